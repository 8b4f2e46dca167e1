"""CVXQ through Triton: a tile of weights, and the product for one to four tokens.

Where a group's codes start is the number of words of all groups before it. Two small launches per
call sum these by tiles of 64 columns (from the depths, 4 bits per group); within a tile, programs
sum for themselves. So nothing is kept besides the format.

A tile lies within a cluster. Every thread of `_decode` has a column and reads some rows of its
groups; scales and locations act on the activations, once for all rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from hf_vq_kernels.levels import level_table_on
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
from hf_vq_kernels.triton_product import Matrix
from torch import Tensor

_TILES_AT_ONCE = 16  # that a program of `_tile_sizes` sums


@triton.jit
def _depth_of(depths, cluster, column, IN: tl.constexpr):
    words: tl.constexpr = (IN + 7) // 8
    word = tl.load(depths + cluster * words + (column >> 3), mask=column < IN, other=0)
    return tl.where(column < IN, (word >> ((column & 7) * 4)) & 15, 0)


@triton.jit
def _tile_sizes(
    depths,
    out,
    IN: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Words of every tile of COLUMNS columns of a cluster: int64 (clusters, tiles)."""
    cluster = tl.program_id(0).to(tl.int64)
    all_tiles: tl.constexpr = (IN + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    column = tile[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    sizes = (_depth_of(depths, cluster, column, IN) * GROUP_ROWS + 31) >> 5
    total = tl.sum(sizes, axis=1).to(tl.int64)
    tl.store(out + cluster * all_tiles + tile, total, mask=tile < all_tiles)


@triton.jit
def _first_word(ends, tile):
    """First word of a tile, where `ends` holds the sums of the sizes of the tiles up to each."""
    return tl.load(ends + tile - 1, mask=tile > 0, other=0)


@triton.jit
def _scale_and_location(
    scales, grid, location, cluster, column, IN: tl.constexpr, CLUSTERS: tl.constexpr
):
    """Scale of groups and their location (0.0 if there are none), float32; `cluster` is int64."""
    here = column < IN
    scale = tl.load(scales + cluster * IN + column, mask=here, other=0).to(tl.float32)
    if grid is not None:
        offset = tl.load(grid + cluster).to(tl.float32)
        step = tl.load(grid + CLUSTERS + cluster).to(tl.float32)
        scale = tl.exp2(offset + step * scale)
    shift = tl.zeros_like(scale)
    if location is not None:
        shift = tl.load(location + cluster * IN + column, mask=here, other=0).to(tl.float32)
        if location.dtype.element_ty == tl.int8:
            shift = shift * 0.015625 * scale
    return scale, shift


@triton.jit
def _levels_of(words, levels, first, depth, row, inside):
    """Level of row `row` of groups that start at word `first`; the four broadcast."""
    bit = depth * row
    at = words + first + (bit >> 5)
    offset = (bit & 31).to(tl.uint32)
    inside = inside & (depth > 0)
    code = tl.load(at, mask=inside, other=0).to(tl.uint32, bitcast=True) >> offset
    crosses = inside & (offset.to(tl.int32) + depth > 32)
    high = tl.load(at + 1, mask=crosses, other=0).to(tl.uint32, bitcast=True)
    code |= (high << 1) << (31 - offset)  # two steps: shifting by 32 is undefined
    base = 1 << depth
    return tl.load(levels + base + (code.to(tl.int32, bitcast=True) & (base - 1)))


@triton.jit
def _position(row_tile, GEOMETRY: tl.constexpr, ROWS: tl.constexpr):
    """Cluster of a tile, rows within the cluster, and numbers of these in clustered order."""
    OUT: tl.constexpr = GEOMETRY[0]
    GROUP_ROWS: tl.constexpr = GEOMETRY[2]
    tiles: tl.constexpr = (GROUP_ROWS + ROWS - 1) // ROWS
    cluster = row_tile // tiles
    within = row_tile % tiles * ROWS + tl.arange(0, ROWS)
    number = cluster * GROUP_ROWS + within
    return cluster.to(tl.int64), within, tl.where(within < GROUP_ROWS, number, OUT)


@triton.jit
def _row_numbers(packed, GEOMETRY: tl.constexpr, row_tile, ROWS: tl.constexpr):
    OUT: tl.constexpr = GEOMETRY[0]
    _, _, number = _position(row_tile, GEOMETRY, ROWS)
    return _rows_of(packed[6], number, OUT)


@triton.jit
def _rows_of(row_perm, number, OUT: tl.constexpr):
    """Rows of the matrix that have numbers `number` in clustered order; OUT for those beyond."""
    row = number
    if row_perm is not None:
        row = tl.load(row_perm + number, mask=number < OUT, other=0).to(tl.int32)
        if row_perm.dtype.element_ty == tl.int16:
            row = row & 0xFFFF
    return tl.where(number < OUT, row, OUT)


@triton.jit
def _column_numbers(packed, GEOMETRY: tl.constexpr, column_tile, COLUMNS: tl.constexpr):
    return column_tile * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def _tile(
    packed, GEOMETRY: tl.constexpr, row_tile, column_tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    words, depths, ends, scales, grid, location, _, levels = packed
    OUT: tl.constexpr = GEOMETRY[0]
    IN: tl.constexpr = GEOMETRY[1]
    GROUP_ROWS: tl.constexpr = GEOMETRY[2]
    CLUSTERS: tl.constexpr = (OUT + GROUP_ROWS - 1) // GROUP_ROWS
    cluster, within, number = _position(row_tile, GEOMETRY, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    depth = _depth_of(depths, cluster, column, IN)
    sizes = (depth * GROUP_ROWS + 31) >> 5
    first = _first_word(ends, cluster * ((IN + COLUMNS - 1) // COLUMNS) + column_tile)
    first = first + tl.cumsum(sizes, axis=0) - sizes
    scale, shift = _scale_and_location(scales, grid, location, cluster, column, IN, CLUSTERS)
    inside = (number < OUT)[:, None] & (column < IN)[None, :]
    level = _levels_of(words, levels, first[None, :], depth[None, :], within[:, None], inside)
    return scale[None, :] * level + shift[None, :]


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
        depth = _depth_of(depths, cluster, column, IN)
        sizes = (depth * GROUP_ROWS + 31) >> 5
        first = _first_word(ends, cluster * column_tiles + tile * (LANES // COLUMNS))
        first = first + tl.cumsum(sizes, axis=0) - sizes
        scale, shift = _scale_and_location(scales, grid, location, cluster, column, IN, CLUSTERS)
        values = ()
        sums = ()
        for t in tl.static_range(TOKENS):
            value = tl.load(x + t * IN + column, mask=here, other=0.0).to(tl.float32)
            values = values + (value * scale,)
            sums = sums + (shifts[t] + value * shift,)
        shifts = sums
        weights = ()
        for r in tl.static_range(ROWS):  # beyond the cluster: its last row, not stored
            row = tl.minimum(first_row + r, GROUP_ROWS - 1)
            weights = weights + (_levels_of(words, levels, first, depth, row, here),)
        sums = ()
        for t in tl.static_range(TOKENS):
            for r in tl.static_range(ROWS):
                sums = sums + (totals[t * ROWS + r] + weights[r] * values[t],)
        totals = sums
    y = sum_lanes(totals, TOKENS * ROWS, PADDED)
    item = tl.arange(0, PADDED)
    token = item // ROWS
    within = first_row + item % ROWS
    number = cluster.to(tl.int32) * GROUP_ROWS + within
    number = tl.where((within < GROUP_ROWS) & (token < TOKENS), number, OUT)
    row = _rows_of(row_perm, number, OUT)
    if location is not None:
        for t in tl.static_range(TOKENS):
            y += tl.where(token == t, tl.sum(shifts[t], axis=0), 0.0)
    if bias is not None:
        y += tl.load(bias + row, mask=row < OUT, other=0.0).to(tl.float32)
    at = (split.to(tl.int64) * TOKENS + token) * OUT + row
    tl.store(out + at, y.to(out.dtype.element_ty), mask=row < OUT)


def matrix(
    words: Tensor,
    depths: Tensor,
    scales: Tensor,
    scale_grid: Tensor | None,
    location: Tensor | None,
    row_perm: Tensor | None,
    in_features: int,
    out_features: int,
    group_rows: int,
    levels: str,
) -> Matrix:
    """The packed matrix of `cvxq_dequantize` for the kernels of triton_product.py."""
    clusters = scales.shape[0]
    tiles = triton.cdiv(in_features, TILE_COLUMNS)
    sizes = depths.new_empty((clusters, tiles), dtype=torch.int64)
    with on_device(depths):
        _tile_sizes[(clusters, triton.cdiv(tiles, _TILES_AT_ONCE))](
            depths, sizes, IN=in_features, GROUP_ROWS=group_rows, TILES=_TILES_AT_ONCE,
            COLUMNS=TILE_COLUMNS,
        )  # fmt: skip
    ends = sizes.flatten().cumsum(0)
    table = level_table_on(levels, words.device)
    packed = (words, depths, ends, scales, scale_grid, location, row_perm, table)
    return Matrix(
        "cvxq", out_features, in_features, clusters, group_rows, packed,
        (out_features, in_features, group_rows), _tile, _row_numbers, _column_numbers,
    )  # fmt: skip


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


BACKENDS = backends("cvxq", 6, matrix, decode, _check)
