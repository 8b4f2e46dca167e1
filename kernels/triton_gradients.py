"""Gradients of codebooks and scales, from those of the product, without a gradient of the weight.

The gradient of a tile of weights, grad.T @ x, is computed in tensor cores, stays in registers, and
is added at once to the entries that the tile was decoded from, by a function of the method:

    scatter(packed, GEOMETRY, sums, row_tile, column_tile, tile, unit, ROWS, COLUMNS)

Which program adds first is chance, so sums are integers, which give the same bits in any order, as
float32 would not: 64 bits, in units of 2**-61 to 2**-60 of the largest sum that the norms of `grad`
and `x` allow, that over all weights of the matrix. For 28672 x 8192 weights a unit is below 2**-32
of the mean product of norms, to which an entry adds up in thousands of weights.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from hf_vq_kernels.triton_common import TILE_COLUMNS, config, multiply, on_device, tuned
from hf_vq_kernels.triton_product import Matrix
from torch import Tensor


@triton.jit
def add_fixed(at, value, unit, inside):
    """Add float32 values to int64 sums, in units of 1 / `unit`."""
    scaled = value * unit
    rounded = scaled + tl.where(scaled < 0, -0.5, 0.5)
    tl.atomic_add(at, rounded.to(tl.int64), mask=inside, sem="relaxed")


@triton.jit
def _sum_and_largest(values, size, BLOCK: tl.constexpr):
    """The sum of the magnitudes of `values` (size,), the largest, and whether one is not finite."""
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    top = tl.zeros((BLOCK,), dtype=tl.float32)
    bad = tl.zeros((BLOCK,), dtype=tl.int32)
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        value = tl.abs(tl.load(values + at, mask=at < size, other=0.0).to(tl.float32))
        finite = value < float("inf")
        bad = bad | tl.where(finite, 0, 1)
        value = tl.where(finite, value, 0.0)
        total += value
        top = tl.maximum(top, value)
    return tl.sum(total, axis=0), tl.max(top, axis=0), tl.max(bad, axis=0)


@triton.jit
def _choose_unit(grad_norms, x_norms, factors, out, rows, columns, count, BLOCK: tl.constexpr):
    """out[0]: what to multiply values with before they become integers; out[1]: and sums after.

    The gradient of a weight is at most the product of two norms, so all together, and whichever
    share an entry, are at most the product of the sums of norms.
    """
    bound, _, bad = _sum_and_largest(grad_norms, rows, BLOCK)
    total, _, wrong = _sum_and_largest(x_norms, columns, BLOCK)
    bound *= total
    bad = bad | wrong
    if factors is not None:
        _, top, wrong = _sum_and_largest(factors, count, BLOCK)
        bound *= top
        bad = bad | wrong
    power = tl.floor(61.0 - tl.log2(tl.maximum(bound, 1e-38)))
    power = tl.minimum(tl.maximum(power, -120.0), 120.0)
    bad = (bad > 0) | (bound == float("inf"))
    tl.store(out, tl.where(bad, 0.0, tl.exp2(power)))
    # what is not finite must be seen by whoever scales the loss
    tl.store(out + 1, tl.where(bad, float("nan"), tl.exp2(-power)))


@triton.jit
def _to_float(sums, unit, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(sums + at, mask=at < size, other=0).to(tl.float32)
    tl.store(out + at, total * tl.load(unit + 1), mask=at < size)


@tuned(
    ["GEOMETRY", "NAME", "TOKENS"],
    [
        config(4, 3, ROWS=64),
        config(4, 2, ROWS=32),
        config(8, 3, ROWS=64),
        config(8, 2, ROWS=128),
    ],
    reset=["sums"],
)
@triton.jit
def _sum_gradients(
    grad,
    x,
    packed,
    sums,
    unit,
    tokens,
    NAME: tl.constexpr,
    GEOMETRY: tl.constexpr,
    SCATTER: tl.constexpr,
    ROW_NUMBERS: tl.constexpr,
    COLUMN_NUMBERS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row_tile = tl.program_id(0)
    column_tile = tl.program_id(1)
    row = ROW_NUMBERS(packed, GEOMETRY, row_tile, ROWS)
    column = COLUMN_NUMBERS(packed, GEOMETRY, column_tile, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, tokens, TOKENS):
        token = first + tl.arange(0, TOKENS)
        there = token < tokens
        at = grad + token.to(tl.int64)[None, :] * OUT + row[:, None]
        left = tl.load(at, mask=there[None, :] & (row < OUT)[:, None], other=0.0)
        at = x + token.to(tl.int64)[:, None] * IN + column[None, :]
        right = tl.load(at, mask=there[:, None] & (column < IN)[None, :], other=0.0)
        total = multiply(left, right, total)
    SCATTER(
        packed, GEOMETRY, sums, row_tile, column_tile, total, tl.load(unit), ROWS, COLUMNS
    )  # fmt: skip


def sum_gradients(
    grad: Tensor, x: Tensor, matrix: Matrix, entries: int, factors: Tensor | None = None
) -> Tensor:
    """Sums of the gradients of weights that share an entry, float32 (entries,).

    grad (tokens, out_features), x (tokens, in_features): contiguous, of one dtype. Which entry a
    weight belongs to says `matrix.scatter`; `factors`: all that it multiplies gradients with, or
    numbers at least as large.
    """
    sums = torch.zeros(entries, dtype=torch.int64, device=grad.device)
    unit = torch.empty(2, dtype=torch.float32, device=grad.device)
    norms = [torch.linalg.vector_norm(t, dim=0, dtype=torch.float32) for t in (grad, x)]
    tokens = grad.shape[0]
    constants = matrix.constants()
    for name in ("TILE", "BANKS", "BANK_ROWS"):
        del constants[name]

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return matrix.row_tiles(meta["ROWS"]), triton.cdiv(matrix.in_features, TILE_COLUMNS)

    out = torch.empty(entries, dtype=torch.float32, device=grad.device)
    with on_device(grad):
        _choose_unit[(1,)](
            *norms, factors, unit, grad.shape[1], x.shape[1],
            0 if factors is None else factors.numel(), BLOCK=1024,
        )  # fmt: skip
        _sum_gradients[grid](
            grad, x, matrix.packed, sums, unit, tokens, **constants, SCATTER=matrix.scatter,
            TOKENS=32 if grad.dtype.itemsize == 4 else 64,
        )  # fmt: skip
        _to_float[(triton.cdiv(entries, 1024),)](sums, unit, out, entries, BLOCK=1024)
    return out
