"""Refinement only ever lowers the loss, stops where it should, and solves least squares exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vq.methods import panel
from hf_vq.methods.refine import fit_codebooks, importance, loss, reassign
from tests.problems import exact_loss, hessian_of, normal, random_lookup, slow_decode


@st.composite
def problems(draw):
    """(weight, damped hessian, state) of any geometry."""
    d = draw(st.sampled_from([1, 2, 4]))
    groups = draw(st.integers(1, 3))
    rows = groups * draw(st.integers(1, 4))
    columns = d * draw(st.integers(1, 20))
    seed = draw(st.integers(0, 999))
    state = random_lookup(
        rows,
        columns,
        d,
        draw(st.integers(2, 12)),
        groups=groups,
        stripe=d * draw(st.integers(1, 12)),
        scaled=draw(st.booleans()),
        padded_rows=draw(st.integers(0, min(1, rows - 1))),
        seed=seed,
    )
    h = hessian_of(columns, seed, tokens=draw(st.sampled_from([3, 200])))
    h += 0.01 * h.diagonal().mean() * torch.eye(columns)
    return normal(rows, columns, seed=seed + 5), h, state


def masked_loss(weight, hessian, state):
    real = state.row_mask[:, 0] > 0
    return exact_loss(weight[real], hessian, slow_decode(state)[real])


@settings(max_examples=40, deadline=None)
@given(problems())
def test_loss_and_decode(problem):
    weight, h, state = problem
    torch.testing.assert_close(state.decode().double(), slow_decode(state))
    assert loss(weight, h, state) == pytest.approx(masked_loss(weight, h, state), rel=1e-4)


# -- reassign ---------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(problems(), st.booleans())
def test_reassign_never_raises_the_loss(problem, compiled):
    weight, h, state = problem
    real = state.row_mask[:, 0] > 0
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(panel, "_compiled", lambda: None)
        for _ in range(3):
            before = slow_decode(state)
            reassign(weight, h, state)
            after = slow_decode(state)
            for r in real.nonzero()[:, 0]:  # rows are independent, so it holds for each
                now = exact_loss(weight[r : r + 1], h, after[r : r + 1])
                assert now <= exact_loss(weight[r : r + 1], h, before[r : r + 1]) * (1 + 1e-4)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("d", "stripe"), [(1, 130), (2, 130), (2, 26)])
def test_reassign_ends_where_no_single_change_helps(d, stripe, scaled):
    # 130 columns: three panels, so that what is carried between panels counts too
    state = random_lookup(3, 130, d, 6, stripe=stripe, scaled=scaled)
    weight, h = normal(3, 130, seed=5), hessian_of(130)
    start = masked_loss(weight, h, state)
    for _ in range(200):
        before = state.index.clone()
        reassign(weight, h, state)
        if torch.equal(before, state.index):
            break
    else:
        pytest.fail("no fixed point")
    best = masked_loss(weight, h, state)
    assert best < 0.5 * start
    quantized = slow_decode(state)
    for r in range(3):
        row = weight[r : r + 1]
        base = exact_loss(row, h, quantized[r : r + 1])
        for v in range(130 // d):
            book = state.codebooks[v // state.vectors_per_stripe, 0].double()
            scale = 1.0 if state.scale is None else float(state.scale[r, v])
            for m in range(6):
                other = quantized[r : r + 1].clone()
                other[0, v * d : (v + 1) * d] = scale * book[m]
                assert exact_loss(row, h, other) >= base * (1 - 1e-5)


def test_reassign_takes_the_best_code_given_the_others():
    # one vector only: the exact optimum
    state = random_lookup(5, 4, 4, 30)
    weight, h = normal(5, 4, seed=5), hessian_of(4)
    reassign(weight, h, state)
    for r in range(5):
        losses = [exact_loss(weight[r : r + 1], h, c[None].double()) for c in state.codebooks[0, 0]]
        assert int(state.index[r, 0]) == min(range(30), key=losses.__getitem__)


# -- codebooks --------------------------------------------------------------


def design(state):
    """Float64 (rows * columns, S * G * k * d) matrix: codebook entries -> dense weights."""
    books = state.codebooks
    columns = []
    for i in range(books.numel()):
        unit = torch.zeros(books.numel())
        unit[i] = 1
        state.codebooks = unit.reshape(books.shape)
        columns.append((slow_decode(state) * state.row_mask).reshape(-1))
    state.codebooks = books
    return torch.stack(columns, 1)


def least_squares(weight, hessian, state, map_to_entries=None):
    """The least loss any codebooks can reach, with the one solution of least change."""
    matrix = design(state)
    if map_to_entries is not None:
        matrix = matrix @ map_to_entries
    rows, columns = weight.shape
    root = torch.linalg.cholesky(hessian.double())
    whitened = (matrix.T.reshape(-1, rows, columns) @ root).reshape(-1, rows * columns).T
    error = (weight.double() - slow_decode(state)) * state.row_mask
    step = torch.linalg.pinv(whitened) @ (error @ root).reshape(-1)
    return step, float(((error @ root).reshape(-1) - whitened @ step).square().sum())


@pytest.mark.parametrize(
    ("d", "groups", "stripe", "scaled", "padded"),
    [(1, 1, 16, False, 0), (2, 2, 6, False, 1), (2, 1, 16, True, 0), (4, 2, 8, True, 2)],
)
def test_fit_is_least_squares(d, groups, stripe, scaled, padded):
    state = random_lookup(
        8, 16, d, 4, groups=groups, stripe=stripe, scaled=scaled, padded_rows=padded
    )
    weight, h = normal(8, 16, seed=5), hessian_of(16, tokens=400)
    h += 0.05 * h.diagonal().mean() * torch.eye(16)
    before = state.codebooks.clone()
    step, least = least_squares(weight, h, state)
    added = fit_codebooks(weight, h, state, iterations=500, tolerance=1e-12)
    torch.testing.assert_close(state.codebooks, before + added)
    assert masked_loss(weight, h, state) == pytest.approx(least, rel=1e-4)
    torch.testing.assert_close(added.double().reshape(-1), step, rtol=1e-2, atol=1e-2)
    assert float(step.abs().max()) > 0.3


def test_fit_leaves_entries_that_nothing_uses():
    state = random_lookup(6, 12, 2, 8, groups=2, padded_rows=2, seed=3)
    state.index.clamp_(max=5)
    state.index[-2:] = 7  # of padded rows
    before = state.codebooks.clone()
    fit_codebooks(normal(6, 12), hessian_of(12), state, iterations=50)
    assert torch.equal(state.codebooks[:, :, 6:], before[:, :, 6:])
    assert not torch.equal(state.codebooks[:, :, :6], before[:, :, :6])


@settings(max_examples=40, deadline=None)
@given(problems(), st.integers(1, 40))
def test_fit_never_raises_the_loss(problem, iterations):
    weight, h, state = problem
    before = masked_loss(weight, h, state)
    fit_codebooks(weight, h, state, iterations=iterations)
    assert masked_loss(weight, h, state) <= before * (1 + 1e-5)


def test_fit_of_codebooks_in_a_span():
    state = random_lookup(6, 20, 1, 8, groups=3, stripe=10, scaled=True)
    basis = normal(3, 8, seed=4)
    factors = normal(2, 3, 3, seed=5)
    state.codebooks = (factors @ basis)[..., None].contiguous()
    weight, h = normal(6, 20, seed=6), hessian_of(20)
    h += 0.05 * h.diagonal().mean() * torch.eye(20)
    to_entries = torch.block_diag(*[basis.T] * 6).double()  # of the factors, codebook by codebook
    _, least = least_squares(weight, h, state, to_entries)
    added = fit_codebooks(weight, h, state, iterations=500, tolerance=1e-12, basis=basis)
    assert added.shape == (2, 3, 3)
    expected = ((factors + added) @ basis)[..., None]
    torch.testing.assert_close(state.codebooks, expected, rtol=1e-4, atol=1e-4)
    assert masked_loss(weight, h, state) == pytest.approx(least, rel=1e-3)


def test_fit_of_a_perfect_codebook_adds_nothing():
    state = random_lookup(4, 12, 2, 5)
    before = state.codebooks.clone()
    added = fit_codebooks(state.decode(), hessian_of(12), state, iterations=20)
    assert torch.equal(added, torch.zeros_like(added))
    assert torch.equal(state.codebooks, before)


@settings(max_examples=20, deadline=None)
@given(problems())
def test_importance_is_the_diagonal_of_the_normal_matrix(problem):
    _, h, state = problem
    if state.codebooks.numel() > 200:
        state.codebooks = state.codebooks[:, :, :2].contiguous()
        state.index.clamp_(max=1)
    matrix = design(state).reshape(*state.decode().shape, -1)
    # one vector counts once: the terms that couple different vectors are not meant
    expected = (matrix.square() * h.diagonal().double()[None, :, None]).sum((0, 1))
    torch.testing.assert_close(
        importance(h, state).double().reshape(-1), expected, rtol=1e-4, atol=1e-6
    )
