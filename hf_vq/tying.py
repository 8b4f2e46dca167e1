"""Packed layers in a model: put in, and made dense again, with tied weights tied before and after.

Transformers says which weights are tied by the names of parameters ("lm_head.weight" is
"model.embed_tokens.weight"). Once the embedding is packed there is no such parameter, so the head
becomes a packed layer that holds the embedding's own tensors, and the names become theirs.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from hf_vq.layers import Packed, PackedEmbedding, PackedLinear


def tied_modules(model: Any) -> dict[str, str]:
    """Module -> the one whose dense weight it shares, whether or not `tie_weights` has run yet."""
    keys: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    ends = [(t.rpartition("."), s.rpartition(".")) for t, s in keys.items()]
    return {t[0]: s[0] for t, s in ends if t[2] == s[2] == "weight"}


def empty_like(
    module: nn.Module, spec: Any, bias: bool, dtype: torch.dtype | None, device: str = "meta"
) -> PackedLinear | PackedEmbedding:
    """A packed layer without values for a dense `nn.Linear` or `nn.Embedding`, or a packed one."""
    if isinstance(module, nn.Embedding):
        return PackedEmbedding(spec, module.padding_idx, dtype, device)
    return PackedLinear(spec, bias, dtype, device)


def swap(model: Any, name: str, layer: Packed) -> None:
    """Put `layer` in the place of the module called `name`, and its twins in those tied to it."""
    model.set_submodule(name, layer.train(model.get_submodule(name).training))
    tied = {n: m for n, m in model.named_modules() if isinstance(m, Packed) and m.tied_to == name}
    dense = [target for target, source in tied_modules(model).items() if source == name]
    for target in [*tied, *dense]:
        old: Any = model.get_submodule(target)
        bias = getattr(old, "bias", None)
        twin = empty_like(old, layer.spec, bias is not None, layer.compute_dtype)
        twin.share(layer, name)
        if bias is not None:
            twin.bias = bias
        model.set_submodule(target, twin.train(old.training))
    if tied or dense:
        _rename(model, [*tied, *dense], name, list(layer.spec.layout()))


def make_dense(model: Any, name: str, dtype: torch.dtype | None = None) -> None:
    """Put a dense layer of `dtype` in the place of the packed one, and in those tied to it."""
    layer: Any = model.get_submodule(name)
    dense = _dense(layer, dtype)
    twins = [n for n, m in model.named_modules() if isinstance(m, Packed) and m.tied_to == name]
    for target in twins:
        old: Any = model.get_submodule(target)
        new = nn.Linear(old.in_features, old.out_features, old.bias is not None, device="meta")
        new.weight = dense.weight
        if old.bias is not None:
            new.bias = old.bias
        model.set_submodule(target, new.train(old.training))
    model.set_submodule(name, dense)
    if twins:
        _rename(model, twins, name, ["weight"])


def _dense(layer: Any, dtype: torch.dtype | None) -> nn.Linear | nn.Embedding:
    if isinstance(layer, PackedEmbedding):
        return layer.to_embedding(dtype)
    return layer.to_linear(dtype)


def _rename(model: Any, targets: list[str], source: str, leaves: list[str]) -> None:
    """Have Transformers know the modules `targets` as tied to `source` by these parameters."""
    keys: dict[str, str] = model.all_tied_weights_keys
    kept = {k: v for k, v in keys.items() if not any(k.startswith(f"{t}.") for t in targets)}
    new = {f"{t}.{leaf}": f"{source}.{leaf}" for t in targets for leaf in leaves}
    model.all_tied_weights_keys = {**kept, **new}
    model.__dict__.pop("_tied_weights_keys", None)
    if leaves != ["weight"]:
        # read as expressions that names begin with; what `tie_weights` starts from when called anew
        model._tied_weights_keys = {
            f"{re.escape(k)}$": f"{re.escape(v)}$" for k, v in model.all_tied_weights_keys.items()
        }
