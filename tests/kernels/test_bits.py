"""The reader of the bit stream, against Python's integers."""

from __future__ import annotations

import torch
from hf_vq_kernels import unpack_bits
from hypothesis import given, settings
from hypothesis import strategies as st


def stream(values: list[int], bits: int) -> list[int]:
    """One row's words by the definition: the row is one long integer."""
    number = sum(value << (c * bits) for c, value in enumerate(values))
    words = []
    for _ in range(-(-len(values) * bits // 32)):
        words.append(number & 0xFFFFFFFF)
        number >>= 32
    return [w - 2**32 if w >= 2**31 else w for w in words]


@settings(deadline=None)
@given(st.data(), st.integers(1, 32), st.integers(1, 3), st.integers(1, 70))
def test_matches_python_integers(data: st.DataObject, bits: int, rows: int, n: int) -> None:
    row = st.lists(st.integers(0, 2**bits - 1), min_size=n, max_size=n)
    values = [data.draw(row) for _ in range(rows)]
    words = torch.tensor([stream(v, bits) for v in values], dtype=torch.int32)
    codes = unpack_bits(words, bits, n)
    assert codes.dtype == torch.int32
    assert (codes.long() & (2**bits - 1)).tolist() == values


def test_leading_dimensions_and_meta() -> None:
    words = torch.tensor(
        [[stream([5, 6, 7] * 5, 3)], [stream([1, 2, 3] * 5, 3)]], dtype=torch.int32
    )
    assert unpack_bits(words, 3, 15).tolist() == [[[5, 6, 7] * 5], [[1, 2, 3] * 5]]
    assert unpack_bits(words.to("meta"), 3, 15).shape == (2, 1, 15)
    assert unpack_bits(words, 3, 2).tolist() == [[[5, 6]], [[1, 2]]]
