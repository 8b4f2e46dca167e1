"""Tuning a packed model block by block, against what the original's blocks put out.

Cheaper than end to end: one block and its hidden states are held, and no logits. Every block is
trained on the inputs that the tuned blocks before it produce (`hf_vq.engine.finetune`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_vq.engine.blocks import BlockPath, capture, find_blocks
from hf_vq.engine.finetune import tune_block
from hf_vq.layers import PackedLinear
from hf_vq.tuning.teacher import load_teacher, tuning_windows

_TOKENS_PER_BATCH = 2048


def tune_blocks(
    model: nn.Module,
    teacher: Any = None,
    dataset: Any = None,
    *,
    steps: int = 96,
    nsamples: int = 128,
    seqlen: int | None = None,
    learning_rate: float | None = None,
    tokenizer: Any = None,
    seed: int = 0,
) -> dict[str, float]:
    """Train the codebooks, scales and norms of a packed model's blocks, in place; codes stay.

    Args:
        model: a packed causal language model, without adapters.
        teacher: the original: a model, a folder or an id. None: the one the config names.
        dataset, tokenizer, nsamples, seqlen, seed: as for `hf_vq.tune`.
        steps: of Adam, per block.
        learning_rate: in root mean squares of each tensor per step. None: 3e-3.

    Returns:
        Block -> its error on held-out windows, as a share of what it was; 1 where nothing was
        gained, and nothing changed.

    Raises:
        ValueError: no dataset, or a teacher of another architecture.
        BlockError: the blocks cannot be run one by one.
    """
    windows = tuning_windows(model, dataset, tokenizer, nsamples, seqlen, seed)
    dense = load_teacher(teacher, model)
    blocks, originals = find_blocks(model), list(find_blocks(dense).values())
    if len(blocks) != len(originals):
        raise ValueError(
            f"the teacher has {len(originals)} blocks and the model {len(blocks)}: pass the very "
            "model that it was quantized from"
        )
    states = [_States(m, windows) for m in (model, dense)]
    ratios = {}
    for index, (name, block) in enumerate(blocks.items()):
        layers = {n: m for n, m in block.named_modules() if isinstance(m, PackedLinear)}
        inputs = list(states[0].hidden)
        states[1].advance(index, originals[index])
        calls = states[0].path(index, block).calls
        tuned = tune_block(
            block, layers, calls, inputs, states[1].hidden,
            steps=steps, learning_rate=learning_rate, seed=seed,
        )  # fmt: skip
        ratios[name] = 1.0 if tuned is None else tuned.loss / tuned.loss_before
        if tuned is not None:
            for short, tensors in tuned.packed.items():
                _store(layers[short], tensors)
            with torch.no_grad():
                for short, value in tuned.other.items():
                    block.get_parameter(short).copy_(value)
        states[0].advance(index, block)
    return ratios


@torch.no_grad()
def _store(layer: PackedLinear, tensors: dict[str, torch.Tensor]) -> None:
    for key, tensor in layer.packed().items():
        tensor.copy_(tensors[key])


class _States:
    """Hidden states of one model on their way through its blocks."""

    def __init__(self, model: nn.Module, windows: torch.Tensor):
        device = next(model.parameters()).device
        # an eighth of the batches decides, so there should be eight
        size = max(1, min(len(windows) // 8, _TOKENS_PER_BATCH // windows.shape[1]))
        batches = [batch.to(device) for batch in windows.split(size)]
        blocks = list(find_blocks(model).values())
        self.captured = capture(model, blocks, batches, type(model).__name__)
        self.hidden, self.captured.hidden = self.captured.hidden, []

    def path(self, index: int, block: nn.Module) -> BlockPath:
        return BlockPath(block, index, self.captured, next(block.parameters()).device)

    def advance(self, index: int, block: nn.Module) -> None:
        path = self.path(index, block)
        for batch, states in enumerate(self.hidden):
            out = path.run(batch, states)
            assert out is not None
            self.hidden[batch] = out.to(states.device)
