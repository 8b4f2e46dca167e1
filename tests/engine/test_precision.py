"""Half floats multiplied in float32: the same products, gradients, dtypes, and a whole model."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from hf_vq.configs import GPTVQConfig
from hf_vq.engine import precision
from hf_vq.engine.precision import products_in_float32, slow_dtypes
from hf_vq.engine.whole import quantize_whole
from hf_vq.loading import packed_layers
from hf_vq.plan import make_plan
from tests.models import QUICK, tiny, tokens

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def slow(monkeypatch):
    """A CPU without units for half floats."""
    monkeypatch.setattr(precision, "slow_dtypes", lambda: frozenset(HALVES))


def assert_near(found: torch.Tensor, exact: torch.Tensor) -> None:
    """To one rounding of the half float."""
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=eps, atol=eps * float(exact.abs().max()))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(37,), (3, 37), (2, 5, 37), (0, 37)])
def test_linear_and_its_gradient(slow, dtype, bias, shape):
    x = torch.randn(shape).to(dtype).requires_grad_()
    weight, b = torch.randn(29, 37).to(dtype), torch.randn(29).to(dtype) if bias else None
    with products_in_float32(dtype):
        y = F.linear(x, weight, b)
    grad = torch.randn(y.shape).to(dtype)
    y.backward(grad)
    assert y.dtype == x.grad.dtype == dtype and y.shape == (*shape[:-1], 29)
    if x.numel():
        exact = F.linear(x.detach().double(), weight.double(), None if b is None else b.double())
        assert_near(y.detach(), exact)
        assert_near(x.grad, grad.double() @ weight.double())


@pytest.mark.parametrize("dtype", HALVES)
def test_attention(slow, dtype):
    q, k, v = (torch.randn(2, 3, 11, 8).to(dtype) for _ in range(3))
    mask = torch.randn(11, 11).to(dtype)
    with products_in_float32(dtype):
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    exact = F.scaled_dot_product_attention(
        *(t.double() for t in (q, k, v)), attn_mask=mask.double()
    )
    assert y.dtype == dtype
    assert_near(y, exact)


def test_weights_that_learn_get_their_gradient(slow):
    x, weight = torch.randn(3, 5).bfloat16(), torch.randn(4, 5).bfloat16().requires_grad_()
    with products_in_float32(torch.bfloat16):
        F.linear(x, weight).sum().backward()
    assert weight.grad is not None


def test_other_dtypes_are_left_alone(slow):
    x, weight = torch.randn(3, 5), torch.randn(4, 5)
    with products_in_float32(torch.bfloat16):
        assert torch.equal(F.linear(x, weight), x @ weight.T)
        assert F.linear(x.double(), weight.double()).dtype == torch.float64


def test_nothing_changes_where_there_are_units(monkeypatch):
    monkeypatch.setattr(precision, "slow_dtypes", frozenset)
    monkeypatch.setattr(precision, "_Float32Products", None)
    with products_in_float32(torch.bfloat16):
        pass


def test_what_this_cpu_has():
    assert slow_dtypes() <= set(HALVES)


def test_no_float32_weight_is_kept_for_the_gradient(slow):
    x, weight = torch.randn(3, 64).bfloat16().requires_grad_(), torch.randn(64, 64).bfloat16()
    kept = []
    with (
        products_in_float32(torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        F.linear(x, weight)
    assert [t.data_ptr() for t in kept] == [weight.data_ptr()]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral"])
def test_a_model_is_quantized_as_before(slow, monkeypatch, kind):
    """In its own dtype, to about the same weights; what runs are products in float32."""
    monkeypatch.setenv("HF_VQ_PROGRESS", "0")
    config = GPTVQConfig(3.0, **QUICK)
    dense, found, ran = tiny(kind), {}, []
    forward = precision._Linear.forward

    def counted(*args):
        ran.append(1)
        return forward(*args)

    monkeypatch.setattr(precision._Linear, "forward", staticmethod(counted))
    for units in (True, False):
        if units:
            with monkeypatch.context() as patch:
                patch.setattr(precision, "slow_dtypes", frozenset)
                model = copy.deepcopy(dense)
                quantize_whole(model, config, tokens(8), make_plan(model, config))
            assert not ran
        else:
            model = copy.deepcopy(dense)
            quantize_whole(model, config, tokens(8), make_plan(model, config))
        assert model.dtype == torch.bfloat16
        found[units] = packed_layers(model)
    assert ran and found[True].keys() == found[False].keys()
    for name, layer in found[True].items():
        original = dense.get_submodule(name).weight.float()
        errors = [(found[u][name].dequantize(torch.float32) - original).norm() for u in found]
        assert 0.8 < errors[0] / errors[1] < 1.25, name
        assert layer.compute_dtype == found[False][name].compute_dtype == torch.bfloat16
