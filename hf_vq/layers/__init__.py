"""Layers that keep their weight packed."""

from hf_vq.layers.embedding import PackedEmbedding
from hf_vq.layers.linear import PackedLinear
from hf_vq.layers.packed import Packed

__all__ = ["Packed", "PackedEmbedding", "PackedLinear"]
