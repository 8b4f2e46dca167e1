"""The recursion of `hf_vq.methods.panel` compiled for a CPU; imported only where numba is."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np


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
