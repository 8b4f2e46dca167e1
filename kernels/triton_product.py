"""Kernels that are the same for all methods: dequantize, product, transposed product.

They compute with tiles of weights, decoded in registers by a function of the method:

    tile(packed, GEOMETRY, row_tile, column_tile, ROWS, COLUMNS) -> float32 (ROWS, COLUMNS)
    rows(packed, GEOMETRY, row_tile, ROWS)  -> int32 (ROWS,), rows of the matrix; others too large
    columns(packed, GEOMETRY, column_tile, COLUMNS) -> int32 (COLUMNS,), likewise

(and for embeddings and gradients `some_rows` and `scatter`: see triton_embedding.py and
triton_gradients.py). A method orders rows and columns as it stores them. Its rows come in `banks`
of `bank_rows` each, and a tile lies within a bank. What a tile holds beyond the matrix is finite
and has no effect.

The product multiplies tiles, rounded to the dtype of the activations, in tensor cores, and sums in
float32. Few tokens leave most of a GPU idle, so sums are cut into parts, which are added in a fixed
order: results do not depend on scheduling.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from hf_vq_kernels.triton_common import (
    TILE_COLUMNS,
    config,
    multiply,
    on_device,
    power_of_two,
    splits_for,
    sum_splits,
    tuned,
)
from torch import Tensor


class Matrix(NamedTuple):
    """A packed matrix as these kernels see it."""

    name: str
    out_features: int
    in_features: int
    banks: int
    bank_rows: int
    packed: tuple[Tensor | None, ...]
    geometry: tuple[Any, ...]
    tile: Any
    rows: Any
    columns: Any
    some_rows: Any
    scatter: Any

    @property
    def device(self) -> torch.device:
        """Where the packed tensors are."""
        for tensor in self.packed:
            if tensor is not None:
                return tensor.device
        raise ValueError("a packed matrix has tensors")

    def row_tiles(self, rows: int) -> int:
        """Number of tiles of `rows` rows."""
        return self.banks * triton.cdiv(self.bank_rows, rows)

    def constants(self) -> dict[str, Any]:
        """The constants of all kernels of this file."""
        return {
            "NAME": self.name,
            "GEOMETRY": self.geometry,
            "TILE": self.tile,
            "ROW_NUMBERS": self.rows,
            "COLUMN_NUMBERS": self.columns,
            "OUT": self.out_features,
            "IN": self.in_features,
            "BANKS": self.banks,
            "BANK_ROWS": self.bank_rows,
            "COLUMNS": TILE_COLUMNS,
        }


_KEY = ["GEOMETRY", "NAME"]


@tuned(
    _KEY,
    [
        config(4, ROWS=32),
        config(4, ROWS=64),
        config(8, ROWS=64),
        config(8, ROWS=128),
    ],
)
@triton.jit
def _dequantize(
    packed,
    out,
    NAME: tl.constexpr,
    GEOMETRY: tl.constexpr,
    TILE: tl.constexpr,
    ROW_NUMBERS: tl.constexpr,
    COLUMN_NUMBERS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    BANKS: tl.constexpr,
    BANK_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row_tile = tl.program_id(0)
    column_tile = tl.program_id(1)
    weight = TILE(packed, GEOMETRY, row_tile, column_tile, ROWS, COLUMNS)
    row = ROW_NUMBERS(packed, GEOMETRY, row_tile, ROWS)
    column = COLUMN_NUMBERS(packed, GEOMETRY, column_tile, COLUMNS)
    at = out + row.to(tl.int64)[:, None] * IN + column[None, :]
    inside = (row < OUT)[:, None] & (column < IN)[None, :]
    tl.store(at, weight.to(out.dtype.element_ty), mask=inside)


@tuned(
    [*_KEY, "TOKENS", "SPLITS"],
    [
        config(4, 3, ROWS=64),
        config(4, 1, ROWS=32),
        config(4, 2, ROWS=128),
        config(8, 2, ROWS=64),
        config(8, 2, ROWS=128),
        config(8, 3, ROWS=128),
    ],
)
@triton.jit
def _product(
    x,
    packed,
    bias,
    out,
    tokens,
    NAME: tl.constexpr,
    GEOMETRY: tl.constexpr,
    TILE: tl.constexpr,
    ROW_NUMBERS: tl.constexpr,
    COLUMN_NUMBERS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    BANKS: tl.constexpr,
    BANK_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row_tile = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    split = tl.program_id(2)
    column_tiles: tl.constexpr = (IN + COLUMNS - 1) // COLUMNS
    per_split: tl.constexpr = (column_tiles + SPLITS - 1) // SPLITS
    start = split * per_split
    x_row = x + token.to(tl.int64)[None, :] * IN
    total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    for column_tile in range(start, tl.minimum(start + per_split, column_tiles)):
        weight = TILE(packed, GEOMETRY, row_tile, column_tile, ROWS, COLUMNS)
        column = COLUMN_NUMBERS(packed, GEOMETRY, column_tile, COLUMNS)
        inside = (column < IN)[:, None] & (token < tokens)[None, :]
        values = tl.load(x_row + column[:, None], mask=inside, other=0.0)
        total = multiply(weight, values, total)
    row = ROW_NUMBERS(packed, GEOMETRY, row_tile, ROWS)
    inside = (row < OUT)[:, None] & (token < tokens)[None, :]
    at = (split.to(tl.int64) * tokens + token)[None, :] * OUT + row[:, None]
    if bias is not None:
        total += tl.load(bias + row, mask=row < OUT, other=0.0).to(tl.float32)[:, None]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@tuned(
    [*_KEY, "TOKENS", "SPLITS"],
    [
        config(4, 2, ROWS=64),
        config(4, 1, ROWS=32),
        config(4, 3, ROWS=64),
        config(8, 2, ROWS=64),
        config(8, 2, ROWS=128),
    ],
)
@triton.jit
def _transposed_product(
    grad,
    packed,
    out,
    tokens,
    NAME: tl.constexpr,
    GEOMETRY: tl.constexpr,
    TILE: tl.constexpr,
    ROW_NUMBERS: tl.constexpr,
    COLUMN_NUMBERS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    BANKS: tl.constexpr,
    BANK_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    column_tile = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    split = tl.program_id(2)
    row_tiles: tl.constexpr = BANKS * ((BANK_ROWS + ROWS - 1) // ROWS)
    per_split: tl.constexpr = (row_tiles + SPLITS - 1) // SPLITS
    start = split * per_split
    grad_row = grad + token.to(tl.int64)[:, None] * OUT
    total = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for row_tile in range(start, tl.minimum(start + per_split, row_tiles)):
        weight = TILE(packed, GEOMETRY, row_tile, column_tile, ROWS, COLUMNS)
        row = ROW_NUMBERS(packed, GEOMETRY, row_tile, ROWS)
        inside = (token < tokens)[:, None] & (row < OUT)[None, :]
        values = tl.load(grad_row + row[None, :], mask=inside, other=0.0)
        total = multiply(values, weight.to(values.dtype), total)
    column = COLUMN_NUMBERS(packed, GEOMETRY, column_tile, COLUMNS)
    inside = (token < tokens)[:, None] & (column < IN)[None, :]
    at = (split.to(tl.int64) * tokens + token)[:, None] * IN + column[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def dequantize(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """The dense weight (out_features, in_features) in `dtype`."""
    device = matrix.device
    out = torch.empty((matrix.out_features, matrix.in_features), dtype=dtype, device=device)

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return matrix.row_tiles(meta["ROWS"]), triton.cdiv(matrix.in_features, TILE_COLUMNS)

    with on_device(out):
        _dequantize[grid](matrix.packed, out, **matrix.constants())
    return out


def product(
    x: Tensor, matrix: Matrix, bias: Tensor | None, dtype: torch.dtype | None = None
) -> Tensor:
    """x (tokens, in_features), contiguous, times the matrix transposed, plus bias (out_features,).

    The result (tokens, out_features) is in `dtype`, by default that of x.
    """
    tokens, width = x.shape[0], matrix.out_features
    block = power_of_two(tokens, 16, 128 if x.dtype.itemsize == 2 else 32)
    tiles = triton.cdiv(tokens, block)
    splits = splits_for(
        matrix.row_tiles(64) * tiles, triton.cdiv(matrix.in_features, TILE_COLUMNS), x.device
    )
    out = x.new_empty((tokens, width), dtype=dtype or x.dtype)
    parts = out if splits == 1 else x.new_empty((splits, tokens, width), dtype=torch.float32)

    def grid(meta: dict[str, Any]) -> tuple[int, int, int]:
        return matrix.row_tiles(meta["ROWS"]), tiles, splits

    with on_device(x):
        _product[grid](
            x, matrix.packed, bias if splits == 1 else None, parts, tokens, **matrix.constants(),
            TOKENS=block, SPLITS=splits,
        )  # fmt: skip
        if splits > 1:
            sum_splits(parts, bias, out)
    return out


def transposed_product(grad: Tensor, matrix: Matrix, dtype: torch.dtype | None = None) -> Tensor:
    """grad (tokens, out_features), contiguous, times the matrix: (tokens, in_features).

    In `dtype`, by default that of grad.
    """
    tokens, width = grad.shape[0], matrix.in_features
    block = power_of_two(tokens, 16, 128 if grad.dtype.itemsize == 2 else 32)
    tiles = triton.cdiv(tokens, block)
    splits = splits_for(triton.cdiv(width, TILE_COLUMNS) * tiles, matrix.row_tiles(64), grad.device)
    out = grad.new_empty((tokens, width), dtype=dtype or grad.dtype)
    parts = out if splits == 1 else grad.new_empty((splits, tokens, width), dtype=torch.float32)
    grid = (triton.cdiv(width, TILE_COLUMNS), tiles, splits)
    with on_device(grad):
        _transposed_product[grid](
            grad, matrix.packed, parts, tokens, **matrix.constants(), TOKENS=block, SPLITS=splits,
        )  # fmt: skip
        if splits > 1:
            sum_splits(parts, None, out)
    return out
