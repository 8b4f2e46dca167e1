"""Modules that compute with packed weights."""

from hf_vq.layers.linear import PackedLinear

__all__ = ["PackedLinear"]
