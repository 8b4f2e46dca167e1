"""Layouts at run time: found while their tensors are as they were, dropped with them, not saved."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from operator import attrgetter

import hf_vq_kernels
import pytest
import torch
from helpers import random_gptvq
from helpers_cvxq import random_cvxq, with_depths
from helpers_vptq import random_vptq
from hf_vq_kernels import cpu_build, cpu_cvxq, layouts
from torch import Tensor

from hf_vq.formats import gptvq, vptq
from hf_vq.formats.cvxq import pack
from hf_vq.formats.gptvq import GPTVQSpec
from hf_vq.formats.vptq import VPTQSpec
from hf_vq.layers import PackedLinear

pytestmark = pytest.mark.skipif(
    cpu_build.unavailable() is not None, reason=f"no compiled backend: {cpu_build.unavailable()}"
)
SPEC = with_depths(70, 90, 24, "float16", "float16", permuted=True)


@pytest.fixture(autouse=True)
def builds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """One entry for every layout that is built; none is kept before or after."""
    built: list[int] = []
    build = cpu_cvxq._build

    def counted(*arguments: object) -> object:
        built.append(1)
        return build(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(cpu_cvxq, "_build", counted)
    layouts.forget()
    yield built
    layouts.forget()


def new_layer(seed: int = 0) -> PackedLinear:
    spec = with_depths(70, 90, 24, "float16", "float16", permuted=True, seed=seed)
    return PackedLinear.from_packed(spec, pack(random_cvxq(spec, seed), spec))


def assert_right(layer: PackedLinear, x: Tensor) -> None:
    with hf_vq_kernels.use_backend("torch"):
        expected = layer(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_made_once(builds: list[int]) -> None:
    layer, x = new_layer(), torch.randn(1, SPEC.in_features)
    for _ in range(3):
        assert_right(layer, x)
    with torch.inference_mode():
        layer(x)
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    assert len(builds) == 1
    clusters = -(-SPEC.out_features // SPEC.group_rows)
    groups = clusters * SPEC.in_features
    assert 14 * groups < layouts.nbytes() < 14 * (groups + 43 * clusters) + 44 * clusters + 64


def test_dequantizing_keeps_none(builds: list[int]) -> None:
    layer = new_layer()
    layer.dequantize()
    assert len(builds) == 1 and layouts.nbytes() == 0


@pytest.mark.parametrize("name", ["words", "depths", "scales", "location"])
def test_made_again_after_a_change(name: str, builds: list[int]) -> None:
    layer, x = new_layer(), torch.randn(1, SPEC.in_features)
    before = layer(x)
    with torch.no_grad():
        tensor = getattr(layer, name)
        tensor.copy_(tensor.flip(0))  # depths: of as many words in all
    assert_right(layer, x)
    assert len(builds) == 2 and not torch.equal(layer(x), before)


def test_made_again_after_forget(builds: list[int]) -> None:
    layer, x = new_layer(), torch.randn(1, SPEC.in_features)
    layer(x)
    layer.scales.data.mul_(2)  # which nothing can notice
    layouts.forget()
    assert_right(layer, x)
    assert len(builds) == 2


def test_dropped_with_the_tensors() -> None:
    layer, x = new_layer(), torch.randn(1, SPEC.in_features)
    layer(x)
    kept = layouts.nbytes()
    moved = copy.deepcopy(layer)
    moved(x)
    assert layouts.nbytes() == 2 * kept > 0
    moved.to("meta")
    gc.collect()
    assert layouts.nbytes() == kept
    del layer
    gc.collect()
    assert layouts.nbytes() == 0


def test_a_new_tensor_at_the_same_address_is_another_one() -> None:
    x = torch.randn(1, SPEC.in_features)
    for seed in range(8):  # the allocator gives freed memory out again
        assert_right(new_layer(seed), x)


def test_same_words_with_other_scales() -> None:
    layer, x = new_layer(), torch.randn(1, SPEC.in_features)
    layer(x)
    layer.scales.data = layer.scales.data.float() * 2  # as training in float32 does
    assert_right(layer, x)


def test_inference_tensors_are_not_kept(builds: list[int]) -> None:
    with torch.inference_mode():
        layer, x = new_layer(), torch.randn(1, SPEC.in_features)
        packed = {name: tensor.clone() for name, tensor in layer.packed().items()}
        assert packed["words"].is_inference()
        layer = PackedLinear.from_packed(SPEC, packed)
        layer(x)
        layer.scales.mul_(2)
        assert_right(layer, x)
    assert layouts.nbytes() == 0 and len(builds) > 1


OTHERS = {
    "gptvq": (
        GPTVQSpec(33, 256, 2, 16, 19, 128, "int4", 32), random_gptvq, gptvq.pack, "codebooks",
    ),
    "vptq": (
        VPTQSpec(50, 172, 6, 64, 16, norm="columns", permuted=True),
        random_vptq, vptq.pack, "centroids.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_methods(method: str, dtype: torch.dtype) -> None:
    """Made once, and again after a change; dropped with the layer, and not saved."""
    spec, random, pack_codes, changed = OTHERS[method]
    layer = PackedLinear.from_packed(spec, pack_codes(random(spec, 0), spec))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(1, spec.in_features).to(dtype)

    def assert_as_decoded(layer: PackedLinear) -> None:
        right = (x.double() @ layer.dequantize(torch.float32).double().T).to(dtype)
        torch.testing.assert_close(layer(x), right, rtol=2e-2, atol=2e-2)

    assert_as_decoded(layer)
    kept = layouts.nbytes()
    first = layer(x)
    assert kept > 0 and layouts.nbytes() == kept
    assert all(torch.equal(before[name], after) for name, after in layer.state_dict().items())
    with torch.no_grad():
        tensor = attrgetter(changed)(layer)
        tensor.copy_(tensor.flip(-1))
    assert_as_decoded(layer)
    assert layouts.nbytes() == kept and not torch.equal(layer(x), first)
    layer(torch.randn(40, spec.in_features).to(dtype))  # many tokens take no layout of VPTQ
    assert layouts.nbytes() == kept
    del layer, tensor
    gc.collect()
    assert layouts.nbytes() == 0


def test_what_is_saved_does_not_change() -> None:
    layer = new_layer()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer(torch.randn(1, SPEC.in_features))
    after = layer.state_dict()
    assert layouts.nbytes() > 0 and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
