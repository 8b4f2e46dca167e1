"""The two ends of a decoder: its token embeddings and its output head.

They are packed before the blocks are, which then make up for part of what the embedding has lost.
The Hessian of a head is that of the final states of the original model; an embedding reads one
token at a time, so all its columns count the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from hf_vq.engine.blocks import BlockPath, Captured, placed
from hf_vq.engine.objective import Objective
from hf_vq.methods.statistics import HessianAccumulator, Statistics
from hf_vq.tying import tied_modules

_TOKENS = 1 << 13
"""Tokens that a head's Hessian is taken over; at least four per column."""


class Ends(NamedTuple):
    """Names among the matrices to be packed; None: not among them. tied: they are one matrix."""

    embedding: str | None
    head: str | None
    tied: bool

    @property
    def measure_head(self) -> bool:
        """Whether a matrix that computes predictions is among them."""
        return self.head is not None or (self.tied and self.embedding is not None)


def find_ends(model: Any, names: Iterable[str]) -> Ends:
    """Which of `names` are the token embeddings and the output head of `model`."""
    places = {id(module): name for name, module in model.named_modules()}

    def name_of(method: str) -> str | None:
        find = getattr(model, method, None)
        module = find() if find is not None else None
        return places.get(id(module)) if module is not None else None

    wanted = set(names)
    embedding, head = name_of("get_input_embeddings"), name_of("get_output_embeddings")
    tied = head is not None and tied_modules(model).get(head) == embedding
    return Ends(embedding if embedding in wanted else None, head if head in wanted else None, tied)


def final_statistics(
    model: Any,
    blocks: list[torch.nn.Module],
    captured: Captured,
    batches: list[torch.Tensor],
    device: torch.device,
) -> Statistics:
    """Statistics of what the output head of the original model reads.

    captured: of `batches`, at the first block. device: where blocks are run.
    """
    home = next(model.parameters()).device
    top = Objective(model, blocks, captured, "hidden", 0)
    hidden = list(captured.hidden)
    width = model.get_output_embeddings().in_features
    count = max(_TOKENS, 4 * width)
    used = 0
    for number, batch in enumerate(batches):
        if used >= count:
            del hidden[number:]
            break
        used += batch.numel()
    for index, block in enumerate(blocks):
        with placed(block, device):
            path = BlockPath(block, index, captured, device)
            for number, states in enumerate(hidden):
                out = path.run(number, states)
                assert out is not None
                hidden[number] = out.to(home)
    sums: HessianAccumulator | None = None
    for batch, states in zip(batches, hidden, strict=False):
        with torch.no_grad():
            final = top.final_states(batch, states)
        sums = sums or HessianAccumulator(final.shape[-1], device)
        sums.add(final.to(device))
    assert sums is not None
    return sums.statistics()
