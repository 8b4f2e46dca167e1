"""CVXQ end to end on one matrix: the pitfalls of the paper and its code, and odd shapes.

The pitfalls are the places where an implementation is easily wrong without anything crashing; each
has the numeric check that would show it. Those of allocation and search alone are in
test_allocation.py and test_cvxq_groups.py.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vq.formats import FORMATS
from hf_vq.formats.cvxq import CVXQSpec, count_words
from hf_vq.layers import PackedLinear
from hf_vq.methods import cvxq_groups
from hf_vq.methods.cvxq import (
    CVXQOptions,
    cluster_rows,
    group_energy,
    group_variance,
    quantize,
)
from hf_vq.methods.cvxq_levels import distortion_table
from hf_vq.methods.cvxq_spec import depth_budget
from hf_vq.methods.feedback import bias_correction
from hf_vq.methods.statistics import Statistics
from tests.problems import exact_loss, hessian_of, normal

PLAIN = CVXQOptions(error_feedback=False)
SWEEP = CVXQOptions(refine_iterations=0, reallocations=0)


def spec_of(rows, columns, mean_depth, g=32, **fields):
    spec = CVXQSpec(rows, columns, min(g, rows), 0, **fields)
    words = depth_budget(spec, mean_depth)
    return CVXQSpec(rows, columns, min(g, rows), words, **fields)


def dequantized(result):
    """The dense matrix as whoever loads the file sees it, float32."""
    spec = result.spec
    tensors = FORMATS["cvxq"].pack(result.codes, spec)
    FORMATS["cvxq"].check(tensors, spec, "test")
    return PackedLinear.from_packed(spec, tensors, None, torch.float32).dequantize(torch.float32)


def loss_of(weight, h, result):
    return exact_loss(weight, h, dequantized(result))


def uneven(rows, columns, seed=0):
    """Rows and columns of different sizes, with a few large weights."""
    size = (0.5 * normal(rows, 1, seed=seed + 1)).exp() * (
        0.5 * normal(columns, seed=seed + 2)
    ).exp()
    return normal(rows, columns, seed=seed) * size


# -- what is stored is what was computed -----------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 80),
    columns=st.integers(1, 40),
    g=st.integers(1, 48),
    mean=st.floats(0.3, 8),
    scale=st.sampled_from(["log8", "float16", "float32"]),
    location=st.sampled_from(["none", "int8", "float16", "float32"]),
    levels=st.sampled_from(["lloyd", "laplace"]),
    permuted=st.booleans(),
    options=st.sampled_from([CVXQOptions(refine_iterations=1), PLAIN]),
    seed=st.integers(0, 99),
)
def test_reload_is_what_was_measured(
    rows, columns, g, mean, scale, location, levels, permuted, options, seed
):
    fields = {"scale_dtype": scale, "location": location, "levels": levels}
    spec = spec_of(rows, columns, mean, g, permuted=permuted and g < rows, **fields)
    weight, h = uneven(rows, columns, seed), hessian_of(columns, seed)
    result = quantize(weight, Statistics(h, 100), spec, options)
    assert result.spec.num_words == count_words(result.codes.depths, spec.group_rows)
    assert result.spec.num_words <= spec.num_words
    expected = loss_of(weight, h, result) / exact_loss(weight, h, torch.zeros_like(weight))
    assert result.relative_error == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("mean", [0.7, 1.5, 2.0, 3.3, 8.0])
@pytest.mark.parametrize("shape", [(96, 50), (70, 33), (32, 8)])
def test_every_word_of_the_budget_is_used(shape, mean):
    spec = spec_of(*shape, mean)
    result = quantize(uneven(*shape), None, spec, CVXQOptions(refine_iterations=0))
    assert result.spec == spec
    stored = spec.num_groups * spec.group_rows
    bits = int((result.codes.depths.long() * spec.group_rows).sum())
    assert bits == 32 * spec.num_words  # whole words: nothing is padding
    assert mean - 32 / stored <= bits / stored <= mean


def test_eight_bits_are_eight_bits_everywhere():
    weight, h = uneven(64, 40), hessian_of(40)
    result = quantize(weight, Statistics(h, 100), spec_of(64, 40, 8.0))
    assert bool((result.codes.depths == 8).all())
    assert result.relative_error < 1e-4


def test_pure_and_repeatable():
    weight, h = uneven(64, 40).bfloat16(), hessian_of(40)
    kept, kept_h = weight.clone(), h.clone()
    spec = spec_of(64, 40, 2.5, permuted=True)
    first = quantize(weight, Statistics(h, 100), spec)
    second = quantize(weight, Statistics(h, 100), spec)
    assert torch.equal(weight, kept) and torch.equal(h, kept_h)
    for name, value in vars(first.codes).items():
        other = getattr(second.codes, name)
        assert value is None if other is None else torch.equal(value, other)


def test_torch_path_is_as_good(monkeypatch):
    weight, h = uneven(96, 64), hessian_of(64)
    spec = spec_of(96, 64, 2.5, permuted=True)
    one = quantize(weight, Statistics(h, 100), spec)
    monkeypatch.setattr(cvxq_groups, "_compiled", lambda: None)
    other = quantize(weight, Statistics(h, 100), spec)
    assert one.relative_error == pytest.approx(other.relative_error, rel=0.05)


def test_an_owned_hessian_that_is_used_for_the_last_time():
    weight, h = uneven(64, 48), hessian_of(48)
    spec = spec_of(64, 48, 2.5)
    shared = quantize(weight, Statistics(h.clone(), 100), spec)
    last = quantize(weight, Statistics(h.clone(), 100, owned=True, last=True), spec)
    assert torch.equal(dequantized(shared), dequantized(last))


# -- depths ------------------------------------------------------------------------------------


def test_the_model_of_the_loss_predicts_it():
    """d = sum P G^2 S^2 D(B), without correlations: what the depths are chosen by comes true."""
    weight, h = normal(256, 60) * (0.7 * normal(60, seed=1)).exp(), hessian_of(60)
    h = torch.diag(h.diagonal())
    for mean in (1.5, 3.0, 4.5):
        spec = spec_of(256, 60, mean, 64)
        result = quantize(weight, Statistics(h, 100), spec, PLAIN)
        energy = group_energy(None, torch.arange(256), spec, weight.device)
        benefit = 64 * energy * h.diagonal() * group_variance(weight, spec)
        table = distortion_table("lloyd").float()
        predicted = float((benefit * table[result.codes.depths.long()]).sum())
        assert loss_of(weight, h, result) == pytest.approx(predicted, rel=0.3)


def test_true_distortions_beat_the_law():
    weight, h = normal(256, 160), torch.diag(hessian_of(160).diagonal())
    for mean, gain in ((1.5, 0.98), (2.5, 0.995)):
        losses = [
            quantize(
                weight,
                Statistics(h, 100),
                spec_of(256, 160, mean, 64, levels="laplace"),
                CVXQOptions(error_feedback=False, distortion=kind),
            ).relative_error
            for kind in ("measured", "law")
        ]
        assert losses[0] < gain * losses[1]
    with pytest.raises(ValueError, match="distortion"):
        quantize(weight, None, spec_of(128, 80, 2), CVXQOptions(distortion="guessed"))


def test_tiny_gradients_are_not_zero():
    """The trap: squares of gradients below 6e-8, the smallest in half precision, become no bits."""
    weight, h = uneven(64, 40), hessian_of(40)
    rows = normal(64, seed=7).square() + 0.1
    spec = spec_of(64, 40, 2.0, permuted=True)
    depths = [
        quantize(weight, Statistics(h * f, 100, sensitivity=rows * f), spec, SWEEP).codes.depths
        for f in (1.0, 2.0**-50)
    ]
    assert torch.equal(*depths)
    assert int((depths[1] > 0).sum()) > 60


def test_sensitive_rows_get_more_bits():
    weight, h = normal(128, 40), hessian_of(40)
    rows = torch.where(torch.arange(128) % 2 == 0, 16.0, 1.0)
    spec = spec_of(128, 40, 4.0, permuted=True)
    options = CVXQOptions(refine_iterations=0, reallocations=0)
    result = quantize(weight, Statistics(h, 100, sensitivity=rows), spec, options)
    depths = result.codes.depths.float()
    assert float(depths[2:].mean() - depths[:2].mean()) == pytest.approx(2.0, abs=0.35)
    assert bool((rows[result.codes.row_perm[64:]] == 16).all())
    # a whole map that says the same, up to the level of its columns
    whole = rows[:, None] * (normal(40, seed=9).square() + 0.1)
    again = quantize(weight, Statistics(h, 100, sensitivity=whole), spec, options)
    assert torch.equal(again.codes.depths, result.codes.depths)
    assert torch.equal(again.codes.codes, result.codes.codes)


def test_rows_in_another_order_are_the_same_matrix():
    weight, h = uneven(96, 40), hessian_of(40)
    rows = normal(96, seed=7).square() + 0.1
    shuffled = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    spec = spec_of(96, 40, 2.5, permuted=True)
    one = quantize(weight, Statistics(h, 100, sensitivity=rows), spec)
    other = quantize(weight[shuffled], Statistics(h, 100, sensitivity=rows[shuffled]), spec)
    assert torch.equal(one.codes.depths, other.codes.depths)
    torch.testing.assert_close(dequantized(one)[shuffled], dequantized(other))


def test_clusters_hold_rows_alike():
    weight = uneven(100, 50)
    order = cluster_rows(weight, torch.ones(100), 32)
    assert torch.equal(order.sort().values, torch.arange(100))
    variance = weight.var(1)[order]
    assert bool((variance.diff() >= 0).all())
    # doubling the sensitivity is doubling the variance
    twice = torch.where(torch.arange(100) < 50, 2.0, 1.0)
    scaled = weight * twice.sqrt()[:, None]
    key = [cluster_rows(w, s, 32) for w, s in ((weight, twice), (scaled, torch.ones(100)))]
    assert torch.equal(*key)


def test_depths_can_be_given():
    weight, h = uneven(64, 20), hessian_of(20)
    depths = torch.randint(0, 5, (2, 20), generator=torch.Generator().manual_seed(0))
    spec = CVXQSpec(64, 20, 32, count_words(depths, 32))
    result = quantize(weight, Statistics(h, 100), spec, depths=depths)
    assert torch.equal(result.codes.depths.long(), depths)
    assert result.spec == spec


def test_pruned_groups_are_counted():
    weight = normal(64, 20)
    weight[:, :5] *= 1e-3
    result = quantize(weight, None, spec_of(64, 20, 1.5))
    pruned = int((result.codes.depths == 0).sum())
    assert pruned >= 10
    assert any(f"{pruned} of 40 groups at 0 bits" in note for note in result.notes)


# -- degenerate input --------------------------------------------------------------------------


def test_zero_rows_columns_and_matrices():
    weight = uneven(64, 20)
    weight[3] = 0
    weight[:, 7] = 0
    spec = spec_of(64, 20, 2.0, permuted=True)
    q = dequantized(quantize(weight, None, spec))
    assert bool(torch.isfinite(q).all())
    assert bool((q[:, 7] == 0).all())
    nothing = quantize(torch.zeros(64, 20), None, spec)
    assert nothing.relative_error == 0.0
    assert float(dequantized(nothing).abs().max()) < 1e-6


def test_a_constant_column_round_trips_without_bits():
    weight = uneven(64, 20)
    weight[:, 4] = -0.625
    spec = spec_of(64, 20, 2.0, scale_dtype="float16", location="float16")
    result = quantize(weight, None, spec, PLAIN)
    assert bool((result.codes.depths[:, 4] == 0).all())
    assert bool((dequantized(result)[:, 4] == -0.625).all())


def test_dead_inputs_and_few_tokens():
    weight, h = uneven(64, 40), hessian_of(40, tokens=5)
    h[:, 11] = h[11] = 0
    result = quantize(weight, Statistics(h, 5), spec_of(64, 40, 2.0))
    assert any("1 dead input" in note for note in result.notes)
    assert bool(torch.isfinite(dequantized(result)).all())
    assert 0 < result.relative_error < 0.1


# -- error feedback ----------------------------------------------------------------------------


def test_each_step_pays():
    weight, h = uneven(128, 96), hessian_of(96)
    spec = spec_of(128, 96, 2.5)
    errors = [
        quantize(weight, Statistics(h, 400), spec, options).relative_error
        for options in (PLAIN, SWEEP, CVXQOptions())
    ]
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < 0.97 * errors[1]


def test_refinement_never_raises_the_loss():
    weight, h = uneven(96, 64), hessian_of(64)
    spec = spec_of(96, 64, 2.0, location="int8")
    errors = [
        quantize(
            weight, Statistics(h, 400), spec, CVXQOptions(refine_iterations=n, reallocations=0)
        ).relative_error
        for n in range(4)
    ]
    assert all(b <= a * (1 + 1e-4) for a, b in itertools.pairwise(errors))


def test_clusters_that_would_be_pruned_whole_get_bits():
    """R_jj^2 is the price of what the columns behind make up for; pruned, they do not."""
    size = torch.where(torch.arange(128) < 64, 0.25, 1.0)[:, None]
    x = normal(300, 10) @ normal(10, 64, seed=1) + 0.2 * normal(300, 64, seed=2)
    h = x.T @ x / 300
    spec = spec_of(128, 64, 1.1, permuted=True)
    once, anew = (
        quantize(
            normal(128, 64, seed=3) * size, Statistics(h, 300), spec, CVXQOptions(reallocations=n)
        )
        for n in (0, 1)
    )
    assert anew.relative_error < 0.97 * once.relative_error
    assert anew.spec.num_words == once.spec.num_words


def test_lloyd_levels_beat_the_compander():
    weight, h = normal(128, 64), hessian_of(64)
    for options in (PLAIN, CVXQOptions()):
        errors = [
            quantize(
                weight, Statistics(h, 400), spec_of(128, 64, 3.0, 64, levels=kind), options
            ).relative_error
            for kind in ("lloyd", "laplace")
        ]
        assert errors[0] < 0.95 * errors[1]


# -- bias ------------------------------------------------------------------------------------


def test_bias_correction_removes_the_mean_error():
    """The preprint's sign doubles it."""
    weight = uneven(64, 40)
    x = normal(500, 40, seed=5) + 0.5
    q = dequantized(quantize(weight, None, spec_of(64, 40, 2.0)))
    before = (x @ q.T - x @ weight.T).mean(0)
    bias = bias_correction(weight, q, x.mean(0))
    after = (x @ q.T + bias - x @ weight.T).mean(0)
    assert float(after.abs().max()) < 1e-5 * float(before.abs().max()) + 1e-5
    assert float(before.abs().max()) > 1e-2
