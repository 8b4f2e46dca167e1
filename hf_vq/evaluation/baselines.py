"""Scalar baselines to compare with: round-to-nearest, GPTQ and AWQ, through the same walk.

A uniform grid of 2**bits values per row and group of columns is a codebook of scalars, so GPTQ is
`hf_vq.methods.feedback.sweep` with such codebooks, and round-to-nearest the same without feedback.
Like the released code, GPTQ takes a group's range from the weights that error feedback has left.
The results stay dense: these exist to be measured, not to be saved.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hf_vq.engine.run import walk_model
from hf_vq.engine.worker import Worker, linear_of
from hf_vq.methods.feedback import correction, sweep
from hf_vq.methods.lookup import Lookup
from hf_vq.methods.statistics import Statistics

GROUP = 64
"""Columns that share a scale and a zero."""

_GRID = 20
"""Exponents that AWQ tries, 0 to 0.95, as its released code does."""
_CLIPS = 10
"""Clipping ratios that AWQ tries, 1 to 0.55."""


def uniform_grid(weight: Tensor, bits: int, clip: float = 1.0) -> Tensor:
    """The 2**bits values (r, 2**bits, 1) that rows of `weight` (r, group) may take.

    Asymmetric: (q - zero) * scale with an fp16 scale and an integer zero per row, spanning `clip`
    times the row's range, and 0.
    """
    low, high = clip * weight.amin(1).clamp_max(0), clip * weight.amax(1).clamp_min(0)
    top = 2**bits - 1
    scale = ((high - low) / top).half().float()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = (-low / scale).round().clamp(0, top)
    return ((torch.arange(top + 1) - zero[:, None]) * scale[:, None])[..., None]


def quantize_scalar(aim: Tensor, upper: Tensor | None, bits: int, group: int = GROUP) -> Tensor:
    """GPTQ (arXiv 2210.17323) of a weight (r, c), given its `Factor.upper`; None: RTN.

    The number of columns must be a multiple of `group`.
    """
    rows, columns = aim.shape
    state = Lookup(
        codebooks=torch.zeros(columns // group, rows, 2**bits, 1),
        index=torch.zeros(rows, columns, dtype=torch.int32),
        scale=None,
        vectors_per_stripe=group,
        row_mask=torch.ones(rows, 1),
    )

    def begin_panel(start: int, stop: int, compensated: Tensor) -> None:
        state.codebooks[start // group] = uniform_grid(compensated, bits)

    sweep(aim, torch.eye(columns) if upper is None else upper, state, begin_panel, width=group)
    return state.decode()


def quantize_awq(weight: Tensor, hessian: Tensor, bits: int, group: int = GROUP) -> Tensor:
    """AWQ (arXiv 2306.00978) of a weight (r, c), given the Hessian (c, c) of its inputs.

    Columns are scaled by a power of their inputs' magnitude before rounding to nearest, with the
    exponent that leaves the smallest output error (equations 4 and 5); then every row of a group is
    clipped where that helps. The magnitude is the root mean square, the error is that on all
    calibration tokens. The scales, which the released code folds into the layer before, count
    16 bits each in `quantize_baseline`.
    """
    magnitude = hessian.diagonal().clamp_min(1e-12).sqrt()
    best, chosen = torch.inf, weight
    for step in range(_GRID):
        scale = magnitude ** (step / _GRID)
        scale = scale / (scale.max() * scale.min()).sqrt()
        decoded = _clipped(weight * scale, hessian, scale, bits, group, clips=1) / scale
        error = float((((weight - decoded) @ hessian) * (weight - decoded)).sum())
        if error < best:
            best, chosen = error, scale
    if chosen is weight:  # an all-zero matrix
        return weight
    return _clipped(weight * chosen, hessian, chosen, bits, group, clips=_CLIPS) / chosen


def _clipped(
    weight: Tensor, hessian: Tensor, scale: Tensor, bits: int, group: int, clips: int
) -> Tensor:
    """Round to nearest, each row of a group with the best clipping ratio for the group alone."""
    out = torch.empty_like(weight)
    for start in range(0, weight.shape[1], group):
        part = slice(start, start + group)
        aim, s = weight[:, part], scale[part]
        inner = hessian[part, part] / (s[:, None] * s[None, :])
        best = torch.full((len(aim),), torch.inf)
        for step in range(clips):
            grid = uniform_grid(aim, bits, 1 - 0.05 * step)[..., 0]
            nearest = (aim[..., None] - grid[:, None]).abs().argmin(-1)
            decoded = grid.gather(1, nearest)
            error = (((aim - decoded) @ inner) * (aim - decoded)).sum(1)
            better = error < best
            best = torch.where(better, error, best)
            out[:, part] = torch.where(better[:, None], decoded, out[:, part])
    return out


def bits_per_weight(bits: int, group: int = GROUP) -> float:
    """All-in: the codes, and an fp16 scale and an integer zero per group."""
    return bits + (16 + bits) / group


BASELINES = ("rtn", "gptq", "awq")


def quantize_baseline(
    model: nn.Module,
    method: str,
    bits: int,
    samples: Tensor | None = None,
    *,
    group: int = GROUP,
    config: Any = None,
) -> float:
    """Round the linear layers of the decoder blocks, in place; returns all-in bits per weight.

    method: one of `BASELINES`. samples: int64 (n, seqlen) calibration tokens, for all but "rtn".
    config: settings of the walk (true_sequential, asymmetric_calibration, damping,
    modules_to_not_convert); None: as the methods' papers have it, without asymmetric calibration.
    Layers whose inputs are no multiple of `group` take the largest group that divides them.
    """
    from hf_vq.configs import GPTVQConfig
    from hf_vq.plan import make_plan

    if method not in BASELINES:
        raise ValueError(f"{method!r} is no baseline; there are {', '.join(BASELINES)}")
    if samples is None and method != "rtn":
        raise ValueError(f"{method} needs calibration data")
    config = config or GPTVQConfig(asymmetric_calibration=False)
    layers = make_plan(model, config).layers
    plan = SimpleNamespace(layers=layers, rows={})
    worker = _ScalarWorker(model, plan, config, _FITS[method], bits, group)
    if method == "rtn" or samples is None:
        for name in layers:
            worker.quantize([name], None)
            worker.swap([name])
    else:
        walk_model(model, samples, config, worker)
    return worker.stored / sum(spec.num_weights for spec in layers.values())


def _fit_gptq(aim: Tensor, statistics: Any, upper: Tensor | None, bits: int, group: int) -> Tensor:
    return quantize_scalar(aim, upper, bits, group)


def _fit_awq(aim: Tensor, statistics: Any, upper: Tensor | None, bits: int, group: int) -> Tensor:
    return quantize_awq(aim, statistics.hessian, bits, group)


_FITS: dict[str, Callable[..., Tensor]] = {"rtn": _fit_gptq, "gptq": _fit_gptq, "awq": _fit_awq}


class _Dense(nn.Linear):
    """A quantized matrix kept dense, with what the engine asks of a packed layer."""

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)


class _ScalarWorker(Worker):
    """The engine's worker, with a scalar quantizer and dense results. stored: bits in all."""

    def __init__(
        self, model: nn.Module, plan: Any, config: Any, fit: Callable, bits: int, group: int
    ):
        super().__init__(model, plan, config, None)
        self.fit, self.bits, self.group, self.stored = fit, bits, group, 0.0

    def _quantize(
        self, name: str, statistics: Statistics | None, pull: torch.Tensor | None
    ) -> None:
        linear, aim = linear_of(self.model, name), self._weight(name)
        rows, columns = aim.shape
        group = next(g for g in range(min(self.group, columns), 0, -1) if columns % g == 0)
        hessian = None if statistics is None else statistics.hessian.clone()
        factor = None if statistics is None else statistics.factor(self.config.damping)
        if factor is not None and pull is not None:
            aim = aim + correction(pull, factor)
        upper = None if factor is None else factor.upper
        layer = _Dense(columns, rows, bias=linear.bias is not None)
        given = SimpleNamespace(hessian=hessian)
        decoded = self.fit(aim.cpu(), given, upper, self.bits, group)
        layer.weight = nn.Parameter(decoded, requires_grad=False)
        layer.bias = linear.bias
        self.packed[name] = layer
        self.stored += rows * columns * bits_per_weight(self.bits, group)
        if self.fit is _fit_awq:
            self.stored += 16 * columns  # its scales
