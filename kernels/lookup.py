"""Rows out of a table, by number: the inner step of every default decoder."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# Vectors decoded at once; 2**25 where a device is not named. A CPU's slice should fit its cache.
VECTORS_AT_ONCE = {"cpu": 2**17}

# An integer (or complex) type as wide as one vector: a look-up then moves one element per vector.
_WIDE = {
    1: torch.int8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
    16: torch.complex128,
}


def vectors_at_once(device: torch.device) -> int:
    """How many vectors a decoder on `device` should hold besides its result."""
    return VECTORS_AT_ONCE.get(device.type, 2**25)


def look_up(table: Tensor, flat: Tensor) -> Tensor:
    """Rows `flat` (r, v) of the contiguous `table` (n, d), side by side: (r, v*d)."""
    n, d = table.shape
    whole_vector = _WIDE.get(d * table.element_size())
    if whole_vector is None:
        return table.index_select(0, flat.flatten()).view(flat.shape[0], -1)
    picked = (
        _aligned(table, d * table.element_size())
        .view(whole_vector)
        .view(n)
        .index_select(0, flat.flatten())
    )
    return picked.view(table.dtype).view(flat.shape[0], -1)


def _aligned(table: Tensor, size: int) -> Tensor:
    """`table`, or a copy of it, from an address that elements of `size` bytes may have.

    A tensor that lies in a mapped file starts where it happened to be written, and the CPU's
    copies of 16 bytes fault on an address that is no multiple of 16.
    """
    if torch.compiler.is_compiling() or isinstance(table, FakeTensor):
        return table  # without data, for shape inference
    offset = table.storage_offset() * table.element_size()  # `view` looks at this one
    return table.clone() if table.data_ptr() % size or offset % size else table
