"""VPTQ through Triton: the product for one to four tokens. The rest is triton_vptq_matrix.py.

A program of `_decode` computes the rows of some row blocks. Every thread holds a few words of the
stream of each, takes their codes apart with constant shifts, and multiplies the vector of each code
with one activation, which serves all rows of all blocks. The permutation and the norm act on the
activations: column norms scale them, and what the norms add to weights is summed on the side.
Codebooks of up to 4096 vectors stay in the first-level cache, those of 65536 in the second.
"""

from __future__ import annotations

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
    load_units,
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
from hf_vq_kernels.triton_product import Matrix
from hf_vq_kernels.triton_vptq_inputs import activations
from hf_vq_kernels.triton_vptq_matrix import arranged, matrix, packed_gradients
from torch import Tensor


def _fits(sizes: dict[str, Any], constants: dict[str, Any]) -> bool:
    geometry = constants["GEOMETRY"]
    bits, width = geometry[4] + geometry[6], geometry[7]
    words = triton.cdiv(width * bits, 32)
    return wide_enough(sizes["WIDE"], bits, words, constants["TOKENS"])


@tuned(
    ["GEOMETRY", "TOKENS", "SPLITS", "BOOK_TYPE"],
    [
        config(4, BLOCKS=1, LANES=4 * WARP, WIDE=1),
        config(4, BLOCKS=2, LANES=4 * WARP, WIDE=1),
        config(2, BLOCKS=2, LANES=2 * WARP, WIDE=1),
        config(8, BLOCKS=1, LANES=8 * WARP, WIDE=1),
        config(4, BLOCKS=4, LANES=4 * WARP, WIDE=1),
        config(2, BLOCKS=1, LANES=2 * WARP, WIDE=4),
        config(2, BLOCKS=2, LANES=2 * WARP, WIDE=4),
        config(4, BLOCKS=1, LANES=4 * WARP, WIDE=4),
        config(4, BLOCKS=1, LANES=4 * WARP, WIDE=2),
    ],
    fits=_fits,
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
    WIDE: tl.constexpr,
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
    # A period: the fewest words that hold whole codes and can be read WIDE at a time. Periods of
    # all groups in one row.
    WORDS: tl.constexpr = period_words(ALL, WIDE)
    CODES: tl.constexpr = period_codes(ALL, WIDE)
    group_periods: tl.constexpr = (WIDTH + CODES - 1) // CODES
    periods: tl.constexpr = (IN - OUTLIERS) // WIDTH * group_periods
    per_split: tl.constexpr = (periods + SPLITS - 1) // SPLITS
    PAIR: tl.constexpr = 2 - DIM // UNIT % 2  # units of a codebook that one load reads
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
        streams = ()
        for b in tl.static_range(BLOCKS):
            at = (group * all_blocks + blocks[b]) * words
            streams = streams + (
                load_words(indices, at, within, period < stop, WORDS, words, WIDE),
            )
        for j in tl.static_range(CODES):
            here = (period < stop) & (within * CODES + j < WIDTH)
            stored = tl.where(here, OUTLIERS + group * WIDTH + within * CODES + j, IN)
            values, offsets = activations(
                x, stored, perm, norm_scale, norm_bias, offsets, IN, NORM, TOKENS
            )
            codes = ()
            for b in tl.static_range(BLOCKS):
                codes = codes + (code_of(streams[b], j, ALL),)
            for e in tl.static_range(DIM):
                if e % (UNIT * PAIR) == 0:
                    units = ()
                    res_units = ()
                    for b in tl.static_range(BLOCKS):
                        number = (codes[b] & (SIZE - 1)).to(tl.int32)
                        entry = (group * SIZE + number) * (DIM // UNIT) + e // UNIT
                        units = units + (load_units(books, entry, here, PAIR),)
                        if res_books is not None:
                            number = (codes[b] >> BITS).to(tl.int32) & (RES_SIZE - 1)
                            entry = (group * RES_SIZE + number) * (DIM // UNIT) + e // UNIT
                            res_units = res_units + (load_units(res_books, entry, here, PAIR),)
                # totals of entry e of every (token, block) are replaced; others stay
                sums = ()
                for t in tl.static_range(TOKENS):
                    for b in tl.static_range(BLOCKS):
                        for f in tl.static_range(DIM):
                            total = totals[(t * BLOCKS + b) * DIM + f]
                            if f == e:
                                weight = entry_of(units[b][e // UNIT % PAIR], e % UNIT, BOOK_TYPE)
                                if res_books is not None:
                                    weight += entry_of(
                                        res_units[b][e // UNIT % PAIR], e % UNIT, BOOK_TYPE
                                    )
                                total = tl.fma(weight, values[t], total)
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
                    sums = sums + (tl.fma(weights[r], values[t], totals[t * ROWS + r]),)
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
    codes = period_codes(bits + res_bits, 1)
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


BACKENDS = backends("vptq", 8, matrix, decode, _check, packed_gradients, arranged)
