"""What the operators of all methods share: the default product, and gradients from those of W.

A method has two operators over the same `num_packed` stored tensors and the same geometry:

    hf_vq::NAME_dequantize(*packed, in_features, *geometry, dtype) -> W
    hf_vq::NAME_linear(x, *packed, bias, *geometry) -> x @ W.T + bias

The product decodes W, uses it and forgets it; its backward pass decodes again. Only the gradients
of stored tensors need the activations, so they are kept only when one of those is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
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

    torch.library.impl(f"hf_vq::{name}_linear", "CompositeExplicitAutograd", linear)


def register_gradients(name: str, num_packed: int, gradients: Gradients) -> None:
    """Autograd of both operators of method `name`, given how W's gradient reaches the packed."""
    dequantize = getattr(torch.ops.hf_vq, f"{name}_dequantize")

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
            grad_x = grad @ dequantize(*packed, ctx.in_features, *ctx.geometry, ctx.dtype)
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
