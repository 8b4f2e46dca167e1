"""What the operators of all methods share: the default product, and gradients from those of W.

A method has two operators over the same `num_packed` stored tensors and the same geometry:

    hf_vq::NAME_dequantize(*packed, in_features, *geometry, dtype) -> W
    hf_vq::NAME_linear(x, *packed, bias, *geometry) -> x @ W.T + bias

and `define_input_gradient` adds one that the backward pass of the second calls,

    hf_vq::NAME_input_gradient(grad, *packed, in_features, *geometry) -> grad @ W

and `register_gradients` the one that gives those of stored tensors, of which `needed` says which,

    hf_vq::NAME_packed_gradients(grad, *packed, x, *geometry, needed) -> [gradient, ...]

The product decodes W, uses it and forgets it; its backward pass decodes again. Only the gradients
of stored tensors need the activations, so they are kept only when one of those is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hf_vq_kernels.dispatch import register_default
from torch import Tensor

# (gradient of W (out, in), which packed tensors need one, packed, geometry) -> theirs, or None
Gradients = Callable[
    [Tensor, tuple[bool, ...], tuple[Any, ...], tuple[Any, ...]], "list[Tensor | None]"
]


def register_product(name: str, num_packed: int) -> None:
    """The default `hf_vq::{name}_linear`: `hf_vq::{name}_dequantize`, then the dense product."""
    dequantize = getattr(torch.ops.hf_vq, f"{name}_dequantize")

    def linear(x: Tensor, *arguments: Any) -> Tensor:
        packed, bias = arguments[:num_packed], arguments[num_packed]
        weight = dequantize(*packed, x.shape[-1], *arguments[num_packed + 1 :], x.dtype)
        # The caller (PackedLinear) has applied autocast already; the result has the dtype of x.
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    register_default(f"{name}_linear", linear)


def define_input_gradient(name: str, num_packed: int, packed: str, geometry: str) -> None:
    """Define `hf_vq::{name}_input_gradient`, given the schemas of the packed and the geometry.

    grad (..., out_features) -> (..., in_features), in the dtype of grad, for which it has a
    gradient itself: that of a linear function, `hf_vq::{name}_linear`.
    """
    torch.library.define(
        f"hf_vq::{name}_input_gradient",
        f"(Tensor grad, {packed}, int in_features, {geometry}) -> Tensor",
    )
    dequantize = getattr(torch.ops.hf_vq, f"{name}_dequantize")
    linear = getattr(torch.ops.hf_vq, f"{name}_linear")

    def default(grad: Tensor, *arguments: Any) -> Tensor:
        with torch.autocast(grad.device.type, enabled=False):
            return grad @ dequantize(*arguments, grad.dtype)

    register_default(f"{name}_input_gradient", default)

    @torch.library.register_fake(f"hf_vq::{name}_input_gradient")
    def fake(grad: Tensor, *arguments: Any) -> Tensor:
        return grad.new_empty((*grad.shape[:-1], arguments[num_packed]))

    def context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1 : num_packed + 1])
        ctx.geometry = inputs[num_packed + 2 :]

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        product = linear(grad, *ctx.saved_tensors, None, *ctx.geometry)
        return (product, *[None] * (num_packed + 1 + len(ctx.geometry)))

    torch.library.register_autograd(
        f"hf_vq::{name}_input_gradient", backward, setup_context=context
    )


def register_gradients(
    name: str,
    num_packed: int,
    packed: str,
    geometry: str,
    trainable: tuple[int, ...],
    gradients: Gradients,
) -> None:
    """Autograd of both operators of method `name`, given how W's gradient reaches the packed.

    Defines `hf_vq::{name}_packed_gradients`, whose default makes W's gradient, in float32, and
    forgets it. `packed`, `geometry`: their schemas; `trainable`: which packed tensors may need a
    gradient. There are no gradients of these gradients.
    """
    torch.library.define(
        f"hf_vq::{name}_packed_gradients",
        f"(Tensor grad, {packed}, Tensor x, {geometry}, bool[] needed) -> Tensor[]",
    )
    input_gradient = getattr(torch.ops.hf_vq, f"{name}_input_gradient")
    packed_gradients = getattr(torch.ops.hf_vq, f"{name}_packed_gradients")

    def default(grad: Tensor, *arguments: Any) -> list[Tensor]:
        stored, x, others = (
            arguments[:num_packed],
            arguments[num_packed],
            arguments[num_packed + 1 :],
        )
        with torch.autocast(grad.device.type, enabled=False):
            tokens = grad.reshape(-1, grad.shape[-1]).float()
            grad_weight = tokens.T @ x.reshape(-1, x.shape[-1]).float()
            found = gradients(grad_weight, tuple(others[-1]), stored, others[:-1])
        return [gradient for gradient in found if gradient is not None]

    register_default(f"{name}_packed_gradients", default)

    @torch.library.register_fake(f"hf_vq::{name}_packed_gradients")
    def fake(grad: Tensor, *arguments: Any) -> list[Tensor]:
        needed = arguments[-1]
        return [t.new_empty(t.shape) for t, n in zip(arguments, needed, strict=False) if n]

    def dequantize_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:num_packed])
        ctx.geometry = inputs[num_packed + 1 : -1]

    def dequantize_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[:num_packed]
        found = gradients(grad, needed, ctx.saved_tensors, ctx.geometry)
        return (*found, None, *[None] * len(ctx.geometry), None)

    def linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, stored, bias = inputs[0], inputs[1 : num_packed + 1], inputs[num_packed + 1]
        ctx.needed = [i in trainable and ctx.needs_input_grad[i + 1] for i in range(num_packed)]
        # Only the gradients of stored tensors look at the activations.
        ctx.save_for_backward(x if any(ctx.needed) else None, *stored)
        ctx.in_features, ctx.dtype = x.shape[-1], x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.geometry = inputs[num_packed + 2 :]

    def linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, *stored = ctx.saved_tensors
        grad_x = grad_bias = None
        grad_packed: list[Tensor | None] = [None] * num_packed
        grad = grad.to(ctx.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = input_gradient(grad, *stored, ctx.in_features, *ctx.geometry)
        if any(ctx.needed):
            found = packed_gradients(grad, *stored, x, *ctx.geometry, ctx.needed)
            for place, gradient in zip(
                [i for i, needed in enumerate(ctx.needed) if needed], found, strict=True
            ):
                grad_packed[place] = gradient
        if ctx.needs_input_grad[num_packed + 1]:
            tokens = grad.flatten(0, -2) if grad.dim() > 1 else grad.unsqueeze(0)
            grad_bias = tokens.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return (grad_x, *grad_packed, grad_bias, *[None] * len(ctx.geometry))

    torch.library.register_autograd(
        f"hf_vq::{name}_dequantize", dequantize_backward, setup_context=dequantize_context
    )
    torch.library.register_autograd(
        f"hf_vq::{name}_linear", linear_backward, setup_context=linear_context
    )
