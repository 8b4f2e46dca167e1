"""The "c" backend of the GPTVQ operators on CPUs: cpu_gptvq.c and what prepares its arguments.

It reads the tensors as they are stored, but for scales and codebooks that the C code wants in
another type: these are a layout (layouts.py).
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from hf_vq_kernels import cpu_build
from hf_vq_kernels.bits import unpack_bits
from hf_vq_kernels.cpu_common import (
    DTYPES,
    by_blocks,
    check,
    few_tokens,
    own_floats,
    plain,
    pointer,
    refuses_dtype,
)
from hf_vq_kernels.dispatch import Backend
from hf_vq_kernels.layouts import Layouts
from hf_vq_kernels.reference import expand_codebooks
from torch import Tensor


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("indices", ctypes.c_void_p),
        ("books8", ctypes.c_void_p),
        ("books", ctypes.c_void_p),
        ("book_scales", ctypes.c_void_p),
        ("scale_codes", ctypes.c_void_p),
        ("scale_grid", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("vector_dim", ctypes.c_int64),
        ("num_centroids", ctypes.c_int64),
        ("group_rows", ctypes.c_int64),
        ("group_columns", ctypes.c_int64),
        ("scale_block", ctypes.c_int64),
        ("log_scales", ctypes.c_int64),
    )
    tensors: tuple[Tensor | None, ...]
    """What is derived from the packed tensors; pointers to these are set in every call."""


def _nbytes(matrix: _Matrix) -> int:
    return sum(t.nbytes for t in matrix.tensors if t is not None)


LAYOUTS = Layouts(_nbytes)
"""Scales in float32, and codebooks where they are not stored as int8."""


def _build(packed: tuple[Any, ...], columns: int, geometry: tuple[Any, ...]) -> _Matrix:
    """A matrix without the addresses of stored tensors."""
    indices, codebooks, book_scales, basis, scale_codes, grid = packed
    vector_dim, k = geometry[:2]
    books8 = books = None
    with torch.inference_mode(False), torch.no_grad():
        if codebooks.dtype == torch.int32:
            nibbles = unpack_bits(codebooks.detach(), 4, k * vector_dim)
            books8 = ((nibbles ^ 8) - 8).to(torch.int8).contiguous()
        elif codebooks.dtype != torch.int8 or basis is not None:
            books = expand_codebooks(
                *(None if t is None else t.detach() for t in (codebooks, book_scales, basis)),
                k, vector_dim,
            )  # fmt: skip
            books = own_floats(books)
        if scale_codes is None or grid is None:
            geometry = (*geometry[:4], 0, geometry[5])
        tensors = (
            books8,
            books,
            own_floats(book_scales) if books is None else None,
            own_floats(grid) if geometry[4] else None,
        )
    matrix = _Matrix(*(None,) * 6, indices.shape[0], columns, *map(int, geometry))
    matrix.books8, matrix.books, matrix.book_scales, matrix.scale_grid = map(pointer, tensors)
    matrix.tensors = tensors
    return matrix


def _matrix(
    packed: tuple[Any, ...], columns: int, geometry: tuple[Any, ...], keep: bool
) -> tuple[_Matrix, list[Tensor | None]]:
    """The matrix, and the stored tensors that it points to.

    One that is kept is used; a new one is kept where `keep` says so.
    """
    tensors = tuple(t for t in packed if t is not None)
    key = (columns, geometry, packed[1].dtype, tuple(t is None for t in packed))
    matrix = LAYOUTS.find(tensors, key)
    if matrix is None:
        matrix = _build(packed, columns, geometry)
        if keep:
            LAYOUTS.keep(tensors, key, matrix)
    indices, books8, scale_codes = map(plain, (packed[0], packed[1], packed[4]))
    matrix.indices = pointer(indices)
    if matrix.tensors[0] is None and matrix.tensors[1] is None:
        matrix.books8 = pointer(books8)
    matrix.scale_codes = pointer(scale_codes) if matrix.scale_block else None
    return matrix, [indices, books8, scale_codes]


def _decode(matrix: _Matrix, first: int, n: int, tile: Tensor) -> None:
    status = cpu_build.library().hf_vq_gptvq_decode(
        ctypes.byref(matrix), ctypes.c_int64(first), ctypes.c_int64(n), DTYPES[tile.dtype],
        ctypes.c_void_p(tile.data_ptr()), ctypes.c_int64(torch.get_num_threads()),
    )  # fmt: skip
    check(status, "hf_vq::gptvq")


def _linear(x: Tensor, *arguments: Any) -> Tensor:
    packed, bias, geometry = arguments[:6], arguments[6], arguments[7:]
    matrix, kept = _matrix(packed, x.shape[-1], geometry, keep=True)
    functions = cpu_build.library()
    if x.numel() // x.shape[-1] <= functions.hf_vq_gptvq_most_tokens(ctypes.byref(matrix)):
        y = few_tokens("hf_vq_gptvq_linear", matrix, x, matrix.rows, bias)
    else:
        y = by_blocks(functions.hf_vq_gptvq_product, matrix, x, matrix.rows, bias)
    del kept  # not before: the structure points to these tensors
    return y


def _dequantize(*arguments: Any) -> Tensor:
    packed, columns, geometry, dtype = arguments[:6], arguments[6], arguments[7:-1], arguments[-1]
    matrix, kept = _matrix(packed, columns, geometry, keep=False)
    weight = torch.empty((matrix.rows, columns), dtype=dtype)
    _decode(matrix, 0, matrix.rows, weight)
    del kept  # not before: the structure points to these tensors
    return weight


def _refuses(indices: Tensor, dtype: torch.dtype, columns: int, d: int, k: int) -> str | None:
    words = ((columns + d - 1) // d * (k - 1).bit_length() + 31) // 32
    if indices.shape[-1] != words:
        return f"indices of {indices.shape[-1]} words do not describe {columns} columns"
    return refuses_dtype(dtype)


def _refuses_linear(x: Tensor, *arguments: Any) -> str | None:
    if x.dim() == 0 or x.numel() == 0:
        return "x is empty"
    return _refuses(arguments[0], x.dtype, x.shape[-1], *arguments[7:9])


def _refuses_dequantize(*arguments: Any) -> str | None:
    return _refuses(arguments[0], arguments[-1], *arguments[6:9])


BACKENDS = (
    Backend("c", "gptvq_linear", ("cpu",), cpu_build.unavailable, _refuses_linear, _linear),
    Backend(
        "c", "gptvq_dequantize", ("cpu",), cpu_build.unavailable, _refuses_dequantize, _dequantize
    ),
)
