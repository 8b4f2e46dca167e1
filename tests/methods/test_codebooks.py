"""Codebooks at stored precision: ranges, scales, order and rank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vq.methods.codebooks import as_integers, low_rank, sort_entries
from tests.problems import normal, random_lookup, slow_decode

LIMITS = {"int8": (-128, 127), "int4": (-8, 7)}


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    dtype=st.sampled_from(["int8", "int4"]),
    magnitude=st.sampled_from([0.0, 1e-20, 1e-3, 1.0, 1e6]),
    seed=st.integers(0, 999),
)
def test_integers_fit_and_are_nearest(n, dtype, magnitude, seed):
    values = normal(2, 3, n, seed=seed) * magnitude
    mass = normal(2, 3, n, seed=seed + 1).square()
    integers, scales = as_integers(values, mass, dtype)
    low, high = LIMITS[dtype]
    assert torch.equal(integers, integers.round())
    assert low <= float(integers.min()) and float(integers.max()) <= high
    assert scales.shape == (2, 3)
    assert torch.equal(scales, scales.bfloat16().float())
    assert bool((scales > 0).all())
    decoded = integers * scales[..., None]
    if dtype == "int8":  # nothing is clipped, but for what the scale's own rounding costs
        bound = scales[..., None] * (0.5 + 127 * 2**-8)
        assert bool(((decoded - values).abs() <= bound + 1e-35).all())


def test_int8_is_fine_enough():
    values = normal(50, 64)
    integers, scales = as_integers(values, torch.ones_like(values), "int8")
    error = (integers * scales[..., None] - values).square().mean() / values.square().mean()
    assert float(error) < 1e-4


def test_int4_clips_what_does_not_matter():
    # one large value without mass: the scale is for the others
    values = normal(1, 32, seed=2)
    values[0, 0] = 1.6 * values.abs().max()
    mass = torch.ones_like(values)
    mass[0, 0] = 0
    error = {}
    for name, m in {"aware": mass, "blind": torch.ones_like(mass)}.items():
        integers, scales = as_integers(values, m, "int4")
        error[name] = float((mass * (integers * scales[..., None] - values).square()).sum())
    assert error["aware"] < 0.8 * error["blind"]


def test_int4_is_never_worse_than_no_clipping():
    values, mass = normal(40, 16), normal(40, 16, seed=1).square()
    integers, scales = as_integers(values, mass, "int4")
    cost = (mass * (integers * scales[..., None] - values).square()).sum(-1)
    plain = (values.abs().amax(-1, keepdim=True) / 7).bfloat16().float()
    rounded = (values / plain).round().clamp(-8, 7) * plain
    assert bool((cost <= (mass * (rounded - values).square()).sum(-1) * (1 + 1e-5)).all())


@pytest.mark.parametrize("scaled", [False, True])
def test_sorting_changes_nothing_but_the_order(scaled):
    state = random_lookup(9, 14, 1, 7, groups=3, stripe=5, scaled=scaled)
    before, shape = slow_decode(state), state.codebooks.shape
    sort_entries(state)
    assert state.codebooks.shape == shape
    assert bool((state.codebooks[..., 0].diff(dim=-1) >= 0).all())
    assert torch.equal(slow_decode(state), before)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_low_rank_is_the_best_of_that_rank(rank):
    books = normal(4, 5, 8, 1).sort(2).values
    factors, basis = low_rank(books, rank)
    assert factors.shape == (4, 5, rank)
    assert basis.shape == (rank, 8)
    assert torch.equal(basis, basis.half().float())
    table = books.reshape(20, 8).double()
    error = (factors.reshape(20, rank).double() @ basis.double() - table).square().sum()
    best = torch.linalg.svdvals(table)[rank:].square().sum()
    # the basis is rounded to float16
    assert float(error) == pytest.approx(float(best), rel=1e-2, abs=1e-5 * float(table.norm()) ** 2)
    assert float(factors.square().mean(0).mean(0).sqrt().max()) == pytest.approx(1, rel=0.1)


def test_fewer_codebooks_than_rank():
    books = normal(1, 2, 8, 1)
    factors, basis = low_rank(books, 5)
    assert factors.shape == (1, 2, 5)  # what the format's layout promises
    assert basis.shape == (5, 8)
    torch.testing.assert_close((factors @ basis)[..., None], books, rtol=1e-2, atol=1e-2)
