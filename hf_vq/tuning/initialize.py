"""LoRA that begins with what quantization lost.

A fresh adapter does nothing, and the first steps of training go into making up for the error of the
packed weights. The best low-rank correction is known before: for a layer with inputs of second
moment H = L L^T, ``min ||(W - Q - s B A) L||`` over matrices of rank r is the truncated SVD of
``(W - Q) L``, times L^-1 (QERA, arXiv 2410.06040, section 4.2; LoftQ, arXiv 2310.08659, is the case
L = 1). Blocks are done in order, each on inputs that come from the corrected blocks before it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_vq.engine.blocks import BlockPath, StopForward, capture, find_blocks
from hf_vq.layers import PackedLinear
from hf_vq.methods.statistics import HessianAccumulator
from hf_vq.tuning.base_weights import BaseWeights
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
    of the original are read one at a time.

    Args:
        model: a PeftModel, or a model with an adapter added, over packed layers; LoRA, with or
            without `use_dora` and `use_rslora`.
        dataset: calibration data, as in the configs. None: all inputs count the same.
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
    def set(self, name: str, hessian: Tensor | None) -> None:
        """hessian: float32 (in_features, in_features) of the layer's inputs; None: the identity."""
        layer, packed = self.layers[name], self.layers[name].base_layer
        assert isinstance(packed, PackedLinear)
        adapter = _name(layer, self.adapter)
        device = packed.qweight.device
        quantized = packed.dequantize(torch.float32)
        error = self.weights(name).to(device) - quantized
        lower = None
        if hessian is not None:
            hessian = hessian.to(device)
            mean = float(hessian.diagonal().mean())
            hessian.diagonal().add_(self.damping * mean + 1e-12)
            lower = torch.linalg.cholesky(hessian)
        weighted = error if lower is None else error @ lower
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        u, s, vh = self._svd(weighted, a.shape[0])
        right = s.sqrt()[:, None] * vh
        if lower is not None:
            right = torch.linalg.solve_triangular(lower, right, upper=False, left=False)
        left = u * s.sqrt()
        scaling = float(layer.scaling[adapter])
        a.zero_()
        b.zero_()
        a[: len(s)] = (right * scaling**-0.5).to(a.dtype)
        b[:, : len(s)] = (left * scaling**-0.5).to(b.dtype)
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
    blocks = find_blocks(model)
    device = next(model.parameters()).device
    batches = [window.to(device) for window in windows.split(1)]
    captured = capture(model, list(blocks.values()), batches, type(model).__name__)
    hidden = captured.hidden
    for index, (name, block) in enumerate(blocks.items()):
        inside = {n.removeprefix(f"{name}."): n for n in start.layers if n.startswith(f"{name}.")}
        path = BlockPath(block, index, captured, next(block.parameters()).device)
        if inside:
            linears = {short: start.layers[full] for short, full in inside.items()}
            for group in path.probe(linears, hidden[0]).groups:
                # one after another: the first of a block change what the later ones are given
                sums = _inputs(path, linears[group[0]], hidden)
                hessian = sums.statistics().hessian if sums.tokens else None
                for short in group:
                    start.set(inside[short], None if hessian is None else hessian.clone())
        for batch, states in enumerate(hidden):
            out = path.run(batch, states)
            assert out is not None
            hidden[batch] = out.to(states.device)


def _inputs(path: BlockPath, layer: Any, hidden: list[Tensor]) -> HessianAccumulator:
    sums = HessianAccumulator(layer.base_layer.in_features, path.device)

    def note(_: nn.Module, args: tuple) -> None:
        sums.add(args[0].detach())
        raise StopForward

    handle = layer.register_forward_pre_hook(note)
    try:
        for batch, states in enumerate(hidden):
            path.run(batch, states)
    finally:
        handle.remove()
    return sums
