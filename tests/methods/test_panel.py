"""The recursion that chooses codes: compiled, in torch, on many threads, against a slow one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vq.methods import panel
from hf_vq.methods.panel import solve_panel
from tests.problems import hessian_of, normal, random_lookup

compiled = pytest.mark.skipif(panel._compiled() is None, reason="needs numba")


def problem(rows, vectors, d, k, *, groups=1, scaled=False, first=0, seed=0):
    """State and the arguments of `solve_panel` for `vectors` vectors from `first` on."""
    columns = (first + vectors) * d
    state = random_lookup(rows, columns, d, k, groups=groups, scaled=scaled, seed=seed)
    width = vectors * d
    arguments = {
        "base": normal(rows, width, seed=seed + 1),
        "u": 0.3 * normal(rows, width, seed=seed + 2),
        "a": normal(vectors, d, d, seed=seed + 3),
        "m": torch.stack([hessian_of(d, seed + 4 + i, tokens=9) for i in range(vectors)]),
        "b": 0.3 * normal(width, width, seed=seed + 5),
    }
    return state, arguments


def solve(state, first, arguments):
    """Codes and base - q; leaves its input as it is."""
    copies = {name: t.clone() for name, t in arguments.items()}
    delta = solve_panel(state, first, **copies)
    vectors = len(arguments["m"])
    return state.index[:, first : first + vectors].clone(), delta.clone()


def assert_solves(state, first, arguments, index, delta):
    """Follow the recursion in float64 along the given codes: each must be the best, ties aside."""
    u, base = arguments["u"].double().clone(), arguments["base"].double()
    d, groups = state.dim, state.codebooks.shape[1]
    rows = len(base)
    stripe = first // state.vectors_per_stripe
    books = state.codebooks[stripe].double().repeat_interleave(rows // groups, 0)  # (r, k, d)
    for v in range(index.shape[1]):
        lo, hi = v * d, (v + 1) * d
        a, m = arguments["a"][v].double(), arguments["m"][v].double()
        q = books
        if state.scale is not None:
            q = books * state.scale[:, first + v, None, None].double()
        linear = u[:, lo:hi] @ a + base[:, lo:hi] @ m
        cost = (q @ m * q).sum(-1) - 2 * (q * linear[:, None]).sum(-1)
        least = cost.min(1).values
        chosen = cost.gather(1, index[:, v : v + 1])[:, 0]
        slack = 1e-4 * cost.abs().amax(1)
        assert bool((chosen <= least + slack).all())
        step = base[:, lo:hi] - q.gather(1, index[:, v, None, None].expand(-1, 1, d))[:, 0]
        torch.testing.assert_close(delta[:, lo:hi].double(), step, rtol=1e-5, atol=1e-5)
        u[:, hi:] += step @ arguments["b"][lo:hi, hi:].double()


@compiled
@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 3),
    rows_per_group=st.integers(1, 7),
    vectors=st.integers(1, 9),
    d=st.sampled_from([1, 2, 4, 8]),
    k=st.integers(2, 40),
    scaled=st.booleans(),
    first=st.integers(0, 3),
    seed=st.integers(0, 999),
)
def test_compiled_solves_the_recursion(groups, rows_per_group, vectors, d, k, scaled, first, seed):
    state, arguments = problem(
        groups * rows_per_group, vectors, d, k, groups=groups, scaled=scaled, first=first, seed=seed
    )
    before = state.index.clone()
    index, delta = solve(state, first, arguments)
    assert_solves(state, first, arguments, index, delta)
    assert torch.equal(state.index[:, :first], before[:, :first])


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("d", "k", "vectors"), [(1, 5, 13), (2, 33, 6), (4, 7, 3), (8, 12, 2)])
def test_torch_solves_the_recursion(monkeypatch, d, k, vectors, scaled):
    monkeypatch.setattr(panel, "_compiled", lambda: None)
    state, arguments = problem(15, vectors, d, k, groups=3, scaled=scaled, first=2)
    index, delta = solve(state, 2, arguments)
    assert_solves(state, 2, arguments, index, delta)


@compiled
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("d", "k", "vectors"), [(1, 5, 13), (2, 33, 6), (4, 7, 3), (8, 12, 2)])
def test_compiled_equals_torch(monkeypatch, d, k, vectors, scaled):
    state, arguments = problem(30, vectors, d, k, groups=3, scaled=scaled, first=1)
    index, delta = solve(state, 1, arguments)
    monkeypatch.setattr(panel, "_compiled", lambda: None)
    other, other_delta = solve(state, 1, arguments)
    same = (index == other).all(1)
    assert int(same.sum()) >= 29  # a tie may fall either way
    torch.testing.assert_close(delta[same], other_delta[same], rtol=1e-4, atol=1e-4)


@compiled
@pytest.mark.parametrize("rows", [256, 333])
def test_threads_do_not_show(rows):
    state, arguments = problem(rows, 5, 2, 16, scaled=True)
    index, delta = solve(state, 0, arguments)
    used = []
    run = panel._over_rows

    def spy(work, rows):
        run(lambda lo, hi: (used.append((lo, hi)), work(lo, hi)), rows)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(panel, "_over_rows", spy)
            many, many_delta = solve(state, 0, arguments)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(index, many)
    assert torch.equal(delta, many_delta)
    edges = sorted(used)
    assert len(edges) == 3
    assert [lo for lo, _ in edges] == [0] + [hi for _, hi in edges[:-1]]
    assert edges[-1][1] == rows


def test_an_error_in_a_thread_is_not_lost():
    before = torch.get_num_threads()
    torch.set_num_threads(2)

    def work(lo, hi):
        if lo:
            raise ValueError("second half")

    try:
        with pytest.raises(ValueError, match="second half"):
            panel._over_rows(work, 200)
    finally:
        torch.set_num_threads(before)


def test_the_right_stripe_is_read(monkeypatch):
    for path in ("compiled", "torch"):
        if path == "torch":
            monkeypatch.setattr(panel, "_compiled", lambda: None)
        state, arguments = problem(6, 2, 2, 8, first=4)
        state.vectors_per_stripe = 2
        state.codebooks = normal(3, 2, 8, 2, seed=9)
        index, delta = solve(state, 4, arguments)
        assert_solves(state, 4, arguments, index, delta)
