"""Hessians are exact sums, whatever the dtype of the inputs, and shifts are dropped when unsure."""

from __future__ import annotations

import pytest
import torch

from hf_vq.methods.statistics import HessianAccumulator, exact_products_of
from tests.problems import normal


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
