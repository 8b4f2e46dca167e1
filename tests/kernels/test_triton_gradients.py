"""Gradients of codebooks, scales, norms and locations in Triton, against those of the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hf_vq_kernels
import pytest
import torch
from helpers import ODD_SPECS
from helpers_cvxq import ODD_CVXQ, with_depths
from helpers_triton import DEVICE, DTYPES, TOLERANCE, only, relative
from helpers_vptq import ODD_VPTQ
from hf_vq_kernels import cvxq_reference, reference, triton_gradients, vptq_reference
from hf_vq_kernels.dispatch import explain, use_backend
from torch import Tensor

from hf_vq.formats.gptvq import GPTVQSpec
from hf_vq.formats.vptq import VPTQSpec
from tests.kernels import test_cvxq_ops, test_ops, test_vptq_ops

ARGUMENTS: dict[str, Callable[..., Any]] = {
    "gptvq": test_ops.arguments,
    "vptq": test_vptq_ops.arguments,
    "cvxq": test_cvxq_ops.arguments,
}
REFERENCES: dict[str, Callable[..., Tensor]] = {
    "gptvq": reference.gptvq_linear,
    "vptq": vptq_reference.vptq_linear,
    "cvxq": cvxq_reference.cvxq_linear,
}
TRAINED = {
    "gptvq": ("codebooks", "codebook_scales", "codebook_basis"),
    "vptq": test_vptq_ops.TRAINED,
    "cvxq": test_cvxq_ops.TRAINED,
}
ODD: dict[str, Any] = {
    f"{method}-{name}": spec
    for method, specs in (("gptvq", ODD_SPECS), ("vptq", ODD_VPTQ), ("cvxq", ODD_CVXQ))
    for name, spec in specs.items()
    if spec.num_weights < 20_000
}


def leaves(spec: Any) -> tuple[dict[str, Tensor | None], tuple[Any, ...], dict[str, Tensor]]:
    """The packed tensors, the geometry, and those of the tensors that are trained, in float32."""
    packed, geometry = ARGUMENTS[spec.method](spec)
    packed = {name: None if t is None else t.to(DEVICE) for name, t in packed.items()}
    trained = {}
    for name in TRAINED[spec.method]:
        if (tensor := packed[name]) is not None and tensor.is_floating_point():
            packed[name] = trained[name] = tensor.float().requires_grad_()  # 16 bits hide digits
    return packed, geometry, trained


def gradients(spec: Any, tokens: int, dtype: torch.dtype, backend: str | None) -> dict[str, Tensor]:
    """By name; `backend` None: the reference's, in float32 from the same numbers."""
    packed, geometry, trained = leaves(spec)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((tokens, spec.in_features), generator=generator).to(dtype).to(DEVICE)
    grad = torch.randn((tokens, spec.out_features), generator=generator).to(dtype).to(DEVICE)
    if backend is None:
        cpu = {name: None if t is None else t.cpu() for name, t in packed.items()}
        y = REFERENCES[spec.method](x.float().cpu(), *cpu.values(), None, *geometry)
        y.backward(grad.float().cpu())
    else:
        linear = getattr(hf_vq_kernels, f"{spec.method}_linear")
        with use_backend(backend):
            linear(x, *packed.values(), None, *geometry).backward(grad)
    found = {name: leaf.grad for name, leaf in trained.items()}
    assert all(gradient is not None for gradient in found.values())
    return found


def check(spec: Any, tokens: int, dtype: torch.dtype) -> None:
    ours = gradients(spec, tokens, dtype, "triton")
    theirs = gradients(spec, tokens, dtype, None)
    for name, gradient in theirs.items():
        error = relative(ours[name], gradient)
        assert error < TOLERANCE[dtype], f"gradient of {name}: relative error {error:.2e}"


@pytest.mark.parametrize("name", ODD)
def test_odd_shapes(name: str) -> None:
    if leaves(ODD[name])[2]:
        check(ODD[name], 3, torch.float32)
    else:  # integers alone, whose gradients nobody can ask for
        assert name in {
            "gptvq-4d-int4-linear", "cvxq-log8", "cvxq-log8-int8", "cvxq-one-row-clusters",
            "cvxq-one-weight",
        }  # fmt: skip


@DTYPES
@pytest.mark.parametrize(
    "name", ["gptvq-8d-float16-log", "vptq-outliers", "vptq-outliers-rows", "cvxq-float16-float16"]
)
def test_more_tokens_than_a_step(name: str, dtype: torch.dtype) -> None:
    check(ODD[name], 70, dtype)


@pytest.mark.parametrize(
    "spec",
    [
        GPTVQSpec(70, 172, 2, 16, 32, 64, "float32", scale_block=16),
        VPTQSpec(75, 172, 6, 64, 4, norm="columns", permuted=True, codebook_dtype="float32"),
        with_depths(150, 130, 70, "float32", "float32", permuted=True),
    ],
    ids=["gptvq", "vptq", "cvxq"],
)
@pytest.mark.parametrize("config", triton_gradients._sum_gradients.space, ids=str)
def test_every_point_of_the_tuning_space(config: object, spec: Any) -> None:
    with only(triton_gradients._sum_gradients, config):
        check(spec, 2, torch.float32)


def test_leading_dimensions_and_the_stored_dtype() -> None:
    packed, geometry = ARGUMENTS["vptq"](ODD_VPTQ["outliers"])
    packed = {name: None if t is None else t.to(DEVICE) for name, t in packed.items()}
    packed["centroids.weight"].requires_grad_()
    x = torch.randn((2, 3, 43), device=DEVICE)
    for shape in ((2, 3, 43), (6, 43), (0, 43)):
        with use_backend("triton"):
            y = hf_vq_kernels.vptq_linear(
                x.flatten()[: torch.Size(shape).numel()].view(shape), *packed.values(), None,
                *geometry,
            )  # fmt: skip
            (found,) = torch.autograd.grad(y.square().sum(), packed["centroids.weight"])
        assert found.dtype == torch.float16 and found.shape == packed["centroids.weight"].shape
        assert bool(found.any()) == (shape[0] > 0)


@pytest.mark.parametrize("exponent", [-90, 60])
def test_gradients_of_any_size(exponent: int) -> None:
    """The unit of the integer sums follows the gradients: scaled losses change nothing."""
    packed, geometry, trained = leaves(ODD["gptvq-2d-float32"])
    x = torch.randn((3, 41), device=DEVICE)
    grad = torch.randn((3, 30), device=DEVICE)
    found = []
    for factor in (1.0, 2.0**exponent):
        with use_backend("triton"):
            y = hf_vq_kernels.gptvq_linear(x, *packed.values(), None, *geometry)
            (gradient,) = torch.autograd.grad(y, trained["codebooks"], grad * factor)
        found.append(gradient / factor)
    assert relative(found[1], found[0]) < 1e-6


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_is_seen(bad: float) -> None:
    """A loss scaler has to notice an overflow, which integers cannot hold."""
    packed, geometry, trained = leaves(ODD["gptvq-2d-float32"])
    grad = torch.randn((3, 30), device=DEVICE)
    grad[1, 2] = bad
    with use_backend("triton"):
        y = hf_vq_kernels.gptvq_linear(
            torch.randn((3, 41), device=DEVICE), *packed.values(), None, *geometry
        )
        (gradient,) = torch.autograd.grad(y, trained["codebooks"], grad)
    assert gradient.isnan().all()


def test_zero_gradients_are_zero() -> None:
    packed, geometry, trained = leaves(ODD["vptq-outliers"])
    with use_backend("triton"):
        y = hf_vq_kernels.vptq_linear(
            torch.randn((3, 43), device=DEVICE), *packed.values(), None, *geometry
        )
        found = torch.autograd.grad(y, list(trained.values()), torch.zeros_like(y))
    assert not any(gradient.any() for gradient in found)


def test_who_computes_them() -> None:
    packed, geometry, _ = leaves(ODD["vptq-main"])
    x, grad = torch.randn((2, 37), device=DEVICE), torch.randn((2, 30), device=DEVICE)
    needed = [name == "centroids.weight" for name in packed]
    arguments = (grad, *packed.values(), x, *geometry, needed)
    with use_backend("triton"):
        text = str(explain("vptq_packed_gradients", *arguments))
    assert text.startswith("vptq_packed_gradients(2x30 float32") and "triton" in text
    with (
        use_backend("triton"),
        pytest.raises(RuntimeError, match=r"activations are torch\.float16"),
    ):
        torch.ops.hf_vq.vptq_packed_gradients(grad, *packed.values(), x.half(), *geometry, needed)
