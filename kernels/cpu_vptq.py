"""The "c" backend of the VPTQ operators on CPUs: cpu_vptq.c and what prepares its arguments.

Indices are read as they are stored. Codebooks are brought to what the C code computes with: for a
few tokens in bfloat16 or float16, where the processor suits, to integers of 16 bits
(cpu_vptq_vnni.h), else to float32, entries padded to 4, 8 or 16 numbers. What a few tokens need is
a layout (layouts.py); for many it is made in every call, which is small beside the product.
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
    own_floats,
    plain,
    pointer,
    refuses_dtype,
)
from hf_vq_kernels.dispatch import Backend
from hf_vq_kernels.layouts import Layouts
from torch import Tensor

FEW_FLOAT = 3
"""Up to so many tokens are multiplied one by one where entries are not integers."""
HALF_FROM = 2**17
"""Numbers of a codebook from which on float16 is read as it is: in float32, a cache's worth."""


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("indices", ctypes.c_void_p),
        ("books", ctypes.c_void_p),
        ("res_books", ctypes.c_void_p),
        ("half_books", ctypes.c_void_p),
        ("books16", ctypes.c_void_p),
        ("res_books16", ctypes.c_void_p),
        ("units16", ctypes.c_void_p),
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
        ("width16", ctypes.c_int64),
        ("outliers", ctypes.c_int64),
        ("outlier_dim", ctypes.c_int64),
        ("outlier_width", ctypes.c_int64),
        ("norm_rows", ctypes.c_int64),
    )
    tensors: tuple[Tensor | None, ...]
    """What is derived from the packed tensors; pointers to these are set in every call."""


def _nbytes(matrix: _Matrix) -> int:
    return sum(t.nbytes for t in matrix.tensors if t is not None)


LAYOUTS = Layouts(_nbytes)
"""Codebooks as a few tokens need them: 16 bytes per entry as integers, 8 where entries have 4
numbers or fewer; and norms in float32."""


def _width(vector_dim: int) -> int:
    return 4 if vector_dim <= 4 else 8 if vector_dim <= 8 else 16


def _padded(book: Tensor | None, vector_dim: int) -> Tensor | None:
    """Codebooks (G, K * vector_dim) as float32 (G, K, width)."""
    if book is None:
        return None
    book = book.detach().to(torch.float32).unflatten(1, (-1, vector_dim))
    return F.pad(book, (0, _width(vector_dim) - vector_dim)).contiguous()


def _integers(book: Tensor, unit: Tensor, vector_dim: int, middle: int) -> Tensor:
    """Codebooks (G, K * vector_dim) in units (G,): int16 (G, K, 4 or 8), plus `middle`."""
    book = book.detach().to(torch.float32).unflatten(1, (-1, vector_dim))
    codes = (book / unit[:, None, None]).round().to(torch.int32) + middle
    codes = F.pad(codes, (0, (4 if vector_dim <= 4 else 8) - vector_dim))
    return (codes & 0xFFFF).to(torch.uint16).view(torch.int16).contiguous()


def _books16(centroids: Tensor, res: Tensor | None, vector_dim: int) -> tuple[Tensor | None, ...]:
    """What cpu_vptq_vnni.h reads: main and residual entries in a unit per group, and the units."""
    largest = centroids.detach().float().abs().amax(1)
    if res is not None:
        largest = largest + res.detach().float().abs().amax(1)
    # one less than 2**15: two entries are rounded. Without a largest entry any unit is right
    unit = torch.where(largest > 0, largest / 32766, torch.ones_like(largest))
    second = None if res is None else _integers(res, unit, vector_dim, 0)
    return _integers(centroids, unit, vector_dim, 2**15), second, unit.contiguous()


def _build(
    packed: tuple[Any, ...], columns: int, geometry: tuple[Any, ...], few: bool, integers: bool
) -> _Matrix:
    """A matrix without the addresses of stored tensors.

    few: for hf_vq_vptq_linear; integers: for the way of cpu_vptq_vnni.h there.
    """
    _, centroids, res, outlier_indices, outlier_centroids, _, scale, offset = packed
    rows, vector_dim, outlier_dim, norm_rows = geometry
    entries = centroids.shape[1] // vector_dim
    res_entries = 0 if res is None else res.shape[1] // vector_dim
    outliers = 0 if outlier_indices is None else outlier_indices.shape[-1]
    with torch.inference_mode(False), torch.no_grad():
        if integers:
            books: tuple[Tensor | None, ...] = (None, None, *_books16(centroids, res, vector_dim))
        else:
            half = few and _reads_halves(centroids, vector_dim)
            main = None if half else _padded(centroids, vector_dim)
            books = (main, _padded(res, vector_dim), None, None, None)
        tensors = (
            *books,
            _padded(outlier_centroids, outlier_dim) if outliers else None,
            None if offset is None else own_floats(scale),
            None if scale is None else own_floats(offset),
        )
    matrix = _Matrix(
        *(None,) * 12, rows, columns, centroids.shape[0], (entries - 1).bit_length(),
        max(res_entries - 1, 0).bit_length(), entries, res_entries, vector_dim, _width(vector_dim),
        4 if vector_dim <= 4 else 8, outliers, outlier_dim, _width(outlier_dim), int(norm_rows),
    )  # fmt: skip
    matrix.books, matrix.res_books, matrix.books16, matrix.res_books16 = map(pointer, tensors[:4])
    matrix.units16, matrix.outlier_books, matrix.scale, matrix.offset = map(pointer, tensors[4:])
    matrix.tensors = tensors
    return matrix


def _reads_halves(centroids: Tensor, vector_dim: int) -> bool:
    return bool(
        centroids.dtype == torch.float16 and vector_dim == 8 and centroids.shape[1] >= HALF_FROM
        and cpu_build.library().hf_vq_vptq_half_books()
    )  # fmt: skip


def _matrix(
    packed: tuple[Any, ...],
    columns: int,
    geometry: tuple[Any, ...],
    few: bool = False,
    integers: bool = False,
) -> tuple[_Matrix, list[Tensor | None]]:
    """The matrix, and the stored tensors that it points to. One of a few tokens is kept."""
    matrix = None
    if few:
        tensors = tuple(t for t in packed if t is not None)
        key = (columns, geometry, integers, len(tensors), packed[1].dtype)
        matrix = LAYOUTS.find(tensors, key)
    if matrix is None:
        matrix = _build(packed, columns, geometry, few, integers)
        if few:
            LAYOUTS.keep(tensors, key, matrix)
    stored = [plain(packed[i]) for i in (0, 1, 3, 5)]
    indices, centroids, outlier_indices, perm = stored
    matrix.indices = pointer(indices)
    halves = matrix.books is None and matrix.books16 is None
    matrix.half_books = pointer(centroids) if halves else None
    matrix.outlier_indices = pointer(outlier_indices) if matrix.outliers else None
    matrix.perm = pointer(perm)
    return matrix, stored


def _decode(matrix: _Matrix, first: int, n: int, tile: Tensor) -> None:
    status = cpu_build.library().hf_vq_vptq_decode(
        ctypes.byref(matrix), ctypes.c_int64(first), ctypes.c_int64(n), DTYPES[tile.dtype],
        ctypes.c_void_p(tile.data_ptr()), ctypes.c_int64(torch.get_num_threads()),
    )  # fmt: skip
    check(status, "hf_vq::vptq")


def _few(x: Tensor, vector_dim: int, residual: bool) -> tuple[int, bool]:
    """Up to how many tokens not to decode the weight is faster, and whether that is in integers."""
    most = 0
    if x.dtype != torch.float32:
        function = cpu_build.function("hf_vq_vptq_most_tokens16", ctypes.c_int64, ctypes.c_int)
        most = function(vector_dim, residual)
    return most or FEW_FLOAT, most > 0


def _linear(x: Tensor, *arguments: Any) -> Tensor:
    packed, bias, geometry = arguments[:8], arguments[8], arguments[9:]
    most, integers = _few(x, geometry[1], packed[2] is not None)
    few = x.numel() // x.shape[-1] <= most
    matrix, kept = _matrix(packed, x.shape[-1], geometry, few, few and integers)
    if few:
        y = few_tokens("hf_vq_vptq_linear", matrix, x, matrix.rows, bias)
    else:
        product = cpu_build.library().hf_vq_vptq_product
        y = by_blocks(product, matrix, x, matrix.rows, bias)
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
