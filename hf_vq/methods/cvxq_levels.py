"""What a scalar quantizer of B bits loses on weights of unit variance: D(B), measured, not a law.

The paper's allocation (CVXQ section 2) puts 2^-2B for it, which is wrong below about three bits,
where most of the groups of a 2- or 3-bit model are; and the constant of a quantizer is not the same
at all depths. These are the mean squared errors on N(0, 1), in closed form from the levels.
"""

from __future__ import annotations

import functools
import math

import torch
from hf_vq_kernels.levels import MAX_DEPTH, level_table

# Laplace scale of the compander for data of unit variance, before any search: three times that of a
# Laplace density with this variance, by the cube-root rule (CVXQ section 3).
COMPANDER_SCALE = 3 / math.sqrt(2)

_GOLDEN = (math.sqrt(5) - 1) / 2


def thresholds(kind: str, cells: str = "nearest") -> torch.Tensor:
    """Where the code changes, float64 (512,): entry (1 << B) + q is the lower end of code q.

    In units of the scale; that of code 0 is -infinity. cells: "nearest" puts them half-way between
    levels; "compander" where the Laplace compander of the paper has them, ``F(x) = q / 2**B``.
    """
    levels = level_table(kind).double()
    out = torch.full((512,), -math.inf, dtype=torch.float64)
    for depth in range(1, MAX_DEPTH + 1):
        n = 2**depth
        here = levels[n : 2 * n]
        if cells == "nearest":
            out[n + 1 : 2 * n] = (here[1:] + here[:-1]) / 2
        else:
            p = 2 * torch.arange(1, n, dtype=torch.float64) / n - 1
            out[n + 1 : 2 * n] = -p.sign() * torch.log1p(-p.abs())
    return out


def gaussian_distortion(kind: str, depth: int, scale: float, cells: str = "nearest") -> float:
    """Mean squared error on N(0, 1) of the levels of `depth` bits, times `scale`."""
    n = 2**depth
    levels = scale * level_table(kind)[n : 2 * n].double()
    low = scale * thresholds(kind, cells)[n : 2 * n]
    high = torch.cat([low[1:], low.new_tensor([math.inf])])
    root = math.sqrt(2)

    def density(x: torch.Tensor) -> torch.Tensor:
        return torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)

    def moment(x: torch.Tensor) -> torch.Tensor:  # x times the density, which vanishes far out
        return torch.where(x.isinf(), 0.0, x * density(x))

    # of (x - level)^2 over a cell, by parts; erfc keeps its digits in the tails
    mass = (torch.erfc(low / root) - torch.erfc(high / root)) / 2
    mean = density(low) - density(high)
    square = mass + moment(low) - moment(high)
    return float((square - 2 * levels * mean + levels.square() * mass).sum())


@functools.cache
def best_scale(kind: str, depth: int, cells: str = "nearest") -> float:
    """The scale that is best for N(0, 1): what a search over many groups centres on."""
    if depth == 0:
        return 1.0
    low, high = math.log(0.05), math.log(8.0)
    while high - low > 1e-6:  # golden section; the error has one minimum
        a, b = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        if gaussian_distortion(kind, depth, math.exp(a), cells) < gaussian_distortion(
            kind, depth, math.exp(b), cells
        ):
            high = b
        else:
            low = a
    return math.exp((low + high) / 2)


@functools.cache
def _distortions(kind: str, scaling: str, cells: str) -> tuple[float, ...]:
    out = []
    for depth in range(MAX_DEPTH + 1):
        if scaling == "best":
            scale = best_scale(kind, depth, cells)
        else:
            scale = COMPANDER_SCALE if kind == "laplace" else 1.0
        out.append(gaussian_distortion(kind, depth, scale, cells))
    return tuple(out)


def distortion_table(kind: str, scaling: str = "best", cells: str = "nearest") -> torch.Tensor:
    """D(B) for B = 0..8, float64 (9,): the mean squared error at unit variance.

    kind: "lloyd" or "laplace". scaling: "best" where scales are searched, "nominal" where they
    follow from the variance (the paper's m = 0). cells: as in `thresholds`.
    """
    return torch.tensor(_distortions(kind, scaling, cells), dtype=torch.float64)
