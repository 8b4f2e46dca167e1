"""A decoder of Llama's shape with random weights, one token at a time, for benchmarks/gpu.py.

Plain torch: a static key-value cache, grouped attention over all of it, every linear layer given
as a function. What it computes means nothing; it moves the bytes that decoding moves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor], Tensor]

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCABULARY = (
    4096, 14336, 32, 8, 128, 32, 128256,
)  # fmt: skip
# (rows, columns) of the linear layers of a block: q, k, v, o, gate, up, down
SHAPES = (
    (HEADS * HEAD_DIM, HIDDEN), (KV_HEADS * HEAD_DIM, HIDDEN), (KV_HEADS * HEAD_DIM, HIDDEN),
    (HIDDEN, HEADS * HEAD_DIM), (INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN),
    (HIDDEN, INTERMEDIATE),
)  # fmt: skip


class Decoder:
    """`make(rows, columns)` gives the linear layers of the blocks; the output head is dense."""

    def __init__(self, make: Callable[[int, int], Linear], context: int, device: str) -> None:
        self.blocks = [[make(*shape) for shape in SHAPES] for _ in range(LAYERS)]
        self.embedding = torch.randn(VOCABULARY, HIDDEN, dtype=torch.bfloat16, device=device)
        self.head = torch.randn(VOCABULARY, HIDDEN, dtype=torch.bfloat16, device=device)
        self.norm = torch.ones(HIDDEN, dtype=torch.bfloat16, device=device)
        shape = (LAYERS, 2, 1, KV_HEADS, context, HEAD_DIM)
        self.cache = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        self.position = torch.full((1,), context - 1, device=device)
        self.token = torch.zeros(1, dtype=torch.int64, device=device)

    def step(self) -> None:
        """Decode one token: `token` becomes the most likely next one, at the last position."""
        x = self.embedding[self.token]
        for cache, (q, k, v, o, gate, up, down) in zip(self.cache, self.blocks, strict=True):
            h = F.rms_norm(x, (HIDDEN,), self.norm)
            for stored, made in zip(cache, (k(h), v(h)), strict=True):
                stored.index_copy_(2, self.position, made.view(1, KV_HEADS, 1, HEAD_DIM))
            query = q(h).view(1, HEADS, 1, HEAD_DIM)
            mixed = F.scaled_dot_product_attention(query, cache[0], cache[1], enable_gqa=True)
            x = x + o(mixed.reshape(1, -1))
            h = F.rms_norm(x, (HIDDEN,), self.norm)
            x = x + down(F.silu(gate(h)) * up(h))
        logits = F.rms_norm(x, (HIDDEN,), self.norm) @ self.head.T
        self.token.copy_(logits.argmax(-1))
