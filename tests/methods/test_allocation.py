"""The allocator against brute force, against the closed form, and the laws any allocator obeys."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vq.methods.allocation import (
    AllocationError,
    allocate,
    allocate_depths,
    closed_form_depths,
    lower_hull,
)
from tests.problems import normal

HIGH_RATE = 4.0 ** -torch.arange(9, dtype=torch.float64)
"""The law of high rates, D(B) = 2^-2B."""
HOLLOW = torch.tensor([1.0, 1.08, 0.28, 0.07, 0.0176])
"""The first bit makes it worse (a Laplace compander on Laplace data)."""

numbers = st.floats(0.01, 100)
curves = st.lists(
    st.lists(st.tuples(st.integers(0, 12), numbers), min_size=1, max_size=5), min_size=1, max_size=4
)


def split(curves):
    return [[r for r, _ in c] for c in curves], [[d for _, d in c] for c in curves]


def brute_force(rates, distortions, budget):
    best = None
    for choice in itertools.product(*(range(len(r)) for r in rates)):
        if sum(r[c] for r, c in zip(rates, choice, strict=True)) <= budget:
            total = sum(d[c] for d, c in zip(distortions, choice, strict=True))
            best = total if best is None else min(best, total)
    return best


def hull_bound(rates, distortions, budget):
    """The least distortion of any mixture of candidates: no choice can be below it."""
    slopes = {0.0}
    for r, d in zip(rates, distortions, strict=True):
        for i, j in itertools.permutations(range(len(r)), 2):
            if r[j] > r[i] and d[j] < d[i]:
                slopes.add((d[i] - d[j]) / (r[j] - r[i]))
    return max(
        sum(
            min(y + slope * x for x, y in zip(r, d, strict=True))
            for r, d in zip(rates, distortions, strict=True)
        )
        - slope * budget
        for slope in slopes
    )


# -- items with curves of their own ----------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(curves, st.integers(0, 50))
def test_within_the_hull_gap_of_the_best(curves, budget):
    rates, distortions = split(curves)
    best = brute_force(rates, distortions, budget)
    if best is None:
        with pytest.raises(AllocationError):
            allocate(rates, distortions, budget)
        return
    found = allocate(rates, distortions, budget)
    assert found.rate <= budget
    assert found.rate == sum(r[c] for r, c in zip(rates, found.choice, strict=True))
    assert found.distortion >= best - 1e-9
    # one item only is off its hull point, so the gap is less than the largest drop along a hull
    drops = [
        d[a] - d[b]
        for r, d in zip(rates, distortions, strict=True)
        for a, b in itertools.pairwise(lower_hull(r, d))
    ]
    bound = hull_bound(rates, distortions, budget)
    assert found.distortion <= bound + max(drops, default=0.0) + 1e-9


@settings(max_examples=100, deadline=None)
@given(curves)
def test_at_every_hull_rate_it_is_the_best(curves):
    rates, distortions = split(curves)
    hulls = [lower_hull(r, d) for r, d in zip(rates, distortions, strict=True)]
    budget = sum(r[h[-1]] for r, h in zip(rates, hulls, strict=True))
    found = allocate(rates, distortions, budget)
    assert found.distortion == pytest.approx(brute_force(rates, distortions, budget))
    least = sum(r[h[0]] for r, h in zip(rates, hulls, strict=True))
    found = allocate(rates, distortions, least)
    assert found.distortion == pytest.approx(brute_force(rates, distortions, least))


@settings(max_examples=100, deadline=None)
@given(curves, st.integers(0, 50), st.integers(0, 10))
def test_more_budget_is_never_worse(curves, budget, more):
    rates, distortions = split(curves)
    if sum(min(r) for r in rates) > budget:
        return
    small, large = (allocate(rates, distortions, b) for b in (budget, budget + more))
    assert large.distortion <= small.distortion + 1e-9


def test_what_no_budget_allows_is_named():
    with pytest.raises(AllocationError, match="below 5, the smallest that 2 items can have"):
        allocate([[2, 4], [3]], [[1.0, 0.5], [1.0]], 4.5)


def test_a_candidate_off_the_hull_is_used_where_nothing_else_fits():
    found = allocate([[0, 3, 4]], [[1.0, 0.9, 0.1]], 3)
    assert found.choice == [1]


@pytest.mark.parametrize(
    ("rates", "distortions"), [([[1, 2]], [[1.0]]), ([[]], [[]]), ([[1]], [[float("nan")]])]
)
def test_unusable_curves(rates, distortions):
    with pytest.raises(AllocationError, match="item 0"):
        allocate(rates, distortions, 10)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), numbers), min_size=1, max_size=12))
def test_hull(points):
    rates, distortions = [r for r, _ in points], [d for _, d in points]
    hull = lower_hull(rates, distortions)
    x, y = [rates[i] for i in hull], [distortions[i] for i in hull]
    assert x[0] == min(rates) and y[-1] == min(distortions)
    assert all(a < b for a, b in itertools.pairwise(x))
    slopes = [(y[i] - y[i + 1]) / (x[i + 1] - x[i]) for i in range(len(x) - 1)]
    assert all(s > 0 for s in slopes) and all(a > b for a, b in itertools.pairwise(slopes))
    for rate, distortion in points:  # none lies below
        for i, slope in enumerate(slopes):
            assert distortion >= y[i] - slope * (rate - x[i]) - 1e-6 * max(distortions)


# -- depths of groups ------------------------------------------------------------------------


def spread(groups: int, seed: int = 0) -> torch.Tensor:
    return (1.5 * normal(groups, seed=seed)).exp()


def distortion(u, p, table, depths):
    return float((u.double() * p * table.double()[depths.long()]).sum())


@settings(max_examples=150, deadline=None)
@given(
    u=st.lists(numbers, min_size=1, max_size=5),
    sizes=st.lists(st.integers(1, 9), min_size=5, max_size=5),
    budget=st.integers(0, 150),
    hollow=st.booleans(),
)
def test_depths_are_within_the_hull_gap_of_the_best(u, sizes, budget, hollow):
    table = HOLLOW if hollow else HIGH_RATE[:5]
    p = torch.tensor(sizes[: len(u)])
    weights = torch.tensor(u, dtype=torch.float64)
    depths = allocate_depths(weights, p, table, budget)
    assert int((p * depths).sum()) <= budget
    rates = [[b * s for b in range(5)] for s in p.tolist()]
    curves = [
        [float(table[b]) * x * s for b in range(5)]
        for x, s in zip(weights.tolist(), p.tolist(), strict=True)
    ]
    found = distortion(weights, p, table, depths)
    assert found >= brute_force(rates, curves, budget) - 1e-9
    steps = itertools.pairwise(lower_hull(range(5), table.tolist()))
    drop = max(float(table[a] - table[b]) for a, b in steps)
    bound = hull_bound(rates, curves, budget) + float((weights * p).max()) * drop
    assert found <= bound + 1e-9


@pytest.mark.parametrize("mean", [0.5, 2.0, 2.37, 3.2, 5.0])
def test_the_budget_is_hit_within_one_step(mean):
    u, p = spread(5000), torch.full((5000,), 32)
    budget = int(mean * p.sum())
    depths = allocate_depths(u, p, HIGH_RATE, budget)
    assert 0 <= budget - int((p * depths).sum()) < 32


@pytest.mark.parametrize("seed", range(3))
def test_the_budget_is_never_passed(seed):
    """At whole steps, where a slope that is off by one rounding takes one group too many."""
    u, p = spread(150, seed), torch.ones(150, dtype=torch.int64)
    for budget in range(200, 700, 17):
        assert int(allocate_depths(u, p, HIGH_RATE, budget).sum()) == budget


def test_mixed_sizes_hit_the_budget_within_the_smallest_step():
    u = spread(4000)
    p = torch.where(torch.arange(4000) % 3 == 0, 1000, 7)
    budget = int(2.5 * p.sum())
    depths = allocate_depths(u, p, HIGH_RATE, budget)
    assert 0 <= budget - int((p * depths).sum()) < 7


def test_equal_groups_get_equal_depths():
    p = torch.full((64,), 128)
    for mean in range(9):
        depths = allocate_depths(torch.full((64,), 0.3), p, HIGH_RATE, mean * 64 * 128)
        assert (depths == mean).all()
    depths = allocate_depths(torch.full((64,), 0.3), p, HIGH_RATE, 64 * 128 * 2 + 128 * 10)
    assert depths.tolist() == [3] * 10 + [2] * 54


def test_no_group_is_beyond_eight():
    depths = allocate_depths(spread(100), torch.full((100,), 64), HIGH_RATE, 8 * 6400)
    assert (depths == 8).all()
    assert torch.equal(depths, allocate_depths(spread(100), torch.tensor(64), HIGH_RATE, 10**9))


@pytest.mark.parametrize("factor", [2.0**-60, 1e-3, 7.0, 2.0**70])
def test_a_common_factor_changes_nothing(factor):
    u, p = spread(3000).double(), torch.full((3000,), 16)
    depths = [allocate_depths(x, p, HIGH_RATE, 3000 * 16 * 3) for x in (u, u * factor)]
    assert torch.equal(*depths)


def test_double_gradients_in_half_of_the_groups():
    """G twice as large (G^2 four times): half a bit above and below the mean on average."""
    u = torch.where(torch.arange(400) < 200, 4.0, 1.0) * spread(200, seed=3).repeat(2)
    depths = allocate_depths(u, torch.full((400,), 64), HIGH_RATE, 400 * 64 * 5)
    assert float(depths[:200].float().mean()) == pytest.approx(5.5, abs=0.05)
    assert float(depths[200:].float().mean()) == pytest.approx(4.5, abs=0.05)


@pytest.mark.parametrize("mean", [3.0, 4.0, 5.0])
def test_closed_form(mean):
    u, p = (0.6 * normal(2000)).exp(), torch.randint(1, 200, (2000,))
    exact = closed_form_depths(u, p, mean)
    assert float((p * exact).sum() / p.sum()) == pytest.approx(mean)
    assert exact.min() > 0 and exact.max() < 8  # nothing clips
    depths = allocate_depths(u, p, HIGH_RATE, int(mean * p.sum()))
    # marginal drops of whole bits: a group is rounded up as long as the slope is passed
    assert float((depths - exact).abs().max()) < 0.6


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.integers(0, 4000), st.integers(1, 300))
def test_more_bits_are_never_worse(seed, budget, more):
    u = spread(40, seed)
    p = torch.randint(1, 30, (40,), generator=torch.Generator().manual_seed(seed))
    for table in (HIGH_RATE, HOLLOW):
        small, large = (allocate_depths(u, p, table, b) for b in (budget, budget + more))
        assert distortion(u, p, table, large) <= distortion(u, p, table, small) * (1 + 1e-12)


def test_groups_without_sensitivity_get_nothing():
    u = torch.tensor([0.0, 1.0, 0.0, 2.0])
    depths = allocate_depths(u, torch.full((4,), 8), HIGH_RATE, 10**6)
    assert depths.tolist() == [0, 8, 0, 8]
    assert allocate_depths(torch.zeros(3), torch.full((3,), 8), HIGH_RATE, 100).tolist() == [0] * 3


def test_float32_is_enough_to_ask_with():
    u = spread(3000)
    p = torch.full((3000,), 16)
    depths = [allocate_depths(x, p, HIGH_RATE, 3000 * 16 * 3) for x in (u, u.double())]
    assert torch.equal(*depths)
    tiny = u.double() * 1e-9  # squares of gradients: below the smallest half-precision number
    assert torch.equal(allocate_depths(tiny.float(), p, HIGH_RATE, 3000 * 16 * 3), depths[0])


def test_many_groups():
    n = 300_000
    u, p = spread(n), torch.full((n,), 256)
    depths = allocate_depths(u, p, HIGH_RATE, n * 256 * 2 + 300)
    assert int((p * depths).sum()) == n * 256 * 2 + 256


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 999), st.integers(0, 40))
def test_whole_words(seed, budget):
    """Groups of 20 weights take ceil(20 B / 32) words: the third bit costs nothing."""
    u, p = spread(5, seed), torch.ones(5, dtype=torch.int64)
    words = [-(-20 * b // 32) for b in range(9)]
    depths = allocate_depths(u, p, HIGH_RATE, budget, words)
    spent = sum(words[b] for b in depths.tolist())
    assert spent <= budget
    assert spent == min(budget, 25)
    free = [b for b in range(8) if words[b] == words[b + 1]]
    assert not set(free) & set(depths.tolist())
    curves = [[float(HIGH_RATE[b]) * x for b in range(9)] for x in u.tolist()]
    found = distortion(u, p, HIGH_RATE, depths)
    assert found <= allocate([words] * 5, curves, budget).distortion * (1 + 1e-9)


def test_unusable_numbers():
    p = torch.full((2,), 8)
    with pytest.raises(AllocationError, match="-1 bits is below 0"):
        allocate_depths(torch.ones(2), p, HIGH_RATE, -1)
    for wrong in (float("nan"), float("inf"), -1.0):
        with pytest.raises(AllocationError, match="1 of 2 sensitivities"):
            allocate_depths(torch.tensor([1.0, wrong]), p, HIGH_RATE, 10)
