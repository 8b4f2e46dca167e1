"""Quantizing a model block by block, on inputs that come from the blocks already quantized.

For every decoder block: collect the statistics of its linears' inputs, quantize them, run the
block again for the inputs of the next one. With `true_sequential` the linears of a block are done
group by group (q/k/v, then o, then gate/up, then down), each on inputs that its quantized
predecessors produce. With `asymmetric_calibration` the unquantized model walks along, so that every
layer can aim at what the original would have computed (see `Statistics.shift`).

Only one block and its statistics are ever on the calibration device; hidden states wait on the CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from hf_vq.engine.blocks import (
    BlockError,
    BlockPath,
    Captured,
    Layout,
    StopForward,
    capture,
    find_blocks,
    move,
    twin,
)
from hf_vq.engine.ends import final_statistics, find_ends
from hf_vq.engine.finetune import tune_block
from hf_vq.formats import FORMATS
from hf_vq.formats.base import LayerSpec
from hf_vq.layers import PackedEmbedding, PackedLinear
from hf_vq.memory import RESULT, own_pages, release
from hf_vq.methods.feedback import all_finite, bias_correction, correction
from hf_vq.methods.statistics import HessianAccumulator, Statistics
from hf_vq.registry import get_method
from hf_vq.tying import swap

# Values of the widest activation per forward pass: enough to keep a matrix product busy, few enough
# not to outweigh a block. One sequence is the least.
_VALUES_PER_BATCH = 1 << 21
# Tokens per input channel that make the shift half as certain as it looks.
_SHRINKAGE = 8
# Weights in a matrix below which a second CPU thread costs more than it brings.
_WEIGHTS_PER_THREAD = 1 << 18
# Weights in the largest matrix from which its arrays get pages of their own.
_WORTH_PAGES = 1 << 20
# Hidden size up to which the outputs of norms are kept as well: in a narrow model they take a good
# part of the time, in a wide one more memory than the weights.
_NARROW = 512


class NonFiniteError(ValueError):
    """NaN or infinity in a weight or an activation; names the layer (and the sample)."""


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
        worker = _Worker(model, plan, config, reporter)
        largest = max(s.num_weights for s in plan.layers.values())
        worker.wide = largest >= _WORTH_PAGES
        with _enough_threads(largest), own_pages(worker.wide):
            if samples is None:
                for name in plan.layers:
                    worker.quantize([name], None)
                    worker.swap([name])
            else:
                _sequential(model, samples, config, worker)
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


class _Worker:
    """Quantizes single matrices and swaps the packed layers in."""

    def __init__(self, model: nn.Module, plan: Any, config: Any, reporter: Any):
        self.model, self.config, self.reporter = model, config, reporter
        self.specs: dict[str, LayerSpec] = plan.layers
        self.rows: Mapping[str, torch.Tensor] = plan.rows
        self.method = get_method(config.method)
        self.device = calibration_device(config.calibration_device)
        self.wide = False
        self.packed: dict[str, Any] = {}  # linear layers and embeddings
        self.sizes: dict[str, int] = {}

    @torch.no_grad()
    def quantize(self, names: list[str], statistics: Statistics | None) -> None:
        """Quantize matrices that share their input; the results wait in `packed`."""
        shift, pull = None, None
        if statistics is not None:
            shift, statistics.shift = statistics.shift, None
        for name in names:
            if statistics is not None:
                pull = self._pull(name, statistics, shift)
                statistics.last = name == names[-1]
                if statistics.last:
                    shift = None  # as large as the Hessian
                # the only part that belongs to one matrix: a copy would lose the shared factor
                rows = self.rows.get(name)
                statistics.sensitivity = None if rows is None else rows.to(self.device)
            self._quantize(name, statistics, pull)
            release()

    def _pull(
        self, name: str, statistics: Statistics, shift: torch.Tensor | None
    ) -> torch.Tensor | None:
        """W S of one matrix; a ready-made one is taken along."""
        # Little data overfits: the noise of the estimate grows with channels per token
        tokens = statistics.tokens
        trust = tokens / (tokens + _SHRINKAGE * len(statistics.hessian))
        pull, statistics.pull = statistics.pull, None
        if pull is None and shift is not None:
            pull = self._weight(name) @ shift
        return None if pull is None else pull.mul_(trust)

    def _weight(self, name: str) -> torch.Tensor:
        weight = dense_of(self.model, name).weight.detach().to(self.device, torch.float32)
        if not all_finite(weight):
            bad = int((~torch.isfinite(weight)).sum())
            raise NonFiniteError(
                f"{name}: {bad} of {weight.numel()} weights are NaN or infinite, so the checkpoint "
                "is damaged; repair it, or leave the layer dense with modules_to_not_convert"
            )
        return weight

    def _quantize(
        self, name: str, statistics: Statistics | None, pull: torch.Tensor | None
    ) -> None:
        began = time.perf_counter()
        linear, weight = dense_of(self.model, name), self._weight(name)
        notes: list[str] = []
        if statistics is not None and statistics.tokens == 0:
            statistics = None
            notes.append("no calibration token reached it: quantized without data")
        spec = self.specs[name]
        options = self._options(name)
        if statistics is not None and pull is not None:
            weight = correction(pull, statistics.factor(options.damping, spec.descending)).add_(
                weight
            )
        corrected = self.config.for_layer(name).bias_correction
        # handed over: a method that pads its target need not keep this one as well
        aim, weight = [weight], weight if corrected else torch.empty(0)
        result = self.method.quantize(aim.pop(), statistics, spec, options)
        spec = getattr(result, "spec", None) or spec
        with own_pages(self.wide, RESULT):
            tensors = FORMATS[self.config.method].pack(move_codes(result.codes), spec)
        dtype, bias = linear.weight.dtype, getattr(linear, "bias", None)
        if isinstance(linear, nn.Embedding):
            table = PackedEmbedding.from_packed(spec, tensors, linear.padding_idx, dtype, name)
            self._finished(name, table, spec, result, began, notes)
            return
        bias = None if bias is None else bias.detach().cpu()
        packed = PackedLinear.from_packed(spec, tensors, bias, dtype, where=name)
        if corrected:
            if statistics is None or statistics.mean is None:
                notes.append("no calibration data, no bias correction")
            else:
                _correct_bias(packed, weight, statistics.mean)
        added = 0
        if packed.bias is not None and linear.bias is None:
            added = packed.bias.nbytes
        self._finished(name, packed, spec, result, began, notes, added)

    def _finished(
        self,
        name: str,
        packed: PackedLinear | PackedEmbedding,
        spec: LayerSpec,
        result: Any,
        began: float,
        notes: list[str],
        added: int = 0,
    ) -> None:
        self.packed[name] = packed
        self.sizes[name] = spec.nbytes + added
        seconds, notes = time.perf_counter() - began, notes + result.notes
        self.reporter.matrix(name, spec, result.relative_error, seconds, notes, added)

    def _options(self, name: str) -> Any:
        """The method's options for one layer, read off the config with its overrides."""
        kind, layer = self.method.options, self.config.for_layer(name)
        known = {f.name for f in fields(kind) if hasattr(layer, f.name)}
        return kind(**{field: getattr(layer, field) for field in known})

    def swap(self, names: list[str]) -> None:
        """Put the packed layers in the place of the dense ones."""
        for name in names:
            swap(self.model, name, self.packed.pop(name))


def _correct_bias(layer: PackedLinear, target: torch.Tensor, mean: torch.Tensor) -> None:
    """Give `layer` the bias with which its mean output is that of `target` (O, I)."""
    missing = bias_correction(target, layer.dequantize(torch.float32).to(target.device), mean)
    missing = missing.to(layer.qweight.device)
    if layer.bias is not None:
        missing += layer.bias.detach()
    layer.bias = nn.Parameter(missing.to(layer.compute_dtype))


def linear_of(module: nn.Module, name: str) -> nn.Linear:
    """The dense linear layer called `name`."""
    linear = module.get_submodule(name)
    if not isinstance(linear, nn.Linear) or linear.weight is None:
        raise TypeError(f"{name} is a {type(linear).__name__}, not a dense nn.Linear")
    return linear


def dense_of(module: nn.Module, name: str) -> nn.Linear | nn.Embedding:
    """The dense linear layer or embedding called `name`."""
    found = module.get_submodule(name)
    if isinstance(found, nn.Embedding) and found.weight is not None:
        return found
    return linear_of(module, name)


def move_codes(codes: Any) -> Any:
    """A codes dataclass with its tensors on the CPU."""
    moved = {f.name: move(getattr(codes, f.name), torch.device("cpu")) for f in fields(codes)}
    return type(codes)(**moved)


def calibration_device(wanted: Any) -> torch.device:
    """The device asked for, else a GPU if there is one."""
    if wanted is not None:
        return torch.device(wanted)
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()  # type: ignore[return-value]
    return torch.device("cpu")


def _sequential(model: nn.Module, samples: torch.Tensor, config: Any, worker: _Worker) -> None:
    blocks = find_blocks(model)
    if not blocks:
        raise BlockError(f"{type(model).__name__} has no list of decoder blocks to walk through")
    inside = {n: s for n, s in worker.specs.items() if any(n.startswith(f"{b}.") for b in blocks)}
    size = _batch_size(inside or worker.specs, samples.shape[1])
    embeds = next(model.parameters()).device
    batches = [b.to(embeds) for b in samples.split(size)]
    captured = capture(model, list(blocks.values()), batches, type(model).__name__)
    streams = _Streams(captured.hidden, _needs_original(config))
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
        _Block(name, block, index, captured, streams, names, worker, not last).quantize(
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
    worker: _Worker,
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


@dataclass
class _Streams:
    """Hidden states on their way through the model, on the CPU, one tensor per batch.

    quantized: through the blocks as they will be. dense: through the original ones, or None.
    """

    quantized: list[torch.Tensor]
    dense: list[torch.Tensor] | None

    def __init__(self, hidden: list[torch.Tensor], with_dense: bool):
        self.quantized = [h.cpu() for h in hidden]
        self.dense = list(self.quantized) if with_dense else None


class _Block:
    """One block while its linears are quantized. Names inside are relative to the block.

    advance: whether the hidden states at the block's end are wanted.
    """

    def __init__(
        self,
        name: str,
        block: nn.Module,
        index: int,
        captured: Captured,
        streams: _Streams,
        names: dict[str, str],
        worker: _Worker,
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
