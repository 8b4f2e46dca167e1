"""Who computes: order, refusals, force, failure; and what `explain` says about it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import hf_vq_kernels
import pytest
import torch
from helpers import ODD_SPECS, random_gptvq
from hf_vq_kernels import dispatch
from torch import Tensor

from hf_vq.formats.gptvq import pack
from hf_vq.layers import PackedLinear

SPEC = ODD_SPECS["2d-int8"]
OPERATOR = "gptvq_linear"


@pytest.fixture
def layer() -> PackedLinear:
    return PackedLinear.from_packed(SPEC, pack(random_gptvq(SPEC, 0), SPEC))


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Make one invented backend, called "c", the only one beside the default."""

    def install(run: Callable[..., Tensor], unavailable: str | None = None, **more: Any) -> None:
        backend = dispatch.Backend(
            "c", OPERATOR, more.get("devices", ()), lambda: unavailable,
            lambda *_: more.get("refused"), run,
        )  # fmt: skip
        default = dispatch._defaults[OPERATOR]
        entries = [dispatch._Entry(backend), dispatch._Entry(default)]
        monkeypatch.setitem(dispatch._entries, OPERATOR, entries)

    yield install


def constant(x: Tensor, *_: Any) -> Tensor:
    return torch.full((*x.shape[:-1], SPEC.out_features), 7.0, dtype=x.dtype)


def broken(*_: Any) -> Tensor:
    raise RuntimeError("out of luck")


def test_the_first_that_can_computes(layer: PackedLinear, only: Any) -> None:
    only(constant)
    assert layer(torch.randn(2, SPEC.in_features)).eq(7).all()


@pytest.mark.parametrize(
    "why",
    [{"unavailable": "no luck"}, {"refused": "no luck"}, {"devices": ("cuda",)}],
    ids=["unavailable", "refused", "device"],
)
def test_explain_says_why_not(layer: PackedLinear, only: Any, why: dict[str, Any]) -> None:
    only(constant, **why)
    explanation = hf_vq_kernels.explain(layer, torch.randn(2, SPEC.in_features))
    decision = explanation.decisions[0]  # the default of linear then asks for W
    assert decision.operator == OPERATOR and decision.chosen == "torch"
    expected = "computes on cuda, not on cpu" if "devices" in why else "no luck"
    assert expected in decision.refused["c"] and expected in str(explanation)
    assert "2x" in str(explanation) and "float32 on cpu" in str(explanation)


def test_explain_without_operators() -> None:
    linear = torch.nn.Linear(2, 2)
    assert "no operator" in str(hf_vq_kernels.explain(linear, torch.randn(1, 2)))


def test_failure_falls_back_once_and_loudly(layer: PackedLinear, only: Any) -> None:
    only(broken)
    x = torch.randn(2, SPEC.in_features)
    with pytest.warns(RuntimeWarning, match=r"gptvq_linear.*'c' failed.*out of luck.*'torch'"):
        first = layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(layer(x), first)
    assert "failed before" in hf_vq_kernels.explain(layer, x).decisions[0].refused["c"]


def test_wrong_calls_blame_no_backend(layer: PackedLinear, only: Any) -> None:
    only(broken)
    packed = layer.packed()
    arguments = (packed["indices"], packed["codebooks"], packed["codebook_scales"])
    rest = (None, None, None, None, SPEC.vector_dim, SPEC.num_centroids, SPEC.group_rows,
            SPEC.group_columns, 0, True)  # fmt: skip
    with warnings.catch_warnings(), pytest.raises(RuntimeError):
        warnings.simplefilter("error")
        hf_vq_kernels.gptvq_linear(torch.randn(2, 3 * SPEC.in_features), *arguments, *rest)
    assert dispatch._entries[OPERATOR][0].broken is None


def test_forced_by_environment(
    layer: PackedLinear, only: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, SPEC.in_features)
    only(constant)
    monkeypatch.setenv("HF_VQ_BACKEND", "torch")
    assert not layer(x).eq(7).all()
    monkeypatch.setenv("HF_VQ_BACKEND", "c")
    explanation = hf_vq_kernels.explain(layer, x)
    assert explanation.decisions[0].chosen == "c (demanded)"
    only(constant, refused="no luck")
    with pytest.raises(RuntimeError, match=r"'c' was demanded.*no luck"):
        layer(x)
    with hf_vq_kernels.use_backend("torch"):
        layer(x)
    monkeypatch.setenv("HF_VQ_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"'fast'.*torch"):
        layer(x)
    monkeypatch.setenv("HF_VQ_BACKEND", "auto")
    layer(x)


def test_a_forced_backend_that_fails_is_not_replaced(layer: PackedLinear, only: Any) -> None:
    only(broken)
    with hf_vq_kernels.use_backend("c"), pytest.raises(RuntimeError, match="out of luck"):
        layer(torch.randn(2, SPEC.in_features))


def test_out_of_memory_is_no_failure_of_a_backend(layer: PackedLinear, only: Any) -> None:
    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("full")

    only(full)
    with pytest.raises(torch.OutOfMemoryError):
        layer(torch.randn(2, SPEC.in_features))


def test_every_operator_has_a_default_and_names_it_last() -> None:
    for operator in ("gptvq_linear", "vptq_dequantize", "cvxq_linear"):
        assert dispatch.backends(operator)[-1] == "torch"
        assert "c" in dispatch.backends(operator)
