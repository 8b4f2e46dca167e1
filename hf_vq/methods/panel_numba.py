"""The recursions of `hf_vq.methods.panel` compiled for a CPU; imported only where numba is."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from hf_vq.methods.kmeans_numba import search


@numba.njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def panel(
    delta: Any,
    u: Any,
    a: Any,
    m: Any,
    b: Any,
    book: Any,
    square: Any,
    index: Any,
    scale: Any,
    scaled: bool,
    rows_per_group: int,
    lo: int,
    hi: int,
) -> None:
    """Rows [lo, hi). delta enters as base and leaves as base - q; u is used up.

    float32 arrays: delta, u (r, P); a, m (V, d, d); b (P, P); book (G, d, k); square (V, G, k);
    scale (r, V), read if `scaled`. index: int64 (r, V), written.
    """
    columns = delta.shape[1]
    d, k = book.shape[1], book.shape[2]
    linear = np.empty(d, np.float32)
    cost = np.empty(k, np.float32)
    for row in range(lo, hi):
        group = row // rows_per_group
        for v in range(index.shape[1]):
            start = v * d
            for t in range(d):
                total = np.float32(0)
                for j in range(d):
                    total += u[row, start + j] * a[v, j, t] + delta[row, start + j] * m[v, j, t]
                linear[t] = total
            s = scale[row, v] if scaled else np.float32(1)
            # s > 0 divides out of s^2 square - 2 s linear . c
            for c in range(k):
                cost[c] = s * square[v, group, c]
            for t in range(d):
                twice = np.float32(2) * linear[t]
                for c in range(k):
                    cost[c] -= twice * book[group, t, c]
            best = 0
            least = cost[0]
            for c in range(1, k):
                if cost[c] < least:
                    least = cost[c]
                    best = c
            index[row, v] = best
            for t in range(d):
                step = delta[row, start + t] - s * book[group, t, best]
                delta[row, start + t] = step
                for j in range(start + d, columns):
                    u[row, j] += step * b[start + t, j]


@numba.njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def tall_panel(
    delta: Any,
    u: Any,
    ratio: Any,
    scale: Any,
    b: Any,
    book: Any,
    residual: Any,
    square: Any,
    residual_square: Any,
    beam: int,
    index: Any,
    residual_index: Any,
    centres: Any,
    centre_square: Any,
    starts: Any,
    probe: int,
    lo: int,
    hi: int,
) -> None:
    """Blocks of rows [lo, hi), vectors of one column. delta and u as in `panel`.

    float32 arrays: delta, u (R * v, P); ratio, scale (P,); b (P, P); book (v, k) and residual
    (v, k2), whose squared lengths are `square` and `residual_square`. index, residual_index: int64
    (R, P), read where there is a residual or `probe`, and written. probe: only so many cells are
    searched, see `search` for these and for centres, centre_square and starts; 0: all centroids.
    """
    columns = delta.shape[1]
    v, k = book.shape
    extra = residual.shape[1]
    x = np.empty(v, np.float32)
    rest = np.empty(v, np.float32)
    cost = np.empty(k, np.float32)
    more = np.empty(max(extra, 1), np.float32)
    top = np.empty(beam, np.int64)
    top_cost = np.empty(beam, np.float32)
    coarse = np.empty(max(centres.shape[1], 1), np.float32)
    scratch = np.empty(max(k, len(coarse)) if probe else 1, np.float32)
    for block in range(lo, hi):
        first = block * v
        for j in range(columns):
            for t in range(v):
                x[t] = (u[first + t, j] * ratio[j] + delta[first + t, j]) / scale[j]
            filled = 0
            if probe:
                filled = search(
                    x,
                    centres,
                    centre_square,
                    book,
                    square,
                    starts,
                    probe,
                    cost,
                    coarse,
                    scratch,
                    top,
                    top_cost,
                )
            else:
                for c in range(k):
                    cost[c] = square[c]
                for t in range(v):
                    twice = np.float32(2) * x[t]
                    for c in range(k):
                        cost[c] -= twice * book[t, c]
            second = 0
            if extra == 0 and probe:
                best = index[block, j]
                least = square[best]
                for t in range(v):
                    least -= np.float32(2) * x[t] * book[t, best]
                if top_cost[0] < least:
                    best = top[0]
            elif extra == 0:
                best = 0
                least = cost[0]
                for c in range(1, k):
                    if cost[c] < least:
                        least = cost[c]
                        best = c
            else:
                for c in range(0 if probe else k):
                    if filled == beam and cost[c] >= top_cost[beam - 1]:
                        continue
                    at = min(filled, beam - 1)
                    while at > 0 and top_cost[at - 1] > cost[c]:
                        top_cost[at] = top_cost[at - 1]
                        top[at] = top[at - 1]
                        at -= 1
                    top_cost[at] = cost[c]
                    top[at] = c
                    filled = min(filled + 1, beam)
                # the codes as they are compete too, so that a pass never makes a choice worse
                best = index[block, j]
                second = residual_index[block, j]
                least = np.float32(0)
                for t in range(v):
                    q = book[t, best] + residual[t, second]
                    least += q * (q - np.float32(2) * x[t])
                for i in range(filled):
                    for t in range(v):
                        rest[t] = x[t] - book[t, top[i]]
                    for c in range(extra):
                        more[c] = residual_square[c]
                    for t in range(v):
                        twice = np.float32(2) * rest[t]
                        for c in range(extra):
                            more[c] -= twice * residual[t, c]
                    for c in range(extra):
                        if top_cost[i] + more[c] < least:
                            least = top_cost[i] + more[c]
                            best = top[i]
                            second = c
                residual_index[block, j] = second
            index[block, j] = best
            for t in range(v):
                q = book[t, best]
                if extra:
                    q += residual[t, second]
                step = delta[first + t, j] - scale[j] * q
                delta[first + t, j] = step
                for i in range(j + 1, columns):
                    u[first + t, i] += step * b[j, i]
