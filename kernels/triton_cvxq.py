"""CVXQ through Triton: the product for one to four tokens. The rest is triton_cvxq_matrix.py.

Every thread of `_decode` has a column and reads some rows of its groups; scales and locations act
on the activations, once for all rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from hf_vq_kernels.triton_backend import backends
from hf_vq_kernels.triton_common import (
    TILE_COLUMNS,
    WARP,
    config,
    next_power_of_2,
    on_device,
    splits_for,
    sum_lanes,
    sum_splits,
    tuned,
)
from hf_vq_kernels.triton_cvxq_matrix import (
    by_row,
    depth_of,
    first_word,
    matrix,
    packed_gradients,
    rows_of,
    scale_and_location,
)
from hf_vq_kernels.triton_product import Matrix
from torch import Tensor


@triton.jit
def _levels_of_rows(words, levels, first, sizes, depth, row, ROWS: tl.constexpr):
    """Levels of rows row .. row + ROWS - 1 (at most 8) of groups, each (lanes,), in a tuple.

    `first`, `sizes`, `depth`: where the words of the groups begin, how many they are, and the bits
    of a code. Words are read once for all rows, whose codes are in 64 bits of three of them. Rows
    beyond the group get any level.
    """
    bit = depth * row
    number = bit >> 5
    offset = bit & 31
    last = offset + ROWS * depth
    at = words + first + number
    word = tl.load(at, mask=number < sizes, other=0)
    window = word.to(tl.uint32, bitcast=True).to(tl.uint64)
    word = tl.load(at + 1, mask=(number + 1 < sizes) & (last > 32), other=0)
    window |= word.to(tl.uint32, bitcast=True).to(tl.uint64) << 32
    window = window >> offset.to(tl.uint64)
    if ROWS * 8 + 31 > 64:
        word = tl.load(at + 2, mask=(number + 2 < sizes) & (last > 64), other=0)
        # two steps: shifting by 64 is undefined
        word = word.to(tl.uint32, bitcast=True).to(tl.uint64) << 1
        window |= word << (63 - offset).to(tl.uint64)
    base = 1 << depth
    out = ()
    for r in tl.static_range(ROWS):
        code = (window >> (depth * r).to(tl.uint64)).to(tl.int32) & (base - 1)
        out = out + (tl.load(levels + (base + code)),)
    return out


@tuned(
    ["GEOMETRY", "TOKENS", "SPLITS"],
    [
        config(4, ROWS=8, LANES=4 * WARP),
        config(2, ROWS=8, LANES=2 * WARP),
        config(4, ROWS=4, LANES=4 * WARP),
        config(4, ROWS=16, LANES=4 * WARP),
        config(8, ROWS=8, LANES=8 * WARP),
        config(2, ROWS=16, LANES=2 * WARP),
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
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    words, depths, ends, scales, grid, location, row_perm, levels = packed
    OUT: tl.constexpr = GEOMETRY[0]
    IN: tl.constexpr = GEOMETRY[1]
    GROUP_ROWS: tl.constexpr = GEOMETRY[2]
    CLUSTERS: tl.constexpr = (OUT + GROUP_ROWS - 1) // GROUP_ROWS
    column_tiles: tl.constexpr = (IN + COLUMNS - 1) // COLUMNS
    lane_tiles: tl.constexpr = (IN + LANES - 1) // LANES
    per_split: tl.constexpr = (lane_tiles + SPLITS - 1) // SPLITS
    row_tiles: tl.constexpr = (GROUP_ROWS + ROWS - 1) // ROWS
    PADDED: tl.constexpr = next_power_of_2(TOKENS * ROWS)
    AT_ONCE: tl.constexpr = min(ROWS, 8)
    cluster = (tl.program_id(0) // row_tiles).to(tl.int64)
    first_row = tl.program_id(0) % row_tiles * ROWS
    split = tl.program_id(1)
    start = split * per_split
    totals = ()
    for _ in tl.static_range(TOKENS * ROWS):
        totals = totals + (tl.zeros((LANES,), dtype=tl.float32),)
    shifts = ()
    for _ in tl.static_range(TOKENS):
        shifts = shifts + (tl.zeros((LANES,), dtype=tl.float32),)
    for tile in range(start, tl.minimum(start + per_split, lane_tiles)):
        column = tile * LANES + tl.arange(0, LANES)
        here = column < IN
        depth = depth_of(depths, cluster, column, IN)
        sizes = (depth * GROUP_ROWS + 31) >> 5
        first = first_word(ends, cluster * column_tiles + tile * (LANES // COLUMNS))
        first = first + tl.cumsum(sizes, axis=0) - sizes
        scale, shift = scale_and_location(scales, grid, location, cluster, column, IN, CLUSTERS)
        values = ()
        sums = ()
        for t in tl.static_range(TOKENS):
            value = tl.load(x + t * IN + column, mask=here, other=0.0).to(tl.float32)
            values = values + (value * scale,)
            sums = sums + (shifts[t] + value * shift,)
        shifts = sums
        weights = ()
        for r in tl.static_range(0, ROWS, AT_ONCE):
            weights = weights + _levels_of_rows(
                words, levels, first, sizes, depth, first_row + r, AT_ONCE
            )
        sums = ()
        for t in tl.static_range(TOKENS):
            for r in tl.static_range(ROWS):
                sums = sums + (tl.fma(weights[r], values[t], totals[t * ROWS + r]),)
        totals = sums
    y = sum_lanes(totals, TOKENS * ROWS, PADDED)
    item = tl.arange(0, PADDED)
    token = item // ROWS
    within = first_row + item % ROWS
    number = cluster.to(tl.int32) * GROUP_ROWS + within
    number = tl.where((within < GROUP_ROWS) & (token < TOKENS), number, OUT)
    row = rows_of(row_perm, number, OUT)
    if location is not None:
        for t in tl.static_range(TOKENS):
            y += tl.where(token == t, tl.sum(shifts[t], axis=0), 0.0)
    if bias is not None:
        y += tl.load(bias + row, mask=row < OUT, other=0.0).to(tl.float32)
    at = (split.to(tl.int64) * TOKENS + token) * OUT + row
    tl.store(out + at, y.to(out.dtype.element_ty), mask=row < OUT)


def decode(x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
    """As `product` of triton_product.py, for x of one to four tokens."""
    tokens, rows = x.shape[0], matrix.out_features
    splits = splits_for(matrix.row_tiles(8), triton.cdiv(matrix.in_features, 256), x.device)
    out = x.new_empty((tokens, rows))
    parts = out if splits == 1 else x.new_empty((splits, tokens, rows), dtype=torch.float32)

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return matrix.row_tiles(meta["ROWS"]), splits

    with on_device(x):
        _decode[grid](
            x, matrix.packed, bias if splits == 1 else None, parts, GEOMETRY=matrix.geometry,
            TOKENS=tokens, SPLITS=splits, COLUMNS=TILE_COLUMNS,
        )  # fmt: skip
        if splits > 1:
            sum_splits(parts, bias, out)
    return out


def _check(*arguments: Any) -> str | None:
    depths, scales, columns = arguments[1], arguments[2], arguments[6]
    if scales.shape[1] != columns or depths.shape[1] != triton.cdiv(columns, 8):
        return f"scales of {scales.shape[1]} columns are not those of {columns} columns"
    return None


BACKENDS = backends("cvxq", 6, matrix, decode, _check, packed_gradients, by_row=by_row)
