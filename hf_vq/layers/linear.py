"""A linear layer that keeps its weight packed and computes through one operator.

Notable choices: it is an `nn.Linear` (PEFT and others look for that class) whose `weight` is None,
so code that would write into a dense weight fails loudly instead of changing a temporary. The
packed tensors are frozen Parameters (device maps and offloading see Parameters) of a declared
dtype, which casts of the model leave alone: a bfloat16 scale stays bfloat16 in a float16 model.
Where a format's tensor names have a dot ("centroids.weight"), a child module holds the tensor, and
the forward pass calls that module: hooks that offload weights attach to modules and fill them when
they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from hf_vq.formats import FORMATS
from hf_vq.formats.base import LayerSpec
from hf_vq.layers.operators import OPERATORS


class PackedTable(nn.Module):
    """One packed tensor under the name `weight`; calling the module returns it."""

    weight: nn.Parameter

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        zeros = torch.zeros(shape, dtype=dtype, device=device)
        self.weight = nn.Parameter(zeros, requires_grad=False)

    def forward(self) -> Tensor:
        """The tensor itself, not a copy."""
        return self.weight

    def reset_parameters(self) -> None:
        """Back to zeros."""
        with torch.no_grad():
            self.weight.zero_()

    def extra_repr(self) -> str:
        """What `print(model)` shows of this table."""
        return f"{tuple(self.weight.shape)}, {self.weight.dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedTable:
        """Moves move the tensor, casts leave it alone."""
        super()._apply(lambda tensor: _move(tensor, fn), recurse)
        return self


class PackedLinear(nn.Linear):
    """y = x @ W.T + bias with W stored as `spec` describes.

    A new layer decodes to zeros; `from_packed` or `load_state_dict` give it values. Its parameters
    are those of `spec.layout()` plus `bias`. `compute_dtype` is the dtype of the bias and of
    `dequantize()`, and follows `.to(dtype)`; the forward pass computes in the dtype of its input.
    """

    spec: LayerSpec
    compute_dtype: torch.dtype

    def __init__(
        self,
        spec: LayerSpec,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's would allocate the dense weight
        self.spec = spec
        self.in_features = spec.in_features
        self.out_features = spec.out_features
        self.compute_dtype = compute_dtype or torch.get_default_dtype()
        self.register_parameter("weight", None)
        for name, (shape, dtype) in spec.layout().items():
            child, dot, _ = name.partition(".")
            if dot:
                self.add_module(child, PackedTable(shape, dtype, device))
            else:
                zeros = torch.zeros(shape, dtype=dtype, device=device)
                self.register_parameter(name, nn.Parameter(zeros, requires_grad=False))
        self._tables = tuple(self._modules)
        self.register_parameter("bias", None)
        if bias:
            zeros = torch.zeros(spec.out_features, dtype=self.compute_dtype, device=device)
            self.bias = nn.Parameter(zeros)

    @classmethod
    def from_packed(
        cls,
        spec: LayerSpec,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
        where: str = "PackedLinear",
    ) -> PackedLinear:
        """A layer over `tensors` (shared, not copied), which must be those of `spec.layout()`.

        Raises `FormatError`, naming `where`, when they are not or cannot be decoded.
        """
        FORMATS[spec.method].check(tensors, spec, where)
        if compute_dtype is None and bias is not None:
            compute_dtype = bias.dtype
        layer = cls(spec, bias=bias is not None, compute_dtype=compute_dtype, device="meta")
        for name in spec.layout():
            child, _, leaf = name.rpartition(".")
            module = layer.get_submodule(child)  # of "": the layer itself
            module.register_parameter(leaf, nn.Parameter(tensors[name].detach(), False))
        if bias is not None:
            if tuple(bias.shape) != (spec.out_features,):
                raise ValueError(
                    f"{where}: bias has shape {tuple(bias.shape)}, expected {(spec.out_features,)}"
                )
            layer.bias = nn.Parameter(bias.detach().to(layer.compute_dtype))
        return layer

    def packed(self) -> dict[str, Tensor]:
        """Name -> tensor, as in `spec.layout()`."""
        return {name: attrgetter(name)(self) for name in self.spec.layout()}

    @property
    def qweight(self) -> Tensor:
        """The first packed tensor, the codes: where PEFT looks for the device of a layer."""
        return attrgetter(next(iter(self.spec.layout())))(self)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of `input` (or of autocast).

        Raises RuntimeError, as `nn.Linear` does, for an input of another width.
        """
        if input.shape[-1] != self.in_features:  # not every operator can tell
            raise RuntimeError(
                f"input of shape {tuple(input.shape)} for a layer of {self.in_features} columns"
            )
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        packed: Mapping[str, Any] = self._parameters
        if self._tables:
            packed = dict(packed)
            for name in self._tables:
                packed[f"{name}.weight"] = getattr(self, name)()
        return OPERATORS[self.spec.method].linear(input, packed, self.spec, self.bias)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight (out_features, in_features), in `compute_dtype` unless told."""
        return OPERATORS[self.spec.method].dequantize(
            self.packed(), self.spec, dtype or self.compute_dtype
        )

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """The same layer as a dense `nn.Linear` of `dtype` (default: `compute_dtype`)."""
        dtype = dtype or self.compute_dtype
        linear = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        with torch.no_grad():
            linear.weight = nn.Parameter(self.dequantize(dtype))
            if self.bias is not None:
                linear.bias = nn.Parameter(self.bias.detach().to(dtype, copy=True))
        return linear.train(self.training)

    def reset_parameters(self) -> None:
        """Back to the state of a new layer: everything zero."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()

    def extra_repr(self) -> str:
        """What `print(model)` shows of this layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, method={self.spec.method}, "
            f"bits={self.spec.bits_per_weight:.3f}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Moves move everything, casts cast the bias alone.

        `fn` is what `.to()`, `.half()`, `.to_empty()` and the like do to one tensor.
        """
        keep: set[int] = set()
        for tensor in self.packed().values():
            keep.add(id(tensor))
            if tensor.grad is not None:
                keep.add(id(tensor.grad))

        def moved(tensor: Tensor) -> Tensor:
            return _move(tensor, fn) if id(tensor) in keep else fn(tensor)

        probe: Any = torch.empty(0, dtype=self.compute_dtype, device=self.qweight.device)
        super()._apply(moved, recurse)
        self.compute_dtype = fn(probe).dtype
        return self


def _move(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """What `fn` does to the place of `tensor`, without what it does to its dtype.

    The tensor goes through `fn` as integers of the same width, which casts of a model do not touch.
    """
    bits = tensor.detach().view(_BITS[tensor.dtype.itemsize])
    out = fn(bits)
    if out.dtype != bits.dtype:  # Module.type() casts integers too
        out = bits.to(out.device)
    return tensor if out is bits else out.view(tensor.dtype)


# Integers as wide as a float of so many bytes.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
