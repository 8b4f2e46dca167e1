"""Quantizing single matrices of a model, and swapping the packed layers in."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from hf_vq.engine.blocks import move
from hf_vq.formats import FORMATS
from hf_vq.formats.base import LayerSpec
from hf_vq.layers import PackedEmbedding, PackedLinear
from hf_vq.memory import RESULT, own_pages, release
from hf_vq.methods.feedback import all_finite, bias_correction, correction
from hf_vq.methods.statistics import Statistics
from hf_vq.registry import get_method
from hf_vq.tying import swap


class NonFiniteError(ValueError):
    """NaN or infinity in a weight or an activation; names the layer (and the sample)."""


class Worker:
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
        pull, statistics.pull = statistics.pull, None
        if pull is None and shift is not None:
            pull = self._weight(name) @ shift
        return None if pull is None else pull.mul_(statistics.trust())

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
