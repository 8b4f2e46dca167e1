"""Bits where they matter: the cheapest mixture of rates for a given distortion, and the reverse.

Given items that each can be had at several (rate, distortion) pairs, find a choice of small total
distortion whose total rate does not exceed a budget. On the lower convex hull of every item the
answer is one slope for all (Lagrange; CVXQ section 2, Shoham and Gersho 1988): an item moves up its
hull as long as a unit of rate buys more than the slope. What the last slope leaves of the budget
is spent move by move, the best drop per unit that still fits first, so the total is never above the
budget and never below it by a move that would have helped.

Two forms: `allocate` for a few hundred items with curves of their own (matrices, each with the
specs it could have), and `allocate_depths` for millions of items that share one curve up to a
factor (groups of weights: sensitivity * D(B) at B bits per weight).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Steps of the bisection on log2 of the slope: more than a double can tell apart.
_BISECTIONS = 200
# Items among which the remainder is spent; those whose next step is worth most.
_LAST_ITEMS = 1 << 16


class AllocationError(ValueError):
    """No choice fits the budget, or the numbers to choose by are unusable."""


@dataclass(frozen=True)
class Allocation:
    """choice[n]: index into the n-th item's candidates; rate and distortion: their totals."""

    choice: list[int]
    rate: float
    distortion: float


def lower_hull(rates: Sequence[float], distortions: Sequence[float]) -> list[int]:
    """Indices of the candidates on the lower convex hull, by rising rate and falling distortion.

    Starts with the smallest rate (of several, the one with the least distortion) and ends with the
    least distortion. Slopes between neighbours fall strictly.
    """
    hull: list[int] = []
    for i in sorted(range(len(rates)), key=lambda i: (rates[i], distortions[i])):
        if hull and distortions[i] >= distortions[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            before = (distortions[a] - distortions[b]) * (rates[i] - rates[b])
            after = (distortions[b] - distortions[i]) * (rates[b] - rates[a])
            if before > after:
                break
            hull.pop()
        hull.append(i)
    return hull


def allocate(
    rates: Sequence[Sequence[float]], distortions: Sequence[Sequence[float]], budget: float
) -> Allocation:
    """One candidate per item, their rates adding up to `budget` at most.

    rates[n], distortions[n]: the n-th item's candidates in any order and number; the unit of rate
    is the budget's (bits, bytes). The result is optimal for the rate it has on the hulls; the
    repair makes it better, not always best. Raises AllocationError if the smallest rates exceed the
    budget.
    """
    _check_curves(rates, distortions)
    hulls = [lower_hull(r, d) for r, d in zip(rates, distortions, strict=True)]
    choice = [hull[0] for hull in hulls]
    spent = float(sum(r[c] for r, c in zip(rates, choice, strict=True)))
    if spent > budget:
        raise AllocationError(
            f"a budget of {budget:g} is below {spent:g}, the smallest that {len(choice)} items can "
            "have; raise the budget"
        )
    steps = []  # (slope, item, candidate): along a hull they fall, so sorting keeps their order
    for n, hull in enumerate(hulls):
        for a, b in itertools.pairwise(hull):
            drop = distortions[n][a] - distortions[n][b]
            steps.append((drop / (rates[n][b] - rates[n][a]), n, b))
    for _, n, b in sorted(steps, key=lambda step: (-step[0], step[1])):
        extra = rates[n][b] - rates[n][choice[n]]
        if spent + extra > budget:
            break
        choice[n], spent = b, spent + extra
    _repair(rates, distortions, choice, budget)
    pairs = list(enumerate(choice))
    return Allocation(
        choice,
        float(sum(rates[n][c] for n, c in pairs)),
        float(sum(distortions[n][c] for n, c in pairs)),
    )


def _check_curves(rates: Sequence[Sequence[float]], distortions: Sequence[Sequence[float]]) -> None:
    for n, (r, d) in enumerate(zip(rates, distortions, strict=True)):
        if len(r) != len(d) or not len(r):
            raise AllocationError(f"item {n} has {len(r)} rates and {len(d)} distortions")
        if not all(abs(x) < float("inf") for x in (*r, *d)):
            raise AllocationError(f"item {n} has a rate or distortion that is not finite")


def _repair(
    rates: Sequence[Sequence[float]],
    distortions: Sequence[Sequence[float]],
    choice: list[int],
    budget: float,
) -> None:
    """Spend the remainder, in place: any candidate of any item that still fits, best value first.

    Off the hull too: a candidate above it may be the only one that is small enough.
    """
    width = max(len(r) for r in rates) if rates else 0
    if not width:
        return
    infinity = float("inf")
    r = torch.tensor([[*x, *[infinity] * (width - len(x))] for x in rates], dtype=torch.float64)
    d = torch.tensor([[*x, *[0.0] * (width - len(x))] for x in distortions], dtype=torch.float64)
    now = torch.tensor(choice)
    while True:
        current = now[:, None]
        extra, drop = r - r.gather(1, current), d.gather(1, current) - d
        spare = budget - float(r.gather(1, current).sum())
        useful = (extra <= spare) & (drop > 0)
        if not bool(useful.any()):
            break
        # a candidate that costs nothing more and is better: take it before all others
        value = torch.where(extra > 0, drop / extra.clamp_min(1e-300), infinity)
        best = int(torch.where(useful, value, -1.0).argmax())
        now[best // width] = best % width
    choice[:] = now.tolist()


# -- many items, one curve -------------------------------------------------------------------


def allocate_depths(
    sensitivity: torch.Tensor,
    sizes: torch.Tensor,
    table: torch.Tensor,
    budget: int,
    rates: Sequence[int] | None = None,
) -> torch.Tensor:
    """Depth 0..K-1 of every group of weights, uint8 (N,), within a budget in bits.

    sensitivity: (N,), what a unit of squared error in one weight of the group costs, times the
    variance of its weights (G^2 S^2). sizes: integers (N,), weights per group, P. table: (K,), the
    quantizer's mean squared error at 0..K-1 bits per weight on data of unit variance, D(B).
    Minimizes ``sum P G^2 S^2 D(B)`` subject to ``sum P B <= budget``. Groups of no sensitivity get
    no bits. Equal groups that cannot all get a bit get it in order. rates: (K,) non-decreasing
    integers in the place of 0..K-1, where a depth takes other than its own number (whole words,
    say). Raises AllocationError for a negative budget, and for sensitivities that are negative or
    not finite.
    """
    u = sensitivity.double().flatten()
    p = sizes.to(u.device, torch.int64).expand(sensitivity.shape).flatten()
    if budget < 0:
        raise AllocationError(f"a budget of {budget} bits is below 0, the smallest there is")
    if not bool(torch.isfinite(u).all()) or bool((u < 0).any()):
        wrong = int((~torch.isfinite(u) | (u < 0)).sum())
        raise AllocationError(f"{wrong} of {len(u)} sensitivities are negative or not finite")
    curve = _Curve(list(rates or range(len(table))), table.double().tolist())
    depths = _by_slope(u, p, curve, budget)
    spent = int((p * torch.tensor(curve.rates, device=u.device)[depths]).sum())
    _spend(u, p, depths, curve, budget - spent)
    return depths.to(torch.uint8)


@dataclass(frozen=True)
class _Curve:
    """Rate and distortion of every depth, per weight."""

    rates: list[int]
    distortions: list[float]


def _by_slope(u: torch.Tensor, p: torch.Tensor, curve: _Curve, budget: int) -> torch.Tensor:
    """Depths int64 (N,) on the hull, for the smallest common slope that the budget allows.

    Along the hull of the curve a group takes a step if ``u * (drop per bit) > slope``. With the
    groups sorted by u, the rate at any slope is a handful of look-ups.
    """
    hull = lower_hull(curve.rates, curve.distortions)
    steps = [
        (b - a, curve.rates[b] - curve.rates[a], curve.distortions[a] - curve.distortions[b])
        for a, b in itertools.pairwise(hull)
    ]
    depths = torch.zeros_like(p)
    if not steps or not len(u) or not bool((u > 0).any()):
        return depths
    if hull[0]:  # deeper for nothing
        depths += hull[0] * (u > 0)
    ordered, order = u.sort()
    weights = torch.cat([p.new_zeros(1), p[order].flip(0).cumsum(0)])  # of the k largest u
    values = [drop / bits for _, bits, drop in steps]
    widths = torch.tensor([bits for _, bits, _ in steps], device=u.device)

    def rate(slope: float) -> int:
        # divided one by one, as below: a tensor would be multiplied by a rounded reciprocal
        limits = torch.tensor([slope / v for v in values], dtype=u.dtype, device=u.device)
        below = torch.searchsorted(ordered, limits, right=True)
        return int((weights[len(u) - below] * widths).sum())

    # At `high` nobody takes a step, at `low` everybody does; doubles in between are bisected.
    positive = ordered[ordered > 0]
    high = float(positive[-1]) * values[0] * 2
    low = float(positive[0]) * values[-1] / 2
    if rate(low) <= budget:
        high = low
    for _ in range(_BISECTIONS):
        middle = (low * high) ** 0.5
        if not low < middle < high:
            break
        low, high = (low, middle) if rate(middle) <= budget else (middle, high)
    for (deeper, _, _), value in zip(steps, values, strict=True):
        depths += deeper * (u > high / value)
    return depths


def _spend(
    u: torch.Tensor, p: torch.Tensor, depths: torch.Tensor, curve: _Curve, spare: int
) -> None:
    """Spend what is left, in place: the best drop per bit that fits, over and over."""
    best, deeper = (table.to(u.device) for table in _best_moves(curve))
    cost_of = torch.tensor(curve.rates, device=u.device)
    most = best.shape[1] - 1

    def values(u: torch.Tensor, p: torch.Tensor, depths: torch.Tensor, spare: int) -> torch.Tensor:
        return u * best[depths, (spare // p.clamp_min(1)).clamp_max(most)]

    few = torch.arange(len(u), device=u.device)
    if len(u) > _LAST_ITEMS:
        few = values(u, p, depths, spare).topk(_LAST_ITEMS).indices.sort().values
    u, p, now = u[few], p[few], depths[few]
    while spare > 0 and len(u):
        value = values(u, p, now, spare)
        top = value.max()
        if not bool(top > 0):
            break
        # groups alike to the last digit take their step together, as many of them as can
        tied = (value == top).nonzero()[:, 0]
        before = now[tied]
        after = before + deeper[before, (spare // p[tied].clamp_min(1)).clamp_max(most)]
        cost = (cost_of[after] - cost_of[before]) * p[tied]
        fits = cost.cumsum(0) <= spare
        now[tied[fits]] = after[fits]
        spare -= int(cost[fits].sum())
    depths[few] = now


def _best_moves(curve: _Curve) -> tuple[torch.Tensor, torch.Tensor]:
    """[b, m]: the largest drop per bit from depth b for at most m more bits; how much deeper."""
    depths = len(curve.rates)
    best = torch.zeros(depths, curve.rates[-1] + 1, dtype=torch.float64)
    deeper = torch.zeros(depths, curve.rates[-1] + 1, dtype=torch.int64)
    for b in range(depths):
        for c in range(b + 1, depths):
            bits = curve.rates[c] - curve.rates[b]
            drop = curve.distortions[b] - curve.distortions[c]
            # a depth that costs no more is taken with the next that does
            worth = drop / bits if bits else 0.0
            better = best[b, bits:] < worth
            best[b, bits:][better], deeper[b, bits:][better] = worth, c - b
    return best, deeper


def closed_form_depths(
    sensitivity: torch.Tensor, sizes: torch.Tensor, mean_depth: float
) -> torch.Tensor:
    """Real-valued depths (N,) for D(B) = 2**-2B with nothing clipped (CVXQ section 2).

    ``B_n = R + (log2(G_n^2 S_n^2) - P-weighted mean of the same) / 2``. What `allocate_depths`
    comes within a bit of where the law holds.
    """
    half = sensitivity.double().log2() / 2
    weight = sizes.double() / sizes.double().sum()
    return mean_depth + half - (weight * half).sum()
