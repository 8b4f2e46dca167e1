"""The tables of levels, against the equations that define them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers_levels import lloyd_max
from hf_vq_kernels.levels import LEVEL_KINDS, level_table, level_table_on


def of_depth(kind: str, depth: int) -> np.ndarray:
    return level_table(kind).numpy()[1 << depth : 2 << depth]


@pytest.mark.parametrize("depth", range(1, 9))
def test_lloyd_levels_are_the_rounded_solution(depth: int) -> None:
    levels = of_depth("lloyd", depth)[2**depth // 2 :]
    assert np.array_equal(levels, lloyd_max(depth).astype(np.float32))


@pytest.mark.parametrize("depth", range(1, 9))
def test_laplace_levels_invert_the_distribution(depth: int) -> None:
    levels = of_depth("laplace", depth).astype(np.float64)
    distribution = 0.5 + 0.5 * np.sign(levels) * (1 - np.exp(-np.abs(levels)))
    middles = (np.arange(2**depth) + 0.5) / 2**depth
    np.testing.assert_allclose(distribution, middles, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", LEVEL_KINDS)
def test_layout_of_the_table(kind: str) -> None:
    table = level_table(kind)
    assert table.shape == (512,) and table.dtype == torch.float32
    assert table[:2].tolist() == [0, 0]  # entry 0 is of no depth, entry 1 the one level of depth 0
    for depth in range(1, 9):
        levels = table[1 << depth : 2 << depth]
        assert torch.equal(levels, -levels.flip(0))
        assert (levels.diff() > 0).all()


def test_published_values() -> None:
    # Max 1960, table I: 2, 4 and 8 levels
    for depth, levels in {
        1: [0.7980],
        2: [0.4528, 1.510],
        3: [0.2451, 0.7560, 1.344, 2.152],
    }.items():
        np.testing.assert_allclose(of_depth("lloyd", depth)[2**depth // 2 :], levels, rtol=3e-4)
    for depth, levels in {
        1: [0.693147],
        2: [0.287682, 1.386294],
        3: [0.133531, 0.470004, 0.980829, 2.079442],
    }.items():
        np.testing.assert_allclose(of_depth("laplace", depth)[2**depth // 2 :], levels, rtol=1e-5)


@pytest.mark.parametrize(
    ("depth", "error"), [(1, 0.3634), (2, 0.1175), (3, 0.03455), (4, 0.009501), (5, 0.002505)]
)
def test_squared_error_of_a_gaussian(depth: int, error: float) -> None:
    levels = of_depth("lloyd", depth).astype(np.float64)
    x = np.linspace(-8, 8, 400_001)
    density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, x)]
    assert abs(((x - nearest) ** 2 * density).sum() / error - 1) < 1e-3


def test_unknown_kind_and_fresh_tables() -> None:
    with pytest.raises(ValueError, match=r'levels are "lloyd" or "laplace", got \'gauss\''):
        level_table("gauss")
    level_table("lloyd").zero_()
    assert level_table("lloyd").any()
    with torch.inference_mode(), torch.device("meta"):
        level_table_on.cache_clear()
        table = level_table_on("lloyd", torch.device("cpu"))
    assert not table.is_inference() and torch.equal(table, level_table("lloyd"))
    assert level_table_on("lloyd", torch.device("cpu")) is table
