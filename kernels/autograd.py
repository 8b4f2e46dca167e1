"""What the operators of all methods share: the default product, and gradients from those of W.

A method has two operators over the same `num_packed` stored tensors and the same geometry:

    hf_vq::NAME_dequantize(*packed, in_features, *geometry, dtype) -> W
    hf_vq::NAME_linear(x, *packed, bias, *geometry) -> x @ W.T + bias

and `define_input_gradient` adds one that the backward pass of the second calls,

    hf_vq::NAME_input_gradient(grad, *packed, in_features, *geometry) -> grad @ W

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


def register_gradients(name: str, num_packed: int, gradients: Gradients) -> None:
    """Autograd of both operators of method `name`, given how W's gradient reaches the packed."""
    input_gradient = getattr(torch.ops.hf_vq, f"{name}_input_gradient")

    def dequantize_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:num_packed])
        ctx.geometry = inputs[num_packed + 1 : -1]

    def dequantize_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[:num_packed]
        packed = gradients(grad, needed, ctx.saved_tensors, ctx.geometry)
        return (*packed, None, *[None] * len(ctx.geometry), None)

    def linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, packed, bias = inputs[0], inputs[1 : num_packed + 1], inputs[num_packed + 1]
        ctx.trains_packed = any(ctx.needs_input_grad[1 : num_packed + 1])
        # Only the gradients of stored tensors look at the activations.
        ctx.save_for_backward(x if ctx.trains_packed else None, *packed)
        ctx.in_features, ctx.dtype = x.shape[-1], x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.geometry = inputs[num_packed + 2 :]

    def linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, *packed = ctx.saved_tensors
        grad_x = grad_bias = None
        grad_packed: list[Tensor | None] = [None] * num_packed
        if ctx.needs_input_grad[0]:
            grad_x = input_gradient(grad.to(ctx.dtype), *packed, ctx.in_features, *ctx.geometry)
        tokens = grad.flatten(0, -2) if grad.dim() > 1 else grad.unsqueeze(0)
        if ctx.trains_packed:
            grad_weight = tokens.T.float() @ x.reshape(-1, ctx.in_features).float()
            needed = ctx.needs_input_grad[1 : num_packed + 1]
            grad_packed = gradients(grad_weight, needed, tuple(packed), ctx.geometry)
        if ctx.needs_input_grad[num_packed + 1]:
            grad_bias = tokens.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return (grad_x, *grad_packed, grad_bias, *[None] * len(ctx.geometry))

    torch.library.register_autograd(
        f"hf_vq::{name}_dequantize", dequantize_backward, setup_context=dequantize_context
    )
    torch.library.register_autograd(
        f"hf_vq::{name}_linear", linear_backward, setup_context=linear_context
    )
