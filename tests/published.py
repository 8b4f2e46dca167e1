"""Checkpoints as the official VPTQ package has published them, small and with random codes."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from hf_vq.formats import vptq
from hf_vq.formats.vptq import VPTQSpec
from hf_vq.layers.linear import PackedLinear
from tests.helpers_vptq import random_vptq
from tests.models import tiny

LAYER = {
    "vector_lens": [-1, 6],
    "num_centroids": [-1, 16],
    "num_res_centroids": [-1, -1],
    "group_num": 1,
    "outlier_size": 0,
    "enable_norm": False,
    "enable_perm": False,
    "is_indice_packed": True,
    "indices_as_float": False,
}
"""The keys of an entry, shape, group size and bias apart."""
VARIETY: dict[str, dict[str, Any]] = {
    "q_proj": {"enable_norm": True, "enable_perm": True, "num_res_centroids": [-1, 4]},
    "k_proj": {"vector_lens": [4, 8], "num_centroids": [32, 64], "outlier_size": 3},
    "v_proj": {"group_num": 4, "enable_perm": True},
    "o_proj": {"enable_norm": True, "norm_dim": 1, "num_centroids": [-1, 4096]},
    "gate_proj": {"num_res_centroids": [-1, 0], "enable_norm": True, "norm_dim": 0},
    "up_proj": {"num_res_centroids": [-1, 64], "enable_proxy_error": False},
    "down_proj": {"vector_lens": [3, 5], "num_centroids": [8, 2], "outlier_size": 10,
                  "group_num": 3, "enable_perm": True, "enable_norm": True},
}  # fmt: skip
"""One of everything that published files do, by the last component of a layer's name."""


def spec_of(entry: dict[str, Any], dtype: str) -> VPTQSpec:
    """What an entry says, read another way than `hf_vq` does."""
    (v0, v), (k0, k), (_, r) = (
        entry[n] for n in ("vector_lens", "num_centroids", "num_res_centroids")
    )
    norm = ("columns", "rows")[entry.get("norm_dim", 0)] if entry["enable_norm"] else "none"
    storage = "float16" if entry["indices_as_float"] else "int16"
    return VPTQSpec(
        entry["out_features"],
        entry["in_features"],
        v,
        k,
        r if r > 0 else 0,
        entry["group_num"],
        entry["outlier_size"],
        v0 if v0 > 0 else 0,
        k0 if k0 > 0 else 0,
        norm,
        entry["enable_perm"],
        dtype,
        "packed" if entry["is_indice_packed"] else storage,
    )


def decoded(spec: VPTQSpec, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The dense float32 weight."""
    tensors, spec = vptq.modernize(tensors, spec)
    return PackedLinear.from_packed(spec, tensors).dequantize(torch.float32)


def publish(
    folder: Path,
    kind: str = "llama",
    *,
    dtype: torch.dtype = torch.float16,
    codebook_dtype: str = "float16",
    model: Any = None,
    **changes: Any,
) -> tuple[dict[str, dict[str, Any]], dict[str, torch.Tensor]]:
    """Write the tensors and a dense config.json of a model whose blocks are all packed.

    changes: to every entry, besides those of `VARIETY`. Returns what goes into the config, {module:
    entry}, and the dense float32 weights, {module: weight}.
    """
    model = tiny(kind, dtype) if model is None else model
    entries, dense = {}, {}
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    for seed, (name, module) in enumerate(model.named_modules()):
        leaf = name.rpartition(".")[2]
        if type(module) is not nn.Linear or leaf not in VARIETY or "vision" in name:
            continue
        entry = {**LAYER, **VARIETY[leaf], **changes, "bias": module.bias is not None}
        shape = {"in_features": module.in_features, "out_features": module.out_features}
        entry = {**shape, **entry}
        # what does not divide is left to the outliers, as the official quantizer does
        rest = entry["in_features"] - entry["outlier_size"]
        if rest % entry["group_num"]:
            entry["group_num"] = 1
        entry["group_size"] = rest // entry["group_num"]
        spec = spec_of(entry, codebook_dtype)
        parts = vptq.pack(small(random_vptq(spec, seed), spec), spec)
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{part}": value for part, value in parts.items()}
        entries[name], dense[name] = entry, decoded(spec, parts)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = copy.deepcopy(model.config).to_dict()
    config |= {"architectures": [type(model).__name__], "torch_dtype": str(dtype)[6:]}
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    return entries, dense


def small(codes: vptq.VPTQCodes, spec: VPTQSpec) -> vptq.VPTQCodes:
    """Weights of random codes are near 1, which would saturate the attention."""
    centroids = {"centroids": codes.centroids / 32}
    for name in ("res_centroids", "outlier_centroids", "bias"):
        value = getattr(codes, name)
        centroids[name] = None if value is None else value / 32
    return replace(codes, **centroids)


def edit_config(folder: Path, **keys: Any) -> None:
    """Set keys of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def stored(folder: Path) -> dict[str, Any]:
    """The quantization_config in a folder."""
    return json.loads((folder / "config.json").read_text())["quantization_config"]
