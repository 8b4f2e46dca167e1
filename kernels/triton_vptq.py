"""VPTQ through Triton: a tile of weights, and the product for one to four tokens.

A program of `_decode` computes the rows of some row blocks. Every thread holds a few words of the
stream of each, takes their codes apart with constant shifts, and multiplies the vector of each code
with one activation, which serves all rows of all blocks. The permutation and the norm act on the
activations: column norms scale them, and what the norms add to weights is summed on the side.
Codebooks of up to 4096 vectors stay in the first-level cache, those of 65536 in the second.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from hf_vq_kernels.triton_backend import backends
from hf_vq_kernels.triton_common import (
    TYPES,
    WARP,
    config,
    entry_of,
    in_units,
    next_power_of_2,
    on_device,
    power_of_two,
    read_codes,
    splits_for,
    sum_lanes,
    sum_splits,
    tuned,
)
from hf_vq_kernels.triton_product import Matrix
from hf_vq_kernels.triton_vptq_inputs import activations, columns_of
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
def _tile(
    packed, GEOMETRY: tl.constexpr, row_tile, column_tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    indices, books, res_books, outlier_indices, outlier_books, perm, norm_scale, norm_bias = packed
    OUT: tl.constexpr = GEOMETRY[0]
    IN: tl.constexpr = GEOMETRY[1]
    DIM: tl.constexpr = GEOMETRY[2]
    SIZE: tl.constexpr = GEOMETRY[3]
    BITS: tl.constexpr = GEOMETRY[4]
    RES_SIZE: tl.constexpr = GEOMETRY[5]
    RES_BITS: tl.constexpr = GEOMETRY[6]
    WIDTH: tl.constexpr = GEOMETRY[7]
    OUTLIERS: tl.constexpr = GEOMETRY[8]
    OUTLIER_DIM: tl.constexpr = GEOMETRY[9]
    NORM: tl.constexpr = GEOMETRY[10]
    PADDED_DIM: tl.constexpr = next_power_of_2(DIM)
    blocks: tl.constexpr = (OUT + DIM - 1) // DIM
    words: tl.constexpr = (WIDTH * (BITS + RES_BITS) + 31) // 32
    block = row_tile * (ROWS // PADDED_DIM) + tl.arange(0, ROWS // PADDED_DIM)[:, None]
    stored = column_tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    entry = tl.arange(0, PADDED_DIM)[None, None, :]
    inside = (block < blocks) & (stored < IN)
    main = tl.maximum(stored - OUTLIERS, 0)
    group = main // WIDTH
    stream = (group * blocks + block).to(tl.int64) * words
    regular = inside & (stored >= OUTLIERS)
    code = read_codes(indices, stream, main % WIDTH, regular, BITS + RES_BITS)
    at = (group * SIZE + (code & (SIZE - 1)).to(tl.int32)).to(tl.int64) * DIM
    known = regular[:, :, None] & (entry < DIM)
    values = tl.load(books + at[:, :, None] + entry, mask=known, other=0.0).to(tl.float32)
    if res_books is not None:
        number = (code >> BITS).to(tl.int32) & (RES_SIZE - 1)
        at = (group * RES_SIZE + number).to(tl.int64) * DIM
        values += tl.load(res_books + at[:, :, None] + entry, mask=known, other=0.0).to(tl.float32)
    row = block[:, :, None] * DIM + entry
    if OUTLIERS > 0:
        known = (inside & (stored < OUTLIERS))[:, :, None] & (entry < DIM) & (row < OUT)
        at = outlier_indices + (row // OUTLIER_DIM) * OUTLIERS + stored[:, :, None]
        number = tl.load(at, mask=known, other=0).to(tl.int32) & 0xFFFF
        at = outlier_books + number * OUTLIER_DIM + row % OUTLIER_DIM
        values += tl.load(at, mask=known, other=0.0).to(tl.float32)
    if NORM == 1:
        column = columns_of(perm, stored, IN)
        scale = tl.load(norm_scale + column, mask=column < IN, other=0.0).to(tl.float32)
        offset = tl.load(norm_bias + column, mask=column < IN, other=0.0).to(tl.float32)
        values = values * scale[:, :, None] + offset[:, :, None]
    if NORM == 2:
        scale = tl.load(norm_scale + row, mask=row < OUT, other=0.0).to(tl.float32)
        offset = tl.load(norm_bias + row, mask=row < OUT, other=0.0).to(tl.float32)
        values = values * scale + offset
    return tl.reshape(tl.permute(values, (0, 2, 1)), (ROWS, COLUMNS))


@tuned(
    ["GEOMETRY", "TOKENS", "SPLITS", "BOOK_TYPE"],
    [
        config(4, BLOCKS=1, LANES=4 * WARP),
        config(4, BLOCKS=2, LANES=4 * WARP),
        config(2, BLOCKS=1, LANES=2 * WARP),
        config(2, BLOCKS=2, LANES=2 * WARP),
        config(8, BLOCKS=1, LANES=8 * WARP),
        config(8, BLOCKS=2, LANES=8 * WARP),
        config(4, BLOCKS=4, LANES=4 * WARP),
    ],
)
@triton.jit
def _decode(
    x,
    packed,
    bias,
    out,
    GEOMETRY: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    BOOK_TYPE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
):
    indices, books, res_books, outlier_indices, outlier_books, perm, norm_scale, norm_bias = packed
    OUT: tl.constexpr = GEOMETRY[0]
    IN: tl.constexpr = GEOMETRY[1]
    DIM: tl.constexpr = GEOMETRY[2]
    SIZE: tl.constexpr = GEOMETRY[3]
    BITS: tl.constexpr = GEOMETRY[4]
    RES_SIZE: tl.constexpr = GEOMETRY[5]
    RES_BITS: tl.constexpr = GEOMETRY[6]
    WIDTH: tl.constexpr = GEOMETRY[7]
    OUTLIERS: tl.constexpr = GEOMETRY[8]
    OUTLIER_DIM: tl.constexpr = GEOMETRY[9]
    NORM: tl.constexpr = GEOMETRY[10]
    all_blocks: tl.constexpr = (OUT + DIM - 1) // DIM
    ALL: tl.constexpr = BITS + RES_BITS
    words: tl.constexpr = (WIDTH * ALL + 31) // 32
    # A period: the fewest whole words that hold whole codes. Periods of all groups in one row.
    CODES: tl.constexpr = 32 // (ALL & -ALL)
    WORDS: tl.constexpr = ALL // (ALL & -ALL)
    group_periods: tl.constexpr = (WIDTH + CODES - 1) // CODES
    periods: tl.constexpr = (IN - OUTLIERS) // WIDTH * group_periods
    per_split: tl.constexpr = (periods + SPLITS - 1) // SPLITS
    ROWS: tl.constexpr = BLOCKS * DIM
    PADDED: tl.constexpr = next_power_of_2(TOKENS * ROWS)

    first_block = tl.program_id(0) * BLOCKS
    split = tl.program_id(1)
    start = split * per_split
    stop = tl.minimum(start + per_split, periods)
    blocks = ()  # beyond the last block: the last one, whose results are not stored
    for b in tl.static_range(BLOCKS):
        blocks = blocks + (tl.minimum(first_block + b, all_blocks - 1).to(tl.int64),)
    totals = ()
    for _ in tl.static_range(TOKENS * ROWS):
        totals = totals + (tl.zeros((LANES,), dtype=tl.float32),)
    offsets = ()  # what the norms add: sums of activations
    for _ in tl.static_range(TOKENS):
        offsets = offsets + (tl.zeros((LANES,), dtype=tl.float32),)

    for first in range(start, stop, LANES):
        period = first + tl.arange(0, LANES)
        group = period // group_periods
        within = period % group_periods
        for j in tl.static_range(CODES):
            here = (period < stop) & (within * CODES + j < WIDTH)
            stored = tl.where(here, OUTLIERS + group * WIDTH + within * CODES + j, IN)
            values, offsets = activations(
                x, stored, perm, norm_scale, norm_bias, offsets, IN, NORM, TOKENS
            )
            if j * ALL % 32 == 0:
                stream = ()
                for b in tl.static_range(BLOCKS):
                    at = indices + (group * all_blocks + blocks[b]) * words + within * WORDS
                    word = tl.load(at + j * ALL // 32, mask=here, other=0)
                    stream = stream + (word.to(tl.uint32, bitcast=True),)
            codes = ()
            for b in tl.static_range(BLOCKS):
                codes = codes + (stream[b] >> (j * ALL % 32),)
            if j * ALL % 32 + ALL > 32:
                stream = ()
                both = ()
                for b in tl.static_range(BLOCKS):
                    at = indices + (group * all_blocks + blocks[b]) * words + within * WORDS
                    word = tl.load(at + j * ALL // 32 + 1, mask=here, other=0)
                    word = word.to(tl.uint32, bitcast=True)
                    stream = stream + (word,)
                    both = both + (codes[b] | (word << (32 - j * ALL % 32)),)
                codes = both
            for e in tl.static_range(DIM):
                if e % UNIT == 0:
                    units = ()
                    res_units = ()
                    for b in tl.static_range(BLOCKS):
                        number = (codes[b] & (SIZE - 1)).to(tl.int32)
                        entry = (group * SIZE + number) * (DIM // UNIT) + e // UNIT
                        units = units + (tl.load(books + entry, mask=here, other=0),)
                        if res_books is not None:
                            number = (codes[b] >> BITS).to(tl.int32) & (RES_SIZE - 1)
                            entry = (group * RES_SIZE + number) * (DIM // UNIT) + e // UNIT
                            res_units = res_units + (
                                tl.load(res_books + entry, mask=here, other=0),
                            )
                # totals of entry e of every (token, block) are replaced; others stay
                sums = ()
                for t in tl.static_range(TOKENS):
                    for b in tl.static_range(BLOCKS):
                        for f in tl.static_range(DIM):
                            total = totals[(t * BLOCKS + b) * DIM + f]
                            if f == e:
                                weight = entry_of(units[b], e % UNIT, BOOK_TYPE)
                                if res_books is not None:
                                    weight += entry_of(res_units[b], e % UNIT, BOOK_TYPE)
                                total += weight * values[t]
                            sums = sums + (total,)
                totals = sums

    if OUTLIERS > 0:
        for first in range(0, tl.where(split == 0, OUTLIERS, 0), LANES):
            outlier = first + tl.arange(0, LANES)
            here = outlier < OUTLIERS
            stored = tl.where(here, outlier, IN)
            values, offsets = activations(
                x, stored, perm, norm_scale, norm_bias, offsets, IN, NORM, TOKENS
            )
            weights = ()
            for b in tl.static_range(BLOCKS):
                for e in tl.static_range(DIM):
                    row = tl.minimum(blocks[b] * DIM + e, OUT - 1)
                    at = outlier_indices + row // OUTLIER_DIM * OUTLIERS + outlier
                    number = tl.load(at, mask=here, other=0).to(tl.int32) & 0xFFFF
                    at = outlier_books + number * OUTLIER_DIM + row % OUTLIER_DIM
                    weights = weights + (tl.load(at, mask=here, other=0.0).to(tl.float32),)
            sums = ()
            for t in tl.static_range(TOKENS):
                for r in tl.static_range(ROWS):
                    sums = sums + (totals[t * ROWS + r] + weights[r] * values[t],)
            totals = sums

    y = sum_lanes(totals, TOKENS * ROWS, PADDED)
    number = tl.arange(0, PADDED)
    row = first_block * DIM + number % ROWS
    token = number // ROWS
    inside = (row < OUT) & (token < TOKENS)
    if NORM > 0:
        shift = tl.zeros((PADDED,), dtype=tl.float32)
        for t in tl.static_range(TOKENS):
            shift += tl.where(token == t, tl.sum(offsets[t], axis=0), 0.0)
        if NORM == 2:
            y *= tl.load(norm_scale + row, mask=inside, other=0.0).to(tl.float32)
            shift *= tl.load(norm_bias + row, mask=inside, other=0.0).to(tl.float32)
        y += shift
    if bias is not None:
        y += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
    at = (split.to(tl.int64) * TOKENS + token) * OUT + row
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


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
        _column_numbers,
    )  # fmt: skip


def decode(x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
    """As `product` of triton_product.py, for x of one to four tokens."""
    indices, books, res_books, *others = matrix.packed
    assert indices is not None and books is not None
    rows, columns, dim, _, bits, _, res_bits, width, outliers = matrix.geometry[:9]
    tokens, book_type = x.shape[0], TYPES[books.dtype]
    books, unit = in_units(books, dim)
    if res_books is not None:
        res_books, _ = in_units(res_books, dim)
    blocks = triton.cdiv(rows, dim)
    codes = 32 // math.gcd(bits + res_bits, 32)
    periods = (columns - outliers) // width * triton.cdiv(width, codes)
    splits = splits_for(blocks, triton.cdiv(periods, 128), x.device)
    out = x.new_empty((tokens, rows))
    parts = out if splits == 1 else x.new_empty((splits, tokens, rows), dtype=torch.float32)

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return triton.cdiv(blocks, meta["BLOCKS"]), splits

    with on_device(x):
        _decode[grid](
            x, (indices, books, res_books, *others), bias if splits == 1 else None, parts,
            GEOMETRY=matrix.geometry, TOKENS=tokens, SPLITS=splits, BOOK_TYPE=book_type, UNIT=unit,
        )  # fmt: skip
        if splits > 1:
            sum_splits(parts, bias, out)
    return out


def _arranged(x: Tensor, matrix: Matrix) -> tuple[Tensor, Matrix]:
    """Activations in stored order, so that tiles read them side by side."""
    perm = matrix.packed[5]
    if perm is None:
        return x, matrix
    return x.index_select(1, perm.int() & 0xFFFF), matrix._replace(columns=_stored_numbers)


def _check(*arguments: Any) -> str | None:
    indices, centroids, res_centroids, outlier_indices, outlier_centroids = arguments[:5]
    columns, dim = arguments[8], arguments[10]
    outliers = 0 if outlier_indices is None else outlier_indices.shape[-1]
    width, rest = divmod(columns - outliers, centroids.shape[0])
    bits = sum(
        (book.shape[1] // dim - 1).bit_length()
        for book in (centroids, res_centroids)
        if book is not None
    )
    if rest or width < 1 or indices.shape[-1] != triton.cdiv(width * bits, 32):
        return (
            f"indices of {indices.shape[-1]} words per stream, {centroids.shape[0]} groups and "
            f"{outliers} outliers are not those of {columns} columns"
        )
    if outliers and outlier_centroids is None:
        return "outlier columns have no codebook"
    return None


BACKENDS = backends("vptq", 8, matrix, decode, _check, _arranged)
