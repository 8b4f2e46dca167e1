"""What VPTQ's Triton kernels do to activations: the permutation of columns, and norms."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def columns_of(perm, stored, IN: tl.constexpr):
    """The columns of the matrix that are stored as numbers `stored`; IN for those beyond."""
    column = stored
    if perm is not None:
        column = tl.load(perm + stored, mask=stored < IN, other=0).to(tl.int32) & 0xFFFF
    return tl.where(stored < IN, column, IN)


@triton.jit
def activations(
    x,
    stored,
    perm,
    norm_scale,
    norm_bias,
    offsets,
    IN: tl.constexpr,
    NORM: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Activations of stored columns, times the norm of columns, and `offsets` plus their sums."""
    column = columns_of(perm, stored, IN)
    here = column < IN
    if NORM == 1:
        scale = tl.load(norm_scale + column, mask=here, other=0.0).to(tl.float32)
        offset = tl.load(norm_bias + column, mask=here, other=0.0).to(tl.float32)
    values = ()
    sums = ()
    for t in tl.static_range(TOKENS):
        value = tl.load(x + t * IN + column, mask=here, other=0.0).to(tl.float32)
        if NORM == 1:
            sums = sums + (offsets[t] + offset * value,)
            value *= scale
        elif NORM == 2:
            sums = sums + (offsets[t] + value,)
        else:
            sums = sums + (offsets[t],)
        values = values + (value,)
    return values, sums
