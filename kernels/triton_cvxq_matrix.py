"""CVXQ for the Triton kernels that all methods share: tiles, rows, sums of gradients.

Where a group's codes start is the number of words of all groups before it. Two small launches per
call sum these by tiles of 64 columns (from the depths, 4 bits per group); within a tile, programs
sum for themselves. So nothing is kept besides the format. A tile lies within a cluster.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from hf_vq_kernels.cvxq_reference import LOCATION_UNIT, row_numbers
from hf_vq_kernels.levels import level_table_on
from hf_vq_kernels.triton_common import TILE_COLUMNS, on_device
from hf_vq_kernels.triton_gradients import add_fixed, sum_gradients
from hf_vq_kernels.triton_product import Matrix
from torch import Tensor

_TILES_AT_ONCE = 16  # that a program of `_tile_sizes` sums


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
    """Adds gradients of weights times their levels to those of scales (clusters, columns)."""
    IN: tl.constexpr = GEOMETRY[1]
    level, cluster, column = _level_tile(packed, GEOMETRY, row_tile, column_tile, ROWS, COLUMNS)
    total = tl.sum(level * tile, axis=0)
    add_fixed(sums + cluster * IN + column, total, unit, column < IN)


@triton.jit
def depth_of(depths, cluster, column, IN: tl.constexpr):
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
    sizes = (depth_of(depths, cluster, column, IN) * GROUP_ROWS + 31) >> 5
    total = tl.sum(sizes, axis=1).to(tl.int64)
    tl.store(out + cluster * all_tiles + tile, total, mask=tile < all_tiles)


@triton.jit
def first_word(ends, tile):
    """First word of a tile, where `ends` holds the sums of the sizes of the tiles up to each."""
    return tl.load(ends + tile - 1, mask=tile > 0, other=0)


@triton.jit
def scale_and_location(
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
def levels_of(words, levels, first, depth, row, inside):
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
    return rows_of(packed[6], number, OUT)


@triton.jit
def rows_of(row_perm, number, OUT: tl.constexpr):
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
def _level_tile(
    packed, GEOMETRY: tl.constexpr, row_tile, column_tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """A tile of levels (0 beyond the matrix), its cluster and its columns."""
    words, depths, ends = packed[0], packed[1], packed[2]
    OUT: tl.constexpr = GEOMETRY[0]
    IN: tl.constexpr = GEOMETRY[1]
    GROUP_ROWS: tl.constexpr = GEOMETRY[2]
    cluster, within, number = _position(row_tile, GEOMETRY, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    depth = depth_of(depths, cluster, column, IN)
    sizes = (depth * GROUP_ROWS + 31) >> 5
    first = first_word(ends, cluster * ((IN + COLUMNS - 1) // COLUMNS) + column_tile)
    first = first + tl.cumsum(sizes, axis=0) - sizes
    inside = (number < OUT)[:, None] & (column < IN)[None, :]
    level = levels_of(words, packed[7], first[None, :], depth[None, :], within[:, None], inside)
    return level, cluster, column


@triton.jit
def _tile(
    packed, GEOMETRY: tl.constexpr, row_tile, column_tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    OUT: tl.constexpr = GEOMETRY[0]
    IN: tl.constexpr = GEOMETRY[1]
    GROUP_ROWS: tl.constexpr = GEOMETRY[2]
    CLUSTERS: tl.constexpr = (OUT + GROUP_ROWS - 1) // GROUP_ROWS
    level, cluster, column = _level_tile(packed, GEOMETRY, row_tile, column_tile, ROWS, COLUMNS)
    scale, shift = scale_and_location(
        packed[3], packed[4], packed[5], cluster, column, IN, CLUSTERS
    )  # fmt: skip
    return scale[None, :] * level + shift[None, :]


@triton.jit
def _some_rows(packed, GEOMETRY: tl.constexpr, row, column_tile, COLUMNS: tl.constexpr):
    """A tile of any rows (n,) of the matrix; finite for numbers that are no rows.

    packed[6] says here where every row is stored, not which row is stored where.
    """
    OUT: tl.constexpr = GEOMETRY[0]
    IN: tl.constexpr = GEOMETRY[1]
    GROUP_ROWS: tl.constexpr = GEOMETRY[2]
    CLUSTERS: tl.constexpr = (OUT + GROUP_ROWS - 1) // GROUP_ROWS
    row = tl.where((row >= 0) & (row < OUT), row, 0)
    if packed[6] is not None:
        row = tl.load(packed[6] + row)
    cluster = (row // GROUP_ROWS).to(tl.int64)[:, None]
    within = (row % GROUP_ROWS)[:, None]
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    depth = depth_of(packed[1], cluster, column, IN)
    sizes = (depth * GROUP_ROWS + 31) >> 5
    first = first_word(packed[2], cluster * ((IN + COLUMNS - 1) // COLUMNS) + column_tile)
    first = first + tl.cumsum(sizes, axis=1) - sizes
    inside = column < IN
    level = levels_of(packed[0], packed[7], first, depth, within, inside)
    scale, shift = scale_and_location(
        packed[3], packed[4], packed[5], cluster, column, IN, CLUSTERS
    )  # fmt: skip
    return scale * level + shift


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
        (out_features, in_features, group_rows), _tile, _row_numbers,
        _column_numbers, _some_rows, _scatter,
    )  # fmt: skip


def by_row(matrix: Matrix) -> Matrix:
    """The matrix with its permutation inverted, as `_some_rows` takes it."""
    perm = matrix.packed[6]
    if perm is None:
        return matrix
    order = row_numbers(perm)
    places = torch.arange(matrix.out_features, dtype=torch.int32, device=perm.device)
    # into zeros, so that the all-zero permutation of a layer without values points inside
    places = torch.zeros_like(places).scatter_(0, order, places)
    return matrix._replace(packed=(*matrix.packed[:6], places, matrix.packed[7]))


def packed_gradients(
    grad: Tensor,
    x: Tensor,
    packed: tuple[Any, ...],
    geometry: tuple[Any, ...],
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """As `gradients` of autograd.py, but from grad (tokens, out) and x (tokens, in)."""
    _, _, scales, _, location, row_perm = packed
    out_features, group_rows, _ = geometry
    clusters, columns = scales.shape
    out: list[Tensor | None] = [None] * 6
    sums = None
    in_units = location is not None and not location.is_floating_point()
    if needed[4] or (needed[2] and in_units):
        # what a cluster has in common is multiplied with the sum of its rows
        clustered = grad if row_perm is None else grad.index_select(1, row_numbers(row_perm))
        clustered = F.pad(clustered, (0, clusters * group_rows - out_features))
        clustered = clustered.view(-1, clusters, group_rows).sum(2, dtype=torch.float32)
        sums = clustered.T @ x.float()
    if needed[2]:
        arguments: Any = (*packed, columns, *geometry)
        weight = matrix(*arguments)
        total = sum_gradients(grad, x, weight, scales.numel(), weight.packed[7])
        total = total.view(scales.shape)
        if in_units and sums is not None and location is not None:
            total += sums * location.float() * LOCATION_UNIT
        out[2] = total.to(scales.dtype)
    if needed[4] and sums is not None and location is not None:
        out[4] = sums.to(location.dtype)
    return out
