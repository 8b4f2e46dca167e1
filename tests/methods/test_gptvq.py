"""GPTVQ end to end on one matrix: the checks of the paper's ten pitfalls, and odd shapes.

The pitfalls are the places where an implementation is easily wrong without anything crashing; each
has the numeric check that would show it. Those of the sweep alone are in test_feedback.py.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vq.formats import FORMATS
from hf_vq.formats.gptvq import GPTVQSpec
from hf_vq.layers import PackedLinear
from hf_vq.methods import gptvq
from hf_vq.methods.feedback import factorize
from hf_vq.methods.gptvq import GPTVQOptions, quantize
from hf_vq.methods.kmeans import assign, kmeans
from hf_vq.methods.statistics import Statistics
from tests.helpers import ODD_SPECS, gptvq_specs
from tests.problems import exact_loss, hessian_of, normal

# seeds that do not depend on chance, so that only what a test changes makes a difference
SWEEP = GPTVQOptions("mahalanobis", refine_iterations=0, codebook_update=False)
FULL = GPTVQOptions("mahalanobis")


def dequantized(codes, spec):
    """The dense matrix as whoever loads the file sees it, float32."""
    tensors = FORMATS["gptvq"].pack(codes, spec)
    FORMATS["gptvq"].check(tensors, spec, "test")
    return PackedLinear.from_packed(spec, tensors, None, torch.float32).dequantize(torch.float32)


def relative(weight, hessian, quantized):
    return exact_loss(weight, hessian, quantized) / exact_loss(weight, hessian, 0 * weight)


def run(weight, hessian, spec, options=FULL):
    statistics = None if hessian is None else Statistics(hessian.clone(), 100)
    return quantize(weight, statistics, spec, options)


@pytest.fixture
def seen(monkeypatch):
    """What every codebook was trained on: list of (points, weights)."""
    found = []

    def spy(points, weights, k, **options):
        found.append((points.clone(), weights.clone()))
        return kmeans(points, weights, k, **options)

    monkeypatch.setattr(gptvq, "kmeans", spy)
    return found


# -- pitfall 1: weights of codebooks and look-up ----------------------------


@pytest.mark.parametrize("options", [SWEEP, FULL], ids=["sweep", "refined"])
@pytest.mark.parametrize("correlated", [False, True])
@pytest.mark.parametrize(("d", "k"), [(1, 4), (2, 16), (4, 16)])
def test_an_important_column_is_served_better(d, k, correlated, options):
    # x_j ten times larger: its importance 100 times
    spec = GPTVQSpec(48, 64, d, k, 48, 32, "float16")
    weight, h, j = normal(48, 64, seed=1), hessian_of(64, seed=2), 21
    if not correlated:
        h = torch.diag(h.diagonal())
    size = torch.ones(64)
    size[j] = 10
    errors = []
    for hessian in (h, h * size * size[:, None]):
        codes = run(weight, hessian, spec, options).codes
        errors.append((weight - dequantized(codes, spec)).square().sum(0) * h.diagonal())
    # a number by itself can only move its codebook's entries
    share = 0.95 if d == 1 and not correlated else 0.5
    assert errors[1][j] < share * errors[0][j]
    if not correlated and d > 1:  # else errors are also there to make up for each other
        others = torch.arange(64) != j
        assert errors[1][others].sum() > errors[0][others].sum()


def test_squared_importance_is_the_right_power(monkeypatch):
    # codebooks trained with 1/u^2 must beat 1/u, and that must beat none and the inverted u of the
    # released code
    spec = GPTVQSpec(64, 256, 4, 64, 64, 256, "float16")
    powers = {"1/u^2": 1.0, "1/u": 0.5, "none": 0.0, "u": -0.5}
    total = dict.fromkeys(powers, 0.0)
    for seed in range(4):
        size = normal(256, seed=seed + 9).exp()
        h = hessian_of(256, seed=seed + 50) * size * size[:, None]
        weight = normal(64, 256, seed=seed)
        for name, power in powers.items():
            monkeypatch.setattr(
                gptvq, "kmeans", lambda x, w, k, p=power, **o: kmeans(x, w**p, k, **o)
            )
            total[name] += run(weight, h, spec, SWEEP).relative_error
    assert total["1/u^2"] < 0.97 * total["1/u"]
    assert total["1/u"] < 0.95 * total["none"]
    assert total["1/u"] < 0.95 * total["u"]


def test_codebooks_are_trained_with_the_price_of_an_error(seen):
    # 1/u_jj^2 with U the paper's upper factor of the inverse Hessian, for all rows alike
    spec = GPTVQSpec(10, 24, 2, 4, 10, 8)
    h = hessian_of(24)
    run(normal(10, 24), h, spec, SWEEP)
    damped = factorize(h, 0.01).hessian.double()
    u = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True).diagonal()
    for stripe, (_, weights) in enumerate(seen):
        expected = (1 / u.square())[8 * stripe : 8 * stripe + 8].expand(10, 8)
        torch.testing.assert_close(weights.reshape(10, 8).double(), expected, rtol=1e-4, atol=0)


# -- pitfall 2: the axis of vectors -----------------------------------------


@pytest.mark.parametrize("options", [SWEEP, FULL], ids=["sweep", "refined"])
def test_a_row_of_its_own_changes_alone(options):
    spec = GPTVQSpec(9, 44, 2, 4, 1, 16, "float16")  # one-row groups
    weight, h = normal(9, 44, seed=1), hessian_of(44, seed=2)
    before = run(weight, h, spec, options).codes
    weight[5] = normal(44, seed=3)
    after = run(weight, h, spec, options).codes
    others = [r for r in range(9) if r != 5]
    assert torch.equal(after.indices[others], before.indices[others])
    assert not torch.equal(after.indices[5], before.indices[5])
    torch.testing.assert_close(after.codebooks[:, others], before.codebooks[:, others])


def test_vectors_lie_along_the_input(seen):
    spec = GPTVQSpec(3, 8, 4, 2, 3, 8)
    weight = torch.arange(24.0).reshape(3, 8)
    run(weight, None, spec, SWEEP)
    assert seen[0][0][0].tolist() == [weight[r, c : c + 4].tolist() for r in range(3)
                                      for c in (0, 4)]  # fmt: skip


# -- pitfall 3: the shape of groups -----------------------------------------


def test_every_codebook_sees_exactly_its_block(seen):
    # W[i, j] = 1000 i + j, two rows by 256 columns, the last stripe ragged
    spec = GPTVQSpec(6, 600, 2, 4, 2, 256)
    i, j = torch.arange(6.0)[:, None], torch.arange(600.0)[None]
    weight = 1000 * i + j
    run(weight, None, spec, GPTVQOptions(refine_iterations=0, codebook_update=False, damping=0.0))
    assert len(seen) == 3
    for stripe, (points, _) in enumerate(seen):
        columns = slice(256 * stripe, min(256 * (stripe + 1), 600))
        assert points.shape == (3, 2 * (columns.stop - columns.start) // 2, 2)
        for group in range(3):
            block = weight[2 * group : 2 * group + 2, columns]
            assert torch.equal(points[group], block.reshape(-1, 2))


def test_codebooks_that_hold_a_whole_block_are_exact():
    spec = GPTVQSpec(6, 24, 2, 8, 2, 8, "float16")  # 8 vectors per block, 8 centroids
    i, j = torch.arange(6.0)[:, None], torch.arange(24.0)[None]
    weight = 100 * i + j  # below 2048: exact in float16
    result = run(weight, None, spec)
    assert torch.equal(dequantized(result.codes, spec), weight)
    for stripe in range(3):
        for group in range(3):
            book = result.codes.codebooks[stripe, group]
            block = weight[2 * group : 2 * group + 2, 8 * stripe : 8 * stripe + 8].reshape(-1, 2)
            assert sorted(book.tolist()) == sorted(block.tolist())


# -- pitfall 4: what codebooks are trained on -------------------------------


def test_later_codebooks_see_what_feedback_made_of_their_weights(monkeypatch):
    spec = GPTVQSpec(12, 48, 2, 4, 12, 16, "float16")
    weight, h = normal(12, 48, seed=1), hessian_of(48, seed=2)
    damped = factorize(h, 0.01).hessian.double()
    solvers = []
    monkeypatch.setattr(
        gptvq, "_Solver", lambda *a, cls=gptvq._Solver: solvers.append(cls(*a)) or solvers[-1]
    )
    starts = iter((0, 16, 32))

    def check(points, weights, k, **options):
        start = next(starts)
        error = (weight - solvers[0].state.decode()).double()[:, :start]
        shift = error @ damped[:start, start:] @ torch.linalg.inv(damped[start:, start:])
        expected = (weight[:, start:] + shift)[:, :16]
        torch.testing.assert_close(points.reshape(12, 16).double(), expected, rtol=1e-4, atol=1e-4)
        assert start == 0 or float(shift[:, :16].abs().mean()) > 0.2
        return kmeans(points, weights, k, **options)

    monkeypatch.setattr(gptvq, "kmeans", check)
    run(weight, h, spec)
    assert next(starts, None) is None


@pytest.mark.parametrize("width", [16, 200])  # 200: wider than what the sweep announces at once
def test_second_codebook_depends_on_the_hessian_left_of_it(width):
    spec = GPTVQSpec(12, 2 * width, 2, 4, 12, width, "float16")
    weight, h = normal(12, 2 * width, seed=1), hessian_of(2 * width, seed=2)
    cut = h.clone()
    cut[:width, width:] = cut[width:, :width] = 0
    # the same price of an error in the second stripe, no feedback into it
    with_feedback, without = (run(weight, x, spec, SWEEP).codes.codebooks for x in (h, cut))
    assert not torch.allclose(with_feedback[1], without[1], atol=0.05)


# -- pitfall 5: scales ------------------------------------------------------


@pytest.mark.parametrize("options", [SWEEP, FULL], ids=["sweep", "refined"])
@pytest.mark.parametrize(("domain", "grid"), [("log", (0.0, 0.0)), ("linear", (1.0, 0.0))])
def test_scales_of_one_change_nothing(monkeypatch, domain, grid, options):
    weight, h = normal(20, 50, seed=1), hessian_of(50, seed=2)
    plain = GPTVQSpec(20, 50, 2, 8, 7, 16)
    scaled = GPTVQSpec(20, 50, 2, 8, 7, 16, scale_block=8, scale_domain=domain)
    expected = run(weight, h, plain, options)
    monkeypatch.setattr(
        gptvq,
        "scale_codes",
        lambda size, _: (torch.zeros(len(size), dtype=torch.uint8), *map(torch.tensor, grid)),
    )
    found = run(weight, h, scaled, options)
    assert torch.equal(found.codes.indices, expected.codes.indices)
    assert torch.equal(found.codes.codebooks, expected.codes.codebooks)
    quantized = dequantized(found.codes, scaled)
    assert torch.equal(quantized, dequantized(expected.codes, plain))


@pytest.mark.parametrize("domain", ["log", "linear"])
@pytest.mark.parametrize(("d", "k"), [(1, 4), (2, 16)])
def test_scales_help_where_rows_differ(d, k, domain):
    size = torch.rand(32, 6, generator=torch.Generator().manual_seed(3)) * 4 + 0.2
    weight = normal(32, 96, seed=1) * size.repeat_interleave(16, 1)
    h = hessian_of(96, seed=2)
    errors = [
        run(weight, h, GPTVQSpec(32, 96, d, k, 32, 48, scale_block=b, scale_domain=domain))
        for b in (0, 16)
    ]
    assert errors[1].relative_error < 0.8 * errors[0].relative_error


@pytest.mark.parametrize("domain", ["log", "linear"])
def test_scales_are_those_of_the_live_weights(monkeypatch, domain):
    # every scale is the largest compensated weight of its block, to the precision of 4 bits
    spec = GPTVQSpec(16, 40, 2, 8, 16, 20, scale_block=10, scale_domain=domain)
    sizes = []
    real = gptvq.scale_codes
    monkeypatch.setattr(gptvq, "scale_codes", lambda s, _: (sizes.append(s), real(s, domain))[1])
    weight, h = normal(16, 40, seed=1), hessian_of(40, seed=2)
    codes = run(weight, h, spec, SWEEP).codes
    offset, step = codes.scale_grid
    scale = offset + step * codes.scale_codes
    scale = scale.exp2() if domain == "log" else scale
    largest = torch.stack(sizes, 1)
    plain = weight.reshape(16, 4, 10).abs().amax(-1)
    torch.testing.assert_close(largest[:, :2], plain[:, :2])
    assert not torch.allclose(largest[:, 2:], plain[:, 2:], rtol=0.05)
    if domain == "linear":
        assert bool(((scale - largest).abs() <= 0.6 * step + 0.01 * largest).all())
    else:
        assert bool(((scale.log2() - largest.log2()).abs() <= 0.6 * step + 0.02).all())


# -- pitfall 6: what is fed back, what is decoded ---------------------------


@pytest.mark.parametrize("options", [SWEEP, FULL], ids=["sweep", "refined"])
@pytest.mark.parametrize("name", ODD_SPECS)
def test_every_vector_is_its_centroid_times_its_scale(monkeypatch, name, options):
    spec = ODD_SPECS[name]
    solvers = []
    monkeypatch.setattr(
        gptvq, "_Solver", lambda *a, cls=gptvq._Solver: solvers.append(cls(*a)) or solvers[-1]
    )
    weight, h = normal(spec.out_features, spec.in_features), hessian_of(spec.in_features)
    result = run(weight, h, spec, options)
    codes, d = result.codes, spec.vector_dim
    books = codes.codebooks
    if spec.svd_rank:
        factors = codes.codebook_factors.float()
        if codes.codebook_scales is not None:
            factors = factors * codes.codebook_scales[..., None]
        books = (factors @ codes.codebook_basis)[..., None]
    elif codes.codebook_scales is not None:
        books = books * codes.codebook_scales[..., None, None]
    expected = torch.empty(spec.out_features, spec.num_vectors * d)
    for r in range(spec.out_features):
        for v in range(spec.num_vectors):
            book = books[v * d // spec.group_columns, r // spec.group_rows]
            q = book[codes.indices[r, v]]
            if spec.scale_block:
                offset, step = codes.scale_grid[:, v * d // spec.scale_block].double()
                z = offset + step * codes.scale_codes[r, v * d // spec.scale_block]
                q = q * (z.exp2() if spec.scale_domain == "log" else z).float()
            expected[r, v * d : (v + 1) * d] = q
    # the state that the error was measured on is what the file decodes to
    state = solvers[0].state.decode()[: spec.out_features]
    torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-6)
    quantized = dequantized(codes, spec)
    torch.testing.assert_close(quantized, expected[:, : spec.in_features], rtol=1e-5, atol=1e-6)
    assert result.relative_error == pytest.approx(
        relative(weight, h, quantized), rel=2e-2, abs=1e-6
    )


# -- pitfall 7: the identity ------------------------------------------------


def test_without_correlations_it_is_plain_kmeans(seen):
    spec = GPTVQSpec(24, 40, 2, 16, 8, 20, "float16")
    weight = normal(24, 40)
    codes = run(weight, torch.eye(40), spec, SWEEP).codes
    for stripe in range(2):
        points = weight[:, 20 * stripe : 20 * stripe + 20].reshape(3, -1, 2)
        assert torch.equal(seen[stripe][0], points)
        ones = torch.ones_like(points)
        books = kmeans(points, 1.01 * ones, 16, iterations=SWEEP.kmeans_iterations).half().float()
        torch.testing.assert_close(codes.codebooks[stripe], books)
        expected = assign(points, ones, books).reshape(24, 10)
        assert torch.equal(codes.indices[:, 10 * stripe : 10 * stripe + 10], expected)


def test_no_statistics_is_the_identity():
    spec = GPTVQSpec(24, 40, 2, 16, 8, 20)
    weight = normal(24, 40)
    first, second = run(weight, None, spec), run(weight, torch.eye(40), spec)
    assert torch.equal(first.codes.indices, second.codes.indices)
    assert first.relative_error == second.relative_error


# -- pitfall 8: the codebook update -----------------------------------------


@settings(max_examples=25, deadline=None)
@given(spec=gptvq_specs(), seed=st.integers(0, 99), tokens=st.sampled_from([3, 400]))
def test_update_and_refinement_never_lose(spec, seed, tokens):
    # on the target that all steps share: the original weights under the damped Hessian
    weight = normal(spec.out_features, spec.in_features, seed=seed)
    h = hessian_of(spec.in_features, seed, tokens)
    damped = factorize(h, 0.01).hessian
    losses = []
    for rounds, update in ((0, False), (0, True), (2, True)):
        options = GPTVQOptions(
            kmeans_iterations=5, refine_iterations=rounds, codebook_update=update
        )
        codes = run(weight, h, spec, options).codes
        losses.append(exact_loss(weight, damped, dequantized(codes, spec)))
    floor = 1e-6 * exact_loss(weight, damped, 0 * weight)
    assert losses[1] <= losses[0] * (1 + 1e-3) + floor
    assert losses[2] <= losses[0] * (1 + 1e-3) + floor


def test_update_and_refinement_gain():
    spec = GPTVQSpec(64, 128, 2, 16, 32, 64)
    weight, h = normal(64, 128, seed=1), hessian_of(128, seed=2)
    sweep, updated, refined = (
        run(weight, h, spec, GPTVQOptions(refine_iterations=r, codebook_update=u)).relative_error
        for r, u in ((0, False), (0, True), (4, True))
    )
    assert updated < 0.99 * sweep
    assert refined < 0.95 * updated


@pytest.mark.parametrize("damping", [0.0, 0.01, 0.5])
def test_error_is_that_of_the_original_weights_under_the_undamped_hessian(damping):
    spec = GPTVQSpec(20, 48, 2, 16, 10, 16)
    weight, h = normal(20, 48, seed=1), hessian_of(48, seed=2)
    result = run(weight, h, spec, GPTVQOptions(damping=damping))
    expected = relative(weight, h, dequantized(result.codes, spec))
    assert result.relative_error == pytest.approx(expected, rel=1e-3)
