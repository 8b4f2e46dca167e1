"""Look-ups among some of very many centroids compiled for a CPU; imported only where numba is."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np


@numba.njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def products(x: Any, square: Any, book: Any, lo: int, hi: int, cost: Any) -> None:
    """cost[c - lo] = square[c] - 2 x . book[:, c] for c in [lo, hi)."""
    # views, since an index known to start at 0 needs no check for counting from the end
    out, d = cost[: hi - lo], len(x)
    out[:] = square[lo:hi]
    t = 0
    while t + 4 <= d:  # four at once: `cost` is read and written less often
        a0, a1 = np.float32(2) * x[t], np.float32(2) * x[t + 1]
        a2, a3 = np.float32(2) * x[t + 2], np.float32(2) * x[t + 3]
        b0, b1 = book[t, lo:hi], book[t + 1, lo:hi]
        b2, b3 = book[t + 2, lo:hi], book[t + 3, lo:hi]
        for c in range(len(out)):
            out[c] -= a0 * b0[c] + a1 * b1[c] + a2 * b2[c] + a3 * b3[c]
        t += 4
    while t < d:
        a0, b0 = np.float32(2) * x[t], book[t, lo:hi]
        for c in range(len(out)):
            out[c] -= a0 * b0[c]
        t += 1


@numba.njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def position_of_least(cost: Any, scratch: Any) -> int:
    """The first position of the least of cost (n,); scratch: as long, overwritten."""
    width = len(cost)
    scratch[:width] = cost
    # folded in halves, which compiles to vector instructions; a running minimum does not
    while width > 8:
        half = width // 2
        front, back = scratch[:half], scratch[width - half : width]
        for c in range(half):
            front[c] = min(front[c], back[c])
        width -= half
    least = scratch[0]
    for c in range(1, width):
        least = min(least, scratch[c])
    at = 0
    while at < len(cost) - 1 and cost[at] > least:
        at += 1
    return at


@numba.njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def search(
    x: Any,
    centres: Any,
    centre_square: Any,
    book: Any,
    square: Any,
    starts: Any,
    probe: int,
    cost: Any,
    coarse: Any,
    scratch: Any,
    top: Any,
    top_cost: Any,
) -> int:
    """Into `top` the positions of the nearest centroids of the `probe` cells nearest to x.

    float32: x (d,), centres (d, C), book (d, k), whose columns are sorted by cell, their squared
    lengths, top_cost (m,): ||c||^2 - 2 x . c in rising order. starts: int64 (C + 1,). top: int64
    (m,). cost, coarse, scratch: room for as many numbers as there are centroids, or cells. Returns
    how many were found, m at most.
    """
    m, filled, cells = len(top), 0, centres.shape[1]
    products(x, centre_square, centres, 0, cells, coarse)
    for _ in range(min(probe, cells)):
        cell = position_of_least(coarse[:cells], scratch)
        coarse[cell] = np.float32(3e38)
        lo, hi = starts[cell], starts[cell + 1]
        products(x, square, book, lo, hi, cost)
        if m == 1:
            best = position_of_least(cost[: hi - lo], scratch)
            if filled == 0 or cost[best] < top_cost[0]:
                top[0], top_cost[0], filled = lo + best, cost[best], 1
            continue
        for c in range(hi - lo):
            if filled == m and cost[c] >= top_cost[m - 1]:
                continue
            at = min(filled, m - 1)
            while at > 0 and top_cost[at - 1] > cost[c]:
                top_cost[at], top[at] = top_cost[at - 1], top[at - 1]
                at -= 1
            top_cost[at], top[at] = cost[c], lo + c
            filled = min(filled + 1, m)
    return filled


@numba.njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def search_all(
    points: Any,
    centres: Any,
    centre_square: Any,
    book: Any,
    square: Any,
    starts: Any,
    probe: int,
    found: Any,
    lo: int,
    hi: int,
) -> None:
    """`search` for points [lo, hi). points: float32 (n, d). found: int64 (n, m), written; -1 where
    there are fewer centroids."""
    m = found.shape[1]
    most = max(book.shape[1], centres.shape[1])
    cost, coarse = np.empty(most, np.float32), np.empty(most, np.float32)
    scratch = np.empty(most, np.float32)
    top_cost = np.empty(m, np.float32)
    for i in range(lo, hi):
        filled = search(
            points[i],
            centres,
            centre_square,
            book,
            square,
            starts,
            probe,
            cost,
            coarse,
            scratch,
            found[i],
            top_cost,
        )
        found[i, filled:] = -1


@numba.njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def descend(
    points: Any, centroids: Any, near: Any, index: Any, cost: Any, lo: int, hi: int
) -> None:
    """Points [lo, hi) move to the best of the centroids listed for the one they have.

    float32: points (n, d), centroids (k, d), cost (n,), written: the squared distance. near: int64
    (k, m). index: int64 (n,), read and written. Quick where neighbours in `points` have one index.
    """
    d, m = points.shape[1], near.shape[1]
    book = np.empty((d, m), np.float32)
    gap, scratch = np.empty(m, np.float32), np.empty(m, np.float32)
    loaded = -1
    for i in range(lo, hi):
        now = index[i]
        if now != loaded:
            for c in range(m):
                for t in range(d):
                    book[t, c] = centroids[near[now, c], t]
            loaded = now
        for c in range(m):
            gap[c] = 0
        for t in range(d):
            x = points[i, t]
            for c in range(m):
                step = x - book[t, c]
                gap[c] += step * step
        best = position_of_least(gap, scratch)
        index[i] = near[now, best]
        cost[i] = gap[best]
