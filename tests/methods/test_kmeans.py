"""The batched, weighted k-means against a slow one, and what it does with awkward data."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vq.methods import kmeans as module
from hf_vq.methods.kmeans import assign, kmeans, kmeans_plus_plus_seeds, mahalanobis_seeds
from tests.problems import generator, normal


def distances(points, weights, centroids):
    """(n, k) for one group, float64."""
    gap = points.double()[:, None] - centroids.double()[None]
    return (weights.double()[:, None] * gap.square()).sum(-1)


def total_cost(points, weights, centroids):
    return sum(
        float(distances(p, w, c).min(1).values.sum())
        for p, w, c in zip(points, weights, centroids, strict=True)
    )


def lloyd(points, weights, centroids, iterations):
    """One group, float64; its data must leave no cluster empty."""
    centroids = centroids.double().clone()
    for _ in range(iterations):
        index = distances(points, weights, centroids).argmin(1)
        for m in range(len(centroids)):
            mine = index == m
            assert bool(mine.any())
            w = weights.double()[mine]
            centroids[m] = (w * points.double()[mine]).sum(0) / w.sum(0)
    return centroids


def data(groups, n, d, seed=0):
    return normal(groups, n, d, seed=seed), normal(groups, n, d, seed=seed + 1).exp()


@pytest.mark.parametrize("d", [1, 2, 4])
@pytest.mark.parametrize("k", [5, 18])  # sums by matrix product, by scatter
@pytest.mark.parametrize("init", ["mahalanobis", "kmeans++"])
def test_equals_slow_lloyd(d, k, init):
    points, weights = data(3, 150, d)
    if init == "mahalanobis":
        seeds = mahalanobis_seeds(points, torch.ones(3, 150, dtype=torch.bool), k)
    else:
        seeds = kmeans_plus_plus_seeds(points, weights, k, generator(4))
    found = kmeans(points, weights, k, iterations=4, init=init, seed=4, tolerance=0)
    for g in range(3):
        expected = lloyd(points[g], weights[g], seeds[g], 4)
        torch.testing.assert_close(found[g].double(), expected, rtol=1e-4, atol=1e-4)


def test_no_iterations_returns_the_seeds():
    points, weights = data(2, 50, 2)
    seeds = mahalanobis_seeds(points, torch.ones(2, 50, dtype=torch.bool), 7)
    assert torch.equal(kmeans(points, weights, 7, iterations=0), seeds)


def test_every_iteration_lowers_the_cost():
    points, weights = data(2, 400, 2)
    costs = [
        total_cost(points, weights, kmeans(points, weights, 12, iterations=i, tolerance=0))
        for i in range(6)
    ]
    assert all(b < a for a, b in pairwise(costs))


def test_stops_early_only_when_there_is_little_to_gain():
    points, weights = data(1, 3000, 2)
    long = kmeans(points, weights, 24, iterations=200, tolerance=0)
    short = kmeans(points, weights, 24, iterations=200)
    assert not torch.equal(long, short)
    assert total_cost(points, weights, short) < 1.02 * total_cost(points, weights, long)


def test_weights_pull():
    points = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
    weights = torch.tensor([[[1.0, 3.0], [3.0, 1.0]]])  # per coordinate
    found = kmeans(points, weights, 1, iterations=3)
    torch.testing.assert_close(found, torch.tensor([[[0.75, 0.25]]]))


def test_assign_takes_the_weighted_nearest():
    points, weights = data(3, 60, 2)
    centroids = normal(3, 9, 2, seed=5)
    found = assign(points, weights, centroids)
    for g in range(3):
        gaps = distances(points[g], weights[g], centroids[g])
        chosen = gaps.gather(1, found[g][:, None])[:, 0]
        torch.testing.assert_close(chosen, gaps.min(1).values, rtol=1e-4, atol=1e-5)
    plain = assign(points, torch.ones_like(weights), centroids)
    assert not torch.equal(found, plain)


@pytest.mark.parametrize("limit", [1, 40, 700])
def test_chunks_do_not_show(monkeypatch, limit):
    points, weights = data(3, 60, 2)
    expected = kmeans(points, weights, 9, iterations=5)
    monkeypatch.setitem(module._CHUNK, "cpu", limit)
    torch.testing.assert_close(kmeans(points, weights, 9, iterations=5), expected)


def test_both_ways_of_summing_agree(monkeypatch):
    points, weights = data(3, 60, 2)
    expected = kmeans(points, weights, 9, iterations=5)
    monkeypatch.setattr(module, "_ONE_HOT_LIMIT", 0)
    torch.testing.assert_close(kmeans(points, weights, 9, iterations=5), expected)


@pytest.mark.parametrize("garbage", [0.0, 1000.0])
def test_zero_weight_is_padding(garbage):
    points, weights = data(2, 80, 2)
    expected = kmeans(points, weights, 6, iterations=8)
    padded = torch.cat([points, torch.full((2, 30, 2), garbage)], 1)
    mass = torch.cat([weights, torch.zeros(2, 30, 2)], 1)
    found = kmeans(padded, mass, 6, iterations=8)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_kmeans_plus_plus_ignores_padding():
    points, weights = data(1, 30, 2)
    points[:, 10:] = 1000.0
    weights[:, 10:] = 0
    seeds = kmeans_plus_plus_seeds(points, weights, 8, generator(0))
    assert float(seeds.max()) < 1000


def test_group_of_padding_alone():
    points, weights = data(2, 40, 2)
    weights[1] = 0
    for init in ("mahalanobis", "kmeans++"):
        found = kmeans(points, weights, 5, iterations=5, init=init)
        assert bool(torch.isfinite(found).all())


# -- seeds ---------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 4])
def test_mahalanobis_seeds_are_evenly_spaced_in_rank(d):
    n, k = 101, 11
    points = normal(1, n, d, seed=3) @ (normal(d, d, seed=4) + torch.eye(d))
    seeds = mahalanobis_seeds(points, torch.ones(1, n, dtype=torch.bool), k)[0]
    centred = (points[0] - points[0].mean(0)).double()
    distance = (centred @ torch.linalg.inv(centred.T @ centred) * centred).sum(1)
    expected = points[0][distance.argsort()[:: (n - 1) // (k - 1)]]
    assert torch.equal(seeds, expected)


def test_kmeans_plus_plus_depends_on_the_seed_alone():
    points, weights = data(3, 60, 2)
    state = torch.random.get_rng_state()
    first = kmeans(points, weights, 8, iterations=0, init="kmeans++", seed=1)
    torch.rand(5)
    again = kmeans(points, weights, 8, iterations=0, init="kmeans++", seed=1)
    torch.random.set_rng_state(state)
    assert torch.equal(first, again)
    kmeans(points, weights, 8, iterations=1, init="kmeans++", seed=2)
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's numbers are drawn
    assert not torch.equal(first, kmeans(points, weights, 8, iterations=0, init="kmeans++", seed=2))
    for g in range(3):  # seeds are points, no two the same
        equal = (first[g][:, None] == points[g][None]).all(-1)
        assert equal.any(1).all() and len(equal.nonzero()[:, 1].unique()) == 8


def test_kmeans_plus_plus_goes_by_squared_distance():
    # beside 200 near points one that is 100 times farther away: 98 % of the chance by squares,
    # 33 % by distances
    points = torch.cat([normal(1, 200, 1), torch.full((1, 1, 1), 100.0)], 1)
    weights = torch.ones_like(points)
    far = sum(
        bool((kmeans_plus_plus_seeds(points, weights, 2, generator(s)) == 100).any())
        for s in range(50)
    )
    assert far >= 45


# -- awkward data ---------------------------------------------------------------


@pytest.mark.parametrize("init", ["mahalanobis", "kmeans++"])
@pytest.mark.parametrize("value", [0.0, -3.25])
@pytest.mark.parametrize("d", [1, 2])
def test_constant_data(init, value, d):
    points = torch.full((2, 40, d), value)
    found = kmeans(points, torch.ones_like(points), 7, iterations=10, init=init)
    assert torch.equal(found, torch.full((2, 7, d), value))


@pytest.mark.parametrize("init", ["mahalanobis", "kmeans++"])
def test_fewer_distinct_points_than_centroids(init):
    # 6 distinct points in unequal numbers, 20 centroids: all are met exactly, duplicates may stay
    distinct = 3 * normal(6, 2, seed=1)
    points = distinct.repeat_interleave(torch.tensor([40, 1, 9, 1, 20, 3]), 0)[None]
    weights = torch.ones_like(points)
    found = kmeans(points, weights, 20, iterations=30, init=init)
    assert total_cost(points, weights, found) < 1e-6 * float(points.square().sum())


@pytest.mark.parametrize("init", ["mahalanobis", "kmeans++"])
def test_more_centroids_than_points(init):
    points, weights = data(2, 3, 4)
    found = kmeans(points, weights, 16, iterations=10, init=init)
    assert found.shape == (2, 16, 4)
    assert total_cost(points, weights, found) < 1e-6


def test_empty_clusters_are_put_where_it_hurts():
    # all seeds fall on the crowd at 0, so the outliers get centroids only by re-seeding
    points = torch.zeros(1, 1000, 1)
    points[0, :4, 0] = torch.tensor([5.0, 6.0, -7.0, 40.0])
    seeds = mahalanobis_seeds(points, torch.ones(1, 1000, dtype=torch.bool), 5)[0, :, 0]
    assert int((seeds == 0).sum()) == 4
    found = kmeans(points, torch.ones_like(points), 5, iterations=20)[0, :, 0].sort().values
    torch.testing.assert_close(found, torch.tensor([-7.0, 0.0, 5.0, 6.0, 40.0]))


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 4),
    n=st.integers(1, 60),
    d=st.sampled_from([1, 2, 4, 8]),
    k=st.integers(2, 40),
    levels=st.integers(1, 50),
    init=st.sampled_from(["mahalanobis", "kmeans++"]),
    scale=st.sampled_from([1e-10, 1.0, 1e6]),
    seed=st.integers(0, 999),
)
def test_any_data_gives_finite_centroids_within_its_range(
    groups, n, d, k, levels, init, scale, seed
):
    points = torch.randint(-levels, levels + 1, (groups, n, d), generator=generator(seed)) * scale
    weights = torch.rand(groups, n, d, generator=generator(seed + 1)) + 0.01
    found = kmeans(points, weights, k, iterations=6, init=init, seed=seed)
    assert found.shape == (groups, k, d)
    slack = 1e-5 * levels * scale
    assert bool((found <= points.amax(1, keepdim=True) + slack).all())
    assert bool((found >= points.amin(1, keepdim=True) - slack).all())
