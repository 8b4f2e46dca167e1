"""`hf_vq.methods.cvxq_groups.solve_columns` compiled for a CPU; imported only where numba is."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

_F = np.float32


@numba.njit(nogil=True, cache=True)
def _half(x: Any) -> Any:
    """The nearest float16, ties to even, as a float32."""
    if x == 0:
        return _F(0)
    exponent = math.frexp(x)[1]
    # 11 significant bits, fewer below 2**-14
    exponent = max(exponent - 11, -24)
    return _F(min(max(np.rint(x * 2.0**-exponent) * 2.0**exponent, -65504.0), 65504.0))


@numba.njit(nogil=True, cache=True)
def _stored_scale(scale: Any, offset: Any, step: Any, values: Any, kind: int) -> Any:
    if kind == 0:
        return _F(scale)
    if kind == 1:
        return _half(scale)
    z = (math.log2(max(np.float64(scale), 1e-300)) - np.float64(offset)) / np.float64(step)
    return values[int(min(max(np.rint(z), 0.0), 255.0))]


@numba.njit(nogil=True, cache=True)
def _stored_location(location: Any, scale: Any, kind: int) -> Any:
    if kind == 0:
        return _F(0)
    if kind == 1:
        return _F(location)
    if kind == 2:
        return _half(location)
    unit = scale / _F(64)
    if unit <= 0:
        return _F(0)
    return _F(min(max(np.rint(location / unit), -128.0), 127.0)) * unit


@numba.njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _evaluate(
    x: Any, w: Any, scale: Any, location: Any, depth: int, levels: Any, ends: Any, code: Any
) -> Any:
    """The error with every weight at its nearest level; the codes are written."""
    inverse = _F(1) / scale if scale > 0 else _F(0)
    start = 1 << depth
    error = _F(0)
    for r in range(len(x)):
        y = (x[r] - location) * inverse
        c = 0
        half = start >> 1
        while half > 0:
            if y > ends[start + c + half]:
                c += half
            half >>= 1
        code[r] = c
        miss = x[r] - (location + scale * levels[start + c])
        error += w[r] * miss * miss
    return error


@numba.njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def columns_panel(
    delta: Any,
    u: Any,
    ratio: Any,
    b: Any,
    weight: Any,
    coupled: bool,
    depths: Any,
    scales: Any,
    locations: Any,
    codes: Any,
    grid: Any,
    values: Any,
    scale_kind: int,
    location_kind: int,
    levels: Any,
    ends: Any,
    centre: Any,
    widths: Any,
    rounds: int,
    fresh: bool,
    lo: int,
    hi: int,
) -> None:
    """Clusters [lo, hi). delta enters as base and leaves as base - q; u is used up.

    float32 arrays: delta, u (M * g, P); ratio (P,); b (P, P), read if `coupled`; weight (M * g,);
    scales, locations (M, P), read unless `fresh`, and written; grid (2, M); values (M, 256);
    levels, ends (512,); centre (9,); widths (n,). depths: int64 (M, P). codes: uint8 (M * g, P),
    written.
    """
    columns = delta.shape[1]
    g = delta.shape[0] // depths.shape[0]
    x = np.empty(g, np.float32)
    trial = np.empty(g, np.uint8)
    chosen = np.empty(g, np.uint8)
    for m in range(lo, hi):
        first = m * g
        w = weight[first : first + g]
        offset, step = grid[0, m], grid[1, m]
        total = _F(0)
        for r in range(g):
            total += w[r]
        for j in range(columns):
            depth = depths[m, j]
            start = 1 << depth
            mean = _F(0)
            for r in range(g):
                x[r] = delta[first + r, j] + u[first + r, j] * ratio[j]
                mean += w[r] * x[r]
            mean = mean / total if location_kind else _F(0)
            size = _F(0)
            for r in range(g):
                size += w[r] * (x[r] - mean) * (x[r] - mean)
            size = math.sqrt(size / total) * centre[depth]
            if depth == 0:
                size = abs(mean) * _F(0.64)
            scale, location, least = _F(0), _F(0), _F(np.inf)
            if not fresh:
                scale, location = scales[m, j], locations[m, j]
                least = _evaluate(x, w, scale, location, depth, levels, ends, chosen)
            for i in range(len(widths)):
                s = _stored_scale(size * widths[i], offset, step, values[m], scale_kind)
                t = _stored_location(mean, s, location_kind)
                error = _evaluate(x, w, s, t, depth, levels, ends, trial)
                if error < least or (fresh and i == 0):
                    scale, location, least = s, t, error
                    chosen[:] = trial
            for _ in range(rounds):
                sl, sll, sx, sxl = _F(0), _F(0), _F(0), _F(0)
                for r in range(g):
                    level = levels[start + chosen[r]]
                    sll += w[r] * level * level
                    sxl += w[r] * x[r] * level
                    if location_kind:
                        sl += w[r] * level
                        sx += w[r] * x[r]
                s = scale
                curvature = sll - sl * sl / total
                if curvature > _F(1e-6) * sll and sxl - sl * sx / total > 0:
                    s = (sxl - sl * sx / total) / curvature
                s = _stored_scale(s, offset, step, values[m], scale_kind)
                t = _stored_location((sx - s * sl) / total, s, location_kind)
                if s == scale and t == location:
                    break
                error = _evaluate(x, w, s, t, depth, levels, ends, trial)
                if not error < least:
                    break
                scale, location, least = s, t, error
                chosen[:] = trial
            scales[m, j], locations[m, j] = scale, location
            for r in range(g):
                row = first + r
                codes[row, j] = chosen[r]
                missed = delta[row, j] - (location + scale * levels[start + chosen[r]])
                delta[row, j] = missed
                if coupled:
                    for k in range(j + 1, columns):
                        u[row, k] += missed * b[j, k]
