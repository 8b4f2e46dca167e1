"""What the C backends of all methods share: pointers, and when to multiply by decoded tiles.

A few tokens are multiplied one by one by the packed weight, which reads nothing but the packed
tensors; more by blocks that are decoded into the cache, multiplied there and overwritten
(cpu_product.h). Each format says where the line is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FEW_TOKENS = 6


def pointer(tensor: Tensor | None) -> int | None:
    """Address of the first element of a contiguous tensor, for ctypes."""
    return None if tensor is None else tensor.data_ptr()


def floats(tensor: Tensor | None) -> Tensor | None:
    """`tensor` as contiguous float32, itself where it is that already."""
    return None if tensor is None else tensor.detach().to(torch.float32).contiguous()


def refuses_dtype(dtype: torch.dtype) -> str | None:
    """Why tensors of `dtype` are not computed with; None if they are."""
    return None if dtype in DTYPES else f"it computes in float32, bfloat16 and float16, not {dtype}"


def check(status: int, what: str) -> None:
    """Raise what a C function reports."""
    if status == 2:
        raise RuntimeError(f"{what}: the packed tensors do not fit each other")
    if status:
        raise MemoryError(f"{what}: no memory for work space")


def few_tokens(
    function: Callable[..., int], x: Tensor, rows: int, bias: Tensor | None, *rest: Any
) -> Tensor:
    """x (..., columns) @ W.T + bias, one token at a time: function(x, y, tokens, *rest, threads).

    Computed and summed in float32, rounded to the dtype of x once.
    """
    flat = x.detach().reshape(-1, x.shape[-1]).to(torch.float32).contiguous()
    y = torch.empty((flat.shape[0], rows), dtype=torch.float32)
    arguments = [
        ctypes.c_int64(a) if isinstance(a, int) and not isinstance(a, bool) else a for a in rest
    ]
    status = function(
        ctypes.c_void_p(flat.data_ptr()), ctypes.c_void_p(y.data_ptr()),
        ctypes.c_int64(flat.shape[0]), *arguments, ctypes.c_int64(torch.get_num_threads()),
    )  # fmt: skip
    check(status, "few tokens")
    if bias is not None:
        y += bias
    return y.to(x.dtype).view(*x.shape[:-1], rows)


def by_blocks(
    function: Callable[..., int],
    matrix: ctypes.Structure,
    x: Tensor,
    rows: int,
    bias: Tensor | None,
) -> Tensor:
    """x (..., columns) @ W.T + bias by decoded blocks (cpu_product.h), summed in float32.

    `function(matrix, x, y, tokens, dtype, bias, threads)` is the C function of a format.
    """
    flat = x.detach().reshape(-1, x.shape[-1]).contiguous()
    y = torch.empty((flat.shape[0], rows), dtype=x.dtype)
    bias = floats(bias)
    status = function(
        ctypes.byref(matrix), ctypes.c_void_p(flat.data_ptr()), ctypes.c_void_p(y.data_ptr()),
        ctypes.c_int64(flat.shape[0]), DTYPES[x.dtype], ctypes.c_void_p(pointer(bias)),
        ctypes.c_int64(torch.get_num_threads()),
    )  # fmt: skip
    check(status, "many tokens")
    return y.view(*x.shape[:-1], rows)
