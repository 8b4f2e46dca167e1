"""A linear layer that keeps its weight packed and computes through one operator.

It is an `nn.Linear` (PEFT and others look for that class) whose `weight` is None, so code that
would write into a dense weight fails loudly instead of changing a temporary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_vq.formats.base import LayerSpec
from hf_vq.layers.operators import OPERATORS
from hf_vq.layers.packed import Packed


class PackedLinear(Packed, nn.Linear):
    """y = x @ W.T + bias with W stored as `spec` describes.

    A new layer decodes to zeros; `from_packed` or `load_state_dict` give it values. Its parameters
    are those of `spec.layout()` plus `bias`. `compute_dtype` is the dtype of the bias and of
    `dequantize()`, and follows `.to(dtype)`; the forward pass computes in the dtype of its input.
    """

    def __init__(
        self,
        spec: LayerSpec,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's would allocate the dense weight
        self.in_features = spec.in_features
        self.out_features = spec.out_features
        self._create(spec, compute_dtype, device)
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
        if compute_dtype is None and bias is not None:
            compute_dtype = bias.dtype
        layer = cls(spec, bias=bias is not None, compute_dtype=compute_dtype, device="meta")
        layer._adopt(tensors, where)
        if bias is not None:
            if tuple(bias.shape) != (spec.out_features,):
                raise ValueError(
                    f"{where}: bias has shape {tuple(bias.shape)}, expected {(spec.out_features,)}"
                )
            layer.bias = nn.Parameter(bias.detach().to(layer.compute_dtype))
        return layer

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
        return OPERATORS[self.spec.method].linear(input, self._called(), self.spec, self.bias)

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

    def extra_repr(self) -> str:
        """What `print(model)` shows of this layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, method={self.spec.method}, "
            f"bits={self.spec.bits_per_weight:.3f}"
        )
