"""Rows out of a table, by number: the inner step of every default decoder."""

from __future__ import annotations

import torch
from torch import Tensor

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
    picked = table.view(whole_vector).view(n).index_select(0, flat.flatten())
    return picked.view(table.dtype).view(flat.shape[0], -1)
