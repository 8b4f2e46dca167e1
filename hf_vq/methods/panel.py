"""Choosing codes for a panel of columns, each choice felt by the columns to its right.

The sweep (`hf_vq.methods.feedback`) and coordinate descent (`hf_vq.methods.refine`) are the same
recursion over the vectors v of a row with different matrices, and this is it:

    linear_v = u_v A_v + base_v M_v
    q_v      = argmin over the codebook of  q M_v q^T - 2 linear_v . q
    u_rest  += (base_v - q_v) B[v, rest]

Rows are independent of each other. On a CPU with numba the recursion is compiled and runs row by
row, in cache; elsewhere it runs vector by vector over all rows at once in torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from hf_vq.methods.lookup import Lookup


def solve_panel(
    state: Lookup,
    first: int,
    base: torch.Tensor,
    u: torch.Tensor,
    a: torch.Tensor,
    m: torch.Tensor,
    b: torch.Tensor,
) -> torch.Tensor:
    """Choose the codes of vectors first, first + 1, ... of every row; returns base - q.

    base, u: float32 (r, P), u is used up. a, m: (P/d, d, d). b: (P, P), blocks right of the
    diagonal are read. All vectors must lie in one stripe. Writes `state.index`.
    """
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
        step = base[:, lo:hi] - state.choose(first + v, linear, book, square[v])
        delta[:, lo:hi] = step
        if hi < base.shape[1]:
            u[:, hi:].addmm_(step, b[lo:hi, hi:])
    return delta


def _over_rows(work: Callable[[int, int], None], rows: int) -> None:
    """Run work(lo, hi) over all rows, on as many threads as torch would use."""
    threads = min(torch.get_num_threads(), max(1, rows // 64))
    if threads == 1:
        work(0, rows)
        return
    edges = [rows * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, edges[:-1], edges[1:]))


@functools.cache
def _compiled() -> Callable | None:
    """The compiled recursion, or None without numba."""
    try:
        from hf_vq.methods.panel_numba import panel
    except ImportError:
        return None
    return panel
