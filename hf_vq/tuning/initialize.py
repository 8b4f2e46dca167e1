"""LoRA that begins with what quantization lost.

A fresh adapter does nothing, and the first steps of training go into making up for the error of the
packed weights. The best low-rank correction is known before. A layer is given x in the original and
x' in the packed model, with what has been corrected of it so far; with H = E x' x'^T = R R^T and
C = E x x'^T, ``min E ||W x - (Q + s B A) x'||^2`` over matrices of rank r is the truncated SVD of
``(W C H^-1 - Q) R``, times R^-1. QERA (arXiv 2410.06040, section 4.2) is the case x = x', and LoftQ
(arXiv 2310.08659) that of R = 1 as well. Both take ``W - Q`` for the error, and it is not: the
quantizers here aim at ``W C H^-1`` themselves (`hf_vq.methods.feedback.correction`), so a part of
it makes up for earlier layers, and to correct that does harm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_vq.engine.blocks import BlockPath, StopForward, capture, find_blocks
from hf_vq.layers import PackedLinear
from hf_vq.methods.feedback import correction
from hf_vq.methods.statistics import HessianAccumulator, Statistics
from hf_vq.tuning.base_weights import BaseWeights
from hf_vq.tuning.originals import original_block, original_embeddings
from hf_vq.tuning.peft import adapter_layers
from hf_vq.tuning.teacher import tuning_windows

# Smaller sides up to which the whole SVD is computed; beyond, a randomized one.
_FULL_SVD = 1024
_OVERSAMPLING, _POWER_ITERATIONS = 16, 4


def init_adapter_from_quantization_error(
    model: nn.Module,
    dataset: Any = None,
    *,
    base_model: Any = None,
    adapter_name: str | None = None,
    tokenizer: Any = None,
    nsamples: int = 64,
    seqlen: int | None = None,
    damping: float = 0.01,
    seed: int = 0,
) -> dict[str, float]:
    """Start a LoRA adapter at the best low-rank correction of its packed layers, in place.

    The packed weights stay as they are, so the adapter is saved and loaded like any other. Weights
    of the original are read one block at a time.

    Args:
        model: a PeftModel, or a model with an adapter added, over packed layers; LoRA, with or
            without `use_dora` and `use_rslora`.
        dataset: calibration data, as in the configs. None: all inputs count the same, and are taken
            for those of the original, so the error corrected is W - Q.
        base_model: the original: a model, a folder or an id. None: the one the config names.
        adapter_name: which adapter. None: the active one.
        tokenizer: for texts. None: the model's own.
        nsamples, seqlen: calibration windows and their tokens (None: the context, at most 2048).
        damping: share of H's mean diagonal that is added to its diagonal.
        seed: of the choice of windows, and of the randomized SVD of large matrices.

    Returns:
        Layer -> share of its squared output error that is left, 0 to 1.

    Raises:
        ValueError: no LoRA over packed layers, or no original weights.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    layers = {
        name: layer
        for name, layer, _ in adapter_layers(base)
        if hasattr(layer, "lora_A") and _name(layer, adapter_name) in layer.lora_A
    }
    if not layers:
        raise ValueError(
            "there is no LoRA adapter"
            + (f" called {adapter_name!r}" if adapter_name else "")
            + " over packed layers; call get_peft_model(model, LoraConfig(...)) first, and this "
            "before merging"
        )
    weights = BaseWeights(base_model, base)
    start = _Start(layers, weights, adapter_name, damping, seed)
    modes = [(module, module.training) for module in base.modules()]
    base.eval()
    try:
        if dataset is not None:
            windows = tuning_windows(base, dataset, tokenizer, nsamples, seqlen, seed)
            _walk(base, windows, start)
        for name in layers:  # without data, or outside of the blocks
            if name not in start.left:
                start.set(name, None)
    finally:
        for module, training in modes:
            module.training = training
    return start.left


def _name(layer: Any, wanted: str | None) -> str:
    return wanted or next(iter(layer.active_adapters), "default")


class _Start:
    """Sets single adapters. left: see `init_adapter_from_quantization_error`."""

    def __init__(
        self,
        layers: dict[str, Any],
        weights: BaseWeights,
        adapter_name: str | None,
        damping: float,
        seed: int,
    ):
        self.layers, self.weights, self.adapter = layers, weights, adapter_name
        self.damping, self.seed = damping, seed
        self.left: dict[str, float] = {}

    @torch.no_grad()
    def set(self, name: str, statistics: Statistics | None) -> None:
        """statistics: of the layer's inputs; None: all count the same, and are the original's."""
        layer, packed = self.layers[name], self.layers[name].base_layer
        assert isinstance(packed, PackedLinear)
        adapter = _name(layer, self.adapter)
        device = packed.qweight.device
        quantized = packed.dequantize(torch.float32)
        weight = self.weights(name).to(device)
        upper = None
        if statistics is not None:
            factor = statistics.factor(self.damping)
            upper = factor.upper
            if statistics.shift is not None:
                pull = (weight @ statistics.shift).mul_(statistics.trust())
                weight = weight + correction(pull, factor)  # the first may be the original's own
        error = weight - quantized
        weighted = error if upper is None else error @ upper
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        u, s, vh = self._svd(weighted, a.shape[0])
        right = s.sqrt()[:, None] * vh
        if upper is not None:
            right = torch.linalg.solve_triangular(upper, right, upper=True, left=False)
        left = u * s.sqrt()
        scaling = float(layer.scaling[adapter])
        # Both factors of a direction as large per entry: one learning rate has to suit them all
        ratio = left.square().mean(0) / right.square().mean(1)
        balance = torch.where(s > 0, ratio, 1.0).pow(0.25)
        a.zero_()
        b.zero_()
        a[: len(s)] = (right * (balance * scaling**-0.5)[:, None]).to(a.dtype)
        b[:, : len(s)] = (left / (balance * scaling**0.5)).to(b.dtype)
        total = float(weighted.double().square().sum())
        self.left[name] = 1 - float(s.double().square().sum()) / total if total else 0.0
        if adapter in getattr(layer, "lora_magnitude_vector", {}):  # DoRA: rows keep their length
            moved = quantized + scaling * (b.float() @ a.float())
            magnitude = layer.lora_magnitude_vector[adapter].weight
            magnitude.copy_(moved.norm(dim=1).to(magnitude.dtype).view(magnitude.shape))

    def _svd(self, matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """(out, k), (k,), (k, in) with k = rank, or the smaller side if that is less."""
        rank = min(rank, *matrix.shape)
        if min(matrix.shape) <= _FULL_SVD:
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            return u[:, :rank], s[:rank], vh[:rank]
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            size = min(rank + _OVERSAMPLING, *matrix.shape)
            u, s, v = torch.svd_lowrank(matrix, q=size, niter=_POWER_ITERATIONS)
        return u[:, :rank], s[:rank], v.T[:rank]


@torch.no_grad()
def _walk(model: nn.Module, windows: Tensor, start: _Start) -> None:
    """Both models, block by block: the packed one with what has been corrected of it so far."""
    blocks = find_blocks(model)
    device = next(model.parameters()).device
    batches = [window.to(device) for window in windows.split(1)]
    captured = capture(model, list(blocks.values()), batches, type(model).__name__)
    hidden = dense = captured.hidden
    with original_embeddings(model, start.weights) as other:
        if other:
            dense = capture(model, list(blocks.values()), batches, type(model).__name__).hidden
    hidden, dense = [[states.cpu() for states in stream] for stream in (hidden, dense)]
    captured.hidden = []
    corrected = [n for n in blocks if any(layer.startswith(f"{n}.") for layer in start.layers)]
    for index, (name, block) in enumerate(blocks.items()):
        if corrected and name == corrected[-1]:
            corrected = []  # behind it nothing is wanted
        original = original_block(name, block, start.weights)
        home = next(block.parameters()).device
        with (
            BlockPath(block, index, captured, home) as path,
            BlockPath(original, index, captured, home) as dense_path,
        ):
            _correct(name, path, dense_path, hidden, dense, start)
            if not corrected:
                return
            for one, stream in ((path, hidden), (dense_path, dense)):
                for batch, states in enumerate(stream):
                    out = one.run(batch, states)
                    assert out is not None
                    stream[batch] = out.cpu()
                    one.forget(batch)


def _correct(
    name: str,
    path: BlockPath,
    dense_path: BlockPath,
    hidden: list[Tensor],
    dense: list[Tensor],
    start: _Start,
) -> None:
    """Set the adapters of one block, those first that change what the later ones are given."""
    inside = {n.removeprefix(f"{name}."): n for n in start.layers if n.startswith(f"{name}.")}
    if not inside:
        return
    linears = {short: start.layers[full] for short, full in inside.items()}
    layout = path.probe(linears, hidden[0])
    kept = layout.replayable | layout.small
    # accelerate's hooks are in the place of a module's forward, where a replay would be
    kept = {child for child in kept if "forward" not in path.block.get_submodule(child).__dict__}
    for one in (path, dense_path):
        one.replay(kept)
    path.recording = layout.settled(()) & kept
    dense_path.recording = kept
    done: list[str] = []
    for group in layout.groups:
        statistics = _statistics(path, dense_path, group[0], linears[group[0]], hidden, dense)
        for short in group:
            start.set(inside[short], statistics)
        done += group
        path.recording = layout.settled(done) & kept


def _statistics(
    path: BlockPath,
    dense_path: BlockPath,
    leader: str,
    layer: Any,
    hidden: list[Tensor],
    dense: list[Tensor],
) -> Statistics | None:
    """Of a linear's inputs in both models; None if no token reaches it."""
    sums = HessianAccumulator(layer.in_features, path.device, with_shift=True)
    for batch, states in enumerate(hidden):
        here = _input(path, leader, batch, states)
        there = _input(dense_path, leader, batch, dense[batch])
        if here is not None:
            # an expert's tokens may be others in the original, even if they are as many
            whole = here.shape[:-1].numel() == states.shape[:-1].numel()
            sums.add(here, there if whole else None)
    return sums.statistics() if sums.tokens else None


def _input(path: BlockPath, name: str, batch: int, states: Tensor) -> Tensor | None:
    found: list[Tensor] = []

    def note(_: nn.Module, args: tuple) -> None:
        found.append(args[0].detach())
        raise StopForward

    handle = path.block.get_submodule(name).register_forward_pre_hook(note)
    try:
        path.run(batch, states)
    finally:
        handle.remove()
    return found[0] if found else None
