"""PackedLinear as a module: values, casts and moves, copies, compilation, what PEFT expects."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from helpers import ODD_SPECS, random_gptvq
from helpers_cvxq import ODD_CVXQ, random_cvxq
from helpers_vptq import ODD_VPTQ, random_vptq
from hf_vq_kernels.dispatch import use_backend
from torch import nn

from hf_vq.formats import FORMATS, FormatError, LayerSpec
from hf_vq.formats.gptvq import GPTVQSpec
from hf_vq.layers import PackedLinear
from hf_vq.layers.operators import OPERATORS

LOG = ODD_SPECS["2d-int8-log"]
SVD = ODD_SPECS["1d-svd-float16-log"]
VPTQ = ODD_VPTQ["outliers"]
CVXQ = ODD_CVXQ["log8-int8"]
ALL: dict[str, LayerSpec] = {
    **{f"gptvq-{name}": spec for name, spec in ODD_SPECS.items()},
    **{f"vptq-{name}": spec for name, spec in ODD_VPTQ.items()},
    **{f"cvxq-{name}": spec for name, spec in ODD_CVXQ.items()},
}
CODES = {"gptvq": random_gptvq, "vptq": random_vptq, "cvxq": random_cvxq}

each_kind = pytest.mark.parametrize(
    "spec", [LOG, SVD, VPTQ, CVXQ], ids=["int8", "svd", "vptq", "cvxq"]
)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in units of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def layer(spec: LayerSpec, bias: bool = True, dtype: torch.dtype = torch.float32) -> PackedLinear:
    values = torch.linspace(-1, 1, spec.out_features).to(dtype) if bias else None
    tensors = FORMATS[spec.method].pack(CODES[spec.method](spec), spec)
    return PackedLinear.from_packed(spec, tensors, values, dtype)


def dtypes(module: PackedLinear) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in module.packed().items()}


def test_every_format_has_an_operator() -> None:
    assert OPERATORS.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bias", [True, False])
def test_computes_like_its_dense_twin(name: str, bias: bool) -> None:
    packed = layer(ALL[name], bias)
    dense = packed.to_linear()
    assert type(dense) is nn.Linear and (dense.bias is not None) == bias
    x = torch.randn(2, 3, packed.in_features)
    with use_backend("torch"):
        assert torch.equal(packed(x), dense(x))
    assert error(packed(x), dense(x)) < 1e-5  # compiled backends add in another order
    for dtype in (torch.bfloat16, torch.float16):
        assert packed(x.to(dtype)).dtype == dtype
        assert torch.equal(packed.to_linear(dtype).weight, packed.dequantize(dtype))


@each_kind
def test_is_an_honest_linear(spec: LayerSpec) -> None:
    packed = layer(spec)
    assert isinstance(packed, nn.Linear) and packed.weight is None
    assert "weight" not in packed.state_dict()
    with pytest.raises(AttributeError):
        packed.weight.data += 1
    assert packed.qweight is packed.get_parameter(next(iter(spec.layout())))
    assert sorted(packed.state_dict()) == sorted([*spec.layout(), "bias"])
    assert list(packed.packed()) == list(spec.layout())
    assert not any(p.requires_grad for p in packed.packed().values())
    assert f"method={spec.method}, bits={spec.bits_per_weight:.3f}" in repr(packed)


@each_kind
def test_new_layer_decodes_to_zeros_and_takes_a_state_dict(spec: LayerSpec) -> None:
    full, empty = layer(spec), PackedLinear(spec, bias=True, compute_dtype=torch.float32)
    assert not empty.dequantize().any()
    empty.load_state_dict(full.state_dict())
    x = torch.randn(4, spec.in_features)
    assert torch.equal(empty(x), full(x))
    empty.reset_parameters()
    assert not empty(x).any()
    for module in full.modules():  # as libraries do that materialize a model from meta
        module.reset_parameters()
    assert not any(p.any() for p in full.parameters())


def test_default_dtype_is_torchs() -> None:
    assert PackedLinear(LOG).compute_dtype == torch.get_default_dtype()
    assert PackedLinear.from_packed(LOG, layer(LOG).packed()).bias is None


def test_from_packed_refuses_what_check_refuses() -> None:
    tensors = layer(LOG).packed()
    with pytest.raises(FormatError, match=r"up_proj: missing tensor 'indices'"):
        PackedLinear.from_packed(
            LOG, {n: t for n, t in tensors.items() if n != "indices"}, where="up_proj"
        )
    with pytest.raises(ValueError, match=r"up_proj: bias has shape \(3,\), expected \(30,\)"):
        PackedLinear.from_packed(LOG, tensors, torch.zeros(3), where="up_proj")


def test_names_with_a_dot_are_child_modules() -> None:
    packed = layer(VPTQ)
    assert {"centroids.weight", "res_centroids.weight"} < set(packed.state_dict())
    for name in ("centroids", "res_centroids", "outlier_centroids"):
        table = getattr(packed, name)
        assert table() is table.weight is packed.packed()[f"{name}.weight"]
        assert not isinstance(
            table, (nn.Linear, nn.Embedding)
        )  # whose weights libraries initialise
        assert f"({name}): PackedTable((" in repr(packed)


def test_hooks_of_child_modules_decide_what_is_computed() -> None:
    packed = layer(VPTQ)
    x = torch.randn(2, VPTQ.in_features)
    before = packed(x)
    doubled = packed.centroids.register_forward_hook(lambda m, args, out: 2 * out)
    changed = packed(x)
    doubled.remove()
    assert not torch.equal(changed, before) and torch.equal(packed(x), before)


def test_unpacked_storages_are_not_computed_with() -> None:
    spec = dataclasses.replace(VPTQ, storage="int16")
    with pytest.raises(ValueError, match=r"not 'int16': store .*vptq\.modernize"):
        layer(spec)(torch.randn(2, spec.in_features))


@each_kind
@pytest.mark.parametrize("difference", [-1, 1])
def test_input_of_another_width_is_refused(spec: LayerSpec, difference: int) -> None:
    with pytest.raises(RuntimeError, match="columns"):
        layer(spec)(torch.randn(2, spec.in_features + difference))


# ---------------------------------------------------------------------------------- casts and moves


@each_kind
@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double().float(),
        lambda m: m.to("cpu", torch.float16),
        lambda m: nn.Sequential(m).to(torch.bfloat16)[0],
        lambda m: m.type(torch.float16),
        lambda m: [child.to(torch.bfloat16) for child in m.modules()],
    ],
)
def test_casts_leave_packed_tensors_alone(spec: LayerSpec, cast) -> None:
    packed = layer(spec)
    before = {name: tensor.clone() for name, tensor in packed.packed().items()}
    cast(packed)
    for name, tensor in packed.packed().items():
        assert isinstance(tensor, nn.Parameter), name
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
    assert packed.bias.dtype == packed.compute_dtype == packed.dequantize().dtype


def test_compute_dtype_follows_without_a_bias() -> None:
    assert layer(LOG, bias=False).half().compute_dtype == torch.float16
    assert layer(LOG, bias=False, dtype=torch.bfloat16).to("cpu").compute_dtype == torch.bfloat16


@each_kind
def test_meta_and_to_empty(spec: LayerSpec) -> None:
    meta = PackedLinear(spec, bias=True, compute_dtype=torch.bfloat16, device="meta")
    assert all(p.is_meta for p in meta.parameters())
    expected = dtypes(layer(spec))
    assert dtypes(meta) == expected
    moved = layer(spec).to("meta")
    assert all(p.is_meta for p in moved.parameters()) and dtypes(moved) == expected
    empty = meta.to_empty(device="cpu")
    assert not any(p.is_meta for p in empty.parameters()) and dtypes(empty) == expected
    empty.load_state_dict(layer(spec).state_dict())
    assert torch.equal(empty.dequantize(), layer(spec).dequantize(torch.bfloat16))


@pytest.mark.parametrize(
    ("spec", "name"),
    [(SVD, "codebook_basis"), (VPTQ, "weight_scale")]
    + [(VPTQ, f"{kind}centroids.weight") for kind in ("", "res_", "outlier_")]
    + [(ODD_CVXQ["float16-float16"], name) for name in ("scales", "location")],
)
def test_trained_codebooks_keep_dtype_and_gradient(spec: LayerSpec, name: str) -> None:
    packed = layer(spec)
    packed.get_parameter(name).requires_grad_()
    packed(torch.randn(3, spec.in_features)).sum().backward()
    assert packed.get_parameter(name).grad.abs().sum() > 0
    packed.bfloat16()
    trained = packed.get_parameter(name)
    assert trained.grad.dtype == trained.dtype == torch.float16


@each_kind
def test_gradient_reaches_the_input(spec: LayerSpec) -> None:
    packed = layer(spec)
    x = torch.randn(5, spec.in_features, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    packed(x).square().sum().backward()
    packed.to_linear()(twin).square().sum().backward()
    assert error(x.grad, twin.grad) < 1e-5
    assert packed.bias.grad is not None and packed.qweight.grad is None


def test_autocast() -> None:
    packed = layer(LOG)
    x = torch.randn(3, LOG.in_features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = packed(x)
        dense = packed.to_linear()(x)
    assert y.dtype == dense.dtype == torch.bfloat16
    assert error(y, dense) < 1e-2


@each_kind
def test_copies(spec: LayerSpec) -> None:
    packed = layer(spec)
    x = torch.randn(3, spec.in_features)
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(packed),
        pickle.loads(pickle.dumps(packed)),
        torch.load(buffer, weights_only=False),
    ):
        assert twin.spec == packed.spec and torch.equal(twin(x), packed(x))
        for tensor in twin.packed().values():
            tensor.zero_()
        assert all(tensor.any() for tensor in packed.packed().values())
    assert packed.to("cpu").share_memory()(x).shape == (3, spec.out_features)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    ("first", "second", "trained"),
    [
        (LOG, GPTVQSpec(17, 30, 4, 8, 3, 12, "float16"), "codebooks"),
        (VPTQ, ODD_VPTQ["groups"], "res_centroids.weight"),
        (CVXQ, ODD_CVXQ["float16-int8"], "scales"),
    ],
    ids=["gptvq", "vptq", "cvxq"],
)
def test_compiles_without_a_graph_break(
    first: LayerSpec, second: LayerSpec, trained: str, dynamic: bool | None
) -> None:
    between = nn.Linear(first.out_features, second.in_features)
    packed = nn.Sequential(layer(first), nn.SiLU(), between, layer(second))
    codebooks = packed[3].get_parameter(trained).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (4, 7):
        results = []
        for module in (packed, compiled):
            x = torch.linspace(-1, 1, rows * first.in_features).view(rows, -1).requires_grad_()
            y = module(x)
            y.sum().backward()
            results.append((y, x.grad, codebooks.grad))
            packed.zero_grad()
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(eager, other, rtol=1e-5, atol=1e-5)


@each_kind
def test_inductor_output_is_equal(spec: LayerSpec) -> None:
    packed = layer(spec).requires_grad_(False)
    x = torch.randn(2, spec.in_features)
    compiled = torch.compile(packed, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), packed(x))
