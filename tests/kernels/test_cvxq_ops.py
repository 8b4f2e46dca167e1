"""The CVXQ operators against the readable reference: values, every gradient, torch's own checks."""

from __future__ import annotations

import dataclasses
from typing import Any

import hf_vq_kernels
import hf_vq_kernels.cvxq_reference as reference
import pytest
import torch
from helpers_cvxq import ODD_CVXQ, cvxq_specs, random_cvxq, with_depths
from hypothesis import given, settings
from torch import Tensor

from hf_vq.formats.cvxq import CVXQCodes, CVXQSpec, count_words, pack

TRAINED = ("scales", "location")
SMALL = [name for name, spec in ODD_CVXQ.items() if spec.out_features < 1000]
FLOATING = [
    n for n in SMALL if ODD_CVXQ[n].scale_dtype != "log8" or "float" in ODD_CVXQ[n].location
]


def arguments(spec: CVXQSpec, seed: int = 0) -> tuple[dict[str, Tensor | None], tuple[Any, ...]]:
    """The packed tensors in the operators' order, and the geometry."""
    tensors = pack(random_cvxq(spec, seed), spec)
    tensors["scales"] = tensors.pop("scale_codes", tensors.get("scales"))
    names = ("words", "depths", "scales", "scale_grid", "location", "row_perm")
    geometry = (spec.out_features, spec.group_rows, spec.levels)
    return {name: tensors.get(name) for name in names}, geometry


def floats(packed: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Those of the packed tensors that can be trained."""
    return {n: t for n in TRAINED if (t := packed[n]) is not None and t.is_floating_point()}


def assert_close(name: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Relative error in the Frobenius norm, reported by name."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, name
    ours, theirs = ours.double(), theirs.double()
    error = (ours - theirs).norm() / theirs.norm().clamp_min(1e-30)
    assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


@settings(deadline=None)
@given(cvxq_specs())
def test_dequantize_equals_reference_exactly(drawn: tuple[CVXQSpec, int]) -> None:
    spec, seed = drawn
    packed, geometry = arguments(spec, seed)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rest = (spec.in_features, *geometry, dtype)
        ours = hf_vq_kernels.cvxq_dequantize(*packed.values(), *rest)
        theirs = reference.cvxq_dequantize(*packed.values(), *rest)
        assert torch.equal(ours, theirs), dtype
        assert ours.is_contiguous() and ours.shape == (spec.out_features, spec.in_features)


@pytest.mark.parametrize("name", ODD_CVXQ)
def test_odd_shapes_equal_reference_exactly(name: str) -> None:
    spec = ODD_CVXQ[name]
    packed, geometry = arguments(spec)
    rest = (spec.in_features, *geometry, torch.float32)
    ours = hf_vq_kernels.cvxq_dequantize(*packed.values(), *rest)
    assert torch.equal(ours, reference.cvxq_dequantize(*packed.values(), *rest))


@pytest.mark.parametrize("weights", [1, 100, 700, 2000])
@pytest.mark.parametrize("name", SMALL)
def test_decoding_in_slices_changes_nothing(
    name: str, weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ODD_CVXQ[name]
    packed, geometry = arguments(spec)
    rest = (spec.in_features, *geometry, torch.bfloat16)
    whole = hf_vq_kernels.cvxq_dequantize(*packed.values(), *rest)
    monkeypatch.setitem(hf_vq_kernels.lookup.VECTORS_AT_ONCE, "cpu", 4 * weights)
    assert torch.equal(hf_vq_kernels.cvxq_dequantize(*packed.values(), *rest), whole)


def test_constant_groups_have_no_codes() -> None:
    # depth 0 is the location exactly, whatever the scale is
    spec = CVXQSpec(33, 5, 11, 0, "float16", "float16")
    packed, geometry = arguments(spec)
    assert packed["words"].shape == (0,)
    weight = hf_vq_kernels.cvxq_dequantize(*packed.values(), 5, *geometry, torch.float32)
    expected = packed["location"].float().repeat_interleave(11, dim=0)
    assert torch.equal(weight, expected)
    packed["location"] = None
    assert not hf_vq_kernels.cvxq_dequantize(*packed.values(), 5, *geometry, torch.float32).any()


@pytest.mark.parametrize("depth", range(9))
def test_all_codes_of_a_depth(depth: int) -> None:
    rows = 2**depth + 3
    depths = torch.full((1, 2), depth, dtype=torch.uint8)
    codes = torch.arange(rows).clamp(max=2**depth - 1).expand(1, 2, rows)
    spec = CVXQSpec(rows, 2, rows, count_words(depths, rows), "float32")
    tensors = pack(CVXQCodes(depths, codes, torch.tensor([[1.0, 2.0]])), spec)
    weight = hf_vq_kernels.cvxq_dequantize(
        tensors["words"], tensors["depths"], tensors["scales"], None, None, None, 2, rows, rows,
        "laplace", torch.float32,
    )  # fmt: skip
    levels = hf_vq_kernels.levels.level_table("laplace")[1 << depth : 2 << depth]
    assert torch.equal(weight[: 2**depth, 0], levels)
    assert torch.equal(weight[:, 1], 2 * weight[:, 0])


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (0,), (2, 0)])
def test_linear_forward(
    name: str, dtype: torch.dtype, tolerance: float, leading: tuple[int, ...]
) -> None:
    spec = ODD_CVXQ[name]
    packed, geometry = arguments(spec)
    x = torch.randn((*leading, spec.in_features)).to(dtype)
    bias = torch.randn(spec.out_features)
    for b in (None, bias, bias.to(dtype)):
        ours = hf_vq_kernels.cvxq_linear(x, *packed.values(), b, *geometry)
        theirs = reference.cvxq_linear(
            x.float(), *packed.values(), None if b is None else b.float(), *geometry
        )
        assert_close("y", ours, theirs.to(dtype), tolerance)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_gradients(name: str, dtype: torch.dtype) -> None:
    spec = ODD_CVXQ[name]
    results = []
    for linear in (hf_vq_kernels.cvxq_linear, reference.cvxq_linear):
        packed, geometry = arguments(spec)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn((2, 3, spec.in_features), generator=generator).to(dtype)
        leaves = {"x": x, "bias": torch.randn(spec.out_features, generator=generator)}
        for key, tensor in floats(packed).items():
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


@pytest.mark.parametrize("name", FLOATING)
def test_dequantize_gradients(name: str) -> None:
    spec = ODD_CVXQ[name]
    results = []
    for dequantize in (hf_vq_kernels.cvxq_dequantize, reference.cvxq_dequantize):
        packed, geometry = arguments(spec)
        leaves = {}
        for key, tensor in floats(packed).items():
            packed[key] = leaves[key] = tensor.float().requires_grad_()
        weight = dequantize(*packed.values(), spec.in_features, *geometry, torch.float32)
        (weight * torch.arange(weight.numel()).view(weight.shape)).sum().backward()
        results.append({key: leaf.grad for key, leaf in leaves.items()})
    assert results[0].keys() == results[1].keys() and results[0]
    for key, grad in results[0].items():
        assert_close(f"gradient of {key}", grad, results[1][key], 2e-6)


@pytest.mark.parametrize("trained", TRAINED)
def test_each_gradient_alone_and_in_the_stored_dtype(trained: str) -> None:
    grads = []
    for everything in (False, True):
        packed, geometry = arguments(ODD_CVXQ["float16-float16"])
        for key in TRAINED if everything else (trained,):
            packed[key].requires_grad_()
        x = torch.linspace(-1, 1, 3 * 36).view(3, -1)
        hf_vq_kernels.cvxq_linear(x, *packed.values(), None, *geometry).square().sum().backward()
        assert everything or [k for k, t in packed.items() if _has_grad(t)] == [trained]
        grads.append(packed[trained].grad)
    assert grads[0].dtype == torch.float16 and grads[0].any()
    assert torch.equal(grads[0], grads[1])


def _has_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.grad is not None


@pytest.mark.parametrize("trained", [(), ("scales",)])
def test_nothing_dense_is_saved_for_backward(trained: tuple[str, ...]) -> None:
    packed, geometry = arguments(with_depths(128, 256, 32, "float16", "int8", permuted=True))
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
        y = hf_vq_kernels.cvxq_linear(x, *packed.values(), None, *geometry)
    assert saved and {t.data_ptr() for t in saved} <= stored
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(
    "name", ["log8-int8", "log8-float16-laplace", "float16", "float16-int8", "float32-float32"]
)
def test_opcheck(name: str) -> None:
    spec = ODD_CVXQ[name]
    packed, geometry = arguments(spec)
    for tensor in floats(packed).values():
        tensor.requires_grad_()
    bias = torch.randn(spec.out_features, requires_grad=True)
    x = torch.randn((2, spec.in_features), requires_grad=True)
    linear = torch.ops.hf_vq.cvxq_linear.default
    torch.library.opcheck(linear, (x, *packed.values(), bias, *geometry))
    dequantize = torch.ops.hf_vq.cvxq_dequantize.default
    torch.library.opcheck(
        dequantize, (*packed.values(), spec.in_features, *geometry, torch.bfloat16)
    )


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_graph_for_layers_of_other_depths(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    linear = torch.compile(
        hf_vq_kernels.cvxq_linear, fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    for seed in (0, 1):
        spec = with_depths(30, 20, 8, "float16", "int8", permuted=True, seed=seed)
        packed, geometry = arguments(spec, seed)
        x = torch.randn(4, 20)
        expected = hf_vq_kernels.cvxq_linear(x, *packed.values(), None, *geometry)
        assert torch.equal(linear(x, *packed.values(), None, *geometry), expected)


@pytest.mark.parametrize("columns", [45, 1, 0])
def test_wrong_input_width_is_refused(columns: int) -> None:
    packed, geometry = arguments(ODD_CVXQ["log8"])
    with pytest.raises(RuntimeError, match=f"do not describe a weight of {columns} columns"):
        hf_vq_kernels.cvxq_linear(torch.randn(2, columns), *packed.values(), None, *geometry)


def test_reference_by_hand() -> None:
    # 3 rows in clusters of 2, one column: 2 bits with codes 3 and 1, then 1 bit with code 0
    words, depths = torch.tensor([0b0111, 0]), torch.tensor([[2], [1]])
    arguments = (words.int(), depths.int(), torch.tensor([[2.0], [4.0]]), None)
    location, perm = torch.tensor([[32], [-64]]), torch.tensor([1, 2, 0]).short()
    weight = reference.cvxq_dequantize(*arguments, location.to(torch.int8), perm, 1, 3, 2, "lloyd")
    high, low = 1.5104176, 0.45278004
    assert torch.allclose(weight[1], torch.tensor(2 * high + 1))
    assert torch.allclose(weight[2], torch.tensor(-2 * low + 1))
    assert torch.allclose(weight[0], torch.tensor(-4 * 0.7978846 - 4))


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_expand_scales(dtype: str) -> None:
    codes = torch.tensor([[0, 255], [3, 8]], dtype=getattr(torch, dtype))
    if dtype == "float32":
        assert reference.expand_scales(codes, None) is codes
        return
    grid = torch.tensor([[-3.0, 1.0], [0.0, 0.5]])
    expected = [[2.0**-3, 2.0**-3], [2.0**2.5, 2.0**5]]
    torch.testing.assert_close(reference.expand_scales(codes, grid), torch.tensor(expected))


def test_specs_differ_in_their_words_only() -> None:
    a, b = (with_depths(30, 20, 8, seed=seed) for seed in (0, 1))
    assert a != b and a == dataclasses.replace(b, num_words=a.num_words)
