"""Rows of packed tables, by number, in one launch: the same kernel for all methods.

Only the rows asked for are read, by a function of the method like the ones of triton_product.py:

    some_rows(packed, GEOMETRY, row, column_tile, COLUMNS) -> float32 (n, COLUMNS)

for rows (n,) of the matrix. A number that is no row stops the kernel by a device-side assertion, as
look-ups of torch do, so nothing has to be asked of the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from hf_vq_kernels.triton_common import TILE_COLUMNS, interpreting, on_device
from hf_vq_kernels.triton_product import Matrix
from torch import Tensor


@triton.jit(debug=True)  # or assertions would be left out
def _embedding(
    ids,
    packed,
    out,
    count,
    GEOMETRY: tl.constexpr,
    SOME_ROWS: tl.constexpr,
    COLUMN_NUMBERS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    COLUMNS: tl.constexpr,
    IDS: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64) * IDS + tl.arange(0, IDS)
    row = tl.load(ids + number, mask=number < count, other=0).to(tl.int64)
    known = (row >= 0) & (row < OUT)
    tl.device_assert(known, "a number that is no row of the table")
    row = tl.where(known, row, 0).to(tl.int32)
    values = SOME_ROWS(packed, GEOMETRY, row, tl.program_id(1), COLUMNS)
    column = COLUMN_NUMBERS(packed, GEOMETRY, tl.program_id(1), COLUMNS)
    at = out + number[:, None] * IN + column[None, :]
    inside = (number < count)[:, None] & (column < IN)[None, :]
    tl.store(at, values.to(out.dtype.element_ty), mask=inside)


def embedding(ids: Tensor, matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """Rows `ids` (n,), contiguous integers, of the matrix: (n, in_features) in `dtype`."""
    count = ids.shape[0]
    out = torch.empty((count, matrix.in_features), dtype=dtype, device=ids.device)
    if count == 0:
        return out
    if ids.device.type == "cpu" and not bool(((ids >= 0) & (ids < matrix.out_features)).all()):
        raise IndexError(f"index out of range in a table of {matrix.out_features} rows")
    # Few numbers: a program each, so that many are at work. More: several share what they read.
    together = 1 if count < 256 else 4
    grid = (triton.cdiv(count, together), triton.cdiv(matrix.in_features, TILE_COLUMNS))
    # assertions alone: checking every addition for overflow costs
    options = {} if interpreting() else {"sanitize_overflow": False}
    with on_device(ids):
        _embedding[grid](
            ids, matrix.packed, out, count, GEOMETRY=matrix.geometry, SOME_ROWS=matrix.some_rows,
            COLUMN_NUMBERS=matrix.columns, OUT=matrix.out_features, IN=matrix.in_features,
            COLUMNS=TILE_COLUMNS, IDS=together, num_warps=1 if together == 1 else 4, **options,
        )  # fmt: skip
    return out
