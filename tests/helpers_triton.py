"""What tests of the Triton kernels share: where they run, one case of each kind, comparisons.

Where there is no GPU, tests/conftest.py chose Triton's interpreter, and tensors stay on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import hf_vq_kernels
import pytest
import torch
from hf_vq_kernels import triton_common
from hf_vq_kernels.dispatch import use_backend
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float16", "bfloat16"])


class Case(NamedTuple):
    """A packed matrix, as the operators of `name` take it, and its dense weight in float32."""

    name: str
    packed: tuple[Tensor | None, ...]
    geometry: tuple[Any, ...]
    weight: Tensor

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The operator, through the dispatch, forced to Triton."""
        operator = getattr(hf_vq_kernels, f"{self.name}_linear")
        with use_backend("triton"):
            return operator(x, *self.packed, bias, *self.geometry)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The operator, through the dispatch, forced to Triton."""
        operator = getattr(hf_vq_kernels, f"{self.name}_dequantize")
        with use_backend("triton"):
            return operator(*self.packed, self.weight.shape[1], *self.geometry, dtype)


def make(
    name: str, arguments: Callable[..., Any], reference: Callable[..., Tensor], spec: Any
) -> Case:
    """A case of random codes; `arguments(spec)` are those of the tests of the operators."""
    packed, geometry = arguments(spec)
    weight = reference(*packed.values(), spec.in_features, *geometry, torch.float32)
    tensors = tuple(None if t is None else t.to(DEVICE) for t in packed.values())
    return Case(name, tensors, geometry, weight.to(DEVICE))


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    assert ours.shape == theirs.shape
    ours, theirs = ours.double(), theirs.double()
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-30)).item()


def check_product(case: Case, tokens: int, dtype: torch.dtype, bias: bool = True) -> None:
    """The forward pass against the float32 reference."""
    rows, columns = case.weight.shape
    x = torch.randn((tokens, columns), device=DEVICE).to(dtype)
    added = torch.randn(rows, device=DEVICE) if bias else None
    y = case.linear(x, added)
    assert y.dtype == dtype
    expected = x.float() @ case.weight.T + (0 if added is None else added)
    assert relative(y, expected) < TOLERANCE[dtype]


def check_input_gradient(case: Case, tokens: int, dtype: torch.dtype) -> None:
    """The backward pass, with respect to the input, against the float32 reference."""
    rows, columns = case.weight.shape
    x = torch.randn((tokens, columns), device=DEVICE).to(dtype).requires_grad_()
    grad = torch.randn((tokens, rows), device=DEVICE).to(dtype)
    with use_backend("triton"):
        case.linear(x, None).backward(grad)
    assert x.grad is not None and x.grad.dtype == dtype
    assert relative(x.grad, grad.float() @ case.weight) < TOLERANCE[dtype]


@contextmanager
def only(kernel: Any, config: Any) -> Iterator[None]:
    """Within the block, `kernel` runs with this point of its tuning space."""
    before = kernel.configs
    kernel.configs = [config]
    try:
        yield
    finally:
        kernel.configs = before


@pytest.fixture
def many_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are cut into as many parts as there is work for, as on a large, idle GPU."""
    monkeypatch.setattr(triton_common, "_multiprocessors", lambda device: 10_000)
