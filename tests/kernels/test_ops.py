"""The operators against the readable reference: values, every gradient, torch's own checks."""

from __future__ import annotations

from typing import Any

import hf_vq_kernels
import hf_vq_kernels.reference as reference
import pytest
import torch
from helpers import ODD_SPECS, gptvq_specs, random_gptvq
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_vq.formats.gptvq import GPTVQSpec, pack

NAMES = (
    "indices", "codebooks", "codebook_scales", "codebook_basis", "scale_codes", "scale_grid",
)  # fmt: skip


def arguments(spec: GPTVQSpec, seed: int = 0) -> tuple[dict[str, Tensor | None], tuple[Any, ...]]:
    """The packed tensors by the operators' names, and the geometry."""
    tensors = dict(pack(random_gptvq(spec, seed), spec))
    if spec.svd_rank:
        tensors["codebooks"] = tensors.pop("codebook_factors")
    geometry = (
        spec.vector_dim, spec.num_centroids, spec.group_rows, spec.group_columns,
        spec.scale_block, spec.scale_domain == "log",
    )  # fmt: skip
    return {name: tensors.get(name) for name in NAMES}, geometry


def assert_close(name: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Relative error in the Frobenius norm, reported by name."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, name
    ours, theirs = ours.double(), theirs.double()
    error = (ours - theirs).norm() / theirs.norm().clamp_min(1e-30)
    assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


@settings(deadline=None)
@given(gptvq_specs(), st.integers(0, 2**32))
def test_dequantize_equals_reference_exactly(spec: GPTVQSpec, seed: int) -> None:
    packed, geometry = arguments(spec, seed)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rest = (spec.in_features, *geometry, dtype)
        ours = hf_vq_kernels.gptvq_dequantize(*packed.values(), *rest)
        assert torch.equal(ours, reference.gptvq_dequantize(*packed.values(), *rest)), dtype
        assert ours.is_contiguous()


@pytest.mark.parametrize("vectors", [1, 100, 700])
@pytest.mark.parametrize("name", ODD_SPECS)
def test_decoding_in_slices_changes_nothing(
    name: str, vectors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ODD_SPECS[name]
    packed, geometry = arguments(spec)
    rest = (spec.in_features, *geometry, torch.bfloat16)
    whole = hf_vq_kernels.gptvq_dequantize(*packed.values(), *rest)
    monkeypatch.setitem(hf_vq_kernels.lookup.VECTORS_AT_ONCE, "cpu", vectors)
    assert torch.equal(hf_vq_kernels.gptvq_dequantize(*packed.values(), *rest), whole)


@pytest.mark.parametrize("name", ODD_SPECS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (0,), (2, 0)])
def test_linear_forward(
    name: str, dtype: torch.dtype, tolerance: float, leading: tuple[int, ...]
) -> None:
    spec = ODD_SPECS[name]
    packed, geometry = arguments(spec)
    x = torch.randn((*leading, spec.in_features)).to(dtype)
    bias = torch.randn(spec.out_features)
    for b in (None, bias, bias.to(dtype)):
        ours = hf_vq_kernels.gptvq_linear(x, *packed.values(), b, *geometry)
        theirs = reference.gptvq_linear(
            x.float(), *packed.values(), None if b is None else b.float(), *geometry
        )
        assert_close("y", ours, theirs.to(dtype), tolerance)


@pytest.mark.parametrize("name", ODD_SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_gradients(name: str, dtype: torch.dtype) -> None:
    spec = ODD_SPECS[name]
    results = []
    for linear in (hf_vq_kernels.gptvq_linear, reference.gptvq_linear):
        packed, geometry = arguments(spec)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn((2, 3, spec.in_features), generator=generator).to(dtype)
        leaves = {"x": x, "bias": torch.randn(spec.out_features, generator=generator)}
        for key in ("codebooks", "codebook_scales", "codebook_basis"):
            if (tensor := packed[key]) is not None and tensor.is_floating_point():
                packed[key] = leaves[key] = tensor.float()  # bf16 would hide a wrong digit
        for leaf in leaves.values():
            leaf.requires_grad_()
        y = linear(x, *packed.values(), leaves["bias"], *geometry)
        y.backward(torch.randn(y.shape, generator=generator).to(dtype))
        results.append({key: leaf.grad for key, leaf in leaves.items()})
    ours, theirs = results
    for key, grad in ours.items():
        assert_close(
            f"gradient of {key}", grad, theirs[key], 2e-6 if x.dtype == torch.float32 else 2e-2
        )


def test_gradients_keep_the_dtype_of_what_is_stored() -> None:
    spec = ODD_SPECS["1d-svd-int8"]
    packed, geometry = arguments(spec)
    packed["codebook_basis"].requires_grad_()
    packed["codebook_scales"].requires_grad_()
    x = torch.randn(spec.in_features)
    hf_vq_kernels.gptvq_linear(x, *packed.values(), None, *geometry).sum().backward()
    assert packed["codebook_basis"].grad.dtype == torch.float16
    assert packed["codebook_scales"].grad.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["8d-float16-log", "1d-svd-float16-log", "2d-int8-log"])
def test_dequantize_gradients(name: str) -> None:
    spec = ODD_SPECS[name]
    results = []
    for dequantize in (hf_vq_kernels.gptvq_dequantize, reference.gptvq_dequantize):
        packed, geometry = arguments(spec)
        leaves = {}
        for key in ("codebooks", "codebook_scales", "codebook_basis"):
            if (tensor := packed[key]) is not None and tensor.is_floating_point():
                packed[key] = leaves[key] = tensor.float().requires_grad_()
        weight = dequantize(*packed.values(), spec.in_features, *geometry, torch.float32)
        (weight * torch.arange(weight.numel()).view(weight.shape)).sum().backward()
        results.append({key: leaf.grad for key, leaf in leaves.items()})
    assert results[0].keys() == results[1].keys() and results[0]
    for key, grad in results[0].items():
        assert_close(f"gradient of {key}", grad, results[1][key], 2e-6)


def test_nothing_dense_is_saved_for_backward() -> None:
    spec = GPTVQSpec(128, 256, 2, 16, 16, 128)
    packed, geometry = arguments(spec)
    stored = {t.data_ptr() for t in packed.values() if t is not None}
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(3, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = hf_vq_kernels.gptvq_linear(x, *packed.values(), None, *geometry)
    assert saved and {t.data_ptr() for t in saved} <= stored  # not even the activations
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("name", ["2d-int8-log", "1d-svd-float16-log", "4d-int4-linear"])
def test_opcheck(name: str) -> None:
    spec = ODD_SPECS[name]
    packed, geometry = arguments(spec)
    for key in ("codebooks", "codebook_scales", "codebook_basis"):
        if (tensor := packed[key]) is not None and tensor.is_floating_point():
            packed[key] = tensor.requires_grad_()
    bias = torch.randn(spec.out_features, requires_grad=True)
    x = torch.randn((2, spec.in_features), requires_grad=True)
    linear = torch.ops.hf_vq.gptvq_linear.default
    torch.library.opcheck(linear, (x, *packed.values(), bias, *geometry))
    dequantize = torch.ops.hf_vq.gptvq_dequantize.default
    torch.library.opcheck(
        dequantize, (*packed.values(), spec.in_features, *geometry, torch.bfloat16)
    )


def test_wrong_input_width_is_refused() -> None:
    packed, geometry = arguments(ODD_SPECS["2d-int8"])
    with pytest.raises(RuntimeError):
        hf_vq_kernels.gptvq_linear(torch.randn(2, 300), *packed.values(), None, *geometry)
