"""The "c" backend of the GPTVQ operators on CPUs: cpu_gptvq.c and what prepares its arguments.

It reads the tensors as they are stored; nothing is repacked and nothing kept between calls.
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
    floats,
    pointer,
    refuses_dtype,
)
from hf_vq_kernels.dispatch import Backend
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


def _matrix(packed: tuple[Any, ...], columns: int, geometry: tuple[Any, ...]) -> Any:
    """The structure, and the tensors that it points to."""
    tensors: list[Any] = [None if t is None else t.detach().contiguous() for t in packed]
    indices, codebooks, book_scales, basis, scale_codes, grid = tensors
    vector_dim, k = geometry[:2]
    books8 = books = None
    if codebooks.dtype == torch.int8 and basis is None:
        books8 = codebooks
    elif codebooks.dtype == torch.int32:
        nibbles = unpack_bits(codebooks, 4, k * vector_dim)
        books8 = ((nibbles ^ 8) - 8).to(torch.int8).contiguous()
    else:
        books = expand_codebooks(codebooks, book_scales, basis, k, vector_dim).contiguous()
    scales = None if books is not None else floats(book_scales)
    if scale_codes is None or grid is None or geometry[4] == 0:
        scale_codes = grid = None
        geometry = (*geometry[:4], 0, geometry[5])
    grid = floats(grid)
    kept = (indices, books8, books, scales, scale_codes, grid)
    return _Matrix(*map(pointer, kept), indices.shape[0], columns, *map(int, geometry)), kept


def _decode(matrix: _Matrix, first: int, n: int, tile: Tensor) -> None:
    status = cpu_build.library().hf_vq_gptvq_decode(
        ctypes.byref(matrix), ctypes.c_int64(first), ctypes.c_int64(n), DTYPES[tile.dtype],
        ctypes.c_void_p(tile.data_ptr()), ctypes.c_int64(torch.get_num_threads()),
    )  # fmt: skip
    check(status, "hf_vq::gptvq")


def _linear(x: Tensor, *arguments: Any) -> Tensor:
    packed, bias, geometry = arguments[:6], arguments[6], arguments[7:]
    matrix, kept = _matrix(packed, x.shape[-1], geometry)
    functions = cpu_build.library()
    if x.numel() // x.shape[-1] <= functions.hf_vq_gptvq_most_tokens(ctypes.byref(matrix)):
        # x in 16 bits of each segment's largest entry: far finer than it came in
        planes = 3 if x.dtype == torch.float32 else 2

        def product(x: Any, y: Any, tokens: Any, planes: Any, threads: Any) -> int:
            return functions.hf_vq_gptvq_linear(ctypes.byref(matrix), x, y, tokens, planes, threads)

        y = few_tokens(product, x, matrix.rows, bias, ctypes.c_int(planes))
    else:
        y = by_blocks(functions.hf_vq_gptvq_product, matrix, x, matrix.rows, bias)
    del kept  # not before: the structure points to these tensors
    return y


def _dequantize(*arguments: Any) -> Tensor:
    packed, columns, geometry, dtype = arguments[:6], arguments[6], arguments[7:-1], arguments[-1]
    matrix, kept = _matrix(packed, columns, geometry)
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
