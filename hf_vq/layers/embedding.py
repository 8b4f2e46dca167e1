"""An embedding that keeps its table packed and decodes only the rows that are looked up."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_vq.formats.base import LayerSpec
from hf_vq.layers.operators import OPERATORS
from hf_vq.layers.packed import Packed


class PackedEmbedding(Packed, nn.Embedding):
    """y = W[ids] with W stored as `spec` describes; out_features are the rows of the table.

    As with `PackedLinear`, `weight` is None, and a new layer decodes to zeros. Rows come in
    `compute_dtype`. There is no gradient to the table.
    """

    # Transformers would draw random numbers for the weight of an embedding that it has not loaded
    _is_hf_initialized = True

    def __init__(
        self,
        spec: LayerSpec,
        padding_idx: int | None = None,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Embedding's would allocate the dense table
        self.num_embeddings, self.embedding_dim = spec.out_features, spec.in_features
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type = None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self._create(spec, compute_dtype, device)

    @classmethod
    def from_packed(
        cls,
        spec: LayerSpec,
        tensors: Mapping[str, Tensor],
        padding_idx: int | None = None,
        compute_dtype: torch.dtype | None = None,
        where: str = "PackedEmbedding",
    ) -> PackedEmbedding:
        """A layer over `tensors` (shared, not copied), which must be those of `spec.layout()`.

        Raises `FormatError`, naming `where`, when they are not or cannot be decoded.
        """
        layer = cls(spec, padding_idx, compute_dtype, device="meta")
        layer._adopt(tensors, where)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """Integers of any shape -> (..., in_features) in `compute_dtype`.

        Raises IndexError for a number beyond the table.
        """
        return OPERATORS[self.spec.method].embedding(
            input, self._called(), self.spec, self.compute_dtype
        )

    def to_embedding(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """The same layer as a dense `nn.Embedding` of `dtype` (default: `compute_dtype`)."""
        weight = self.dequantize(dtype or self.compute_dtype)
        embedding = nn.Embedding(
            self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta"
        )
        embedding.weight = nn.Parameter(weight)
        return embedding.train(self.training)

    def extra_repr(self) -> str:
        """What `print(model)` shows of this layer."""
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, method={self.spec.method}, "
            f"bits={self.spec.bits_per_weight:.3f}"
        )
