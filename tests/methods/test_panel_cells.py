"""Codes out of very many centroids, of which the compiled loop compares with some."""

from __future__ import annotations

import pytest
import torch

from hf_vq.methods import panel
from hf_vq.methods.lookup import Lookup
from hf_vq.methods.panel import solve_panel
from tests.problems import generator, normal

pytestmark = pytest.mark.skipif(panel._compiled() is None, reason="needs numba")
K, V = 900, 4


def state_of(rows, columns, residual, seed=0):
    blocks = -(-rows // V)
    draw = generator(seed + 3)
    state = Lookup(
        codebooks=normal(1, 1, K, V, seed=seed),
        index=torch.randint(K, (blocks, columns), generator=draw).int(),
        scale=None,
        vectors_per_stripe=columns,
        row_mask=(torch.arange(blocks * V) < rows).float()[:, None],
        vector_rows=V,
        column_scale=torch.rand(columns, generator=draw) + 0.5,
    )
    if residual:
        state.residual = 0.2 * normal(1, 1, 8, V, seed=seed + 1)
        state.residual_index = torch.randint(8, (blocks, columns), generator=draw).int()
    return state


def solve(rows, columns, residual, beam=3):
    state = state_of(rows, columns, residual)
    base = normal(len(state.index) * V, columns, seed=5)
    base *= state.row_mask
    ones = torch.ones(columns, 1, 1)
    b = 0.1 * normal(columns, columns, seed=6)
    delta = solve_panel(state, 0, base, torch.zeros_like(base), 0 * ones, ones, b, beam)
    return state, delta


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("rows", [64, 63, 5])
def test_all_cells_are_the_exact_search(monkeypatch, rows, residual):
    expected, left = solve(rows, 24, residual)
    monkeypatch.setattr(panel, "_EXACT_LIMIT", K - 1)
    monkeypatch.setattr(panel, "SEARCHED", K)
    found, also_left = solve(rows, 24, residual)
    assert torch.equal(found.index, expected.index)
    if residual:
        assert torch.equal(found.residual_index, expected.residual_index)
    torch.testing.assert_close(also_left, left)


@pytest.mark.parametrize("residual", [False, True])
def test_few_cells_lose_little(monkeypatch, residual):
    _, exact = solve(400, 32, residual)
    monkeypatch.setattr(panel, "_EXACT_LIMIT", K - 1)
    state, left = solve(400, 32, residual)
    assert float(left.square().sum()) < 1.01 * float(exact.square().sum())
    assert int(state.index.max()) < K and int(state.index.min()) >= 0


@pytest.mark.parametrize("residual", [False, True])
def test_a_pass_makes_no_choice_worse(monkeypatch, residual):
    monkeypatch.setattr(panel, "_EXACT_LIMIT", K - 1)
    monkeypatch.setattr(panel, "SEARCHED", 1)
    state = state_of(200, 30, residual)
    target = normal(200, 30, seed=5)
    ones, b = torch.ones(30, 1, 1), torch.zeros(30, 30)
    before = float("inf")
    for _ in range(3):
        arguments = (target.clone(), torch.zeros_like(target), 0 * ones, ones, b, 2)
        solve_panel(state, 0, *arguments)
        now = (target - state.decode()).square().sum()
        assert float(now) <= before * (1 + 1e-6)
        before = float(now)


def test_not_for_few_vectors_or_few_centroids(monkeypatch):
    def refuse(book):
        raise AssertionError("sorted into cells")

    monkeypatch.setattr(panel, "_cells_of", refuse)
    solve(64, 24, False)
    monkeypatch.setattr(panel, "_EXACT_LIMIT", K - 1)
    solve(8, 24, False)
    with pytest.raises(AssertionError, match="sorted"):
        solve(64, 24, False)


def test_cells_are_those_of_the_codebook():
    for seed in (1, 2, 2, 1):
        book = normal(50, V, seed=seed)
        cells = panel._cells_of(book)
        assert cells is panel._cells_of(book.clone())
        gap = torch.cdist(book[cells.members], cells.centres)
        sizes = torch.tensor(cells.starts).diff()
        own = torch.arange(len(sizes)).repeat_interleave(sizes)
        torch.testing.assert_close(gap.gather(1, own[:, None])[:, 0], gap.min(1).values)
