"""Scalar baselines: round-to-nearest and GPTQ, through the same statistics, walk and sweep.

A uniform grid of 2**bits values per row and group of columns is a codebook of scalars, so GPTQ is
`hf_vq.methods.feedback.sweep` with such codebooks, and round-to-nearest the same without feedback.
Like the released code, GPTQ takes a group's range from the weights that error feedback has left.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from hf_vq.engine.run import _sequential, _Worker, linear_of
from hf_vq.methods.feedback import correction, sweep
from hf_vq.methods.lookup import Lookup
from hf_vq.methods.statistics import Statistics


def uniform_grid(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The 2**bits values (r, 2**bits, 1) that rows of `weight` (r, group) may take.

    Asymmetric: (q - zero) * scale with an fp16 scale and an integer zero per row, spanning the
    row's range and 0.
    """
    low, high = weight.amin(1).clamp_max(0), weight.amax(1).clamp_min(0)
    top = 2**bits - 1
    scale = ((high - low) / top).half().float()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = (-low / scale).round().clamp(0, top)
    return ((torch.arange(top + 1) - zero[:, None]) * scale[:, None])[..., None]


def quantize_scalar(
    aim: torch.Tensor, upper: torch.Tensor | None, bits: int, group: int = 64
) -> torch.Tensor:
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

    def begin_panel(start: int, stop: int, compensated: torch.Tensor) -> None:
        state.codebooks[start // group] = uniform_grid(compensated, bits)

    sweep(aim, torch.eye(columns) if upper is None else upper, state, begin_panel, width=group)
    return state.decode()


def bits_per_weight(bits: int, group: int = 64) -> float:
    """All-in: the codes, and an fp16 scale and an integer zero per group."""
    return bits + (16 + bits) / group


class _Dense(nn.Linear):
    """A quantized matrix kept dense, with what the engine asks of a packed layer."""

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return self.weight.to(dtype)


class _ScalarWorker(_Worker):
    """The engine's worker, with a scalar quantizer and dense results."""

    def __init__(self, *args: object, bits: int, group: int):
        super().__init__(*args)  # type: ignore[arg-type]
        self.scalar = partial(quantize_scalar, bits=bits, group=group)

    def _quantize(
        self, name: str, statistics: Statistics | None, pull: torch.Tensor | None
    ) -> None:
        linear, aim = linear_of(self.model, name), self._weight(name)
        factor = None if statistics is None else statistics.factor(self.config.damping)
        if factor is not None and pull is not None:
            aim = aim + correction(pull, factor)
        layer = _Dense(linear.in_features, linear.out_features, bias=linear.bias is not None)
        decoded = self.scalar(aim, None if factor is None else factor.upper)
        layer.weight = nn.Parameter(decoded, requires_grad=False)
        layer.bias = linear.bias
        self.packed[name] = layer  # type: ignore[assignment]


def quantize_model_scalar(
    model: nn.Module,
    layers: dict,
    samples: torch.Tensor | None,
    config: object,
    bits: int,
    group: int = 64,
) -> None:
    """Replace the weights of these layers, in place. samples None: round-to-nearest.

    `config` gives the walk's settings (true_sequential, asymmetric_calibration, damping).
    """
    worker = _ScalarWorker(model, layers, config, None, bits=bits, group=group)
    if samples is not None:
        _sequential(model, samples, config, worker)
        return
    for name in layers:
        worker.quantize([name], None)
        worker.swap([name])
