"""GPTVQ for the Triton kernels that all methods share: tiles, rows, sums of gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from hf_vq_kernels.ops import stored_gradients
from hf_vq_kernels.reference import expand_codebooks
from hf_vq_kernels.triton_common import read_codes
from hf_vq_kernels.triton_gradients import add_fixed, sum_gradients
from hf_vq_kernels.triton_product import Matrix
from torch import Tensor


@triton.jit
def _row_numbers(packed, GEOMETRY: tl.constexpr, row_tile, ROWS: tl.constexpr):
    return row_tile * ROWS + tl.arange(0, ROWS)


@triton.jit
def _column_numbers(packed, GEOMETRY: tl.constexpr, column_tile, COLUMNS: tl.constexpr):
    return column_tile * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def scale_of(scale_codes, scale_grid, row, block, inside, BLOCKS: tl.constexpr, LOG: tl.constexpr):
    """Scales of (row, block of columns), float32; row is an int64 column, block broadcasts."""
    words: tl.constexpr = (BLOCKS + 7) // 8
    code = read_codes(scale_codes, row * words, block, inside, 4).to(tl.float32)
    known = block < BLOCKS
    offset = tl.load(scale_grid + block, mask=known, other=0.0).to(tl.float32)
    step = tl.load(scale_grid + BLOCKS + block, mask=known, other=0.0).to(tl.float32)
    scale = offset + step * code
    if LOG:
        scale = tl.exp2(scale)
    return scale


@triton.jit
def _places(packed, GEOMETRY: tl.constexpr, row, vector, inside):
    """Codebook and code of vectors `vector` of rows `row`, int32, which broadcast."""
    OUT: tl.constexpr = GEOMETRY[0]
    IN: tl.constexpr = GEOMETRY[1]
    DIM: tl.constexpr = GEOMETRY[2]
    BITS: tl.constexpr = GEOMETRY[4]
    GROUP_ROWS: tl.constexpr = GEOMETRY[5]
    GROUP_VECTORS: tl.constexpr = GEOMETRY[6]
    vectors: tl.constexpr = (IN + DIM - 1) // DIM
    words: tl.constexpr = (vectors * BITS + 31) // 32
    groups: tl.constexpr = (OUT + GROUP_ROWS - 1) // GROUP_ROWS
    code = read_codes(packed[0], row.to(tl.int64) * words, vector, inside, BITS).to(tl.int32)
    return (vector // GROUP_VECTORS) * groups + row // GROUP_ROWS, code


@triton.jit
def _scale_vectors(values, packed, GEOMETRY: tl.constexpr, row, vector, inside):
    """values (rows, vectors, entries) times the scale of the block of columns of each vector."""
    IN: tl.constexpr = GEOMETRY[1]
    DIM: tl.constexpr = GEOMETRY[2]
    SCALE_VECTORS: tl.constexpr = GEOMETRY[7]
    LOG: tl.constexpr = GEOMETRY[8]
    if packed[3] is not None:
        vectors: tl.constexpr = (IN + DIM - 1) // DIM
        BLOCKS: tl.constexpr = (vectors + SCALE_VECTORS - 1) // SCALE_VECTORS
        block = vector // SCALE_VECTORS
        scale = scale_of(packed[3], packed[4], row.to(tl.int64), block, inside, BLOCKS, LOG)
        values *= scale[:, :, None]
    return values


@triton.jit
def _some_rows(packed, GEOMETRY: tl.constexpr, row, column_tile, COLUMNS: tl.constexpr):
    """A tile of any rows (n,) of the matrix; zeros for numbers that are no rows."""
    _, books, book_scales, _, _ = packed
    OUT: tl.constexpr = GEOMETRY[0]
    IN: tl.constexpr = GEOMETRY[1]
    DIM: tl.constexpr = GEOMETRY[2]
    SIZE: tl.constexpr = GEOMETRY[3]
    vectors: tl.constexpr = (IN + DIM - 1) // DIM
    row = row[:, None]
    vector = column_tile * (COLUMNS // DIM) + tl.arange(0, COLUMNS // DIM)[None, :]
    inside = (row >= 0) & (row < OUT) & (vector < vectors)
    book, code = _places(packed, GEOMETRY, row, vector, inside)
    entry = tl.arange(0, DIM)[None, None, :]
    if books.dtype.element_ty == tl.int32:
        book_words: tl.constexpr = (SIZE * DIM + 7) // 8
        first = code * DIM
        at = books + book.to(tl.int64) * book_words + (first >> 3)
        nibbles = tl.load(at, mask=inside, other=0)[:, :, None] >> (
            ((first & 7)[:, :, None] + entry) * 4
        )
        values = (((nibbles & 15) ^ 8) - 8).to(tl.float32)
    else:
        at = (book.to(tl.int64) * SIZE + code) * DIM
        values = tl.load(books + at[:, :, None] + entry, mask=inside[:, :, None], other=0)
        values = values.to(tl.float32)
    if book_scales is not None:
        scale = tl.load(book_scales + book, mask=inside, other=0.0).to(tl.float32)
        values *= scale[:, :, None]
    values = _scale_vectors(values, packed, GEOMETRY, row, vector, inside)
    return tl.reshape(values, (row.shape[0], COLUMNS))


@triton.jit
def _tile(
    packed, GEOMETRY: tl.constexpr, row_tile, column_tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = row_tile * ROWS + tl.arange(0, ROWS)
    return _some_rows(packed, GEOMETRY, row, column_tile, COLUMNS)


@triton.jit
def _scatter(
    packed,
    GEOMETRY: tl.constexpr,
    sums,
    row_tile,
    column_tile,
    tile,
    unit,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Adds gradients of weights to those of the entries of (stripe, row group, code)."""
    OUT: tl.constexpr = GEOMETRY[0]
    IN: tl.constexpr = GEOMETRY[1]
    DIM: tl.constexpr = GEOMETRY[2]
    SIZE: tl.constexpr = GEOMETRY[3]
    vectors: tl.constexpr = (IN + DIM - 1) // DIM
    row = row_tile * ROWS + tl.arange(0, ROWS)[:, None]
    vector = column_tile * (COLUMNS // DIM) + tl.arange(0, COLUMNS // DIM)[None, :]
    inside = (row < OUT) & (vector < vectors)
    book, code = _places(packed, GEOMETRY, row, vector, inside)
    values = tl.reshape(tile, (ROWS, COLUMNS // DIM, DIM))
    values = _scale_vectors(values, packed, GEOMETRY, row, vector, inside)
    at = (book.to(tl.int64) * SIZE + code) * DIM
    at = sums + at[:, :, None] + tl.arange(0, DIM)[None, None, :]
    add_fixed(at, values, unit, (inside & (code < SIZE))[:, :, None])


def matrix(
    indices: Tensor,
    codebooks: Tensor,
    codebook_scales: Tensor | None,
    codebook_basis: Tensor | None,
    scale_codes: Tensor | None,
    scale_grid: Tensor | None,
    in_features: int,
    vector_dim: int,
    num_centroids: int,
    group_rows: int,
    group_columns: int,
    scale_block: int,
    log_scales: bool,
) -> Matrix:
    """The packed matrix of `gptvq_dequantize` for the kernels of triton_product.py.

    Factorised codebooks (one number per weight and rank) are multiplied out, in one small launch.
    """
    if codebook_basis is not None:
        codebooks = expand_codebooks(
            codebooks, codebook_scales, codebook_basis, num_centroids, vector_dim
        )
        codebook_scales = None
    if scale_codes is None:
        scale_block = vector_dim
    rows = indices.shape[0]
    geometry = (
        rows, in_features, vector_dim, num_centroids, (num_centroids - 1).bit_length(), group_rows,
        group_columns // vector_dim, scale_block // vector_dim, log_scales,
    )  # fmt: skip
    packed = (indices, codebooks, codebook_scales, scale_codes, scale_grid)
    return Matrix(
        "gptvq", rows, in_features, 1, rows, packed, geometry, _tile, _row_numbers,
        _column_numbers, _some_rows, _scatter,
    )  # fmt: skip


def packed_gradients(
    grad: Tensor,
    x: Tensor,
    packed: tuple[Any, ...],
    geometry: tuple[Any, ...],
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """As `gradients` of autograd.py, but from grad (tokens, out) and x (tokens, in)."""
    _, codebooks, _, _, scale_codes, grid = packed
    dim, size, log_scales = geometry[0], geometry[1], geometry[5]
    # which codebooks there are does not matter here, so factors need not be multiplied out
    arguments: Any = (*packed[:3], None, scale_codes, grid, x.shape[1], *geometry)
    factors = None
    if scale_codes is not None and grid is not None:
        offset, step = grid.float()
        factors = torch.stack([offset, offset + 15 * step])
        factors = factors.exp2() if log_scales else factors
    shape = (*codebooks.shape[:2], size, dim)
    values = sum_gradients(grad, x, matrix(*arguments), math.prod(shape), factors)
    return stored_gradients(values.view(shape), needed, packed)
