"""Packing into the bit stream."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vq.formats.bitstream import pack_bits, packed_words, unpack_bits


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 32), st.integers(0, 4), st.integers(1, 100), st.integers(0, 2**32))
def test_round_trip(bits: int, rows: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2**bits, (rows, n), generator=generator)
    before = values.clone()
    words = pack_bits(values, bits)
    assert words.dtype == torch.int32 and words.shape == (rows, packed_words(n, bits))
    assert torch.equal(values, before)
    assert torch.equal(unpack_bits(words, bits, n), values)
    assert unpack_bits(words, bits, n).dtype == torch.int64


def test_bit_order() -> None:
    # 5 = 101b and 3 = 011b, least significant bit first: 3 bits each, then zeros
    assert pack_bits(torch.tensor([[5, 3]]), 3).tolist() == [[0b011_101]]
    # the 11th 3-bit code starts at bit 30: two bits in the first word, one in the second
    assert pack_bits(torch.tensor([[0] * 10 + [7]]), 3).tolist() == [[-(2**30), 1]]
    assert pack_bits(torch.tensor([[2**32 - 1, 1]]), 32).tolist() == [[-1, 1]]


def test_padding_bits_are_zero() -> None:
    words = pack_bits(torch.full((1, 5), 127), 7)
    assert unpack_bits(words, 1, 64).tolist() == [[1] * 35 + [0] * 29]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype(dtype: torch.dtype) -> None:
    values = torch.arange(16, dtype=dtype).expand(2, 3, 16)
    assert torch.equal(unpack_bits(pack_bits(values, 5), 5, 16), values.long())


def test_meta_layout_equals_real() -> None:
    values = torch.zeros((3, 43), dtype=torch.int64)
    for bits in (1, 3, 8, 13, 32):
        real, meta = pack_bits(values, bits), pack_bits(values.to("meta"), bits)
        assert meta.is_meta and meta.shape == real.shape and meta.dtype == real.dtype
        assert unpack_bits(meta, bits, 43).shape == (3, 43)


@pytest.mark.parametrize("value", [-1, 8])
def test_values_out_of_range_are_refused(value: int) -> None:
    with pytest.raises(ValueError, match=r"into 3 bits \(0\.\.7\)"):
        pack_bits(torch.tensor([[0, value]]), 3)


@pytest.mark.parametrize("bits", [0, 33])
def test_bits_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=r"1\.\.32"):
        pack_bits(torch.zeros((1, 1), dtype=torch.int64), bits)
    with pytest.raises(ValueError, match=r"1\.\.32"):
        unpack_bits(torch.zeros((1, 2), dtype=torch.int32), bits, 1)


def test_too_few_words_are_refused() -> None:
    with pytest.raises(ValueError, match="11 codes of 3 bits"):
        unpack_bits(torch.zeros((1, 1), dtype=torch.int32), 3, 11)
