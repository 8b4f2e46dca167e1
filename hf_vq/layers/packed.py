"""What layers that keep their weight packed have in common: the tensors, and how they move.

The packed tensors are frozen Parameters (device maps and offloading see Parameters) of a declared
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
from hf_vq_kernels.dispatch import demand
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


class Packed(nn.Module):
    """A layer whose weight (out_features, in_features) is stored as `spec` describes.

    Its parameters are those of `spec.layout()` and whatever the layer has besides. `compute_dtype`
    is that of `dequantize()`, and follows `.to(dtype)`. tied_to: name, in the model, of the layer
    whose packed tensors these are; "" for its own.
    """

    spec: LayerSpec
    compute_dtype: torch.dtype
    tied_to: str = ""
    backend: str | None = None
    """What the operators have to run for this layer; None: the first backend that can."""

    def set_backend(self, name: str | None) -> None:
        """Force a backend of the operators for this layer; None or "auto" forces none.

        Raises ValueError for a name that no backend has. One that cannot compute what it is asked
        for raises when it is.
        """
        demand(self.qweight, name)
        self.backend = None if name == "auto" else name

    def _create(
        self, spec: LayerSpec, compute_dtype: torch.dtype | None, device: torch.device | str | None
    ) -> None:
        """Zeros for every packed tensor; after `nn.Module.__init__`."""
        self.spec = spec
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

    def _adopt(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Take `tensors` (shared, not copied) for the packed ones.

        Raises `FormatError`, naming `where`, when they cannot be decoded.
        """
        FORMATS[self.spec.method].check(tensors, self.spec, where)
        for name in self.spec.layout():
            child, _, leaf = name.rpartition(".")
            module = self.get_submodule(child)  # of "": the layer itself
            module.register_parameter(leaf, nn.Parameter(tensors[name].detach(), False))

    def share(self, other: Packed, name: str) -> None:
        """Hold the very Parameters of `other`, called `name`: moving one moves both."""
        for leaf in self.spec.layout():
            child, _, last = leaf.rpartition(".")
            self.get_submodule(child).register_parameter(last, attrgetter(leaf)(other))
        self.tied_to = name

    def packed(self) -> dict[str, Tensor]:
        """Name -> tensor, as in `spec.layout()`."""
        return {name: attrgetter(name)(self) for name in self.spec.layout()}

    @property
    def qweight(self) -> Tensor:
        """The first packed tensor, the codes: where PEFT looks for the device of a layer."""
        return attrgetter(next(iter(self.spec.layout())))(self)

    @property
    def W_q(self) -> Tensor:
        """`qweight` again: the name by which PEFT tells that `dequantize()` gives the weight."""
        return self.qweight

    def _called(self) -> Mapping[str, Any]:
        """The packed tensors, as a forward pass has to ask for them."""
        packed: Mapping[str, Any] = self._parameters
        if self.backend is not None and not torch.compiler.is_compiling():
            demand(self.qweight, self.backend)  # again: offloading makes new tensors
        if self._tables:
            packed = dict(packed)
            for name in self._tables:
                packed[f"{name}.weight"] = getattr(self, name)()
        return packed

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight (out_features, in_features), in `compute_dtype` unless told."""
        if self.backend is not None:
            demand(self.qweight, self.backend)
        return OPERATORS[self.spec.method].dequantize(
            self.packed(), self.spec, dtype or self.compute_dtype
        )

    def reset_parameters(self) -> None:
        """Back to the state of a new layer: everything zero."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packed:
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
        if self.backend is not None:
            demand(self.qweight, self.backend)
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
