"""The VPTQ operators against the readable reference: values, every gradient, torch's own checks."""

from __future__ import annotations

import dataclasses
from typing import Any

import hf_vq_kernels
import hf_vq_kernels.vptq_reference as reference
import pytest
import torch
from helpers_vptq import ODD_VPTQ, random_vptq, vptq_specs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_vq.formats.vptq import VPTQSpec, pack

NAMES = (
    "indices", "centroids.weight", "res_centroids.weight", "outlier_indices",
    "outlier_centroids.weight", "perm", "weight_scale", "weight_bias",
)  # fmt: skip
TRAINED = tuple(name for name in NAMES if "indices" not in name and name != "perm")
SMALL = [name for name, spec in ODD_VPTQ.items() if spec.in_features < 1000]


def arguments(spec: VPTQSpec, seed: int = 0) -> tuple[dict[str, Tensor | None], tuple[Any, ...]]:
    """The packed tensors in the operators' order, and the geometry."""
    tensors = pack(random_vptq(spec, seed), spec)
    geometry = (spec.out_features, spec.vector_dim, spec.outlier_vector_dim, spec.norm == "rows")
    return {name: tensors.get(name) for name in NAMES}, geometry


def assert_close(name: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Relative error in the Frobenius norm, reported by name."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, name
    ours, theirs = ours.double(), theirs.double()
    error = (ours - theirs).norm() / theirs.norm().clamp_min(1e-30)
    assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


@settings(deadline=None)
@given(vptq_specs(), st.integers(0, 2**32))
def test_dequantize_equals_reference_exactly(spec: VPTQSpec, seed: int) -> None:
    packed, geometry = arguments(spec, seed)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rest = (spec.in_features, *geometry, dtype)
        ours = hf_vq_kernels.vptq_dequantize(*packed.values(), *rest)
        theirs = reference.vptq_dequantize(*packed.values(), *rest)
        assert torch.equal(ours, theirs), dtype
        assert ours.is_contiguous() and ours.shape == (spec.out_features, spec.in_features)


@pytest.mark.parametrize("name", ODD_VPTQ)
def test_odd_shapes_equal_reference_exactly(name: str) -> None:
    spec = ODD_VPTQ[name]
    packed, geometry = arguments(spec)
    rest = (spec.in_features, *geometry, torch.float32)
    ours = hf_vq_kernels.vptq_dequantize(*packed.values(), *rest)
    assert torch.equal(ours, reference.vptq_dequantize(*packed.values(), *rest))


@pytest.mark.parametrize("vectors", [1, 100, 700])
@pytest.mark.parametrize("name", SMALL)
def test_decoding_in_slices_changes_nothing(
    name: str, vectors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = dataclasses.replace(ODD_VPTQ[name], out_features=ODD_VPTQ[name].out_features + 64)
    packed, geometry = arguments(spec)
    rest = (spec.in_features, *geometry, torch.bfloat16)
    whole = hf_vq_kernels.vptq_dequantize(*packed.values(), *rest)
    monkeypatch.setitem(hf_vq_kernels.lookup.VECTORS_AT_ONCE, "cpu", 4 * vectors)
    assert torch.equal(hf_vq_kernels.vptq_dequantize(*packed.values(), *rest), whole)


@pytest.mark.parametrize("rows", [16, 4096])
def test_a_table_of_sums_changes_nothing(rows: int) -> None:
    # 4 groups x 8 x 4 = 128 pairs, against 2 x 40 vectors (two look-ups) and 512 x 40 (one)
    spec = VPTQSpec(rows, 40, 8, 8, 4, 4, norm="columns", permuted=True)
    packed, geometry = arguments(spec)
    rest = (spec.in_features, *geometry, torch.bfloat16)
    ours = hf_vq_kernels.vptq_dequantize(*packed.values(), *rest)
    assert torch.equal(ours, reference.vptq_dequantize(*packed.values(), *rest))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (0,), (2, 0)])
def test_linear_forward(
    name: str, dtype: torch.dtype, tolerance: float, leading: tuple[int, ...]
) -> None:
    spec = ODD_VPTQ[name]
    packed, geometry = arguments(spec)
    x = torch.randn((*leading, spec.in_features)).to(dtype)
    bias = torch.randn(spec.out_features)
    for b in (None, bias, bias.to(dtype)):
        ours = hf_vq_kernels.vptq_linear(x, *packed.values(), b, *geometry)
        theirs = reference.vptq_linear(
            x.float(), *packed.values(), None if b is None else b.float(), *geometry
        )
        assert_close("y", ours, theirs.to(dtype), tolerance)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_gradients(name: str, dtype: torch.dtype) -> None:
    spec = ODD_VPTQ[name]
    results = []
    for linear in (hf_vq_kernels.vptq_linear, reference.vptq_linear):
        packed, geometry = arguments(spec)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn((2, 3, spec.in_features), generator=generator).to(dtype)
        leaves = {"x": x, "bias": torch.randn(spec.out_features, generator=generator)}
        for key in TRAINED:
            if (tensor := packed[key]) is not None:
                packed[key] = leaves[key] = tensor.float()  # 16 bits would hide a wrong digit
        for leaf in leaves.values():
            leaf.requires_grad_()
        y = linear(x, *packed.values(), leaves["bias"], *geometry)
        y.backward(torch.randn(y.shape, generator=generator).to(dtype))
        results.append({key: leaf.grad for key, leaf in leaves.items()})
    ours, theirs = results
    for key, grad in ours.items():
        tolerance = 2e-6 if dtype == torch.float32 else 2e-2
        assert_close(f"gradient of {key}", grad, theirs[key], tolerance)


@pytest.mark.parametrize("name", SMALL)
def test_dequantize_gradients(name: str) -> None:
    spec = ODD_VPTQ[name]
    results = []
    for dequantize in (hf_vq_kernels.vptq_dequantize, reference.vptq_dequantize):
        packed, geometry = arguments(spec)
        leaves = {}
        for key in TRAINED:
            if (tensor := packed[key]) is not None:
                packed[key] = leaves[key] = tensor.float().requires_grad_()
        weight = dequantize(*packed.values(), spec.in_features, *geometry, torch.float32)
        (weight * torch.arange(weight.numel()).view(weight.shape)).sum().backward()
        results.append({key: leaf.grad for key, leaf in leaves.items()})
    assert results[0].keys() == results[1].keys() and results[0]
    for key, grad in results[0].items():
        assert_close(f"gradient of {key}", grad, results[1][key], 2e-6)


@pytest.mark.parametrize("trained", TRAINED)
def test_each_gradient_alone_and_in_the_stored_dtype(trained: str) -> None:
    spec = dataclasses.replace(ODD_VPTQ["outliers"], codebook_dtype="bfloat16")
    grads = []
    for everything in (False, True):
        packed, geometry = arguments(spec)
        for key in TRAINED if everything else (trained,):
            packed[key].requires_grad_()
        x = torch.linspace(-1, 1, 3 * spec.in_features).view(3, -1)
        hf_vq_kernels.vptq_linear(x, *packed.values(), None, *geometry).square().sum().backward()
        assert everything or [k for k, t in packed.items() if t.grad is not None] == [trained]
        grads.append(packed[trained].grad)
    assert grads[0].dtype == torch.bfloat16 and grads[0].any()
    assert torch.equal(grads[0], grads[1])


@pytest.mark.parametrize("trained", [(), ("centroids.weight",)])
def test_nothing_dense_is_saved_for_backward(trained: tuple[str, ...]) -> None:
    spec = VPTQSpec(128, 256, 8, 16, 16, permuted=True, norm="columns")
    packed, geometry = arguments(spec)
    for name in trained:
        packed[name].requires_grad_()
    x = torch.randn(3, 256, requires_grad=True)
    stored = {t.data_ptr() for t in packed.values() if t is not None}
    if trained:
        stored.add(x.data_ptr())
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = hf_vq_kernels.vptq_linear(x, *packed.values(), None, *geometry)
    assert saved and {t.data_ptr() for t in saved} <= stored
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("name", ["outliers", "outliers-rows", "residual-32-bits", "main"])
def test_opcheck(name: str) -> None:
    spec = ODD_VPTQ[name]
    packed, geometry = arguments(spec)
    for key in TRAINED:
        if (tensor := packed[key]) is not None:
            packed[key] = tensor.requires_grad_()
    bias = torch.randn(spec.out_features, requires_grad=True)
    x = torch.randn((2, spec.in_features), requires_grad=True)
    linear = torch.ops.hf_vq.vptq_linear.default
    torch.library.opcheck(linear, (x, *packed.values(), bias, *geometry))
    dequantize = torch.ops.hf_vq.vptq_dequantize.default
    torch.library.opcheck(
        dequantize, (*packed.values(), spec.in_features, *geometry, torch.bfloat16)
    )


@pytest.mark.parametrize(
    ("name", "columns"), [("main", 45), ("main", 1), ("main", 0), ("groups", 37), ("outliers", 3)]
)
def test_wrong_input_width_is_refused(name: str, columns: int) -> None:
    packed, geometry = arguments(ODD_VPTQ[name])
    with pytest.raises(RuntimeError, match=f"do not describe a weight of {columns} columns"):
        hf_vq_kernels.vptq_linear(torch.randn(2, columns), *packed.values(), None, *geometry)
