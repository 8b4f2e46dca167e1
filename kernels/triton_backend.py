"""The Triton backend of every method: which kernel computes how many tokens.

1 to 4 tokens: the method's `decode` (elementwise, one launch for most matrices). More: `product`,
tiles of weights into tensor cores. From `DENSE_FROM` tokens on: the weight is decoded once, into
the dtype of the activations, and multiplied by the vendor's library, which then wins: tiles would
be decoded again for every 128 tokens. Gradients of codebooks and scales: triton_gradients.py; rows
of tables: triton_embedding.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
from hf_vq_kernels.dispatch import Backend, forced_backend
from hf_vq_kernels.triton_common import devices
from hf_vq_kernels.triton_embedding import embedding
from hf_vq_kernels.triton_product import Matrix, dequantize, product, transposed_product
from torch import Tensor

DECODE_UP_TO = 4
"""Tokens that `decode` computes; its kernels keep a sum per row and token in registers."""

DENSE_FROM = {"gptvq": 257, "vptq": 257, "cvxq": 129}
"""Tokens from which a dense weight is made, for 16-bit activations. A guess from instruction
counts, not measured: `python benchmarks/gpu.py` measures where the lines cross."""

DENSE_FROM_FLOAT32 = 33
"""The same for float32, whose tiles no tensor core multiplies exactly."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)

Decode = Callable[[Tensor, Matrix, "Tensor | None"], Tensor]
Gradients = Callable[
    [Tensor, Tensor, "tuple[Tensor | None, ...]", "tuple[Any, ...]", "tuple[bool, ...]"],
    "list[Tensor | None]",
]


def _unavailable() -> str | None:
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 6):
        return f"the kernels need triton >= 3.6, this is {triton.__version__}"
    return None


def _not_here(tensor: Tensor) -> str | None:
    """Why not on the device of `tensor`, which is one of `devices()`."""
    if tensor.device.type == "cpu":
        if forced_backend() != "triton":
            return "Triton's interpreter is slow, and computes only where it is demanded"
    elif tensor.device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(tensor.device)
        if capability < (8, 0):
            return f"the kernels need compute capability 8.0, this is {capability}"
    return None


def backends(
    name: str,
    num_packed: int,
    matrix: Callable[..., Matrix],
    decode: Decode,
    check: Callable[..., str | None],
    gradients: Gradients,
    arrange: Callable[[Tensor, Matrix], tuple[Tensor, Matrix]] | None = None,
    by_row: Callable[[Matrix], Matrix] | None = None,
) -> tuple[Backend, ...]:
    """The backends of all operators of method `name`.

    `matrix(*packed, in_features, *geometry)`; `check` of the same says what is wrong with them;
    `gradients(grad, x, packed, geometry, needed)`: those of the packed tensors;
    `arrange(x, matrix)` brings activations (tokens, in_features) into the stored order, and
    `by_row(matrix)` the matrix into the form that its `some_rows` reads.
    """

    def why_not(values: Tensor, dtype: torch.dtype, arguments: tuple[Any, ...]) -> str | None:
        if dtype not in _FLOATS:
            return f"the kernels compute in float16, bfloat16 and float32, not in {dtype}"
        for tensor in arguments[:num_packed]:
            if tensor is None:
                continue
            if tensor.device != values.device:
                return f"packed tensors are on {tensor.device}, activations on {values.device}"
            if not tensor.is_contiguous() or tensor.dtype == torch.float64:
                return "packed tensors are not contiguous, or float64"
        return _not_here(values) or check(*arguments)

    def linear(x: Tensor, *arguments: Any) -> Tensor:
        packed, bias, geometry = (
            arguments[:num_packed], arguments[num_packed], arguments[num_packed + 1 :],
        )  # fmt: skip
        tokens = x.reshape(-1, x.shape[-1]).contiguous()
        weight = matrix(*packed, x.shape[-1], *geometry)
        count = tokens.shape[0]
        if count == 0:
            out = x.new_empty((0, weight.out_features))
        elif count <= DECODE_UP_TO:
            out = decode(tokens, weight, bias)
        elif count < _dense_from(name, x.dtype):
            if arrange is not None:
                tokens, weight = arrange(tokens, weight)
            out = product(tokens, weight, bias)
        else:
            bias = None if bias is None else bias.to(x.dtype)
            with torch.autocast(x.device.type, enabled=False):
                out = F.linear(tokens, dequantize(weight, x.dtype), bias)
        return out.view(*x.shape[:-1], weight.out_features)

    def linear_refuses(x: Tensor, *arguments: Any) -> str | None:
        packed, geometry = arguments[:num_packed], arguments[num_packed + 1 :]
        bias = arguments[num_packed]
        if bias is not None and not bias.is_contiguous():
            return "the bias is not contiguous"
        return why_not(x, x.dtype, (*packed, x.shape[-1], *geometry))

    def input_gradient(grad: Tensor, *arguments: Any) -> Tensor:
        weight = matrix(*arguments)
        tokens = grad.reshape(-1, grad.shape[-1]).contiguous()
        count = tokens.shape[0]
        if count == 0:
            out = grad.new_empty((0, weight.in_features))
        elif count < _dense_from(name, grad.dtype):
            out = transposed_product(tokens, weight)
        else:
            out = tokens @ dequantize(weight, grad.dtype)
        return out.view(*grad.shape[:-1], weight.in_features)

    def gradient_refuses(grad: Tensor, *arguments: Any) -> str | None:
        return why_not(grad, grad.dtype, arguments)

    def packed_gradients(grad: Tensor, *arguments: Any) -> list[Tensor]:
        packed, x = arguments[:num_packed], arguments[num_packed]
        geometry, needed = arguments[num_packed + 1 : -1], tuple(arguments[-1])
        tokens = grad.reshape(-1, grad.shape[-1]).contiguous()
        if tokens.shape[0] == 0:
            return [torch.zeros_like(t) for t, n in zip(packed, needed, strict=True) if n]
        x = x.reshape(-1, x.shape[-1]).contiguous()
        with torch.autocast(grad.device.type, enabled=False):
            found = gradients(tokens, x, packed, geometry, needed)
        return [gradient for gradient in found if gradient is not None]

    def packed_gradients_refuses(grad: Tensor, *arguments: Any) -> str | None:
        packed, x = arguments[:num_packed], arguments[num_packed]
        geometry = arguments[num_packed + 1 : -1]
        if x.dtype != grad.dtype:
            return f"activations are {x.dtype}, their gradients {grad.dtype}"
        return why_not(grad, grad.dtype, (*packed, x.shape[-1], *geometry))

    def rows(ids: Tensor, *arguments: Any) -> Tensor:
        weight = matrix(*arguments[:-1])
        if by_row is not None:
            weight = by_row(weight)
        found = embedding(ids.flatten().contiguous(), weight, arguments[-1])
        return found.view(*ids.shape, weight.in_features)

    def rows_refuses(ids: Tensor, *arguments: Any) -> str | None:
        return why_not(ids, arguments[-1], arguments[:-1])

    def dense(*arguments: Any) -> Tensor:
        return dequantize(matrix(*arguments[:-1]), arguments[-1])

    def dense_refuses(*arguments: Any) -> str | None:
        return why_not(arguments[0], arguments[-1], arguments[:-1])

    table = {
        "linear": (linear_refuses, linear),
        "dequantize": (dense_refuses, dense),
        "input_gradient": (gradient_refuses, input_gradient),
        "packed_gradients": (packed_gradients_refuses, packed_gradients),
        "embedding": (rows_refuses, rows),
    }
    return tuple(
        Backend("triton", f"{name}_{operator}", devices(), _unavailable, refuses, run)
        for operator, (refuses, run) in table.items()
    )


def _dense_from(name: str, dtype: torch.dtype) -> int:
    return DENSE_FROM_FLOAT32 if dtype == torch.float32 else DENSE_FROM[name]
