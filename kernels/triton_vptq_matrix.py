"""VPTQ for the Triton kernels that all methods share: tiles, rows, sums of gradients."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from hf_vq_kernels.triton_common import next_power_of_2, power_of_two, read_codes
from hf_vq_kernels.triton_gradients import add_fixed, sum_gradients
from hf_vq_kernels.triton_product import Matrix, product, transposed_product
from hf_vq_kernels.triton_vptq_inputs import columns_of
from torch import Tensor

_NO_NORM, _NORM_COLUMNS, _NORM_ROWS = 0, 1, 2


@triton.jit
def _row_numbers(packed, GEOMETRY: tl.constexpr, row_tile, ROWS: tl.constexpr):
    OUT: tl.constexpr = GEOMETRY[0]
    DIM: tl.constexpr = GEOMETRY[2]
    PADDED_DIM: tl.constexpr = next_power_of_2(DIM)
    number = tl.arange(0, ROWS)
    block = row_tile * (ROWS // PADDED_DIM) + number // PADDED_DIM
    return tl.where(number % PADDED_DIM < DIM, block * DIM + number % PADDED_DIM, OUT)


@triton.jit
def _column_numbers(packed, GEOMETRY: tl.constexpr, column_tile, COLUMNS: tl.constexpr):
    return columns_of(packed[5], column_tile * COLUMNS + tl.arange(0, COLUMNS), GEOMETRY[1])


@triton.jit
def _stored_numbers(packed, GEOMETRY: tl.constexpr, column_tile, COLUMNS: tl.constexpr):
    """Columns in stored order, for activations that were brought into it."""
    return column_tile * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def _stored_columns(GEOMETRY: tl.constexpr, block, stored, inside):
    """Of stored columns: are they in a group (not outliers); their group; their stream's first word

    and their number in it. `block` (rows, 1) of row blocks, `stored` (1, columns).
    """
    OUT: tl.constexpr = GEOMETRY[0]
    DIM: tl.constexpr = GEOMETRY[2]
    BITS: tl.constexpr = GEOMETRY[4]
    RES_BITS: tl.constexpr = GEOMETRY[6]
    WIDTH: tl.constexpr = GEOMETRY[7]
    OUTLIERS: tl.constexpr = GEOMETRY[8]
    blocks: tl.constexpr = (OUT + DIM - 1) // DIM
    words: tl.constexpr = (WIDTH * (BITS + RES_BITS) + 31) // 32
    main = tl.maximum(stored - OUTLIERS, 0)
    group = main // WIDTH
    stream = (group * blocks + block).to(tl.int64) * words
    return inside & (stored >= OUTLIERS), group, stream, main % WIDTH


@triton.jit
def _normalized(values, packed, GEOMETRY: tl.constexpr, stored, row, OFFSET: tl.constexpr):
    """values (blocks, columns, entries) times the norm, plus its offset if OFFSET."""
    OUT: tl.constexpr = GEOMETRY[0]
    IN: tl.constexpr = GEOMETRY[1]
    NORM: tl.constexpr = GEOMETRY[10]
    norm_scale = packed[6]
    norm_bias = packed[7]
    if NORM == 1:
        column = columns_of(packed[5], stored, IN)
        values *= tl.load(norm_scale + column, mask=column < IN, other=0.0).to(tl.float32)[
            :, :, None
        ]
        if OFFSET:
            offset = tl.load(norm_bias + column, mask=column < IN, other=0.0).to(tl.float32)
            values += offset[:, :, None]
    if NORM == 2:
        values *= tl.load(norm_scale + row, mask=row < OUT, other=0.0).to(tl.float32)
        if OFFSET:
            values += tl.load(norm_bias + row, mask=row < OUT, other=0.0).to(tl.float32)
    return values


@triton.jit
def _vectors(packed, GEOMETRY: tl.constexpr, block, stored, entry, row, there):
    """Entries `entry` of the vectors of row blocks `block` (n, 1) in columns `stored` (1, columns).

    entry and row, the row of the matrix, broadcast against (n, columns, entries), the shape of the
    result; where `there`, of that shape, is false, values are 0 (or what the norm adds).
    """
    indices, books, res_books, outlier_indices, outlier_books, _, _, _ = packed
    OUT: tl.constexpr = GEOMETRY[0]
    IN: tl.constexpr = GEOMETRY[1]
    DIM: tl.constexpr = GEOMETRY[2]
    SIZE: tl.constexpr = GEOMETRY[3]
    BITS: tl.constexpr = GEOMETRY[4]
    RES_SIZE: tl.constexpr = GEOMETRY[5]
    RES_BITS: tl.constexpr = GEOMETRY[6]
    OUTLIERS: tl.constexpr = GEOMETRY[8]
    OUTLIER_DIM: tl.constexpr = GEOMETRY[9]
    blocks: tl.constexpr = (OUT + DIM - 1) // DIM
    inside = (block >= 0) & (block < blocks) & (stored < IN)
    regular, group, stream, place = _stored_columns(GEOMETRY, block, stored, inside)
    code = read_codes(indices, stream, place, regular, BITS + RES_BITS)
    at = (group * SIZE + (code & (SIZE - 1)).to(tl.int32)).to(tl.int64) * DIM
    known = regular[:, :, None] & there
    values = tl.load(books + at[:, :, None] + entry, mask=known, other=0.0).to(tl.float32)
    if res_books is not None:
        number = (code >> BITS).to(tl.int32) & (RES_SIZE - 1)
        at = (group * RES_SIZE + number).to(tl.int64) * DIM
        values += tl.load(res_books + at[:, :, None] + entry, mask=known, other=0.0).to(tl.float32)
    if OUTLIERS > 0:
        known = (inside & (stored < OUTLIERS))[:, :, None] & there & (row < OUT)
        at = outlier_indices + (row // OUTLIER_DIM) * OUTLIERS + stored[:, :, None]
        number = tl.load(at, mask=known, other=0).to(tl.int32) & 0xFFFF
        at = outlier_books + number * OUTLIER_DIM + row % OUTLIER_DIM
        values += tl.load(at, mask=known, other=0.0).to(tl.float32)
    return _normalized(values, packed, GEOMETRY, stored, row, True)


@triton.jit
def _tile(
    packed, GEOMETRY: tl.constexpr, row_tile, column_tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    DIM: tl.constexpr = GEOMETRY[2]
    PADDED_DIM: tl.constexpr = next_power_of_2(DIM)
    block = row_tile * (ROWS // PADDED_DIM) + tl.arange(0, ROWS // PADDED_DIM)[:, None]
    stored = column_tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    entry = tl.arange(0, PADDED_DIM)[None, None, :]
    row = block[:, :, None] * DIM + entry
    values = _vectors(packed, GEOMETRY, block, stored, entry, row, entry < DIM)
    return tl.reshape(tl.permute(values, (0, 2, 1)), (ROWS, COLUMNS))


@triton.jit
def _some_rows(packed, GEOMETRY: tl.constexpr, row, column_tile, COLUMNS: tl.constexpr):
    """A tile of any rows (n,) of the matrix; finite for numbers that are no rows."""
    OUT: tl.constexpr = GEOMETRY[0]
    DIM: tl.constexpr = GEOMETRY[2]
    stored = column_tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    there = ((row >= 0) & (row < OUT))[:, None, None]
    row = tl.where(there, row[:, None, None], 0)
    block = tl.reshape(row // DIM, (row.shape[0], 1))
    values = _vectors(packed, GEOMETRY, block, stored, row % DIM, row, there)
    return tl.reshape(values, (row.shape[0], COLUMNS))


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
    """Adds gradients of weights to those of the codebooks' entries.

    The geometry ends with where those of the main, residual and outlier codebooks begin in `sums`;
    -1 for those that need none.
    """
    OUT: tl.constexpr = GEOMETRY[0]
    IN: tl.constexpr = GEOMETRY[1]
    DIM: tl.constexpr = GEOMETRY[2]
    SIZE: tl.constexpr = GEOMETRY[3]
    BITS: tl.constexpr = GEOMETRY[4]
    RES_SIZE: tl.constexpr = GEOMETRY[5]
    RES_BITS: tl.constexpr = GEOMETRY[6]
    OUTLIERS: tl.constexpr = GEOMETRY[8]
    OUTLIER_DIM: tl.constexpr = GEOMETRY[9]
    MAIN: tl.constexpr = GEOMETRY[11]
    RES: tl.constexpr = GEOMETRY[12]
    OUTLIER: tl.constexpr = GEOMETRY[13]
    PADDED_DIM: tl.constexpr = next_power_of_2(DIM)
    blocks: tl.constexpr = (OUT + DIM - 1) // DIM
    block = row_tile * (ROWS // PADDED_DIM) + tl.arange(0, ROWS // PADDED_DIM)[:, None]
    stored = column_tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    entry = tl.arange(0, PADDED_DIM)[None, None, :]
    row = block[:, :, None] * DIM + entry
    inside = (block < blocks) & (stored < IN)
    regular, group, stream, place = _stored_columns(GEOMETRY, block, stored, inside)
    values = tl.permute(tl.reshape(tile, (ROWS // PADDED_DIM, PADDED_DIM, COLUMNS)), (0, 2, 1))
    values = _normalized(values, packed, GEOMETRY, stored, row, False)
    known = regular[:, :, None] & (entry < DIM)
    if MAIN >= 0 or RES >= 0:
        code = read_codes(packed[0], stream, place, regular, BITS + RES_BITS)
    if MAIN >= 0:
        at = (group * SIZE + (code & (SIZE - 1)).to(tl.int32)).to(tl.int64) * DIM
        add_fixed(sums + MAIN + at[:, :, None] + entry, values, unit, known)
    if RES >= 0:
        number = (code >> BITS).to(tl.int32) & (RES_SIZE - 1)
        at = (group * RES_SIZE + number).to(tl.int64) * DIM
        add_fixed(sums + RES + at[:, :, None] + entry, values, unit, known)
    if OUTLIER >= 0:
        known = (inside & (stored < OUTLIERS))[:, :, None] & (entry < DIM) & (row < OUT)
        at = packed[3] + (row // OUTLIER_DIM) * OUTLIERS + stored[:, :, None]
        number = tl.load(at, mask=known, other=0).to(tl.int32) & 0xFFFF
        at = sums + OUTLIER + number * OUTLIER_DIM + row % OUTLIER_DIM
        add_fixed(at, values, unit, known)


def matrix(
    indices: Tensor,
    centroids: Tensor,
    res_centroids: Tensor | None,
    outlier_indices: Tensor | None,
    outlier_centroids: Tensor | None,
    perm: Tensor | None,
    weight_scale: Tensor | None,
    weight_bias: Tensor | None,
    in_features: int,
    out_features: int,
    vector_dim: int,
    outlier_vector_dim: int,
    norm_rows: bool,
) -> Matrix:
    """The packed matrix of `vptq_dequantize` for the kernels of triton_product.py."""
    size = centroids.shape[1] // vector_dim
    res_size = 0 if res_centroids is None else res_centroids.shape[1] // vector_dim
    outliers = 0 if outlier_indices is None else outlier_indices.shape[-1]
    norm = _NO_NORM
    if weight_scale is not None and weight_bias is not None:
        norm = _NORM_ROWS if norm_rows else _NORM_COLUMNS
    else:
        weight_scale = weight_bias = None
    if not outliers:
        outlier_indices = outlier_centroids = None
    geometry = (
        out_features, in_features, vector_dim, size, (size - 1).bit_length(), res_size,
        max(res_size - 1, 0).bit_length(), (in_features - outliers) // centroids.shape[0],
        outliers, outlier_vector_dim, norm,
    )  # fmt: skip
    packed = (
        indices, centroids, res_centroids, outlier_indices, outlier_centroids, perm, weight_scale,
        weight_bias,
    )  # fmt: skip
    rows = triton.cdiv(out_features, vector_dim) * power_of_two(vector_dim)
    return Matrix(
        "vptq", out_features, in_features, 1, rows, packed, geometry, _tile, _row_numbers,
        _column_numbers, _some_rows, _scatter,
    )  # fmt: skip


def arranged(x: Tensor, matrix: Matrix) -> tuple[Tensor, Matrix]:
    """Activations in stored order, so that tiles read them side by side."""
    perm = matrix.packed[5]
    if perm is None:
        return x, matrix
    return x.index_select(1, perm.int() & 0xFFFF), matrix._replace(columns=_stored_numbers)


def packed_gradients(
    grad: Tensor,
    x: Tensor,
    packed: tuple[Any, ...],
    geometry: tuple[Any, ...],
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """As `gradients` of autograd.py, but from grad (tokens, out) and x (tokens, in)."""
    scale, norm_bias, norm_rows = packed[6], packed[7], geometry[3]
    out: list[Tensor | None] = [None] * 8
    if scale is not None and norm_bias is not None:
        # The gradient of a norm is a sum over the rows or columns of W's, so it needs no tile of
        # that: only the product with what is normalized, or with ones.
        if needed[6]:
            without: Any = (*packed[:6], None, None, x.shape[1], *geometry)
            plain = matrix(*without)
            if norm_rows:
                tokens, plain = arranged(x, plain)
                parts = grad * product(tokens, plain, None, torch.float32)
            else:
                parts = x * transposed_product(grad, plain, torch.float32)
            out[6] = parts.sum(0).to(scale.dtype)
        if needed[7]:
            if norm_rows:
                summed = x.sum(1, dtype=torch.float32) @ grad.float()
            else:
                summed = grad.sum(1, dtype=torch.float32) @ x.float()
            out[7] = summed.to(norm_bias.dtype)
    arguments: Any = (*packed, x.shape[1], *geometry)
    weight = matrix(*arguments)
    if needed[4] and weight.packed[4] is None:  # no outlier columns
        out[4] = torch.zeros_like(packed[4])
    sizes = [
        packed[i].numel() if needed[i] and weight.packed[i] is not None else 0 for i in (1, 2, 4)
    ]
    if not any(sizes):
        return out
    starts = [sum(sizes[:i]) if size else -1 for i, size in enumerate(sizes)]
    tokens, weight = arranged(x, weight)
    weight = weight._replace(geometry=(*weight.geometry, *starts))
    factors = None if weight.geometry[10] == _NO_NORM else scale
    sums = sum_gradients(grad, tokens, weight, sum(sizes), factors)
    for i, size, start in zip((1, 2, 4), sizes, starts, strict=True):
        if size:
            part = sums[start : start + size].view(packed[i].shape)
            # a copy, because gradients must not share memory
            out[i] = part.to(packed[i].dtype, copy=True)
    return out
