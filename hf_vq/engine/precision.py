"""Products of half floats on CPUs that have no units for them.

There torch multiplies bfloat16 and float16 numbers one by one, several times slower than float32.
Multiplying copies in float32 and rounding the result gives what the units of other CPUs give, which
accumulate in float32 too; one matrix is copied at a time, and nothing of it is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


def slow_dtypes() -> frozenset[torch.dtype]:
    """The half floats that this CPU has no units for, as far as torch's library can tell."""
    slow = set()
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
        # without oneDNN (as on ARM builds) torch has kernels of its own, of which nothing is known
        if torch.backends.mkldnn.is_available() and supported is not None and not supported():
            slow.add(dtype)
    return frozenset(slow)


@contextmanager
def products_in_float32(dtype: torch.dtype) -> Iterator[None]:
    """Inside, linear layers and attention of this dtype multiply in float32, where that is faster.

    Results keep their dtype. Frozen weights only: others are multiplied as they are.
    """
    if dtype not in slow_dtypes():
        yield
        return
    with _Float32Products(dtype):
        yield


class _Float32Products(TorchFunctionMode):
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.linear and len(args) > 1 and self._slow(args[0]):
            if not args[1].requires_grad:
                bias = args[2] if len(args) > 2 else kwargs.get("bias")
                return _Linear.apply(args[0], args[1], bias)
        elif function is F.scaled_dot_product_attention and args and self._slow(args[0]):
            wide = {key: self._wide(value) for key, value in kwargs.items()}
            return function(*map(self._wide, args), **wide).to(self.dtype)
        return function(*args, **kwargs)

    def _slow(self, x: torch.Tensor) -> bool:
        return x.dtype is self.dtype and x.device.type == "cpu"

    def _wide(self, value: Any) -> Any:
        half = isinstance(value, torch.Tensor) and value.dtype is self.dtype
        return value.float() if half else value


class _Linear(torch.autograd.Function):
    """x W^T + b of half floats (..., i), (o, i), (o,); keeps no float32 weight for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(weight)
        bias = None if bias is None else bias.float()
        return F.linear(x.float(), weight.float(), bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (weight,) = ctx.saved_tensors
        return (grads[0].float() @ weight.float()).to(grads[0].dtype), None, None
