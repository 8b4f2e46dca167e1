"""Triton through the dispatch: who computes how many tokens, whole layers, what is refused."""

from __future__ import annotations

import pytest
import torch
from helpers import ODD_SPECS, random_gptvq
from helpers_cvxq import ODD_CVXQ, random_cvxq
from helpers_triton import DEVICE, TOLERANCE, Case, make, only, relative
from helpers_vptq import ODD_VPTQ, random_vptq
from hf_vq_kernels import reference, triton_backend, triton_product
from hf_vq_kernels.dispatch import explain, use_backend

from hf_vq.formats import FORMATS, LayerSpec
from hf_vq.layers import PackedLinear
from tests.kernels.test_ops import arguments

CODES = {"gptvq": random_gptvq, "vptq": random_vptq, "cvxq": random_cvxq}
LAYERS: dict[str, LayerSpec] = {
    "gptvq": ODD_SPECS["8d-float16-log"],
    "vptq": ODD_VPTQ["outliers"],
    "cvxq": ODD_CVXQ["log8-int8"],
}


def case() -> Case:
    return make("gptvq", arguments, reference.gptvq_dequantize, ODD_SPECS["2d-int8-log"])


def layer(method: str, dtype: torch.dtype) -> PackedLinear:
    spec = LAYERS[method]
    tensors = FORMATS[method].pack(CODES[method](spec), spec)
    bias = torch.linspace(-1, 1, spec.out_features).to(dtype)
    return PackedLinear.from_packed(spec, tensors, bias, dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("leading", [(), (2, 1), (2, 3), (0,), (40,)])
@pytest.mark.parametrize("method", LAYERS)
def test_layers_forward_and_backward(
    method: str, leading: tuple[int, ...], dtype: torch.dtype
) -> None:
    packed = layer(method, dtype)
    dense = packed.to_linear(torch.float32)
    x = torch.randn((*leading, packed.in_features), device=DEVICE).to(dtype).requires_grad_()
    grad = torch.randn((*leading, packed.out_features), device=DEVICE).to(dtype)
    with use_backend("triton"):
        y = packed(x)
        y.backward(grad)
    assert relative(y, x.float() @ dense.weight.T + dense.bias) <= TOLERANCE[dtype]
    assert x.grad is not None and packed.bias.grad is not None
    assert relative(x.grad, grad.float() @ dense.weight) <= TOLERANCE[dtype]
    assert relative(packed.bias.grad, grad.float().reshape(-1, packed.out_features).sum(0)) < 1e-2


@pytest.mark.parametrize(
    ("tokens", "chosen"), [(4, "decode"), (5, "tiles"), (32, "tiles"), (33, "dense")]
)
def test_who_computes_how_many_tokens(
    tokens: int, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    for name, function in (("tiles", "product"), ("dense", "dequantize")):
        original = getattr(triton_backend, function)

        def note(*args, original=original, name=name):
            called.append(name)
            return original(*args)

        monkeypatch.setattr(triton_backend, function, note)
    packed = case()
    x = torch.randn(tokens, 172, device=DEVICE)
    assert relative(packed.linear(x, None), x @ packed.weight.T) < 1e-5
    assert called == ([] if chosen == "decode" else [chosen])


def test_a_half_trained_layer_keeps_the_gradients_of_its_codebooks() -> None:
    grads = []
    for backend in ("torch", "triton"):
        packed = layer("gptvq", torch.float32)
        packed.codebooks.requires_grad_()
        x = torch.linspace(-1, 1, 6 * packed.in_features, device=DEVICE).view(6, -1)
        with use_backend(backend):
            packed(x).square().sum().backward()
        grads.append(packed.codebooks.grad)
    assert grads[0] is not None and grads[0].dtype == torch.float16
    assert relative(grads[1], grads[0]) < 1e-3


@pytest.mark.parametrize(
    "kernel", [triton_product._product, triton_product._transposed_product], ids=["y", "dx"]
)
def test_every_point_of_the_tuning_space(kernel: object) -> None:
    packed = case()
    x = torch.randn((6, 172), device=DEVICE, requires_grad=True)
    for config in kernel.space:
        with only(kernel, config), use_backend("triton"):
            y = packed.linear(x, None)
            x.grad = None
            y.backward(torch.ones_like(y))
        assert relative(y, x @ packed.weight.T) < 1e-5
        assert relative(x.grad, packed.weight.sum(0).expand(6, -1)) < 1e-5


def test_what_it_does_not_compute_is_refused_with_a_reason() -> None:
    packed = case()
    x = torch.randn((2, 172), dtype=torch.float64, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"not in torch\.float64"):
        packed.linear(x, None)
    with pytest.raises(RuntimeError, match="words per row are not those of 300 columns"):
        packed.linear(torch.randn((2, 300), device=DEVICE), None)


@pytest.mark.skipif(DEVICE != "cpu", reason="about machines without a GPU")
def test_the_interpreter_computes_only_where_it_is_demanded() -> None:
    packed = layer("vptq", torch.float32)
    text = str(explain(packed, torch.randn(packed.in_features)))
    assert "not triton: Triton's interpreter is slow" in text


def test_opcheck_of_the_input_gradient() -> None:
    packed = case()
    grad = torch.randn((2, 30), device=DEVICE, requires_grad=True)
    operator = torch.ops.hf_vq.gptvq_input_gradient.default
    torch.library.opcheck(operator, (grad, *packed.packed, 172, *packed.geometry))


def test_the_input_gradient_is_differentiable() -> None:
    packed = case()
    x = torch.randn((2, 172), device=DEVICE, requires_grad=True)
    with use_backend("triton"):
        y = torch.ops.hf_vq.gptvq_linear(x, *packed.packed, None, *packed.geometry)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        grad.sum().backward()
    expected = 2 * (packed.weight.sum(1) @ packed.weight).expand(2, -1)
    assert relative(x.grad, expected) < 1e-5
