"""The chosen geometry hits the target, all-in, and can be met by depths."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vq.formats.cvxq import CVXQSpec
from hf_vq.methods.cvxq import CVXQOptions, quantize
from hf_vq.methods.cvxq_spec import choose_spec, depth_budget, index_budget, most_words
from tests.problems import normal


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 600),
    columns=st.integers(1, 600),
    bits=st.floats(0.6, 9),
    bias=st.booleans(),
)
def test_never_above_the_target(rows, columns, bits, bias):
    try:
        spec = choose_spec(rows, columns, bits, {}, added_bias=bias)
    except ValueError as error:
        assert "reachable" in str(error)
        return
    assert (spec.out_features, spec.in_features) == (rows, columns)
    extra = 16 / columns if bias else 0
    assert spec.bits_per_weight + extra <= bits * (1 + 1e-9)
    assert 1 <= spec.group_rows <= rows
    # one more step does not fit, unless everything is at its deepest
    step = -(-spec.group_rows // 32)
    if spec.num_words < most_words(spec):
        assert spec.bits_per_weight + extra + 32 * step / spec.num_weights > bits * (1 - 1e-9)


@pytest.mark.parametrize("bits", [1.5, 2.0, 2.2, 3.1, 3.2, 4.25])
@pytest.mark.parametrize(
    "shape",
    [(256, 704), (704, 256), (896, 896), (4864, 896), (1024, 4096), (4096, 4096), (172, 688)],
)
def test_close_to_the_target(shape, bits):
    spec = choose_spec(*shape, bits, {})
    assert 0.998 * bits <= spec.bits_per_weight <= bits


def test_groups_are_whole_words_and_rows_come_out_even():
    for shape in [(4096, 4096), (11008, 4096), (4864, 896), (704, 256)]:
        spec = choose_spec(*shape, 3.0)
        assert spec.group_rows % 32 == 0
        assert spec.num_clusters * spec.group_rows <= 1.01 * shape[0]
        assert spec.permuted


def test_a_permutation_must_be_worth_its_bits():
    assert not choose_spec(256, 64, 3.0).permuted
    assert choose_spec(256, 4096, 3.0).permuted
    assert choose_spec(256, 64, 3.0, {"permuted": True, "group_rows": 64}).permuted


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("group_rows", 96),
        ("scale_dtype", "float16"),
        ("location", "int8"),
        ("levels", "laplace"),
        ("permuted", False),
    ],
)
def test_overrides(field, value):
    spec = choose_spec(704, 256, 3.0, {field: value})
    assert getattr(spec, field) == value
    assert 2.99 <= spec.bits_per_weight <= 3.0


def test_mean_depth_alone():
    spec = choose_spec(256, 512, None, {"mean_depth": 3.0, "group_rows": 128})
    assert spec.num_words * 32 == 3 * spec.num_weights
    assert spec.bits_per_weight > 3.0
    small = choose_spec(256, 512, 4.0, {"mean_depth": 3.0, "group_rows": 128})
    assert small.num_words == spec.num_words
    with pytest.raises(ValueError, match="mean_depth"):
        choose_spec(256, 512, None)


def test_what_is_out_of_reach_is_named():
    with pytest.raises(ValueError, match=r"bits=0\.3 is out of reach for a 20 x 64 matrix"):
        choose_spec(20, 64, 0.3, {})
    with pytest.raises(ValueError, match=r"with mean_depth=3\.0; reachable: 3\.0"):
        choose_spec(256, 512, 3.0, {"mean_depth": 3.0})
    with pytest.raises(ValueError, match="vector_dim: not part of"):
        choose_spec(256, 512, 3.0, {"vector_dim": 2})


@pytest.mark.parametrize(("rows", "g"), [(96, 32), (96, 40), (70, 64), (20, 20), (33, 7)])
@pytest.mark.parametrize("bits", [2.5, 4.0])
def test_words_are_what_depths_can_add_up_to(rows, g, bits):
    shell = CVXQSpec(rows, 24, g, 0)
    words = index_budget(shell, bits)
    if words <= 0:
        return
    spec = CVXQSpec(rows, 24, g, words)
    assert spec.bits_per_weight <= bits
    assert words >= depth_budget(spec, 0.1)
    result = quantize(normal(rows, 24), None, spec, CVXQOptions(refine_iterations=0))
    assert result.spec is not None
    assert spec.num_words - result.spec.num_words <= (0 if g % 32 == 0 else 1)


def test_a_bias_is_paid_for():
    with_bias = choose_spec(256, 704, 2.5, {"group_rows": 128}, added_bias=True)
    without = choose_spec(256, 704, 2.5, {"group_rows": 128})
    assert 4 * (without.num_words - with_bias.num_words) == pytest.approx(2 * 256, abs=32)
