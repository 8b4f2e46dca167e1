"""The "c" backend of the VPTQ operators on CPUs: cpu_vptq.c and what prepares its arguments.

Indices are read as they are stored. Codebooks are brought to float32, entries padded to 4, 8 or 16
numbers, in every call: that is small beside the product for all but the largest.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from hf_vq_kernels import cpu_build
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
from torch import Tensor

FEW_TOKENS = 4
"""Fewer are multiplied one by one."""
HALF_FROM = 2**17
"""Numbers of a codebook from which on float16 is read as it is: in float32, a cache's worth."""


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("indices", ctypes.c_void_p),
        ("books", ctypes.c_void_p),
        ("res_books", ctypes.c_void_p),
        ("half_books", ctypes.c_void_p),
        ("outlier_indices", ctypes.c_void_p),
        ("outlier_books", ctypes.c_void_p),
        ("perm", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("main_bits", ctypes.c_int64),
        ("res_bits", ctypes.c_int64),
        ("entries", ctypes.c_int64),
        ("res_entries", ctypes.c_int64),
        ("vector_dim", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("outliers", ctypes.c_int64),
        ("outlier_dim", ctypes.c_int64),
        ("outlier_width", ctypes.c_int64),
        ("norm_rows", ctypes.c_int64),
    )


def _width(vector_dim: int) -> int:
    return 4 if vector_dim <= 4 else 8 if vector_dim <= 8 else 16


def _padded(book: Tensor | None, vector_dim: int) -> Tensor | None:
    """Codebooks (G, K * vector_dim) as float32 (G, K, width)."""
    if book is None:
        return None
    book = book.detach().to(torch.float32).unflatten(1, (-1, vector_dim))
    return F.pad(book, (0, _width(vector_dim) - vector_dim)).contiguous()


def _plain(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().contiguous()


def _matrix(
    packed: tuple[Any, ...], columns: int, geometry: tuple[Any, ...], one_by_one: bool = False
) -> Any:
    """The structure, and the tensors that it points to; `one_by_one`: for hf_vq_vptq_linear."""
    indices, centroids, res, outlier_indices, outlier_centroids, perm, scale, offset = packed
    rows, vector_dim, outlier_dim, norm_rows = geometry
    outliers = 0
    if outlier_indices is not None and outlier_centroids is not None:
        outliers = outlier_indices.shape[-1]
    if scale is None or offset is None:
        scale = offset = None
    entries = centroids.shape[1] // vector_dim
    res_entries = 0 if res is None else res.shape[1] // vector_dim
    half = (
        one_by_one and centroids.dtype == torch.float16 and vector_dim == 8
        and centroids.shape[1] >= HALF_FROM and cpu_build.library().hf_vq_vptq_half_books()
    )  # fmt: skip
    kept = (
        _plain(indices),
        None if half else _padded(centroids, vector_dim),
        _padded(res, vector_dim),
        _plain(centroids) if half else None,
        _plain(outlier_indices) if outliers else None,
        _padded(outlier_centroids, outlier_dim) if outliers else None,
        _plain(perm),
        floats(scale),
        floats(offset),
    )
    matrix = _Matrix(
        *map(pointer, kept), rows, columns, centroids.shape[0], (entries - 1).bit_length(),
        max(res_entries - 1, 0).bit_length(), entries, res_entries, vector_dim, _width(vector_dim),
        outliers, outlier_dim, _width(outlier_dim), int(norm_rows),
    )  # fmt: skip
    return matrix, kept


def _decode(matrix: _Matrix, first: int, n: int, tile: Tensor) -> None:
    status = cpu_build.library().hf_vq_vptq_decode(
        ctypes.byref(matrix), ctypes.c_int64(first), ctypes.c_int64(n), DTYPES[tile.dtype],
        ctypes.c_void_p(tile.data_ptr()), ctypes.c_int64(torch.get_num_threads()),
    )  # fmt: skip
    check(status, "hf_vq::vptq")


def _linear(x: Tensor, *arguments: Any) -> Tensor:
    packed, bias, geometry = arguments[:8], arguments[8], arguments[9:]
    few = x.numel() // x.shape[-1] < FEW_TOKENS
    matrix, kept = _matrix(packed, x.shape[-1], geometry, few)
    rows = matrix.rows
    if few:
        linear = cpu_build.library().hf_vq_vptq_linear

        def product(*rest: Any) -> int:
            return linear(ctypes.byref(matrix), *rest)

        return few_tokens(product, x, rows, bias)

    y = by_blocks(cpu_build.library().hf_vq_vptq_product, matrix, x, rows, bias)
    del kept  # not before: the structure points to these tensors
    return y


def _dequantize(*arguments: Any) -> Tensor:
    packed, columns, geometry, dtype = arguments[:8], arguments[8], arguments[9:-1], arguments[-1]
    matrix, kept = _matrix(packed, columns, geometry)
    weight = torch.empty((matrix.rows, columns), dtype=dtype)
    step = max(1, 256 // matrix.vector_dim) * matrix.vector_dim
    # of a layer whose weights are still to come, the permutation does not reach every column
    room = torch.zeros(step * columns, dtype=dtype)
    for first in range(0, matrix.rows, step):
        n = min(step, matrix.rows - first)
        tile = room[: n * columns].view(columns, n)
        _decode(matrix, first, n, tile)
        weight[first : first + n] = tile.T
    del kept  # not before: the structure points to these tensors
    return weight


def _refuses(packed: tuple[Any, ...], dtype: torch.dtype, columns: int, v: int) -> str | None:
    indices, centroids, res, outlier_indices, outlier_centroids, perm = packed[:6]
    if (outlier_indices is None) != (outlier_centroids is None):
        return "outliers have indices or a codebook, but not both"
    outliers = 0 if outlier_indices is None else outlier_indices.shape[-1]
    entries = [centroids.shape[1] // v] + ([] if res is None else [res.shape[1] // v])
    bits = sum((n - 1).bit_length() for n in entries)
    width, rest = divmod(columns - outliers, centroids.shape[0])
    if rest or width < 1 or -(-width * bits // 32) != indices.shape[-1]:
        return f"indices of {indices.shape[-1]} words do not describe {columns} columns"
    if bits < 1 or (perm is not None and perm.dtype != torch.int16):
        return "codes of no bits, or a permutation that is not int16"
    return refuses_dtype(dtype)


def _refuses_linear(x: Tensor, *arguments: Any) -> str | None:
    if x.dim() == 0 or x.numel() == 0:
        return "x is empty"
    return _refuses(arguments[:8], x.dtype, x.shape[-1], arguments[10])


def _refuses_dequantize(*arguments: Any) -> str | None:
    return _refuses(arguments[:8], arguments[-1], arguments[8], arguments[10])


BACKENDS = (
    Backend("c", "vptq_linear", ("cpu",), cpu_build.unavailable, _refuses_linear, _linear),
    Backend(
        "c", "vptq_dequantize", ("cpu",), cpu_build.unavailable, _refuses_dequantize, _dequantize
    ),
)
