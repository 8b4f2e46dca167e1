"""Groups of scalar codes: the search against brute force, compiled against torch, storage."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hf_vq_kernels.levels import level_table
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vq.methods import cvxq_groups
from hf_vq.methods.cvxq_groups import Groups, Search, scale_grid, solve_columns
from tests.problems import generator, hessian_of, normal

SEARCH = Search((0.7, 0.84, 1.0, 1.19), 3)
compiled = pytest.mark.skipif(cvxq_groups._compiled() is None, reason="needs numba")
PATHS = [pytest.param("compiled", marks=compiled), "torch"]


def make(x, depths, *, kind="lloyd", scale="log8", location="none", row_weight=None):
    g = len(x) // len(depths)
    weight = torch.ones(len(x)) if row_weight is None else row_weight
    return Groups(depths.long(), weight, scale_grid(x, g), kind, scale, location)


def random_depths(m, columns, seed=0):
    return torch.randint(0, 9, (m, columns), generator=generator(seed))


def solve(groups, x, path="compiled", search=SEARCH, fresh=True):
    """Without a Hessian; returns x - q."""
    with pytest.MonkeyPatch.context() as patch:
        if path == "torch":
            patch.setattr(cvxq_groups, "_compiled", lambda: None)
        zero = torch.zeros_like(x)
        return solve_columns(groups, 0, x, zero, zero[0], None, search, fresh)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("location", ["none", "int8", "float16"])
@pytest.mark.parametrize("scale", ["log8", "float16", "float32"])
@pytest.mark.parametrize("kind", ["lloyd", "laplace"])
def test_codes_are_the_nearest_levels(path, kind, scale, location):
    x = normal(24, 18, seed=1) + 0.3
    groups = make(x, random_depths(3, 18), kind=kind, scale=scale, location=location)
    error = solve(groups, x, path)
    torch.testing.assert_close(x - groups.decode(), error, atol=1e-6, rtol=0)
    levels = level_table(kind)
    for m in range(3):
        for j in range(18):
            n = 1 << int(groups.depths[m, j])
            values = groups.location[m, j] + groups.scale[m, j] * levels[n : 2 * n]
            miss = x[8 * m : 8 * m + 8, j, None] - values
            least = miss.abs().min(1).values
            torch.testing.assert_close(
                error[8 * m : 8 * m + 8, j].abs(), least, atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("location", ["none", "int8"])
def test_the_search_comes_close_to_the_best_stored_scale(path, location):
    x = normal(64, 40, seed=2)
    groups = make(x, random_depths(1, 40) % 5 + 1, location=location)
    found = solve(groups, x, path).square().sum(0)
    best = torch.full_like(found, torch.inf)
    levels = level_table("lloyd")
    for code in range(256):
        scale = groups.scale_values(torch.full((1, 40), code))[0]
        for j in range(40):
            n = 1 << int(groups.depths[0, j])
            miss = x[:, j, None] - scale[j] * levels[n : 2 * n]
            best[j] = min(best[j], miss.square().min(1).values.sum())
    # least squares ends in a local minimum, and a location is better than none
    assert float((found / best).mean()) < (1.01 if location == "none" else 1.0)
    assert float((found / best).max()) < 1.15


@compiled
@settings(max_examples=30, deadline=None)
@given(
    clusters=st.integers(1, 3),
    g=st.integers(1, 40),
    columns=st.integers(1, 12),
    kind=st.sampled_from(["lloyd", "laplace"]),
    scale=st.sampled_from(["log8", "float16", "float32"]),
    location=st.sampled_from(["none", "int8", "float16", "float32"]),
    fresh=st.booleans(),
    coupled=st.booleans(),
    seed=st.integers(0, 99),
)
def test_compiled_equals_torch(clusters, g, columns, kind, scale, location, fresh, coupled, seed):
    x = normal(clusters * g, columns, seed=seed)
    depths = random_depths(clusters, columns, seed)
    weight = normal(clusters * g, seed=seed + 1).abs() + 0.1
    h = hessian_of(columns, seed)
    losses, results = [], []
    for path in ("compiled", "torch"):
        groups = make(x, depths, kind=kind, scale=scale, location=location, row_weight=weight)
        u = 0.1 * normal(*x.shape, seed=seed + 2)
        with pytest.MonkeyPatch.context() as patch:
            if path == "torch":
                patch.setattr(cvxq_groups, "_compiled", lambda: None)
            error = solve_columns(
                groups, 0, x, u, 1 / h.diagonal(), h if coupled else None, SEARCH, fresh
            )
        torch.testing.assert_close(x - groups.decode(), error, atol=1e-5, rtol=1e-5)
        losses.append(float((weight[:, None] * (error @ h) * error).sum()))
        results.append(groups)
    # A rounding may tip the choice between two scales, and what follows feels it
    same = (results[0].scale[:, 0] == results[1].scale[:, 0]).float().mean()
    if not coupled:
        assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert float(same) == 1.0 or losses[0] == pytest.approx(losses[1], rel=0.3)


@pytest.mark.parametrize("path", PATHS)
def test_a_group_that_competes_never_gets_worse(path):
    x = normal(60, 30, seed=3)
    groups = make(x, random_depths(2, 30) % 4, location="int8")
    before = solve(groups, x, path).reshape(2, 30, 30).square().sum(1)
    after = solve(groups, x, path, Search((3.0,), 1), fresh=False)
    assert bool((after.reshape(2, 30, 30).square().sum(1) <= before * (1 + 1e-5)).all())


@pytest.mark.parametrize("path", PATHS)
def test_rows_of_no_weight_have_no_say(path):
    x = normal(16, 6, seed=4)
    weight = (torch.arange(16) < 12).float()
    spoiled = torch.where(weight[:, None] > 0, x, 1e3)
    found = []
    for data in (x, spoiled):
        groups = make(x, torch.full((1, 6), 2), row_weight=weight)
        solve(groups, data, path)
        found.append((groups.scale, groups.codes[:12]))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("depth", [0, 1, 4])
@pytest.mark.parametrize("location", ["none", "int8", "float16"])
def test_nothing_is_lost_on_zeros_and_no_nan(path, location, depth):
    x = torch.zeros(8, 3)
    x[:, 1] = normal(8)
    groups = make(x, torch.full((1, 3), depth), location=location)
    error = solve(groups, x, path)
    assert bool(torch.isfinite(groups.decode()).all() & torch.isfinite(error).all())
    # the smallest scale of the grid is 2**-12 of the largest group's size
    assert float(error[:, [0, 2]].abs().max()) < (1e-6 if depth == 0 else 5e-3)


@pytest.mark.parametrize("path", PATHS)
def test_a_constant_column_is_its_location(path):
    """The trap: no bits decoded as zero instead of the location."""
    x = normal(32, 4, seed=5)
    x[:, 2] = 0.4375
    depths = torch.tensor([[2, 3, 0, 0]])
    groups = make(x, depths, scale="float16", location="float16")
    error = solve(groups, x, path)
    assert bool((error[:, 2] == 0).all())
    torch.testing.assert_close(error[:, 3], x[:, 3] - x[:, 3].mean(), atol=1e-3, rtol=0)
    groups = make(x, depths, location="int8")
    error = solve(groups, x, path)
    assert float(error[:, 2].abs().max()) < 0.4375 / 100


# -- storage ---------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.floats(-70000, 70000, width=32))
def test_half_rounds_as_torch_does(value):
    half = pytest.importorskip("hf_vq.methods.cvxq_numba")._half
    expected = torch.tensor(value).clamp(-65504, 65504).half().float().item()
    assert half(value) == expected


@settings(max_examples=200, deadline=None)
@given(st.floats(2.0**-26, 1e-4))
def test_half_rounds_small_numbers_once(value):
    half = pytest.importorskip("hf_vq.methods.cvxq_numba")._half
    # numpy's cast; torch's goes by way of float32 and rounds twice
    assert half(value) == float(np.float64(value).astype(np.float16))


@pytest.mark.parametrize("size", [1e-6, 0.02, 1.0, 3e3])
def test_grid_covers_every_group(size):
    x = size * normal(64, 50) * (2 * normal(50, seed=1)).exp()
    groups = make(x, torch.zeros(2, 50))
    assert torch.equal(groups.grid, groups.grid.half().float())
    root = x.reshape(2, 32, 50).square().mean(1).sqrt()
    for factor in (0.5, 1.0, 2.0):
        ratio = groups.store_scale(root * factor) / (root * factor)
        inside = root > root.amax(1, keepdim=True) * 2.0**-11
        assert float((ratio[inside] - 1).abs().max()) < 0.03


def test_stored_values_are_found_again():
    x = normal(16, 9)
    groups = make(x, random_depths(2, 9), location="int8")
    solve(groups, x)
    assert torch.equal(groups.scale_values(groups.scale_code(groups.scale)), groups.scale)
    z = groups.location_code()
    assert int(z.min()) >= -128 and int(z.max()) <= 127
    assert torch.equal(z * (groups.scale / 64), groups.location)
