"""Hessians are exact sums, whatever the dtype of the inputs, and shifts are dropped when unsure."""

from __future__ import annotations

import pytest
import torch

from hf_vq.methods.feedback import correction, factorize
from hf_vq.methods.statistics import HessianAccumulator, Statistics, exact_products_of
from tests.problems import hessian_of, normal


def batches(dtype, columns=37, seed=0):
    """Ragged batches of tokens whose mean is not zero."""
    shapes = [(3, 7, columns), (1, 50, columns), (11, columns)]
    return [(normal(*s, seed=seed + i) + 0.3).to(dtype) for i, s in enumerate(shapes)]


def flat(parts):
    return torch.cat([p.reshape(-1, p.shape[-1]) for p in parts]).double()


def worst(found, expected):
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_hessian_is_the_product_of_the_values_given(dtype):
    sums = HessianAccumulator(37, "cpu")
    for x in batches(dtype):
        sums.add(x)
    found = sums.statistics()
    x = flat(batches(dtype))
    assert found.tokens == len(x) == 82
    assert found.hessian.dtype == torch.float32
    assert found.shift is None
    # a bfloat16 accumulator, or float32 inputs rounded to bfloat16, would be off by 1e-3
    assert worst(found.hessian, x.T @ x / len(x)) < 2e-6


def test_float32_stays_exact_after_bfloat16():
    HessianAccumulator(37, "cpu").add(batches(torch.bfloat16)[0])
    test_hessian_is_the_product_of_the_values_given(torch.float32)


def test_precision_setting_is_restored():
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    with pytest.raises(RuntimeError, match="inside"), exact_products_of(torch.bfloat16):
        assert matmul.fp32_precision == "bf16"
        raise RuntimeError("inside")
    assert matmul.fp32_precision == before
    with exact_products_of(torch.float32):
        assert matmul.fp32_precision == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shift_is_the_cross_moment(dtype):
    sums = HessianAccumulator(37, "cpu", with_shift=True)
    seen = batches(dtype)
    meant = [(x + 0.1 * normal(*x.shape, seed=9)).to(dtype) for x in seen]
    for x, dense in zip(seen, meant, strict=True):
        sums.add(x, dense)
    x, dense = flat(seen), flat(meant)
    # relative to H: the shift is the difference of two such sums
    expected = (dense - x).T @ x / len(x)
    size = (x.T @ x / len(x)).abs().max()
    shift = sums.statistics().shift
    assert float((shift.double() - expected).abs().max() / size) < 2e-6
    assert float(expected.abs().max() / size) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pull_is_the_weight_times_the_shift(dtype):
    # bfloat16 differences are rounded in the sum, not what they are differences of
    seen = batches(dtype)
    meant = [(x + 0.1 * normal(*x.shape, seed=9)).to(dtype) for x in seen]
    weight = normal(5, 37, seed=3).to(dtype)
    whole = HessianAccumulator(37, "cpu", with_shift=True)
    sums = HessianAccumulator(37, "cpu", with_shift=True, weight=weight)
    for x, dense in zip(seen, meant, strict=True):
        whole.add(x, dense)
        sums.add(x, dense)
    found, expected = sums.statistics(), whole.statistics()
    assert found.shift is None
    assert torch.equal(found.hessian, expected.hessian)
    limit = 2e-5 if dtype is torch.float32 else 1e-2
    assert worst(found.pull, weight.double() @ expected.shift.double()) < limit


def test_no_pull_unasked_or_of_other_tokens():
    weight = normal(5, 37)
    x = batches(torch.float32)[0]
    sums = HessianAccumulator(37, "cpu", weight=weight)
    sums.add(x, x + 1)
    assert sums.statistics().pull is None
    sums = HessianAccumulator(37, "cpu", with_shift=True, weight=weight)
    sums.add(x)
    assert sums.statistics().pull is None


def statistics_of(columns=22):
    sums = HessianAccumulator(columns, "cpu")
    sums.add(normal(4 * columns, columns))
    return sums.statistics()


def test_the_last_matrix_folds_the_factor():
    found = statistics_of()
    factor = found.factor(0.01)
    hessian, upper = factor.hessian.clone(), factor.upper.clone()
    with found.factored(factor) as given:
        assert given is upper or torch.equal(given, upper)
        assert factor.hessian is not given  # others may come
    found.last = True
    with found.factored(factor) as given:
        assert given is factor.hessian
        assert torch.equal(given.triu(), upper)
    assert torch.allclose(factor.hessian, hessian, rtol=0, atol=1e-6)
    again = found.factor(0.01)  # whoever asks all the same gets a new one
    assert torch.allclose(again.upper, upper, rtol=0, atol=1e-5)
    assert torch.allclose(again.hessian, hessian, rtol=0, atol=1e-5)


def test_a_borrowed_hessian_is_not_folded():
    h = statistics_of().hessian
    before = h.clone()
    found = Statistics(h, tokens=88, last=True)
    factor = found.factor(0.01)
    with found.factored(factor) as given:
        assert given is not factor.hessian
    assert torch.equal(h, before)


def test_no_shift_when_nothing_moved():
    sums = HessianAccumulator(37, "cpu", with_shift=True)
    for x in batches(torch.bfloat16):
        sums.add(x, x.clone())
    assert torch.equal(sums.statistics().shift, torch.zeros(37, 37))


@pytest.mark.parametrize("other", [None, (2, 7, 37), (21, 37)])
def test_other_tokens_drop_the_shift_for_good(other):
    sums = HessianAccumulator(37, "cpu", with_shift=True)
    first, second, third = batches(torch.float32)
    sums.add(second, second)
    sums.add(first, None if other is None else torch.zeros(other))
    sums.add(third, third)
    found = sums.statistics()
    assert found.shift is None
    assert found.tokens == 82
    x = flat(batches(torch.float32))
    assert worst(found.hessian, x.T @ x / len(x)) < 2e-6


def test_no_tokens():
    found = HessianAccumulator(5, "cpu", with_shift=True).statistics()
    assert found.tokens == 0
    assert torch.equal(found.hessian, torch.zeros(5, 5))
    assert torch.equal(found.shift, torch.zeros(5, 5))


# -- the order of the channels --------------------------------------------------------------------


@pytest.mark.parametrize("owned", [True, False])
def test_a_factor_in_descending_order(owned):
    h = hessian_of(24, seed=3)
    statistics = Statistics(h.clone(), 100, owned=owned)
    plain = statistics.factor(0.01).upper.clone()
    sorted_factor = statistics.factor(0.01, descending=True)
    order = sorted_factor.order
    assert order is not None and order.sort().values.tolist() == list(range(24))
    assert (h.diagonal()[order].diff() <= 0).all()
    expected = factorize(h[order][:, order], 0.01)
    torch.testing.assert_close(sorted_factor.upper, expected.upper)
    assert sorted_factor.added == pytest.approx(expected.added, rel=1e-5)
    assert statistics.factor(0.01, descending=True) is sorted_factor
    back = statistics.factor(0.01)
    assert back.order is None
    torch.testing.assert_close(back.upper, plain)


def test_corrections_do_not_depend_on_the_order():
    h, pull = hessian_of(24, seed=3), normal(7, 24, seed=4)
    found = [
        correction(pull.clone(), Statistics(h.clone(), 100).factor(0.01, descending))
        for descending in (False, True)
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)
