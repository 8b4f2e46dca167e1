"""The original's blocks beside those of the packed model made from it, one block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hf_vq.engine.blocks import twin
from hf_vq.layers import Packed, PackedLinear
from hf_vq.tuning.base_weights import BaseWeights

_BASE = ".base_layer"  # PEFT's name for the layer that an adapter stands around


def original_block(name: str, block: nn.Module, weights: BaseWeights) -> nn.Module:
    """Block `name` as the original has it: a copy of `block` without adapters or packed layers.

    Linear layers are read from the original, in the dtype that the packed ones compute in, and so
    is whatever else it has under the same name: norms may have been trained since. What it does not
    have is shared with `block`. Raises ValueError where the weight of a packed layer is missing.
    """
    original = twin(block)
    for short, module in list(original.named_modules()):
        base = getattr(module, "base_layer", module)
        if isinstance(base, nn.Linear) and not short.endswith(_BASE):
            full = f"{name}.{short}"
            if isinstance(base, PackedLinear) or base is not module:
                original.set_submodule(short, _linear(full, base, weights))
    for short, parameter in list(original.named_parameters()):
        found = weights.find(f"{name}.{short}")
        if found is None or found.shape != parameter.shape or not found.is_floating_point():
            continue
        owner, _, leaf = short.rpartition(".")
        value = found.to(parameter.device, parameter.dtype)
        own = nn.Parameter(value, requires_grad=False)  # the other one is the packed model's
        original.get_submodule(owner).register_parameter(leaf, own)
    return original.eval()


def _linear(name: str, base: nn.Linear, weights: BaseWeights) -> nn.Linear:
    packed = isinstance(base, PackedLinear)
    dtype = base.compute_dtype if isinstance(base, PackedLinear) else base.weight.dtype
    device = base.qweight.device if isinstance(base, PackedLinear) else base.weight.device
    bias = weights.find(f"{name}.bias") if packed else base.bias
    linear = nn.Linear(base.in_features, base.out_features, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weights(name).to(device, dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(device, dtype), requires_grad=False)
    return linear


@contextmanager
def original_embeddings(model: nn.Module, weights: BaseWeights) -> Iterator[bool]:
    """Let `model` look tokens up as the original does; gives whether that makes a difference."""
    changed: list[tuple[str, nn.Module]] = []
    try:
        for name, module in list(model.named_modules()):
            if not isinstance(module, nn.Embedding):
                continue
            table = weights.find(f"{name.removesuffix(_BASE)}.weight")
            if table is None or table.shape != (module.num_embeddings, module.embedding_dim):
                continue
            new: Any
            if isinstance(module, Packed):
                new = nn.Embedding(*table.shape, module.padding_idx, device="meta")
                table = table.to(module.qweight.device, module.compute_dtype)
            else:
                table = table.to(module.weight.device, module.weight.dtype)
                if torch.equal(table, module.weight):
                    continue
                new = twin(module)  # it may do more than look up, such as scaling
            new.weight = nn.Parameter(table, requires_grad=False)
            changed.append((name, module))
            model.set_submodule(name, new)
        yield bool(changed)
    finally:
        for name, module in changed:
            model.set_submodule(name, module)
