"""Codes that move while codebooks are trained, after PV-Tuning (arXiv 2405.14852, section 3).

A gradient with respect to a code does not exist, one with respect to the weight that it stands for
does. So while codes are trained, packed layers are replaced by dense ones that hold what is decoded
from them; their gradient gives those of the codebooks, and moves, by Adam, a *wish* per weight: the
decoded value and what recent steps would have added to it. Where a wish has come nearer to another
centroid than to its own, the code is changed, but only a small share of all codes at a time, those
that bring the weights nearest to what is wished. Wishes fade, so that noise, which has no
direction, never gets as far as another centroid.

This takes five values per weight (the weight, its gradient, the wish and Adam's two moments).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_vq.formats import FORMATS
from hf_vq.formats.trainable import trained_names
from hf_vq.layers import PackedLinear
from hf_vq.tuning.codebooks import stored_spec, trainable_linears, with_hook

# Of 2^-bits root mean squares of the weights, which is about the distance between neighbours, per
# step, at the peak of the schedule.
_LEARNING_RATE = 0.1
# What is left of a wish after a step.
_FADING = 0.995
_BETAS = (0.9, 0.95)
# Steps from one change of codes to the next: looking for nearer centroids takes as long as a step.
_EVERY = 4


class Decoded(nn.Module):
    """Computes with the weight of a packed layer, dense and with a gradient."""

    layer: PackedLinear

    def __init__(self, layer: PackedLinear):
        super().__init__()
        object.__setattr__(self, "layer", layer)  # no submodule: its tensors are not this one's
        # `tune` runs in float32 on the CPU, whatever the model's dtype
        dtype = torch.float32 if layer.qweight.device.type == "cpu" else layer.compute_dtype
        self.weight = nn.Parameter(layer.dequantize(dtype).detach().clone())
        self.bias = layer.bias

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return F.linear(input, self.weight, self.bias)


class CodeMover:
    """Stands between a model and its packed layers, from its construction to `restore`."""

    def __init__(self, model: nn.Module, share: float):
        """model: after `make_trainable`. share: of all codes that a step may change, at most."""
        self.model, self.share = model, share
        self.layers: dict[str, Decoded] = {}
        self.wishes: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.rates: dict[str, float] = {}
        self.steps = self.changed = 0
        for name, layer in trainable_linears(model).items():
            if FORMATS[layer.spec.method].nearest is None:
                continue
            dense = Decoded(layer).train(layer.training)
            model.set_submodule(name, with_hook(dense, layer))
            self.layers[name] = dense
            self.rates[name] = _LEARNING_RATE * 2.0 ** -stored_spec(layer).bits_per_weight
            weight = dense.weight.detach().float()
            zeros = torch.zeros_like(weight)
            self.wishes[name] = (zeros, zeros.clone(), zeros.clone())

    def restore(self) -> None:
        """Put the packed layers back."""
        for name, dense in self.layers.items():
            self.model.set_submodule(name, dense.layer)

    def spread(self) -> None:
        """Give the layers' codebooks the gradients that follow from those of the weights."""
        for dense in self.layers.values():
            if dense.weight.grad is None:  # an expert that no token was sent to
                continue
            live = [dense.layer.packed()[key] for key in trained_names(dense.layer.spec)]
            weight = dense.layer.dequantize(torch.float32)
            gradients = torch.autograd.grad(weight, live, dense.weight.grad.float())
            for tensor, gradient in zip(live, gradients, strict=True):
                tensor.grad = gradient

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move wishes and codes; after the codebooks have moved.

        rate: what the schedule leaves of the learning rate.
        """
        self.steps += 1
        for name, dense in self.layers.items():
            layer: PackedLinear = dense.layer
            if dense.weight.grad is None:
                continue
            wish, mean, square = self.wishes[name]
            gradient = dense.weight.grad.float()
            dense.weight.grad = None
            mean.lerp_(gradient, 1 - _BETAS[0])
            square.lerp_(gradient.square(), 1 - _BETAS[1])
            size = (square / (1 - _BETAS[1] ** self.steps)).sqrt_().add_(1e-20)
            direction = mean / size / (1 - _BETAS[0] ** self.steps)
            weight = layer.dequantize(torch.float32)
            scale = rate * self.rates[name] * float(weight.square().mean().sqrt())
            # on from the decoded weights, wherever the codebooks' own step has taken them
            wish.mul_(_FADING).sub_(direction, alpha=scale)
            if self.steps % _EVERY == 0:
                weight = self._grant(layer, weight, wish)
            dense.weight.copy_(weight)

    def _grant(self, layer: PackedLinear, weight: Tensor, wish: Tensor) -> Tensor:
        """Change codes, take from `wish` what it has been given, and return the new weights."""
        nearest = FORMATS[layer.spec.method].nearest
        assert nearest is not None
        share = min(1.0, _EVERY * self.share)
        tensors, changed = nearest(weight + wish, layer.packed(), layer.spec, share)
        if not changed:
            return weight
        for key, tensor in tensors.items():
            layer.packed()[key].copy_(tensor)
        after = layer.dequantize(torch.float32)
        wish.add_(weight - after)
        self.changed += changed
        return after

    def state(self) -> list[Tensor]:
        """All codes, as they are packed."""
        return [tensor.clone() for tensor in self._codes()]

    @torch.no_grad()
    def load(self, state: list[Tensor]) -> None:
        """Back to `state`; after the codebooks."""
        for tensor, value in zip(self._codes(), state, strict=True):
            tensor.copy_(value)
        for dense in self.layers.values():
            dense.weight.copy_(dense.layer.dequantize())

    def _codes(self) -> list[Tensor]:
        return [
            tensor
            for dense in self.layers.values()
            for tensor in dense.layer.packed().values()
            if not tensor.is_floating_point()
        ]
