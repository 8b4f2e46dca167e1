"""What the C backends of all methods share: pointers, and when to multiply by decoded tiles.

A few tokens are multiplied one by one by the packed weight, which reads nothing but the packed
tensors; more by blocks that are decoded into the cache, multiplied there and overwritten
(cpu_product.h). Each format says where the line is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from hf_vq_kernels import cpu_build
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def pointer(tensor: Tensor | None) -> int | None:
    """Address of the first element of a contiguous tensor, for ctypes."""
    return None if tensor is None else tensor.data_ptr()


def plain(tensor: Tensor | None) -> Tensor | None:
    """`tensor` as it is stored, contiguous: something to take the address of."""
    return None if tensor is None else tensor.contiguous()


def floats(tensor: Tensor | None) -> Tensor | None:
    """`tensor` as contiguous float32, itself where it is that already."""
    return None if tensor is None else tensor.detach().to(torch.float32).contiguous()


def own_floats(tensor: Tensor | None) -> Tensor | None:
    """`floats`, but always a copy: what a layout keeps is nothing that is stored."""
    return None if tensor is None else tensor.detach().to(torch.float32, copy=True).contiguous()


def refuses_dtype(dtype: torch.dtype) -> str | None:
    """Why tensors of `dtype` are not computed with; None if they are."""
    return None if dtype in DTYPES else f"it computes in float32, bfloat16 and float16, not {dtype}"


def check(status: int, what: str) -> None:
    """Raise what a C function reports."""
    if status == 2:
        raise RuntimeError(f"{what}: the packed tensors do not fit each other")
    if status:
        raise MemoryError(f"{what}: no memory for work space")


_NUMBER, _ADDRESS = ctypes.c_int64, ctypes.c_void_p


def few_tokens(
    name: str, matrix: ctypes.Structure, x: Tensor, rows: int, bias: Tensor | None
) -> Tensor:
    """x (..., columns) @ W.T + bias without decoding W; summed in float32 and rounded once.

    `name`: of the C function (matrix, dtype, x, bias, y, tokens, threads) of a format.
    """
    x = x.contiguous()
    y = torch.empty((*x.shape[:-1], rows), dtype=x.dtype)
    bias = floats(bias)
    function = cpu_build.function(
        name, _ADDRESS, ctypes.c_int, _ADDRESS, _ADDRESS, _ADDRESS, _NUMBER, _NUMBER
    )
    status = function(
        ctypes.byref(matrix), DTYPES[x.dtype], x.data_ptr(), pointer(bias), y.data_ptr(),
        x.numel() // x.shape[-1], torch.get_num_threads(),
    )  # fmt: skip
    check(status, name)
    return y


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
