"""Choosing codes for a panel of columns, each choice felt by the columns to its right.

The sweep (`hf_vq.methods.feedback`) and coordinate descent (`hf_vq.methods.refine`) are the same
recursion over the vectors v of a row with different matrices, and this is it:

    linear_v = u_v A_v + base_v M_v
    q_v      = argmin over the codebook of  q M_v q^T - 2 linear_v . q
    u_rest  += (base_v - q_v) B[v, rest]

Rows (of vectors) are independent of each other. On a CPU with numba the recursion is compiled and
runs row by row, in cache; elsewhere it runs vector by vector over all rows at once in torch.

Vectors along the rows of one column (VPTQ) are the case where A and M are numbers: then the best q
is the one nearest to ``x = linear / M``, whatever M is, and a second codebook can be searched with
a beam. That case has code of its own here; what surrounds it does not know.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from hf_vq.methods.kmeans_large import SEARCHED, Cells, build_cells
from hf_vq.methods.kmeans_large import over_rows as _over_rows
from hf_vq.methods.lookup import Lookup

# Up to here a compiled search compares with every centroid, beyond with those of a few cells.
_EXACT_LIMIT = 4096


def solve_panel(
    state: Lookup,
    first: int,
    base: torch.Tensor,
    u: torch.Tensor,
    a: torch.Tensor,
    m: torch.Tensor,
    b: torch.Tensor,
    beam: int = 1,
) -> torch.Tensor:
    """Choose the codes of vectors first, first + 1, ... of every row; returns base - q.

    base, u: float32 (r, P), u is used up. a, m: (P/d, d, d). b: (P, P), blocks right of the
    diagonal are read. All vectors must lie in one stripe. Writes the codes of `state`. beam: how
    many main centroids are tried with their best residual one.
    """
    if state.vector_rows > 1 or state.residual is not None:
        return _solve_tall(state, first, base, u, a.flatten() / m.flatten(), b, beam)
    book = state.codebooks[first // state.vectors_per_stripe]
    # q M q^T of every candidate, (P/d, G, k)
    square = torch.einsum("gkd,vde,gke->vgk", book, m, book)
    compiled = _compiled() if base.device.type == "cpu" else None
    if compiled is None:
        return _in_torch(state, first, base, u, a, m, b, book, square)
    delta = base.contiguous().clone()
    vectors = len(m)
    index = torch.empty(len(base), vectors, dtype=torch.int64)
    scale = torch.ones(1, 1)
    if state.scale is not None:
        scale = state.scale[:, first : first + vectors].contiguous()
    arrays = [
        t.contiguous().numpy()
        for t in (delta, u.contiguous(), a, m, b, book.transpose(1, 2), square, index, scale)
    ]
    rows_per_group = len(base) // len(book)
    _over_rows(
        lambda lo, hi: compiled(*arrays, state.scale is not None, rows_per_group, lo, hi), len(base)
    )
    state.index[:, first : first + vectors] = index
    return delta


def _in_torch(
    state: Lookup,
    first: int,
    base: torch.Tensor,
    u: torch.Tensor,
    a: torch.Tensor,
    m: torch.Tensor,
    b: torch.Tensor,
    book: torch.Tensor,
    square: torch.Tensor,
) -> torch.Tensor:
    d = state.dim
    delta = torch.empty_like(base)
    for v in range(len(m)):
        lo, hi = v * d, (v + 1) * d
        linear = torch.addmm(u[:, lo:hi] @ a[v], base[:, lo:hi], m[v])
        step = base[:, lo:hi] - _choose(state, first + v, linear, book, square[v])
        delta[:, lo:hi] = step
        if hi < base.shape[1]:
            u[:, hi:].addmm_(step, b[lo:hi, hi:])
    return delta


def _choose(
    state: Lookup, vector: int, linear: torch.Tensor, book: torch.Tensor, square: torch.Tensor
) -> torch.Tensor:
    """Set and return the best q (r, d) for vector column `vector` of every row.

    Minimizes ``square(q) - 2 linear . q`` over the row's codebook. linear (r, d); book (G, k, d),
    the stripe's codebooks; square (G, k), the quadratic term of every centroid.
    """
    groups, k, d = book.shape
    step = linear.reshape(groups, -1, d)
    quadratic = square[:, None]
    if state.scale is not None:
        # s > 0 divides out of s^2 square - 2 s linear . c
        quadratic = state.scale[:, vector].reshape(groups, -1, 1) * quadratic
    cost = torch.baddbmm(quadratic, step, book.transpose(1, 2), alpha=-2)
    best = cost.min(-1).indices
    state.index[:, vector] = best.reshape(-1)
    flat = (best + k * torch.arange(groups, device=best.device)[:, None]).reshape(-1)
    q = book.reshape(-1, d).index_select(0, flat)
    return q if state.scale is None else q * state.scale[:, vector : vector + 1]


# -- vectors along rows --------------------------------------------------------------------------


def _solve_tall(
    state: Lookup,
    first: int,
    base: torch.Tensor,
    u: torch.Tensor,
    ratio: torch.Tensor,
    b: torch.Tensor,
    beam: int,
) -> torch.Tensor:
    """As `solve_panel`, for one row group and vectors of one column; ratio = A / M (P,)."""
    assert state.dim == 1 and state.codebooks.shape[1] == 1 and state.scale is None
    stripe, columns = first // state.vectors_per_stripe, slice(first, first + base.shape[1])
    book = state.codebooks[stripe, 0]
    residual = book[:0] if state.residual is None else state.residual[stripe, 0]
    scale = torch.ones(base.shape[1], device=base.device)
    if state.column_scale is not None:
        scale = state.column_scale[columns]
    index = state.index[:, columns].to(torch.int64, copy=True)
    codes = (index, torch.zeros_like(index))
    if state.residual_index is not None:
        codes = (index, state.residual_index[:, columns].to(torch.int64, copy=True))
    delta = base.contiguous().clone()
    u = u.contiguous()
    run = _tall_in_torch
    if base.device.type == "cpu" and (compiled := _compiled_tall()) is not None:
        run = compiled
    v = state.vector_rows
    real = int(state.row_mask.sum()) if v > 1 else len(base)
    whole = real // v * v
    beam = max(1, min(beam, len(book))) if len(residual) else 1
    for lo, hi in ((0, whole), (whole, real)):
        if lo == hi:
            continue
        # Rows beyond the matrix have no say in the choice: there a vector is as long as its rest
        part = slice(lo // v, -(-hi // v))
        size = min(v, hi - lo)
        run(
            delta[lo:hi],
            u[lo:hi],
            ratio,
            scale,
            b,
            book[:, :size],
            residual[:, :size],
            beam,
            *(c[part] for c in codes),
        )
    state.index[:, columns] = codes[0].to(state.index.dtype)
    if state.residual_index is not None:
        state.residual_index[:, columns] = codes[1].to(state.index.dtype)
    return delta


def _tall_in_torch(
    delta: torch.Tensor,
    u: torch.Tensor,
    ratio: torch.Tensor,
    scale: torch.Tensor,
    b: torch.Tensor,
    book: torch.Tensor,
    residual: torch.Tensor,
    beam: int,
    index: torch.Tensor,
    residual_index: torch.Tensor,
) -> None:
    """delta enters as base and leaves as base - q; codes are replaced by better ones."""
    size = book.shape[1]
    square, residual_square = book.square().sum(1), residual.square().sum(1)
    for j in range(delta.shape[1]):
        x = (u[:, j] * ratio[j] + delta[:, j]).reshape(-1, size) / scale[j]
        cost = torch.addmm(square, x, book.T, alpha=-2)
        if len(residual):
            costs, tops = cost.topk(beam, dim=1, largest=False)
            rest = x[:, None] - book[tops]
            more = (residual_square - 2 * rest @ residual.T).min(-1)
            # the codes as they are compete too, so that a pass never makes a choice worse
            now = book[index[:, j]] + residual[residual_index[:, j]]
            costs = torch.cat([(now * (now - 2 * x)).sum(1, keepdim=True), costs + more.values], 1)
            which = costs.argmin(1, keepdim=True)
            best = torch.cat([index[:, j, None], tops], 1).gather(1, which)[:, 0]
            second = torch.cat([residual_index[:, j, None], more.indices], 1).gather(1, which)[:, 0]
            q = book[best] + residual[second]
            residual_index[:, j] = second
        else:
            best = cost.min(1).indices
            q = book[best]
        index[:, j] = best
        delta[:, j] -= q.reshape(-1) * scale[j]
        if j + 1 < delta.shape[1]:
            u[:, j + 1 :].addmm_(delta[:, j : j + 1], b[j : j + 1, j + 1 :])


@functools.cache
def _compiled_tall() -> Callable | None:
    """`_tall_in_torch` compiled, or None without numba."""
    try:
        from hf_vq.methods.panel_numba import tall_panel
    except ImportError:
        return None
    panel: Any = tall_panel  # typed by numba as what it was before it was compiled

    def run(
        delta: torch.Tensor,
        u: torch.Tensor,
        ratio: torch.Tensor,
        scale: torch.Tensor,
        b: torch.Tensor,
        book: torch.Tensor,
        residual: torch.Tensor,
        beam: int,
        index: torch.Tensor,
        residual_index: torch.Tensor,
    ) -> None:
        cells, probe = None, 0
        # sorting into cells has to pay
        if len(book) > _EXACT_LIMIT and 8 * index.numel() >= len(book):
            cells, probe = _cells_of(book), SEARCHED
            # the loop counts centroids in the order of their cells
            index.copy_(cells.members.argsort()[index])
            book = book[cells.members]
        centres = book[:0] if cells is None else cells.centres
        starts = torch.tensor([0] if cells is None else cells.starts)
        matrices = [t.contiguous().numpy() for t in (ratio, scale, b, book.T, residual.T)]
        squares = [t.square().sum(1).numpy() for t in (book, residual)]
        outer = (delta.numpy(), u.numpy())
        codes = (index.numpy(), residual_index.numpy())
        coarse = (centres.T.contiguous().numpy(), centres.square().sum(1).numpy(), starts.numpy())
        _over_rows(
            lambda lo, hi: panel(*outer, *matrices, *squares, beam, *codes, *coarse, probe, lo, hi),
            len(index),
        )
        if cells is not None:
            index.copy_(cells.members[index])

    return run


# The last codebook that was sorted into cells, and those: panels come in runs with the same one.
_last: tuple[torch.Tensor, Cells] | None = None


def _cells_of(book: torch.Tensor) -> Cells:
    global _last
    last = _last
    if last is None or not torch.equal(last[0], book):
        last = _last = (book.clone(), build_cells(book))
    return last[1]


@functools.cache
def _compiled() -> Callable | None:
    """The compiled recursion, or None without numba."""
    try:
        from hf_vq.methods.panel_numba import panel
    except ImportError:
        return None
    return panel
