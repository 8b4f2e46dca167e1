"""The levels of CVXQ by the equations that define them (docs/format.md), numpy only."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np


def lloyd_max(depth: int) -> np.ndarray:
    """The positive levels of the Lloyd-Max quantizer of N(0, 1), in float64 by Newton's method."""
    n = 2 ** (depth - 1)
    wide = NormalDist(sigma=math.sqrt(3))  # the best density of levels, if they are many
    x = np.array([wide.inv_cdf(0.5 + (i + 0.5) / (2 * n)) for i in range(n)])
    for _ in range(20):
        t = np.concatenate([[0], (x[1:] + x[:-1]) / 2, [np.inf]])
        density = np.exp(-t * t / 2) / math.sqrt(2 * math.pi)
        tail = np.array([math.erfc(v / math.sqrt(2)) / 2 for v in t])
        mass = tail[:-1] - tail[1:]
        mean = (density[:-1] - density[1:]) / mass
        # derivatives of the means by the lower and the upper border
        lower, upper = np.zeros(n), np.zeros(n)
        lower[1:] = density[1:-1] * (mean - t[:-1])[1:] / mass[1:]
        upper[:-1] = density[1:-1] * (t[1:] - mean)[:-1] / mass[:-1]
        jacobian = np.eye(n) - np.diag((lower + upper) / 2)
        jacobian -= np.diag(lower[1:] / 2, -1) + np.diag(upper[:-1] / 2, 1)
        x = x - np.linalg.solve(jacobian, x - mean)
    assert np.abs(x - mean).max() < 1e-12
    return x


def laplace(depth: int) -> np.ndarray:
    """The positive levels of the compander, in float64."""
    n = 2**depth
    q = np.arange(n // 2, n)
    return -np.log(1 - (2 * q + 1 - n) / n)
