"""PackedLinear as a module: values, casts and moves, copies, compilation, what PEFT expects."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from helpers import ODD_SPECS, random_gptvq
from torch import nn

from hf_vq.formats import FORMATS, FormatError
from hf_vq.formats.gptvq import GPTVQSpec, pack
from hf_vq.layers import PackedLinear
from hf_vq.layers.operators import OPERATORS

LOG = ODD_SPECS["2d-int8-log"]
SVD = ODD_SPECS["1d-svd-float16-log"]


def layer(spec: GPTVQSpec, bias: bool = True, dtype: torch.dtype = torch.float32) -> PackedLinear:
    values = torch.linspace(-1, 1, spec.out_features).to(dtype) if bias else None
    return PackedLinear.from_packed(spec, pack(random_gptvq(spec), spec), values, dtype)


def dtypes(module: PackedLinear) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in module.packed().items()}


def test_every_format_has_an_operator() -> None:
    assert OPERATORS.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", ODD_SPECS)
@pytest.mark.parametrize("bias", [True, False])
def test_computes_like_its_dense_twin(name: str, bias: bool) -> None:
    packed = layer(ODD_SPECS[name], bias)
    dense = packed.to_linear()
    assert type(dense) is nn.Linear and (dense.bias is not None) == bias
    x = torch.randn(2, 3, packed.in_features)
    assert torch.equal(packed(x), dense(x))
    for dtype in (torch.bfloat16, torch.float16):
        assert packed(x.to(dtype)).dtype == dtype
        assert torch.equal(packed.to_linear(dtype).weight, packed.dequantize(dtype))


def test_is_an_honest_linear() -> None:
    packed = layer(LOG)
    assert isinstance(packed, nn.Linear) and packed.weight is None
    assert "weight" not in packed.state_dict()
    with pytest.raises(AttributeError):
        packed.weight.data += 1
    assert packed.qweight is packed.indices
    assert list(packed.state_dict()) == [*LOG.layout(), "bias"]
    assert not any(p.requires_grad for p in packed.packed().values())
    assert "method=gptvq, bits=" in repr(packed) and f"{LOG.bits_per_weight:.3f}" in repr(packed)


def test_new_layer_decodes_to_zeros_and_takes_a_state_dict() -> None:
    full, empty = layer(LOG), PackedLinear(LOG, bias=True, compute_dtype=torch.float32)
    assert not empty.dequantize().any()
    empty.load_state_dict(full.state_dict())
    x = torch.randn(4, LOG.in_features)
    assert torch.equal(empty(x), full(x))
    empty.reset_parameters()
    assert not empty(x).any()


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


# ---------------------------------------------------------------------------------- casts and moves


@pytest.mark.parametrize("spec", [LOG, SVD], ids=["int8", "svd"])
@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double().float(),
        lambda m: m.to("cpu", torch.float16),
        lambda m: nn.Sequential(m).to(torch.bfloat16)[0],
        lambda m: m.type(torch.float16),
    ],
)
def test_casts_leave_packed_tensors_alone(spec: GPTVQSpec, cast) -> None:
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


def test_meta_and_to_empty() -> None:
    meta = PackedLinear(SVD, bias=True, compute_dtype=torch.bfloat16, device="meta")
    assert all(p.is_meta for p in meta.parameters())
    expected = dtypes(layer(SVD))
    assert dtypes(meta) == expected
    moved = layer(SVD).to("meta")
    assert all(p.is_meta for p in moved.parameters()) and dtypes(moved) == expected
    empty = meta.to_empty(device="cpu")
    assert not any(p.is_meta for p in empty.parameters()) and dtypes(empty) == expected
    empty.load_state_dict(layer(SVD).state_dict())
    assert torch.equal(empty.dequantize(), layer(SVD).dequantize(torch.bfloat16))


def test_trained_codebooks_keep_dtype_and_gradient() -> None:
    packed = layer(SVD)
    packed.codebook_basis.requires_grad_()
    packed(torch.randn(3, SVD.in_features)).sum().backward()
    assert packed.codebook_basis.grad.abs().sum() > 0
    packed.bfloat16()
    assert packed.codebook_basis.grad.dtype == packed.codebook_basis.dtype == torch.float16


def test_gradient_reaches_the_input() -> None:
    packed = layer(LOG)
    x = torch.randn(5, LOG.in_features, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    packed(x).square().sum().backward()
    packed.to_linear()(twin).square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)
    assert packed.bias.grad is not None and packed.indices.grad is None


def test_autocast() -> None:
    packed = layer(LOG)
    x = torch.randn(3, LOG.in_features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = packed(x)
        dense = packed.to_linear()(x)
    assert y.dtype == dense.dtype == torch.bfloat16
    torch.testing.assert_close(y, dense, rtol=2e-2, atol=5e-2)


def test_copies() -> None:
    packed = layer(LOG)
    x = torch.randn(3, LOG.in_features)
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(packed),
        pickle.loads(pickle.dumps(packed)),
        torch.load(buffer, weights_only=False),
    ):
        assert twin.spec == packed.spec and torch.equal(twin(x), packed(x))
        twin.indices.zero_()
        assert packed.indices.any()
    assert packed.to("cpu").share_memory()(x).shape == (3, 30)


def test_compiles_without_a_graph_break() -> None:
    packed = nn.Sequential(layer(LOG), nn.SiLU(), layer(GPTVQSpec(17, 30, 4, 8, 3, 12, "float16")))
    packed[2].codebooks.requires_grad_()
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    results = []
    for module in (packed, compiled):
        x = torch.linspace(-1, 1, 4 * 172).view(4, 172).requires_grad_()
        y = module(x)
        y.sum().backward()
        results.append((y, x.grad, packed[2].codebooks.grad))
        packed.zero_grad()
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(eager, other, rtol=1e-5, atol=1e-5)


def test_inductor_output_is_equal() -> None:
    packed = layer(LOG).requires_grad_(False)
    x = torch.randn(2, 172)
    compiled = torch.compile(packed, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), packed(x))
