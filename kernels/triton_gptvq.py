"""GPTVQ through Triton: the product for one to four tokens. The rest is triton_gptvq_matrix.py.

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
from hf_vq_kernels.triton_backend import backends
from hf_vq_kernels.triton_common import (
    TYPES,
    WARP,
    code_of,
    config,
    entry_of,
    in_units,
    load_words,
    next_power_of_2,
    on_device,
    period_codes,
    period_words,
    splits_for,
    sum_lanes,
    sum_splits,
    tuned,
    wide_enough,
)
from hf_vq_kernels.triton_gptvq_matrix import matrix, packed_gradients, scale_of
from hf_vq_kernels.triton_product import Matrix
from torch import Tensor

# Lanes that own WIDE words each: as many as there are threads, so that every tensor has the one
# layout and nothing is exchanged between threads.
_DECODE = [
    config(4, ROWS=8, LANES=4 * WARP, WIDE=1),
    config(4, ROWS=4, LANES=4 * WARP, WIDE=1),
    config(2, ROWS=8, LANES=2 * WARP, WIDE=1),
    config(8, ROWS=4, LANES=8 * WARP, WIDE=1),
    config(4, ROWS=2, LANES=4 * WARP, WIDE=1),
    config(2, ROWS=4, LANES=2 * WARP, WIDE=4),
    config(4, ROWS=4, LANES=4 * WARP, WIDE=4),
    config(2, ROWS=2, LANES=2 * WARP, WIDE=4),
    config(4, ROWS=4, LANES=4 * WARP, WIDE=2),
]


def _fits(sizes: dict[str, Any], constants: dict[str, Any]) -> bool:
    _, columns, dim, _, bits = constants["GEOMETRY"][:5]
    words = triton.cdiv(triton.cdiv(columns, dim) * bits, 32)
    return wide_enough(sizes["WIDE"], bits, words, constants["TOKENS"])


@tuned(["GEOMETRY", "TOKENS", "SPLITS", "BOOK_TYPE", "X_TYPE"], _DECODE, fits=_fits)
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
    WIDE: tl.constexpr,
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
    # A period: the fewest words that hold whole codes and can be read WIDE at a time.
    WORDS: tl.constexpr = period_words(BITS, WIDE)
    CODES: tl.constexpr = period_codes(BITS, WIDE)
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
        streams = ()
        for r in tl.static_range(ROWS):
            at = indices + rows[r] * words
            streams = streams + (load_words(at, 0, period, period < stop, WORDS, words, WIDE),)
        for j in tl.static_range(CODES):
            vector = period * CODES + j
            here = (period < stop) & (vector < vectors)
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
                code = (code_of(streams[r], j, BITS) & ((1 << BITS) - 1)).to(tl.int32)
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
                        sums = sums + (tl.fma(weight, values[t], parts[t * ROWS + r]),)
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
            sums = sums + (tl.fma(part, factors[r], totals[t * ROWS + r]),)
            zeros = zeros + (tl.zeros_like(part),)
    return sums, zeros


def decode(x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
    """As `product` of triton_product.py, for x of one to four tokens."""
    indices, codebooks, *scales = matrix.packed
    assert indices is not None and codebooks is not None
    rows, columns, dim, _, bits = matrix.geometry[:5]
    tokens, codes = x.shape[0], period_codes(bits, 1)
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


BACKENDS = backends("gptvq", 6, matrix, decode, _check, packed_gradients)
