"""GPTVQ through Triton: a tile of weights, and the product for one to four tokens.

`_decode` is for few tokens, where what counts is how fast codes are read: every thread holds some
words of a row, loads each once, takes its codes apart with constant shifts, looks the vectors up
and multiplies, all elementwise; nothing moves between threads before the end of a row. Codebooks
are looked up as stored (int8 entries are multiplied by their scale once per vector), so that those
of a tile stay in the first-level cache.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from hf_vq_kernels.reference import expand_codebooks
from hf_vq_kernels.triton_backend import backends
from hf_vq_kernels.triton_common import (
    TYPES,
    WARP,
    config,
    entry_of,
    in_units,
    next_power_of_2,
    on_device,
    read_codes,
    splits_for,
    sum_lanes,
    sum_splits,
    tuned,
)
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
def _tile(
    packed, GEOMETRY: tl.constexpr, row_tile, column_tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    indices, books, book_scales, scale_codes, scale_grid = packed
    OUT: tl.constexpr = GEOMETRY[0]
    IN: tl.constexpr = GEOMETRY[1]
    DIM: tl.constexpr = GEOMETRY[2]
    SIZE: tl.constexpr = GEOMETRY[3]
    BITS: tl.constexpr = GEOMETRY[4]
    GROUP_ROWS: tl.constexpr = GEOMETRY[5]
    GROUP_VECTORS: tl.constexpr = GEOMETRY[6]
    SCALE_VECTORS: tl.constexpr = GEOMETRY[7]
    LOG: tl.constexpr = GEOMETRY[8]
    vectors: tl.constexpr = (IN + DIM - 1) // DIM
    words: tl.constexpr = (vectors * BITS + 31) // 32
    groups: tl.constexpr = (OUT + GROUP_ROWS - 1) // GROUP_ROWS
    row = row_tile * ROWS + tl.arange(0, ROWS)[:, None]
    vector = column_tile * (COLUMNS // DIM) + tl.arange(0, COLUMNS // DIM)[None, :]
    inside = (row < OUT) & (vector < vectors)
    wide_row = row.to(tl.int64)
    code = read_codes(indices, wide_row * words, vector, inside, BITS).to(tl.int32)
    book = (vector // GROUP_VECTORS) * groups + row // GROUP_ROWS
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
    if scale_codes is not None:
        BLOCKS: tl.constexpr = (vectors + SCALE_VECTORS - 1) // SCALE_VECTORS
        scale = scale_of(
            scale_codes, scale_grid, wide_row, vector // SCALE_VECTORS, inside, BLOCKS, LOG
        )
        values *= scale[:, :, None]
    return tl.reshape(values, (ROWS, COLUMNS))


# Lanes that own a word each: as many as there are threads, so that every tensor has the one layout
# and nothing is exchanged between threads.
_DECODE = [
    config(4, ROWS=8, LANES=4 * WARP),
    config(4, ROWS=4, LANES=4 * WARP),
    config(2, ROWS=8, LANES=2 * WARP),
    config(2, ROWS=4, LANES=2 * WARP),
    config(8, ROWS=4, LANES=8 * WARP),
    config(8, ROWS=8, LANES=8 * WARP),
    config(1, ROWS=4, LANES=WARP),
    config(4, ROWS=2, LANES=4 * WARP),
]


@tuned(["GEOMETRY", "TOKENS", "SPLITS", "BOOK_TYPE", "X_TYPE"], _DECODE)
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
    BOOK_UNIT: tl.constexpr,
    X_TYPE: tl.constexpr,
    X_UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    indices, books, book_scales, scale_codes, scale_grid = packed
    OUT: tl.constexpr = GEOMETRY[0]
    IN: tl.constexpr = GEOMETRY[1]
    DIM: tl.constexpr = GEOMETRY[2]
    SIZE: tl.constexpr = GEOMETRY[3]
    BITS: tl.constexpr = GEOMETRY[4]
    GROUP_ROWS: tl.constexpr = GEOMETRY[5]
    GROUP_VECTORS: tl.constexpr = GEOMETRY[6]
    SCALE_VECTORS: tl.constexpr = GEOMETRY[7]
    LOG: tl.constexpr = GEOMETRY[8]
    vectors: tl.constexpr = (IN + DIM - 1) // DIM
    words: tl.constexpr = (vectors * BITS + 31) // 32
    groups: tl.constexpr = (OUT + GROUP_ROWS - 1) // GROUP_ROWS
    blocks: tl.constexpr = (vectors + SCALE_VECTORS - 1) // SCALE_VECTORS
    # A period: the fewest whole words that hold whole codes.
    CODES: tl.constexpr = 32 // (BITS & -BITS)
    WORDS: tl.constexpr = BITS // (BITS & -BITS)
    periods: tl.constexpr = (vectors + CODES - 1) // CODES
    per_split: tl.constexpr = (periods + SPLITS - 1) // SPLITS
    book_words: tl.constexpr = (SIZE * DIM + 7) // 8
    PADDED: tl.constexpr = next_power_of_2(TOKENS * ROWS)
    scaled: tl.constexpr = book_scales is not None or scale_codes is not None
    large: tl.constexpr = vectors // GROUP_VECTORS + 1 > 2147483647 // (groups * SIZE * DIM)

    first_row = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    start = split * per_split
    stop = tl.minimum(start + per_split, periods)
    rows = ()  # beyond the last row: the last one, whose result is not stored
    for r in tl.static_range(ROWS):
        rows = rows + (tl.minimum(first_row + r, OUT - 1).to(tl.int64),)
    totals = ()
    for _ in tl.static_range(TOKENS * ROWS):
        totals = totals + (tl.zeros((LANES,), dtype=tl.float32),)
    for first in range(start, stop, LANES):
        period = first + tl.arange(0, LANES)
        parts = ()
        for _ in tl.static_range(TOKENS * ROWS):
            parts = parts + (tl.zeros((LANES,), dtype=tl.float32),)
        factors = ()
        for j in tl.static_range(CODES):
            vector = period * CODES + j
            here = (period < stop) & (vector < vectors)
            codes = ()
            if j * BITS % 32 == 0:
                stream = ()
                for r in tl.static_range(ROWS):
                    at = indices + rows[r] * words + period * WORDS
                    word = tl.load(at + j * BITS // 32, mask=here, other=0)
                    stream = stream + (word.to(tl.uint32, bitcast=True),)
            for r in tl.static_range(ROWS):
                codes = codes + (stream[r] >> (j * BITS % 32),)
            if j * BITS % 32 + BITS > 32:
                stream = ()
                both = ()
                for r in tl.static_range(ROWS):
                    at = indices + rows[r] * words + period * WORDS
                    word = tl.load(at + j * BITS // 32 + 1, mask=here, other=0)
                    word = word.to(tl.uint32, bitcast=True)
                    stream = stream + (word,)
                    both = both + (codes[r] | (word << (32 - j * BITS % 32)),)
                codes = both

            # What belongs to a codebook or a block is found anew only where one can begin.
            if j == 0 or GROUP_VECTORS % CODES != 0:
                books_of = ()
                for r in tl.static_range(ROWS):
                    if r == 0 or GROUP_ROWS % ROWS != 0:
                        group = (rows[r] // GROUP_ROWS).to(tl.int32)
                        book = tl.where(here, vector // GROUP_VECTORS, 0) * groups + group
                        if large:
                            book = book.to(tl.int64)
                    books_of = books_of + (book,)
            if scaled:
                if (j == 0 or GROUP_VECTORS % CODES != 0) or (
                    scale_codes is not None
                    and (SCALE_VECTORS % CODES != 0)
                    and (CODES % SCALE_VECTORS != 0 or j % SCALE_VECTORS == 0)
                ):
                    if j > 0:
                        totals, parts = _flush(totals, parts, factors, TOKENS, ROWS)
                    factors = ()
                    for r in tl.static_range(ROWS):
                        factor = tl.full((LANES,), 1.0, dtype=tl.float32)
                        if book_scales is not None:
                            factor *= tl.load(book_scales + books_of[r]).to(tl.float32)
                        if scale_codes is not None:
                            factor *= scale_of(
                                scale_codes, scale_grid, rows[r], vector // SCALE_VECTORS, here,
                                blocks, LOG,
                            )  # fmt: skip
                        factors = factors + (factor,)

            places = ()
            for r in tl.static_range(ROWS):
                code = (codes[r] & ((1 << BITS) - 1)).to(tl.int32)
                if vectors % CODES != 0:
                    code = tl.where(here, code, 0)
                places = places + (code,)
            for e in tl.static_range(DIM):
                if (j * DIM + e) % X_UNIT == 0:
                    place = period * (CODES * DIM // X_UNIT) + (j * DIM + e) // X_UNIT
                    known = (period < stop) & (place < IN // X_UNIT)
                    x_units = ()
                    for t in tl.static_range(TOKENS):
                        x_unit = tl.load(x + t * (IN // X_UNIT) + place, mask=known, other=0)
                        x_units = x_units + (x_unit,)
                values = ()
                for t in tl.static_range(TOKENS):
                    values = values + (entry_of(x_units[t], (j * DIM + e) % X_UNIT, X_TYPE),)
                if BOOK_TYPE == "int4":
                    if e == 0:
                        units = ()
                        for r in tl.static_range(ROWS):
                            nibble = places[r] * DIM
                            unit = tl.load(books + books_of[r] * book_words + (nibble >> 3))
                            units = units + (unit >> ((nibble & 7) * 4),)
                elif e % BOOK_UNIT == 0:
                    units = ()
                    for r in tl.static_range(ROWS):
                        entry = (books_of[r] * SIZE + places[r]) * (DIM // BOOK_UNIT)
                        units = units + (tl.load(books + entry + e // BOOK_UNIT),)
                sums = ()
                for t in tl.static_range(TOKENS):
                    for r in tl.static_range(ROWS):
                        if BOOK_TYPE == "int4":
                            weight = ((((units[r] >> (4 * e)) & 15) ^ 8) - 8).to(tl.float32)
                        else:
                            weight = entry_of(units[r], e % BOOK_UNIT, BOOK_TYPE)
                        sums = sums + (parts[t * ROWS + r] + weight * values[t],)
                parts = sums
        if scaled:
            totals, parts = _flush(totals, parts, factors, TOKENS, ROWS)
        else:
            sums = ()
            for i in tl.static_range(TOKENS * ROWS):
                sums = sums + (totals[i] + parts[i],)
            totals = sums

    y = sum_lanes(totals, TOKENS * ROWS, PADDED)
    number = tl.arange(0, PADDED)
    row = first_row + number % ROWS
    inside = (row < OUT) & (number < TOKENS * ROWS)
    if bias is not None:
        y += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
    at = (split.to(tl.int64) * TOKENS + number // ROWS) * OUT + row
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _flush(totals, parts, factors, TOKENS: tl.constexpr, ROWS: tl.constexpr):
    """totals + parts * factors, and zeros in the place of parts."""
    sums = ()
    zeros = ()
    for t in tl.static_range(TOKENS):
        for r in tl.static_range(ROWS):
            part = parts[t * ROWS + r]
            sums = sums + (totals[t * ROWS + r] + part * factors[r],)
            zeros = zeros + (tl.zeros_like(part),)
    return sums, zeros


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
        _column_numbers,
    )  # fmt: skip


def decode(x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
    """As `product` of triton_product.py, for x of one to four tokens."""
    indices, codebooks, *scales = matrix.packed
    assert indices is not None and codebooks is not None
    rows, columns, dim, _, bits = matrix.geometry[:5]
    tokens, codes = x.shape[0], 32 // (bits & -bits)
    if codebooks.dtype == torch.int32:
        book_type, book_unit = "int4", 1
    else:
        book_type = TYPES[codebooks.dtype]
        codebooks, book_unit = in_units(codebooks, dim)
    x_units, x_unit = in_units(x, math.gcd(columns, codes * dim))
    periods = triton.cdiv(triton.cdiv(columns, dim), codes)
    splits = splits_for(triton.cdiv(rows, 8), triton.cdiv(periods, 64), x.device)
    out = x.new_empty((tokens, rows))
    parts = out if splits == 1 else x.new_empty((splits, tokens, rows), dtype=torch.float32)

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return triton.cdiv(rows, meta["ROWS"]), splits

    with on_device(x):
        _decode[grid](
            x_units, (indices, codebooks, *scales), bias if splits == 1 else None, parts,
            GEOMETRY=matrix.geometry, TOKENS=tokens, SPLITS=splits, BOOK_TYPE=book_type,
            BOOK_UNIT=book_unit, X_TYPE=TYPES[x.dtype], X_UNIT=x_unit,
        )  # fmt: skip
        if splits > 1:
            sum_splits(parts, bias, out)
    return out


def _check(*arguments: Any) -> str | None:
    indices, columns, dim, size, group_columns = (
        arguments[0], *arguments[6:9], arguments[10],
    )  # fmt: skip
    words = triton.cdiv(triton.cdiv(columns, dim) * (size - 1).bit_length(), 32)
    if indices.shape[1] != words or group_columns % dim:
        return f"indices of {indices.shape[1]} words per row are not those of {columns} columns"
    if dim not in (1, 2, 4, 8):
        return f"vectors have 1, 2, 4 or 8 entries in the kernels, not {dim}"
    return None


BACKENDS = backends("gptvq", 6, matrix, decode, _check)
