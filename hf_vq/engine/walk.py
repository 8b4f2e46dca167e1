"""One decoder block while its linears are quantized, group by group.

The hidden states at its beginning wait on the CPU; so do those at its end, which take their place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_vq.engine.blocks import BlockPath, Captured, Layout, StopForward, twin
from hf_vq.engine.finetune import tune_block
from hf_vq.engine.worker import NonFiniteError, Worker, linear_of
from hf_vq.layers import PackedLinear
from hf_vq.memory import release
from hf_vq.methods.statistics import HessianAccumulator, Statistics

# Hidden size up to which the outputs of norms are kept as well: in a narrow model they take a good
# part of the time, in a wide one more memory than the weights.
_NARROW = 512


@dataclass
class Streams:
    """Hidden states on their way through the model, on the CPU, one tensor per batch.

    quantized: through the blocks as they will be. dense: through the original ones, or None.
    """

    quantized: list[torch.Tensor]
    dense: list[torch.Tensor] | None

    def __init__(self, hidden: list[torch.Tensor], with_dense: bool):
        self.quantized = [h.cpu() for h in hidden]
        self.dense = list(self.quantized) if with_dense else None


class BlockWalk:
    """One block while its linears are quantized. Names inside are relative to the block.

    advance: whether the hidden states at the block's end are wanted.
    """

    def __init__(
        self,
        name: str,
        block: nn.Module,
        index: int,
        captured: Captured,
        streams: Streams,
        names: dict[str, str],
        worker: Worker,
        advance: bool,
    ):
        self.name, self.block, self.streams = name, block, streams
        self.names, self.worker = names, worker
        config = worker.config
        self.independent = config.calibration_inputs == "original"
        self.asymmetric = config.asymmetric_calibration and not self.independent
        self.advance = advance
        self.tuned = config.finetune_steps > 0 and bool(names)
        self.path = BlockPath(block, index, captured, worker.device)
        self.dense_path = None
        if streams.dense is not None:
            self.dense_path = BlockPath(twin(block), index, captured, worker.device)
        self.linears = {n: linear_of(block, n) for n in names}
        self.done: dict[str, PackedLinear] = {}

    def quantize(self, true_sequential: bool) -> None:
        with ExitStack() as stack:
            paths = [p for p in (self.path, self.dense_path) if p is not None]
            for path in paths:
                stack.enter_context(path)
            if self.linears:
                layout = self.path.probe(self.linears, self.streams.quantized[0])
                stages = [[g] for g in layout.groups] if true_sequential else [layout.groups]
                kept = set(layout.replayable)
                if self.streams.quantized[0].shape[-1] <= _NARROW:
                    kept |= layout.small
                for path in paths:
                    path.replay(kept)
                self.path.recording = layout.settled(())
                if self.dense_path is not None:
                    self.dense_path.recording = layout.small.copy()
                for number, stage in enumerate(stages):
                    self._stage(stage, layout, stages[number + 1 :])
            inputs = list(self.streams.quantized) if self.tuned else []
            dense = self.streams.dense
            moved = self.asymmetric and bool(self.linears)  # by the last stage
            if self.dense_path is not None and dense is not None and self._dense_advances():
                _run_through(self.dense_path, dense, () if moved else range(len(dense)))
            if (self.advance and not self.tuned) or (self.tuned and self.independent):
                self._advance(self._running())
        if self.tuned:
            self._tune(inputs)
            if self.advance and not self.independent:
                self._advance(list(self.done))

    def _stage(self, stage: list[list[str]], layout: Layout, later: list[list[list[str]]]) -> None:
        """Statistics of these groups' inputs, then their quantization."""
        finished = (_children([stage]) - _children(later)) & layout.replayable
        inputs: list[torch.Tensor] = []
        tail = self._tail(stage, layout, finished)
        statistics = self._collect(stage, finished, inputs if tail else None, last=not later)
        release()
        for group in stage:
            self.worker.quantize([self.names[n] for n in group], statistics.pop(group[0]))
            for name in group:
                self.done[name] = self.worker.packed[self.names[name]]
        self.path.recording = layout.settled(self.done)
        if tail is not None:
            child, last, nones = tail
            with self._decoded([last]), torch.no_grad():
                for batch in range(len(inputs)):
                    x, inputs[batch] = inputs[batch], torch.empty(0)
                    out = self.linears[last](x.to(self.worker.device))
                    self.path.keep(child, batch, out if nones is None else (out, *[None] * nones))

    @contextmanager
    def _decoded(self, names: Iterable[str]) -> Iterator[None]:
        """Give the linears that are done their quantized weights, for as long as they run.

        Decoding once for all batches is faster than in every forward pass, and not keeping the
        weights saves the memory of a block.
        """
        with ExitStack() as stack:
            for name in () if self.independent else names:
                linear = self.linears[name]
                weight = self.done[name].dequantize(linear.weight.dtype).to(self.worker.device)
                stack.callback(setattr, linear, "weight", linear.weight)
                linear.weight = nn.Parameter(weight, requires_grad=False)
                bias = self.done[name].bias
                if bias is not None:  # with bias correction, another one
                    stack.callback(setattr, linear, "bias", linear.bias)
                    value = bias.detach().to(self.worker.device)
                    linear.bias = nn.Parameter(value, requires_grad=False)
            yield

    def _running(self) -> list[str]:
        """The linears that are done and that a run of the block will not skip."""
        batches = len(self.streams.quantized)
        return [n for n in self.done if not self.path.skips(_child(n), batches)]

    def _tail(
        self, stage: list[list[str]], layout: Layout, finished: set[str]
    ) -> tuple[str, str, int | None] | None:
        """A child whose output can be had without running it again, and the linear it ends with.

        There is one where the stage is just that linear: its input, which the statistics need
        anyway, is kept (unless it is much wider than the hidden states).
        """
        width = self.streams.quantized[0].shape[-1]
        for child in finished & layout.tails.keys():
            last, nones = layout.tails[child]
            if stage == [[last]] and self.linears[last].in_features <= 2 * width:
                return child, last, nones
        return None

    def _collect(
        self,
        stage: list[list[str]],
        finished: set[str],
        inputs: list[torch.Tensor] | None,
        last: bool,
    ) -> dict[str, Statistics]:
        """Statistics of the input of every group, under the name of its first linear.

        last: nothing will be collected after this, so the original can run to the block's end, and
        its states there take the place of those at the beginning.
        """
        sums = {group[0]: self._accumulator(group) for group in stage}
        with self._decoded(self._running()):
            for batch in range(len(self.streams.quantized)):
                aims = self._dense_inputs(batch, list(sums), finished, last)
                self._collect_batch(batch, sums, aims, inputs)
        return {n: s.statistics() for n, s in sums.items()}

    def _accumulator(self, group: list[str]) -> HessianAccumulator:
        linear, device = self.linears[group[0]], self.worker.device
        alone = len(group) == 1 and 2 * linear.out_features <= linear.in_features
        weight = linear.weight.detach().to(device) if alone else None
        return HessianAccumulator(linear.in_features, device, self.asymmetric, weight)

    def _dense_advances(self) -> bool:
        """Whether the original's states at the block's end will be needed."""
        return self.dense_path is not None and (self.advance or self.tuned)

    def _dense_inputs(
        self, batch: int, leaders: list[str], finished: set[str], last: bool
    ) -> dict[str, torch.Tensor]:
        """What these linears read in the original model."""
        aims: dict[str, torch.Tensor] = {}
        path, states = self.dense_path, self.streams.dense
        if path is None or states is None or not self.asymmetric:
            return aims
        if last and self._dense_advances():
            with _listening(path.block, leaders, aims, stop=False):
                _run_through(path, states, [batch])
            return aims
        # The original block will not change: let a child that is done after this stage finish, and
        # keep what it returns.
        if not last:
            path.recording |= finished
        alone = len(finished) == 1 and len(leaders) == 1 and not last
        path.stop_after = next(iter(finished)) if alone else None
        with _listening(path.block, leaders, aims, stop=not alone):
            path.run(batch, states[batch])
        return aims

    def _collect_batch(
        self,
        batch: int,
        sums: dict[str, HessianAccumulator],
        aims: dict[str, torch.Tensor],
        inputs: list[torch.Tensor] | None,
    ) -> None:
        seen: dict[str, torch.Tensor] = {}
        with _listening(self.block, list(sums), seen, stop=True):
            self.path.run(batch, self.streams.quantized[batch])
        tokens = self.streams.quantized[batch].shape[:-1].numel()
        for name, x in seen.items():
            # an expert's tokens may be others in the original, even if they are as many
            whole = x.shape[:-1].numel() == tokens
            sums[name].add(x, aims.pop(name, None) if whole else None)
            self._check(name, sums[name], x, batch)
            if inputs is not None:
                inputs.append(x.cpu())

    def _advance(self, running: list[str]) -> None:
        """Hidden states at the block's end, in the place of those at its beginning."""
        with self._decoded(running):
            _run_through(self.path, self.streams.quantized, range(len(self.streams.quantized)))

    def _tune(self, inputs: list[torch.Tensor]) -> None:
        """Train the block's codebooks and norms; the streams' dense states are at its end."""
        config, began = self.worker.config, time.perf_counter()
        targets = self.streams.quantized if self.independent else self.streams.dense
        assert targets is not None
        tuned = tune_block(
            self.block,
            self.done,
            self.path.calls,
            inputs,
            targets,
            steps=config.finetune_steps,
            learning_rate=config.finetune_lr,
            seed=config.seed,
        )
        seconds = time.perf_counter() - began
        if tuned is None:
            self.worker.reporter.tuned(self.name, 1.0, seconds)
            return
        for name, tensors in tuned.packed.items():
            old, full = self.done[name], self.names[name]
            new = PackedLinear.from_packed(
                old.spec, tensors, old.bias, old.compute_dtype, where=full
            )
            self.done[name] = self.worker.packed[full] = new
        with torch.no_grad():
            for name, value in tuned.other.items():
                self.block.get_parameter(name).copy_(value)
        self.worker.reporter.tuned(self.name, tuned.loss / tuned.loss_before, seconds)

    def _check(self, name: str, sums: HessianAccumulator, x: torch.Tensor, batch: int) -> None:
        if bool(torch.isfinite(sums.total.diagonal().sum())):
            return
        first = len(self.streams.quantized[0])
        rows = (~torch.isfinite(x.reshape(len(x), -1))).any(1).nonzero().flatten().tolist()
        sample = batch * first + (rows[0] if rows else 0)
        raise NonFiniteError(
            f"{self.names[name]}: its input is NaN or infinite for calibration sample {sample}; "
            "load the model in float32 or bfloat16 (float16 overflows), or leave the sample out"
        )


def _run_through(path: BlockPath, hidden: list[torch.Tensor], batches: Iterable[int]) -> None:
    """Take these batches to the block's end. Nothing will be run on them again."""
    path.stop_after = None
    path.recording = set()
    for batch in batches:
        out = path.run(batch, hidden[batch])
        assert out is not None
        hidden[batch] = out.cpu()
        path.forget(batch)


def _child(linear: str) -> str:
    return linear.split(".")[0]


def _children(stages: Any) -> set[str]:
    """Direct children of the block that hold any of these (nested lists of) linears."""
    if isinstance(stages, str):
        return {_child(stages)}
    return {child for part in stages for child in _children(part)}


@contextmanager
def _listening(
    block: nn.Module, names: list[str], found: dict[str, torch.Tensor], stop: bool
) -> Iterator[None]:
    """Note the inputs of these linears; after the last one, leave the forward pass."""

    def hook_for(name: str) -> Callable:
        def hook(_: nn.Module, args: tuple) -> None:
            found[name] = args[0].detach()
            if stop and len(found) == len(names):
                raise StopForward

        return hook

    handles = [block.get_submodule(n).register_forward_pre_hook(hook_for(n)) for n in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
