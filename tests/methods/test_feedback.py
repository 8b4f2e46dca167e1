"""The factorization survives any Hessian, and the sweep is GPTQ's without an inverse Hessian."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vq.methods.feedback import correction, factorize, fold, sweep, unfold
from tests.problems import hessian_of, normal, random_lookup, slow_decode


def product(factor):
    return factor.upper.double() @ factor.upper.double().T


def close(found, expected, tolerance=1e-5):
    return (
        float((found.double() - expected.double()).abs().max() / expected.abs().max()) < tolerance
    )


# -- factorize ---------------------------------------------------------------


def test_factor_of_a_healthy_hessian():
    h = hessian_of(30)
    factor = factorize(h, 0.01)
    assert factor.notes == []
    assert factor.damping == 0.01
    assert torch.equal(factor.upper, factor.upper.triu())
    expected = h.double() + 0.01 * h.double().diagonal().mean() * torch.eye(30)
    assert close(factor.hessian, expected)
    assert close(product(factor), expected)


def test_input_is_not_changed():
    h = hessian_of(8)
    h[3] = h[:, 3] = 0
    kept = h.clone()
    factorize(h)
    assert torch.equal(h, kept)


def test_dead_channels_get_the_damping_alone():
    h = hessian_of(12)
    h[[2, 7]] = 0
    h[:, [2, 7]] = 0
    factor = factorize(h, 0.01)
    assert factor.notes == ["2 dead input channels"]
    assert float(factor.hessian[2, 2]) == pytest.approx(0.01 * float(h.diagonal().mean()))
    assert close(product(factor), factor.hessian)


@pytest.mark.parametrize("tokens", [1, 5, 19])
def test_fewer_tokens_than_inputs(tokens):
    h = hessian_of(40, tokens=tokens)
    factor = factorize(h, 0.01)
    assert factor.notes == []
    assert close(product(factor), factor.hessian)


def test_damping_grows_until_it_works():
    h = hessian_of(20)
    h -= 0.05 * h.diagonal().mean() * torch.eye(20)  # a few negative eigenvalues
    assert float(torch.linalg.eigvalsh(h)[0]) < 0
    factor = factorize(h, 0.001)
    assert factor.damping == pytest.approx(0.1)
    assert factor.notes[-1] == "damping raised to 0.1"
    assert close(product(factor), factor.hessian)


def test_no_damping_on_a_singular_hessian():
    h = torch.ones(6, 6)
    h[0] = h[:, 0] = 0
    factor = factorize(h, 0.0)
    assert any(note.startswith("damping raised") for note in factor.notes)
    assert close(product(factor), factor.hessian)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_indefinite_hessian_leaves_its_diagonal(damping):
    h = torch.tensor([[1.0, 50.0, 0.0], [50.0, 0.0, 0.0], [0.0, 0.0, 4.0]])
    factor = factorize(h, damping)
    assert factor.notes[-1] == "Hessian not positive definite: its diagonal used"
    assert torch.equal(factor.upper, torch.diag(factor.upper.diagonal()))
    assert bool((factor.upper.diagonal() > 0).all())
    assert close(product(factor), factor.hessian)


def test_non_finite_entry_leaves_the_diagonal():
    h = hessian_of(9)
    h[1, 4] = float("nan")
    factor = factorize(h, 0.01)
    assert factor.notes == ["non-finite Hessian: its diagonal used"]
    expected = h.diagonal() + 0.01 * h.diagonal().mean()
    assert close(factor.hessian, torch.diag(expected))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_non_finite_diagonal_leaves_the_identity(value):
    h = hessian_of(9)
    h[4, 4] = value
    factor = factorize(h, 0.5)
    assert factor.notes == ["non-finite Hessian: identity used"]
    assert close(factor.hessian, 1.5 * torch.eye(9))


def test_all_zero_hessian():
    factor = factorize(torch.zeros(7, 7), 0.01)
    assert "all-zero Hessian: identity used" in factor.notes
    assert close(factor.hessian, 1.01 * torch.eye(7))


@settings(max_examples=60, deadline=None)
@given(
    columns=st.integers(1, 12),
    damping=st.sampled_from([0.0, 0.001, 0.01, 1.0]),
    scale=st.sampled_from([1e-12, 1.0, 1e8]),
    seed=st.integers(0, 999),
    damage=st.sampled_from(["none", "zeros", "nan", "inf", "minus", "asymmetric"]),
)
def test_whatever_comes_in_a_usable_factor_comes_out(columns, damping, scale, seed, damage):
    h = hessian_of(columns, seed, tokens=1 + seed % 20) * scale
    if damage == "zeros":
        h[: 1 + seed % columns] = 0
    elif damage == "minus":
        h = -h
    elif damage == "asymmetric":
        h = normal(columns, columns, seed=seed) * scale
    elif damage != "none":
        h[seed % columns, (seed // 7) % columns] = float(damage)
    factor = factorize(h, damping)
    assert bool(torch.isfinite(factor.upper).all())
    assert bool((factor.upper.diagonal() > 0).all())
    assert bool(torch.isfinite(factor.hessian).all())


# -- correction ---------------------------------------------------------------


def test_correction_is_the_least_squares_weight():
    # the closed form of min_V ||W x_dense - V x||^2 + damping ||V - W||^2
    columns, tokens = 12, 80
    w = normal(5, columns, seed=1)
    x = normal(tokens, columns, seed=2) @ normal(columns, columns, seed=3)
    dense = x + 0.3 * normal(tokens, columns, seed=4)
    h = x.T @ x / tokens
    factor = factorize(h, 0.01)
    damping = 0.01 * h.double().diagonal().mean() * torch.eye(columns)
    cross = (dense.double().T @ x.double()) / tokens
    expected = w.double() @ (cross + damping) @ torch.linalg.inv(h.double() + damping)
    found = w + correction(w @ (cross - h.double()).float(), factor)
    assert close(found, expected, 1e-4)
    assert not close(w, expected, 1e-2)


def test_corrected_weight_comes_closer_to_what_the_dense_model_computes():
    w, x = normal(6, 10, seed=1), normal(200, 10, seed=2)
    dense = x + 0.5 * normal(200, 10, seed=3)
    factor = factorize(x.T @ x / 200, 0.01)
    corrected = w + correction(w @ ((dense - x).T @ x / 200), factor)
    wanted = dense @ w.T
    assert (wanted - x @ corrected.T).norm() < (wanted - x @ w.T).norm()


def test_nothing_lost_nothing_corrected():
    factor = factorize(hessian_of(10), 0.01)
    assert torch.equal(correction(torch.zeros(4, 10), factor), torch.zeros(4, 10))


# -- sweep ---------------------------------------------------------------


def obq(weight, hessian, state):
    """Q and codes of GPTQ/OBQ with inverse Hessians taken afresh at every step, float64, O(c^4).

    d columns at a time: the centroid that is nearest in the metric 1/[H^-1]_qq of the remaining
    inverse Hessian, then the update of all weights that remain.
    """
    w, h = weight.double().clone(), hessian.double()
    rows, columns = w.shape
    d, groups = state.dim, state.codebooks.shape[1]
    out, codes = torch.empty_like(w), torch.empty_like(state.index)
    targets = torch.empty_like(w)
    for start in range(0, columns, d):
        inverse = torch.linalg.inv(h[start:, start:])
        metric = torch.linalg.inv(inverse[:d, :d])
        vector = start // d
        for r in range(rows):
            book = state.codebooks[vector // state.vectors_per_stripe, r // (rows // groups)]
            book = book.double()
            if state.scale is not None:
                book = book * state.scale[r, vector].double()
            miss = w[r, start : start + d] - book
            best = int((miss @ metric * miss).sum(1).argmin())
            codes[r, vector] = best
            out[r, start : start + d] = book[best]
        targets[:, start : start + d] = w[:, start : start + d]
        error = (w[:, start : start + d] - out[:, start : start + d]) @ metric
        w[:, start:] -= error @ inverse[:d]
    return out, codes, targets


@pytest.mark.parametrize("backend", ["default", "torch"])
@pytest.mark.parametrize(
    ("d", "columns", "stripe", "groups", "scaled", "width"),
    [
        (1, 21, 21, 1, False, 128),
        (1, 21, 8, 3, False, 5),
        (2, 22, 22, 1, False, 128),
        (2, 22, 6, 3, False, 4),
        (2, 22, 12, 2, True, 4),
        (4, 24, 16, 2, False, 8),
        (4, 24, 24, 1, True, 7),
        (8, 24, 16, 1, False, 128),
    ],
)
def test_sweep_is_gptq(monkeypatch, backend, d, columns, stripe, groups, scaled, width):
    if backend == "torch":
        monkeypatch.setattr("hf_vq.methods.panel._compiled", lambda: None)
    state = random_lookup(6, columns, d, 9, groups=groups, stripe=stripe, scaled=scaled)
    weight = normal(6, columns, seed=5)
    factor = factorize(hessian_of(columns), 0.01)
    expected, codes, _ = obq(weight, factor.hessian, state)
    sweep(weight, factor.upper, state, lambda *_: None, width)
    assert torch.equal(state.index, codes)
    assert close(state.decode(), expected, 1e-4)


@pytest.mark.parametrize("columns", [1, 7, 22])
def test_a_folded_factor_holds_both(columns):
    h = hessian_of(columns)
    h = (h + h.T) / 2
    factor, expected = factorize(h, 0.01), factorize(h, 0.01)
    diagonal = fold(factor, step=5)
    assert factor.upper is factor.hessian
    assert torch.equal(factor.upper.triu(), expected.upper)
    unfold(factor, diagonal, step=5)
    assert torch.equal(factor.hessian, expected.hessian)


def test_sweep_reads_nothing_below_the_diagonal():
    states = [random_lookup(6, 22, 2, 9, groups=3, stripe=6) for _ in range(2)]
    factor, weight = factorize(hessian_of(22), 0.01), normal(6, 22, seed=5)
    sweep(weight, factor.upper, states[0], lambda *_: None, 4)
    sweep(weight, factor.upper + normal(22, 22).tril(-1), states[1], lambda *_: None, 4)
    assert torch.equal(states[0].index, states[1].index)


def test_regression_anchor_uniform_grid_is_plain_gptq():
    # Pitfall list, last line: the pipeline with a 4-bit uniform grid per row and group of columns
    # in place of codebooks must be GPTQ. Here against GPTQ as its paper writes it (algorithm 1,
    # Cholesky of the inverse Hessian) instead of against a perplexity.
    rows, columns, group = 5, 48, 16
    weight, h = normal(rows, columns, seed=3), hessian_of(columns, seed=4)
    factor = factorize(h, 0.01)
    top = weight.abs().reshape(rows, -1, group).amax(-1)
    step = top / 7.5  # (rows, groups)
    levels = (torch.arange(16) - 7.5) * step[..., None]
    state = random_lookup(rows, columns, 1, 16, groups=rows, stripe=group)
    state.codebooks = levels.transpose(0, 1)[..., None].contiguous()
    sweep(weight, factor.upper, state, lambda *_: None)

    u = torch.linalg.cholesky(torch.linalg.inv(factor.hessian.double()), upper=True)
    w, expected = weight.double().clone(), torch.empty(rows, columns, dtype=torch.float64)
    for j in range(columns):
        s = step[:, j // group].double()
        expected[:, j] = ((w[:, j] / s + 7.5).round().clamp(0, 15) - 7.5) * s
        w[:, j:] -= ((w[:, j] - expected[:, j]) / u[j, j])[:, None] * u[j, j:]
    assert close(state.decode(), expected, 1e-4)
    plain = ((weight / step.repeat_interleave(group, 1) + 7.5).round().clamp(0, 15) - 7.5) * (
        step.repeat_interleave(group, 1)
    )
    assert not close(plain, expected, 1e-2)  # feedback did something


def test_panels_are_announced_with_the_compensated_weights():
    # for all columns not yet quantized, whatever the panel: W_R + E_L H_LR H_RR^-1
    columns, d = 30, 2
    state = random_lookup(4, columns, d, 5, stripe=10)
    weight, factor = normal(4, columns, seed=5), factorize(hessian_of(columns), 0.01)
    seen = []

    def begin(start, stop, compensated):
        left = (weight - state.decode()).double()[:, :start]
        h = factor.hessian.double()
        optimum = left @ h[:start, start:] @ torch.linalg.inv(h[start:, start:])
        expected = weight.double()[:, start:stop] + optimum[:, : stop - start]
        assert close(compensated, expected, 1e-4)
        if start:
            assert not close(weight[:, start:stop], expected, 1e-2)
        seen.append((start, stop))

    sweep(weight, factor.upper, state, begin, width=4)
    assert seen == [(0, 4), (4, 8), (8, 10), (10, 14), (14, 18), (18, 20), (20, 24), (24, 28),
                    (28, 30)]  # fmt: skip


def test_diagonal_hessian_feeds_nothing_back():
    # Pitfall 7
    state = random_lookup(4, 24, 2, 5, stripe=8)
    weight = normal(4, 24, seed=5)
    factor = factorize(torch.diag(normal(24, seed=6).square() + 0.1), 0.01)

    def begin(start, stop, compensated):
        assert torch.equal(compensated, weight[:, start:stop])

    sweep(weight, factor.upper, state, begin, width=4)
    nearest = slow_decode(state)
    for r in range(4):
        for v in range(12):
            book = state.codebooks[v // 4, 0].double()
            w = factor.hessian.diagonal()[2 * v : 2 * v + 2].double()
            x = weight[r, 2 * v : 2 * v + 2].double()
            best = book[(w * (x - book).square()).sum(1).argmin()]
            assert torch.equal(nearest[r, 2 * v : 2 * v + 2], best)


def test_rows_do_not_talk_to_each_other():
    # Pitfall 2, for fixed codebooks
    factor = factorize(hessian_of(24), 0.01)
    weight = normal(6, 24, seed=5)
    found = []
    for changed in (False, True):
        state = random_lookup(6, 24, 2, 16, groups=2, stripe=8, scaled=True)
        w = weight.clone()
        if changed:
            w[3] = normal(24, seed=77)
        sweep(w, factor.upper, state, lambda *_: None)
        found.append(state.index)
    different = (found[0] != found[1]).any(1)
    assert different.tolist() == [False, False, False, True, False, False]
