"""Reading the bit stream: fixed-width codes, least significant bit first, in 32-bit words.

Bit s of a row's stream is bit (s mod 32) of its word (s div 32); code c is bits
c*bits .. c*bits + bits - 1 of the stream. Words are int32 tensors that hold uint32 bit patterns.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unpack_bits(words: Tensor, bits: int, n: int) -> Tensor:
    """The first `n` codes of every row: int32 (..., ceil(n*bits/32)) -> int32 (..., n).

    `bits` is 1..32. Codes are non-negative but for bits = 32, where the top bit is the int32 sign.
    Shapes depend on `bits` and `n` only, so it can be traced, and it runs on any device.
    """
    device = words.device
    if 32 % bits == 0:  # no code crosses a word: one shift and one mask
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=device)
        codes = words.unsqueeze(-1) >> shifts
        if bits < 32:
            codes &= (1 << bits) - 1
        return codes.flatten(-2)[..., :n]
    first_bit = torch.arange(n, device=device) * bits
    low_word = first_bit // 32
    offset = (first_bit % 32).to(torch.int32)
    in_low = (32 - offset).clamp(max=bits)  # bits of this code found in its first word
    low_mask = (1 << in_low) - 1
    high_mask = (1 << (bits - in_low)) - 1  # 0 where the code ends within its first word
    high_word = (low_word + 1).clamp(max=max(words.shape[-1] - 1, 0))
    # `>>` on int32 copies the sign down; the mask drops those copies.
    codes = words.index_select(-1, low_word) >> offset
    codes &= low_mask
    high = words.index_select(-1, high_word)
    high &= high_mask
    high <<= in_low
    codes |= high
    return codes
