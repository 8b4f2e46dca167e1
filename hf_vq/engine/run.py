"""Quantizing a model block by block, on inputs that come from the blocks already quantized.

For every decoder block: collect the statistics of its linears' inputs, quantize them, run the
block again for the inputs of the next one. With `true_sequential` the linears of a block are done
group by group (q/k/v, then o, then gate/up, then down), each on inputs that its quantized
predecessors produce. With `asymmetric_calibration` the unquantized model walks along, so that every
layer can aim at what the original would have computed (see `Statistics.shift`).

Only one block and its statistics are ever on the calibration device; hidden states wait on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hf_vq.engine.blocks import BlockError, Captured, capture, find_blocks
from hf_vq.engine.ends import final_statistics, find_ends
from hf_vq.engine.precision import products_in_float32
from hf_vq.engine.walk import BlockWalk, Streams
from hf_vq.engine.worker import Worker
from hf_vq.formats.base import LayerSpec
from hf_vq.memory import own_pages, release

# Values of the widest activation per forward pass: enough to keep a matrix product busy, few enough
# not to outweigh a block. One sequence is the least.
_VALUES_PER_BATCH = 1 << 21
# Weights in a matrix below which a second CPU thread costs more than it brings.
_WEIGHTS_PER_THREAD = 1 << 18
# Weights in the largest matrix from which its arrays get pages of their own.
_WORTH_PAGES = 1 << 20


def quantize_model(
    model: nn.Module, plan: Any, samples: torch.Tensor | None, config: Any, reporter: Any
) -> dict[str, int]:
    """Replace every planned `nn.Linear` of `model` by a `PackedLinear`, in place.

    Returns the bytes that each takes, with a bias that it had not before.

    samples: int64 (n, seqlen) token windows, or None to quantize without data. Raises
    `NonFiniteError`, and `BlockError` for a model whose blocks cannot be run one by one.
    """
    reporter.start(len(plan.layers), sum(s.num_weights for s in plan.layers.values()))
    try:
        worker = Worker(model, plan, config, reporter)
        largest = max(s.num_weights for s in plan.layers.values())
        worker.wide = largest >= _WORTH_PAGES
        products = products_in_float32(next(model.parameters()).dtype)
        with _enough_threads(largest), own_pages(worker.wide), products:
            if samples is None:
                for name in plan.layers:
                    worker.quantize([name], None)
                    worker.swap([name])
            else:
                walk_model(model, samples, config, worker)
        return worker.sizes
    finally:
        reporter.finish()


@contextmanager
def _enough_threads(weights: int) -> Iterator[None]:
    """No more CPU threads than the largest matrix keeps busy.

    Threads that wait for each other at every small step of a small model make it slower, on a busy
    machine ten times slower.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, max(1, weights // _WEIGHTS_PER_THREAD)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def walk_model(model: nn.Module, samples: torch.Tensor, config: Any, worker: Worker) -> None:
    blocks = find_blocks(model)
    if not blocks:
        raise BlockError(f"{type(model).__name__} has no list of decoder blocks to walk through")
    inside = {n: s for n, s in worker.specs.items() if any(n.startswith(f"{b}.") for b in blocks)}
    size = _batch_size(inside or worker.specs, samples.shape[1])
    embeds = next(model.parameters()).device
    batches = [b.to(embeds) for b in samples.split(size)]
    captured = capture(model, list(blocks.values()), batches, type(model).__name__)
    streams = Streams(captured.hidden, _needs_original(config))
    if len(inside) < len(worker.specs):
        _quantize_ends(model, list(blocks.values()), captured, batches, worker)
        if config.calibration_inputs != "original":
            again = capture(model, list(blocks.values()), batches, type(model).__name__)
            streams.quantized = [h.cpu() for h in again.hidden]
    captured.hidden = []
    for index, (name, block) in enumerate(blocks.items()):
        names = {n.removeprefix(f"{name}."): n for n in worker.specs if n.startswith(f"{name}.")}
        home = next(block.parameters()).device
        block.to(worker.device)
        last = index == len(blocks) - 1
        BlockWalk(name, block, index, captured, streams, names, worker, not last).quantize(
            config.true_sequential
        )
        worker.swap(list(names.values()))
        block.to(home)
        release()


def _quantize_ends(
    model: nn.Module,
    blocks: list[nn.Module],
    captured: Captured,
    batches: list[torch.Tensor],
    worker: Worker,
) -> None:
    """Quantize embeddings and the output head, on what they read in the original model."""
    ends = find_ends(model, worker.specs)
    statistics = None
    if ends.measure_head:
        statistics = final_statistics(model, blocks, captured, batches, worker.device)
    for name in filter(None, (ends.head, ends.embedding)):
        reads_states = name == ends.head or ends.tied
        worker.quantize([name], statistics if reads_states else None)
        worker.swap([name])


def _needs_original(config: Any) -> bool:
    """Whether the unquantized model walks along beside the quantized one."""
    if config.calibration_inputs == "original":
        return False  # it is the only one there is
    return config.asymmetric_calibration or config.finetune_steps > 0


def _batch_size(specs: dict[str, LayerSpec], seqlen: int) -> int:
    """Sequences per forward pass."""
    widest = max(max(spec.in_features, spec.out_features) for spec in specs.values())
    return max(1, _VALUES_PER_BATCH // (widest * seqlen))
