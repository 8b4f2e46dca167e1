"""k-means with many centroids: against the exact one, on awkward data, on threads, in memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hf_vq.methods import kmeans as exact
from hf_vq.methods import kmeans_large as module
from hf_vq.methods.kmeans import kmeans
from hf_vq.methods.kmeans_large import build_cells, candidates, descend, kmeans_large, nearest
from tests.problems import generator, normal

compiled = pytest.mark.skipif(module._compiled() is None, reason="needs numba")


@pytest.fixture(params=["compiled", "torch"])
def backend(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(module, "_compiled", lambda: None)
    elif module._compiled() is None:
        pytest.skip("needs numba")
    return request.param


def data(n, d, seed=0):
    return normal(n, d, seed=seed), normal(n, seed=seed + 1).exp()


def cost(points, weights, centroids):
    gap = (points - centroids[nearest(points, centroids)]).double().square().sum(1)
    return float((weights.double() * gap).sum())


def lloyd(points, weights, k, **options):
    """The exact k-means: full distances, k-means++ seeds one by one."""
    limit, exact._EXACT_LIMIT = exact._EXACT_LIMIT, 1 << 30
    try:
        spread = weights[:, None].expand_as(points)
        return kmeans(points[None], spread[None], k, init="kmeans++", **options)[0]
    finally:
        exact._EXACT_LIMIT = limit


# -- quality --------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d", "k"), [(9001, 8, 300), (20000, 4, 257), (5000, 5, 700)])
def test_close_to_exact_lloyd(backend, n, d, k):
    points, weights = data(n, d)
    found = kmeans_large(points, weights, k, iterations=20)
    assert found.shape == (k, d) and found.dtype == torch.float32
    assert cost(points, weights, found) < 1.03 * cost(
        points, weights, lloyd(points, weights, k, iterations=20)
    )


def test_close_to_exact_lloyd_on_clumps(backend):
    # far from normal: clumps of very different size and spread, far from 0
    centres, spread = 20 * normal(30, 6, seed=1) + 1000, normal(30, seed=2).exp()
    clump = (torch.rand(8000, generator=generator(3)).square() * 30).long()
    points = centres[clump] + spread[clump, None] * normal(8000, 6, seed=4)
    weights = torch.ones(8000)
    found = kmeans_large(points, weights, 250, iterations=20)
    centred = points - 1000
    peer = lloyd(centred, weights, 250, iterations=20)
    assert cost(centred, weights, found - 1000) < 1.05 * cost(centred, weights, peer)


def test_iterations_lower_the_cost(backend):
    points, weights = data(6000, 4)
    costs = [
        cost(points, weights, kmeans_large(points, weights, 150, iterations=i)) for i in (0, 2, 12)
    ]
    assert costs[0] > 1.1 * costs[1] > 1.1 * costs[2] * 0.95


def test_centroids_are_means_of_the_points_that_have_them(backend):
    points, weights = data(4000, 3)
    found = kmeans_large(points, weights, 100, iterations=60, tolerance=0)
    index = nearest(points, found)
    mass = torch.zeros(100).index_add_(0, index, weights)
    mean = torch.zeros(100, 3).index_add_(0, index, weights[:, None] * points) / mass[:, None]
    near = ((mean - found).abs().amax(1) < 0.05).float().mean()
    assert float(near) > 0.95  # but for points that exact search would move still


def test_weights_pull(backend):
    points = normal(6000, 4)
    heavy = torch.where(points[:, 0] > 0, 50.0, 1.0)
    found = kmeans_large(points, heavy, 120, iterations=15)
    even = kmeans_large(points, torch.ones(6000), 120, iterations=15)
    assert int((found[:, 0] > 0).sum()) > 1.3 * int((even[:, 0] > 0).sum())
    assert cost(points, heavy, found) < 0.9 * cost(points, heavy, even)


# -- the way from kmeans() -------------------------------------------------------


def test_kmeans_takes_it_beyond_the_limit(monkeypatch):
    points, weights = data(3000, 4)
    expected = kmeans_large(points, weights, 100, iterations=5, seed=3)
    monkeypatch.setattr(exact, "_EXACT_LIMIT", 99)
    options = {"iterations": 5, "seed": 3, "init": "kmeans++"}
    for mass in (weights[:, None], weights[:, None].expand(-1, 4)):
        assert torch.equal(kmeans(points[None], mass[None], 100, **options)[0], expected)
    # vectors that stick out of a matrix
    rest, mass = torch.zeros(40, 4), torch.tensor([2.0, 2.0, 0.0, 0.0]).expand(40, 4)
    padded = torch.cat([points, rest])[None]
    mass = torch.cat([weights[:, None].expand(-1, 4), mass])[None]
    assert torch.equal(kmeans(padded, mass, 100, **options)[0], expected)
    both = kmeans(
        torch.stack([points, 2 * points]), weights[:, None].expand(2, -1, 1), 100, **options
    )
    torch.testing.assert_close(both[1], 2 * both[0])


def test_kmeans_keeps_full_distances_where_weights_differ_or_few_are_asked_for(monkeypatch):
    points, weights = data(400, 2)
    options = {"iterations": 4, "init": "kmeans++"}
    weights = torch.stack([weights, weights + 1], 1)
    expected = kmeans(points[None], weights[None], 50, **options)
    monkeypatch.setattr(exact, "_EXACT_LIMIT", 49)
    assert torch.equal(kmeans(points[None], weights[None], 50, **options), expected)
    padding = torch.zeros(1, 400, 2)  # a group of padding alone, one with half of it partly so
    half = torch.where(torch.arange(400)[:, None] % 2 > 0, 1.0, torch.tensor([1.0, 0.0]))[None]
    for mass in (padding, half):
        assert bool(torch.isfinite(kmeans(points[None], mass, 50, **options)).all())
    assert exact._equal_weights(half) is None


def test_one_weight_per_point_is_the_same_for_few_centroids():
    points, weights = data(300, 3)
    wide = kmeans(points[None], weights[None, :, None].expand(1, 300, 3), 20, iterations=5)
    assert torch.equal(kmeans(points[None], weights[None, :, None], 20, iterations=5), wide)


# -- determinism, memory ------------------------------------------------------------


def test_depends_on_the_seed_not_on_threads(backend):
    points, weights = data(20000, 8)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(kmeans_large(points, weights, 300, iterations=8, seed=5))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert not torch.equal(found[0], kmeans_large(points, weights, 300, iterations=8, seed=6))


def test_draws_nobody_elses_random_numbers():
    state = torch.random.get_rng_state()
    kmeans_large(*data(900, 2), 40, iterations=2)
    assert torch.equal(torch.random.get_rng_state(), state)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor made."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.numbers = max(self.numbers, t.untyped_storage().nbytes() // t.element_size())
        return out


def test_memory_goes_by_points_not_by_points_times_centroids(backend, monkeypatch):
    for owner in (module, exact):
        monkeypatch.setitem(owner._CHUNK, "cpu", 1 << 12)
    n, d, k = 12000, 4, 400
    points, weights = data(n, d)
    with Largest() as seen:
        kmeans_large(points, weights, k, iterations=7)
    assert n * d < seen.numbers <= n * (2 * d + 2) < n * k / 20


@pytest.mark.parametrize("size", [1, 1000])
def test_chunks_do_not_show(backend, monkeypatch, size):
    points, weights = data(700, 3)
    expected = kmeans_large(points, weights, 40, iterations=6)
    monkeypatch.setitem(module._CHUNK, "cpu", size)
    found = kmeans_large(points, weights, 40, iterations=6)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# -- awkward data ---------------------------------------------------------------------


def test_zero_weight_is_padding(backend):
    points, weights = data(2000, 4)
    expected = kmeans_large(points, weights, 90, iterations=6)
    at = torch.arange(0, 4000, 2)
    padded, mass = torch.full((4000, 4), 1e6), torch.zeros(4000)
    padded[at], mass[at] = points, weights
    assert torch.equal(kmeans_large(padded, mass, 90, iterations=6), expected)


@pytest.mark.parametrize("n", [0, 1, 30, 64])
def test_no_fewer_centroids_than_points(backend, n):
    points, weights = data(n, 4)
    found = kmeans_large(points, weights, 64, iterations=6)
    assert found.shape == (64, 4) and bool(torch.isfinite(found).all())
    assert n == 0 or cost(points, weights, found) < 1e-6


def test_fewer_distinct_points_than_centroids(backend):
    distinct = 3 * normal(60, 3, seed=1)
    points = distinct.repeat_interleave(torch.arange(60) % 7 * 9 + 1, 0)
    weights = torch.ones(len(points))
    found = kmeans_large(points, weights, 80, iterations=20)
    assert cost(points, weights, found) < 1e-5 * float(points.square().sum())


@pytest.mark.parametrize("value", [0.0, -3.25, 1e6])
def test_constant_data(backend, value):
    points = torch.full((500, 3), value)
    found = kmeans_large(points, torch.rand(500) + 0.1, 40, iterations=5)
    torch.testing.assert_close(found, torch.full((40, 3), value))


def test_a_crowd_and_outliers(backend):
    # nearly all points are one; the seeds must find the others
    points = torch.zeros(3000, 4)
    points[:150] = normal(150, 4) * 10
    found = kmeans_large(points, torch.ones(3000), 100, iterations=20)
    peer = lloyd(points, torch.ones(3000), 100, iterations=20)
    assert cost(points, torch.ones(3000), found) < 1.2 * cost(points, torch.ones(3000), peer)


def test_empty_clusters_go_where_it_hurts():
    centroids = torch.tensor([[0.0], [9.0], [50.0]])
    points, index = torch.tensor([[0.0], [7.0], [-4.0], [9.0]]), torch.tensor([0, 1, 0, 1])
    idle = torch.tensor([False, False, True])
    assert module._reseed(centroids, idle, points, index, torch.tensor([0.0, 4, 16, 0]))
    assert centroids[2, 0] == -4 and index.tolist() == [0, 1, 2, 1]
    assert not module._reseed(centroids, idle, points, index, torch.zeros(4))


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 300),
    d=st.sampled_from([1, 2, 3, 8]),
    k=st.integers(1, 80),
    levels=st.integers(1, 50),
    scale=st.sampled_from([1e-10, 1.0, 1e6]),
    seed=st.integers(0, 999),
)
def test_any_data_gives_finite_centroids_within_its_range(n, d, k, levels, scale, seed):
    points = torch.randint(-levels, levels + 1, (n, d), generator=generator(seed)) * scale
    weights = torch.rand(n, generator=generator(seed + 1)) + 0.01
    found = kmeans_large(points, weights, k, iterations=7, seed=seed)
    assert found.shape == (k, d)
    slack = 1e-5 * levels * scale
    assert bool((found <= points.amax(0) + slack).all())
    assert bool((found >= points.amin(0) - slack).all())


# -- the parts ----------------------------------------------------------------------------


def test_cells_hold_every_centroid_once():
    centroids = normal(500, 4)
    cells = build_cells(centroids)
    assert torch.equal(cells.members.sort().values, torch.arange(500))
    assert cells.starts[0] == 0 and cells.starts[-1] == 500
    for c in range(len(cells.centres)):
        mine = cells.of(c)
        assert len(mine) and bool((nearest(centroids[mine], cells.centres) == c).all())


@pytest.mark.parametrize("d", [1, 3, 4, 9])
@pytest.mark.parametrize("count", [1, 5])
def test_search_of_all_cells_is_exact(backend, d, count):
    points, centroids = normal(101, d), normal(130, d, seed=1)
    cells = build_cells(centroids)
    found = candidates(points, centroids, cells, len(cells.centres), count)
    apart = torch.cdist(points.double(), centroids.double())
    torch.testing.assert_close(apart.gather(1, found), apart.sort().values[:, :count])


def test_search_of_few_cells_finds_less_and_says_so(backend):
    points, centroids = normal(50, 2), normal(40, 2, seed=1)
    cells = build_cells(centroids)
    found = candidates(points, centroids, cells, 1, 30)
    assert bool((found[:, 0] >= 0).all()) and bool((found < 0).any())
    for row in found:
        real = row[row >= 0]
        assert len(real.unique()) == len(real)


@compiled
def test_both_ways_to_descend_agree(monkeypatch):
    points, centroids = normal(777, 5), normal(60, 5, seed=1)
    near = torch.randint(60, (60, 9), generator=generator(2))
    index = torch.randint(60, (777,), generator=generator(3))
    first, cost_first = descend(points, centroids, near, index)
    monkeypatch.setattr(module, "_compiled", lambda: None)
    second, cost_second = descend(points, centroids, near, index)
    torch.testing.assert_close(cost_first, cost_second)
    assert float((first == second).float().mean()) > 0.99
    gap = (points[:, None] - centroids[near[index]]).square().sum(-1).min(1).values
    torch.testing.assert_close(cost_second, gap)
