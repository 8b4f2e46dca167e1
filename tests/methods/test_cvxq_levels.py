"""D(B) against measurements, against samples, and its shape."""

from __future__ import annotations

import pytest
import torch
from hf_vq_kernels.levels import level_table

from hf_vq.methods.cvxq_levels import (
    COMPANDER_SCALE,
    best_scale,
    distortion_table,
    gaussian_distortion,
    thresholds,
)
from tests.problems import normal


@pytest.mark.parametrize(
    ("kind", "scaling", "cells", "expected"),
    [
        ("laplace", "nominal", "compander", [0.8162, 0.3076, 0.0634, 0.0153, 0.0038]),
        ("laplace", "best", "compander", [0.3631, 0.1431, 0.0539, 0.0135, 0.0033]),
        ("lloyd", "best", "nearest", [0.3631, 0.1174, 0.0346, 0.0095, 0.0025]),
    ],
)
def test_known_values(kind, scaling, cells, expected):
    """Measured on unit Gaussian samples with the 33-point grid of the paper's code; Max 1960."""
    table = distortion_table(kind, scaling, cells)
    assert table[0] == pytest.approx(1.0, abs=1e-12)
    assert table[1:6].tolist() == pytest.approx(expected, rel=0.01, abs=6e-5)


@pytest.mark.parametrize("kind", ["lloyd", "laplace"])
@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_samples_agree(kind, depth):
    x, n = normal(200_000, seed=depth).double(), 2**depth
    scale = best_scale(kind, depth)
    levels = scale * level_table(kind)[n : 2 * n].double()
    nearest = (x[:, None] - levels).abs().min(1).values.square().mean()
    assert float(nearest) == pytest.approx(distortion_table(kind)[depth].item(), rel=0.02)


@pytest.mark.parametrize("kind", ["lloyd", "laplace"])
def test_a_bit_more_is_always_better_and_worth_less(kind):
    drops = -distortion_table(kind).diff()
    assert bool((drops > 0).all())
    assert bool((drops.diff() < 0).all())  # convex: no depth is skipped


def test_the_law_of_high_rates_holds_only_there():
    table = distortion_table("lloyd")
    ratios = (table[:-1] / table[1:]).tolist()
    assert ratios[0] == pytest.approx(2.75, abs=0.01)
    assert ratios[-1] == pytest.approx(4.0, abs=0.05)


def test_nearest_cells_lose_least():
    for depth in range(1, 9):
        for scale in (1.0, 1.5, COMPANDER_SCALE):
            near = gaussian_distortion("laplace", depth, scale)
            assert near <= gaussian_distortion("laplace", depth, scale, "compander") + 1e-12


@pytest.mark.parametrize("kind", ["lloyd", "laplace"])
def test_no_scale_is_better_than_the_best(kind):
    for depth in range(1, 9):
        best = gaussian_distortion(kind, depth, best_scale(kind, depth))
        scales = torch.linspace(0.3, 4, 60).tolist()
        assert all(gaussian_distortion(kind, depth, s) >= best - 1e-9 for s in scales)


def test_thresholds_lie_between_levels():
    for kind, cells in (("lloyd", "nearest"), ("laplace", "nearest"), ("laplace", "compander")):
        ends, levels = thresholds(kind, cells), level_table(kind).double()
        for depth in range(1, 9):
            n = 2**depth
            assert ends[n] == -torch.inf
            assert bool((ends[n + 1 : 2 * n] > levels[n : 2 * n - 1]).all())
            assert bool((ends[n + 1 : 2 * n] < levels[n + 1 : 2 * n]).all())
