"""A decoder of Llama's shape with random weights, one token at a time, for benchmarks/gpu.py.

Plain torch: a static key-value cache, grouped attention over all of it, every linear layer given
as a function. What it computes means nothing; it moves the bytes that decoding moves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """A decoder of Llama's kind."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocabulary: int

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of the linear layers of a block: q, k, v, o, gate, up, down."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (
            (queries, self.hidden), (keys, self.hidden), (keys, self.hidden),
            (self.hidden, queries), (self.intermediate, self.hidden),
            (self.intermediate, self.hidden), (self.hidden, self.intermediate),
        )  # fmt: skip


LLAMA_8B = Size(4096, 14336, 32, 8, 128, 32, 128256)
TINY = Size(32, 64, 2, 1, 16, 1, 40)  # for a dry run


class Decoder:
    """`make(rows, columns)` gives the linear layers of the blocks; the output head is dense."""

    def __init__(
        self, make: Callable[[int, int], Linear], context: int, device: str, size: Size = LLAMA_8B
    ) -> None:
        self.size = size
        self.blocks = [[make(*shape) for shape in size.shapes] for _ in range(size.layers)]
        table = (size.vocabulary, size.hidden)
        self.embedding = torch.randn(table, dtype=torch.bfloat16, device=device)
        self.head = torch.randn(table, dtype=torch.bfloat16, device=device)
        self.norm = torch.ones(size.hidden, dtype=torch.bfloat16, device=device)
        shape = (size.layers, 2, 1, size.kv_heads, context, size.head_dim)
        self.cache = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        self.position = torch.full((1,), context - 1, device=device)
        self.token = torch.zeros(1, dtype=torch.int64, device=device)

    def step(self) -> None:
        """Decode one token: `token` becomes the most likely next one, at the last position."""
        size = self.size
        width = (size.hidden,)
        x = self.embedding[self.token]
        for cache, (q, k, v, o, gate, up, down) in zip(self.cache, self.blocks, strict=True):
            h = F.rms_norm(x, width, self.norm)
            for stored, made in zip(cache, (k(h), v(h)), strict=True):
                stored.index_copy_(2, self.position, made.view(1, size.kv_heads, 1, size.head_dim))
            query = q(h).view(1, size.heads, 1, size.head_dim)
            mixed = F.scaled_dot_product_attention(query, cache[0], cache[1], enable_gqa=True)
            x = x + o(mixed.reshape(1, -1))
            h = F.rms_norm(x, width, self.norm)
            x = x + down(F.silu(gate(h)) * up(h))
        logits = F.rms_norm(x, width, self.norm) @ self.head.T
        self.token.copy_(logits.argmax(-1))
