"""Codebooks, scales and norms as what an optimizer trains, with the codes as they are.

`make_trainable` gives every packed layer float32 codebooks (or scales) that require grad and
freezes the rest but for the norms; Transformers' Trainer takes the model from there.
`store_trained` rounds what was trained to the precision the layers were stored in, so that the
model saves in the same format, to the byte as large. `hf_vq.tune` (`hf_vq.tuning.distill`) rounds
in every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from hf_vq.formats import FORMATS, LayerSpec
from hf_vq.formats.trainable import trained_names
from hf_vq.layers import PackedLinear
from hf_vq.loading import packed_layers

Module = TypeVar("Module", bound=nn.Module)

_STORED = "_hf_vq_stored"
"""Attribute of a trainable layer that holds what it was made of; the codes are shared with it."""


class Stored(NamedTuple):
    """A packed matrix as it was before training."""

    spec: LayerSpec
    tensors: dict[str, Tensor]


def make_trainable(model: nn.Module, unquantized: bool = False) -> list[str]:
    """Let codebooks, scales and norms of packed layers, and the model's norms, be trained.

    Packed layers are replaced in place by float32 ones with the same codes; every other parameter
    is frozen, but for dense embeddings and linear layers with `unquantized`. Returns the names of
    the parameters that require grad now. Raises ValueError for a model without packed layers. Call
    `store_trained` after training.
    """
    layers = _linears(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no packed layers; quantize it first, or train it as it is"
        )
    model.requires_grad_(False)
    for name, layer in layers.items():
        if not hasattr(layer, _STORED):
            layer = _widened(layer, name)
            model.set_submodule(name, layer)
        for key in trained_names(layer.spec):
            layer.packed()[key].requires_grad_(True)
    for parameter in (*norms(model).values(), *(dense_weights(model) if unquantized else ())):
        parameter.requires_grad_(True)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.trains_codebooks = True
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def store_trained(model: nn.Module) -> None:
    """Round what `make_trainable` has made trainable to how it was stored, in place, and freeze it.

    Changes nothing in layers that are not trainable.
    """
    for name, layer in _linears(model).items():
        stored: Stored | None = getattr(layer, _STORED, None)
        if stored is not None:
            tensors = narrowed(layer)
            bias = None if layer.bias is None else layer.bias.detach()
            new = PackedLinear.from_packed(stored.spec, tensors, bias, layer.compute_dtype, name)
            model.set_submodule(name, with_hook(new.train(layer.training), layer))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.trains_codebooks = False


@torch.no_grad()
def narrowed(layer: PackedLinear, trained: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of a trainable layer as they would be stored; `trained` in place of its own."""
    stored: Stored = getattr(layer, _STORED)
    device = layer.qweight.device
    tensors = {name: tensor.detach() for name, tensor in layer.packed().items()}
    before = {name: tensor.to(device) for name, tensor in stored.tensors.items()}
    values = {**tensors, **(trained or {})}
    return FORMATS[stored.spec.method].narrow(values, before, stored.spec)


def rounded(layer: PackedLinear, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """float32 values of `trained` (name -> values) after a round trip through the stored format."""
    stored: Stored = getattr(layer, _STORED)
    wide, _ = FORMATS[stored.spec.method].widen(narrowed(layer, trained), stored.spec)
    return {name: wide[name] for name in trained}


def stored_spec(layer: PackedLinear) -> LayerSpec:
    """What a layer that `make_trainable` has put into the model will be stored as."""
    stored: Stored = getattr(layer, _STORED)
    return stored.spec


def trainable_linears(model: nn.Module) -> dict[str, PackedLinear]:
    """Name -> layer that `make_trainable` has replaced."""
    return {name: layer for name, layer in _linears(model).items() if hasattr(layer, _STORED)}


def _linears(model: nn.Module) -> dict[str, PackedLinear]:
    """Packed linear layers, but for an output head that shares its codes with the embedding."""
    return {
        name: layer
        for name, layer in packed_layers(model).items()
        if isinstance(layer, PackedLinear) and not getattr(layer, "tied_to", "")
    }


def norms(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> weights and biases of normalisation layers."""
    found = {}
    for name, module in model.named_modules():
        if "norm" in type(module).__name__.lower():
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 1:
                    found[f"{name}.{leaf}"] = parameter
    return found


def dense_weights(model: nn.Module) -> list[nn.Parameter]:
    """Weights of embeddings and linear layers that are not packed; tied ones once."""
    kinds = (nn.Linear, nn.Embedding)
    modules = (m for m in model.modules() if isinstance(m, kinds) and not hasattr(m, "packed"))
    dense: dict[int, Any] = {id(m.weight): m.weight for m in modules}
    return list(dense.values())


def _widened(layer: PackedLinear, name: str) -> PackedLinear:
    tensors = {key: tensor.detach() for key, tensor in layer.packed().items()}
    wide, spec = FORMATS[layer.spec.method].widen(tensors, layer.spec)
    for key in trained_names(spec):
        if wide[key] is tensors.get(key):  # stored as float32: training must not change the record
            wide[key] = wide[key].clone()
    bias = None if layer.bias is None else layer.bias.detach()
    new = PackedLinear.from_packed(spec, wide, bias, layer.compute_dtype, name)
    new.requires_grad_(False)
    object.__setattr__(new, _STORED, Stored(layer.spec, tensors))
    return with_hook(new.train(layer.training), layer)


def with_hook(new: Module, old: nn.Module) -> Module:
    """Accelerate's hook, if any, moves inputs to the layer's device."""
    hook: Any = getattr(old, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, hook)
    return new
