"""From a packed checkpoint to packed layers, refusing a damaged one before reading it.

Transformers fills what a file lacks with random values and reports it in a table; 5.17 also takes
tensors of any shape for a quantized model. So the files' headers are compared with the specs first.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from hf_vq.configs import VQConfig
from hf_vq.formats import FORMATS, FormatError, LayerSpec
from hf_vq.layers.linear import PackedLinear

logger = logging.getLogger(__name__)

_DTYPES = {
    "torch.int32": "I32",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float32": "F32",
}
_AGAIN = "download it or quantize the model again"


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """Name -> packed layer, in the order of the model's definition."""
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}


def swap_in_empty(model: nn.Module, config: VQConfig, compute_dtype: Any) -> None:
    """Replace the linear layers that `config.layers` lists by empty packed ones on the meta device.

    Names are matched with and without the model's base prefix, because AutoModel's classes have
    none. Raises `FormatError` for a layer listed twice, of another kind, or with a bad description.
    """
    recorded = _recorded(config)
    live = dict(model.named_modules())
    absent = []
    for name, fields in recorded.items():
        here = _live_name(model, name, live)
        if here is None:
            absent.append(name)
            continue
        module = live[here]
        if type(module) is not nn.Linear:
            raise FormatError(
                f"{name}: config.json lists it as packed, but in {type(model).__name__} it is a "
                f"{type(module).__name__}, not a linear layer; the config belongs to another model"
            )
        spec = FORMATS[config.method].make_spec(
            module.out_features, module.in_features, fields, name
        )
        packed = PackedLinear(spec, module.bias is not None, compute_dtype, device="meta")
        model.set_submodule(here, packed)
    if len(absent) == len(recorded):
        raise FormatError(
            f"config.json lists {len(recorded)} packed layers (first: {absent[0]}) and "
            f"{type(model).__name__} has none of them; load it with the class it was saved from"
        )
    if absent:
        logger.warning(
            "%s has no %s and %d more of the packed layers in the checkpoint; they are not loaded",
            type(model).__name__,
            absent[0],
            len(absent) - 1,
        )


def _recorded(config: VQConfig) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for entry in config.layers:
        fields = {k: v for k, v in entry.items() if k != "modules"}
        for name in entry.get("modules", ()):
            if name in out:
                raise FormatError(f"{name}: config.json lists it twice under quantization_config")
            out[name] = fields
    if not out:
        raise FormatError(
            "config.json has a quantization_config but lists no packed layers in it: it is "
            f"damaged; {_AGAIN}"
        )
    return out


def _live_name(model: nn.Module, name: str, live: dict[str, nn.Module]) -> str | None:
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        if candidate in live:
            return candidate
    return None


def verify_files(
    model: nn.Module, files: Iterable[str], rename: Callable[[str], str] = lambda key: key
) -> None:
    """Compare the headers of safetensors files with the packed layers of a model.

    `rename` maps a key in a file to the model's name of that parameter. Raises `FormatError` naming
    layer, file and what to do: for an unreadable or truncated file, a missing or extra tensor, a
    wrong shape or dtype.
    """
    layers = packed_layers(model)
    format_names = {n for layer in layers.values() for n in layer.spec.layout()}
    found: dict[str, set[str]] = {name: set() for name in layers}
    paths = [f for f in files if f.endswith(".safetensors")]
    if not paths:
        return
    for path in paths:
        where = os.path.basename(path)
        for key, shape, dtype in _header(path):
            owner, _, leaf = rename(key).rpartition(".")
            if owner in layers:
                _check_entry(owner, leaf, shape, dtype, layers[owner], where)
                found[owner].add(leaf)
            elif leaf in format_names and owner in _dense_linears(model):
                raise FormatError(
                    f"{owner}: {where} holds {leaf!r} for it, but config.json does not list it as "
                    f"packed; the files belong to different models; {_AGAIN}"
                )
    for name, layer in layers.items():
        wanted = [*layer.spec.layout(), *(["bias"] if layer.bias is not None else [])]
        missing = [leaf for leaf in wanted if leaf not in found[name]]
        if missing:
            names = ", ".join(os.path.basename(p) for p in paths)
            raise FormatError(f"{name}: {missing[0]!r} is missing from {names}; {_AGAIN}")


def _dense_linears(model: nn.Module) -> set[str]:
    return {n for n, m in model.named_modules() if type(m) is nn.Linear}


def _header(path: str) -> list[tuple[str, tuple[int, ...], str]]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = ((key, file.get_slice(key)) for key in file.keys())  # noqa: SIM118
            return [(key, tuple(s.get_shape()), s.get_dtype()) for key, s in slices]
    except OSError as error:
        reason = error.strerror or str(error).partition(":")[0]
        raise FormatError(f"{path} cannot be read ({reason}); {_AGAIN}") from None
    except SafetensorError as error:
        raise FormatError(f"{path} is no complete safetensors file ({error}); {_AGAIN}") from None


def _check_entry(
    name: str, leaf: str, shape: tuple[int, ...], dtype: str, layer: PackedLinear, where: str
) -> None:
    if leaf == "bias" and layer.bias is not None:
        wanted_shape: tuple[int, ...] = (layer.out_features,)
        wanted_dtype = dtype  # a bias takes the model's dtype
    elif leaf in layer.spec.layout():
        layout = layer.spec.layout()[leaf]
        wanted_shape, wanted_dtype = layout.shape, _DTYPES[str(layout.dtype)]
    else:
        raise FormatError(
            f"{name}: {where} holds an extra tensor {leaf!r}, which is no part of a packed layer; "
            f"{_AGAIN}"
        )
    if shape != wanted_shape or dtype != wanted_dtype:
        raise FormatError(
            f"{name}: {leaf!r} in {where} has shape {list(shape)} and dtype {dtype}, but "
            f"config.json describes {list(wanted_shape)} and {wanted_dtype}; the files "
            f"belong to different models or versions; {_AGAIN}"
        )


def finish(model: nn.Module) -> None:
    """Check the values that were loaded and freeze them.

    Transformers rebuilds every floating parameter as a trainable one, so codebooks and scales have
    to be frozen afterwards. Raises `FormatError` for values that cannot be decoded.
    """
    for name, layer in packed_layers(model).items():
        tensors = layer.packed()
        FORMATS[layer.spec.method].check(tensors, layer.spec, name)
        for tensor in tensors.values():
            tensor.requires_grad_(False)


def layer_entries(layers: dict[str, LayerSpec]) -> list[dict[str, Any]]:
    """The `layers` field of a config: modules with equal specs share an entry."""
    entries: dict[str, dict[str, Any]] = {}
    for name, spec in layers.items():
        fields = spec.to_dict()
        entry = entries.setdefault(repr(sorted(fields.items())), {"modules": [], **fields})
        entry["modules"].append(name)
    return list(entries.values())
