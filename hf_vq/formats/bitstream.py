"""The one bit stream of every format: fixed-width codes, least significant bit first.

Stream bit s of a row is bit (s mod 32) of the row's word (s div 32); code c occupies stream bits
c*bits .. c*bits + bits - 1. Rows are padded with zero bits to whole 32-bit words. Words are stored
as int32 tensors holding uint32 bit patterns, and 16-bit numbers as int16 tensors alike.
"""

from __future__ import annotations

import math

import hf_vq_kernels.bits
import torch
from torch import Tensor


def packed_words(n: int, bits: int) -> int:
    """32-bit words that hold `n` codes of `bits` bits."""
    return math.ceil(n * bits / 32)


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Integers (..., n) in 0 .. 2**bits - 1 -> int32 words (..., ceil(n*bits/32)). bits: 1..32.

    Raises ValueError for a value that does not fit (not on the meta device).
    """
    _check_bits(bits)
    *rows, n = values.shape
    values = values.to(torch.int64)
    if not values.is_meta and bool(((values < 0) | (values >> bits != 0)).any()):
        raise ValueError(
            f"cannot pack values {int(values.min())}..{int(values.max())} into {bits} bits "
            f"(0..{2**bits - 1})"
        )
    # The pattern of codes against word borders repeats: work on whole periods, a column at a time.
    period_bits = math.lcm(bits, 32)
    codes_per_period, words_per_period = period_bits // bits, period_bits // 32
    periods = math.ceil(n / codes_per_period)
    padded = torch.nn.functional.pad(values, (0, periods * codes_per_period - n))
    padded = padded.view(*rows, periods, codes_per_period)
    words = torch.zeros((*rows, periods, words_per_period), dtype=torch.int64, device=values.device)
    for code in range(codes_per_period):
        word, offset = divmod(code * bits, 32)
        words[..., word] |= (padded[..., code] << offset) & 0xFFFFFFFF
        if offset + bits > 32:
            words[..., word + 1] |= padded[..., code] >> (32 - offset)
    words = words.flatten(-2)[..., : packed_words(n, bits)]
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_bits(words: Tensor, bits: int, n: int) -> Tensor:
    """The first `n` codes of every row: int32 (..., words) -> int64 (..., n), all >= 0."""
    _check_bits(bits)
    if words.dtype != torch.int32 or words.shape[-1] < packed_words(n, bits):
        raise ValueError(
            f"{n} codes of {bits} bits need int32 words of shape (..., {packed_words(n, bits)}), "
            f"got {words.dtype} {tuple(words.shape)}"
        )
    return hf_vq_kernels.bits.unpack_bits(words, bits, n).to(torch.int64) & (2**bits - 1)


def to_16_bits(values: Tensor) -> Tensor:
    """Integers 0..65535 as the int16 of the same 16 bits."""
    values = values.to(torch.int64)
    return torch.where(values >= 2**15, values - 2**16, values).to(torch.int16).contiguous()


def from_16_bits(stored: Tensor) -> Tensor:
    """The int64 integers 0..65535 that 16-bit elements of any dtype stand for."""
    return stored.view(torch.int16).to(torch.int64) & 0xFFFF


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 32:
        raise ValueError(f"bits must be 1..32, got {bits}")
