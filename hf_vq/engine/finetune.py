"""Layer-wise fine-tuning (VPTQ, appendix): a block's codebooks against what it should return.

Quantizing makes every matrix right for itself. Once the codes of a whole decoder block are fixed,
its codebooks, the norms of its packed matrices and the weights of its normalisation layers are
trained together, by Adam on the squared error between what the packed block returns for the inputs
it will really get and what the original one returns for its own, relative per token. Tokens held
out of the training decide which state is kept; if none is better than the one before, that one is.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_vq.engine.blocks import first_output, twin
from hf_vq.formats import FORMATS
from hf_vq.formats.trainable import trained_names
from hf_vq.layers import PackedLinear

logger = logging.getLogger(__name__)

# Tokens per step, where single batches have fewer.
_TOKENS_PER_STEP = 4096
# Share of the batches that are not trained on but decide.
_HELD_OUT = 1 / 8
# Of root mean squares per step.
_LEARNING_RATE = 3e-3
# Times during training that the held-out batches are looked at.
_CHECKS = 4


@dataclass
class Tuned:
    """loss_before, loss: mean squared error on the held-out batches; what to store instead."""

    loss_before: float
    loss: float
    packed: dict[str, dict[str, Tensor]]
    other: dict[str, Tensor]


def tune_block(
    block: nn.Module,
    layers: Mapping[str, PackedLinear],
    calls: Mapping[tuple[int, ...], tuple[tuple, dict]],
    inputs: list[Tensor],
    targets: list[Tensor],
    *,
    steps: int,
    learning_rate: float | None = None,
    seed: int = 0,
) -> Tuned | None:
    """Train what is trainable in a packed block; changes neither `block` nor `layers`.

    block: the dense block, on the device to train on. layers: name in the block -> packed layer.
    calls: as in `BlockPath`. inputs, targets: (batch, seqlen, width) hidden states of the quantized
    model before the block, and of the original one behind it. learning_rate: per step, in root mean
    squares of each tensor; it falls along a cosine. None: nothing to train, or nothing gained.
    """
    device = next(block.parameters()).device
    learning_rate = _LEARNING_RATE if learning_rate is None else learning_rate
    model, packed = _trainable_copy(block, layers, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not packed or len(inputs) < 2:
        return None
    run = _Runner(model, calls, device)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed)).tolist()
    held = max(1, round(len(order) * _HELD_OUT))
    judges, pool = order[:held], order[held:]
    before = best = run.loss(inputs, targets, judges)
    state = None
    optimizer = torch.optim.Adam(
        [{"params": [p], "lr": learning_rate * _size(p)} for p in parameters], betas=(0.9, 0.95)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    per_step = max(1, _TOKENS_PER_STEP // inputs[0].shape[:-1].numel())
    per_step = min(per_step, len(pool))
    generator = torch.Generator().manual_seed(seed + 1)
    queue: list[int] = []
    for step in range(1, steps + 1):
        if len(queue) < per_step:
            queue += [pool[i] for i in torch.randperm(len(pool), generator=generator).tolist()]
        some, queue = queue[:per_step], queue[per_step:]
        optimizer.zero_grad(set_to_none=True)
        for batch in some:
            (run.squared_error(inputs[batch], targets[batch]) / per_step).backward()
        optimizer.step()
        schedule.step()
        if step == steps or step % max(1, steps // _CHECKS) == 0:
            loss = run.loss(inputs, targets, judges)
            if loss < best:
                best, state = loss, [p.detach().clone() for p in parameters]
    if state is None:
        return None
    with torch.no_grad():
        for parameter, value in zip(parameters, state, strict=True):
            parameter.copy_(value)
    return Tuned(before, best, *_stored(model, packed, layers))


def _trainable_copy(
    block: nn.Module, layers: Mapping[str, PackedLinear], device: torch.device
) -> tuple[nn.Module, list[str]]:
    """The block with float32 packed layers and norms that require grad; and the names of those.

    Nothing of it is shared with `block`, whose parameters keep their dtype and their gradients.
    """
    model = twin(block)
    packed = list(layers)
    for name, layer in layers.items():
        tensors, spec = FORMATS[layer.spec.method].widen(layer.packed(), layer.spec)
        tensors = {key: tensor.detach().to(device, copy=True) for key, tensor in tensors.items()}
        bias = None if layer.bias is None else layer.bias.detach().to(device)
        wide = PackedLinear.from_packed(spec, tensors, bias, torch.float32, where=name)
        for key in trained_names(spec):
            wide.packed()[key].requires_grad_(True)
        model.set_submodule(name, wide)
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, PackedLinear) or owner.rpartition(".")[0] in layers:
            continue
        trained = parameter.ndim == 1 and "norm" in type(module).__name__.lower()
        wide_parameter = nn.Parameter(parameter.detach().float().clone(), requires_grad=trained)
        module.register_parameter(leaf, wide_parameter)
    return model, packed


def _size(tensor: Tensor) -> float:
    return float(tensor.detach().square().mean().sqrt().clamp_min(1e-12))


class _Runner:
    """Runs the copy of a block in float32."""

    def __init__(
        self,
        model: nn.Module,
        calls: Mapping[tuple[int, ...], tuple[tuple, dict]],
        device: torch.device,
    ):
        self.model, self.device = model, device
        self.calls = {shape: _wide(call) for shape, call in calls.items()}

    def squared_error(self, hidden: Tensor, target: Tensor) -> Tensor:
        args, kwargs = self.calls[tuple(hidden.shape[:-1])]
        out = first_output(self.model(hidden.to(self.device).float(), *args, **kwargs))
        target = target.to(self.device).float()
        # The next block normalises every token: a few of huge norm must not drown the others
        size = target.square().mean(-1).clamp_min(1e-12)
        return ((out - target).square().mean(-1) / size).mean()

    @torch.no_grad()
    def loss(self, inputs: list[Tensor], targets: list[Tensor], which: list[int]) -> float:
        total = sum(float(self.squared_error(inputs[i], targets[i])) for i in which)
        return total / len(which)


def _wide(value: Any) -> Any:
    """Every floating tensor in nested tuples, lists and dicts as float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: _wide(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_wide(v) for v in value)
    return value


def _stored(
    model: nn.Module, packed: list[str], layers: Mapping[str, PackedLinear]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Trained tensors at the precision they are stored in: of packed layers, and of the others."""
    tensors = {}
    for name in packed:
        trained = model.get_submodule(name)
        assert isinstance(trained, PackedLinear)
        values = {key: tensor.detach().cpu() for key, tensor in trained.packed().items()}
        layer = layers[name]
        before = {key: tensor.detach().cpu() for key, tensor in layer.packed().items()}
        tensors[name] = FORMATS[layer.spec.method].narrow(values, before, layer.spec)
    other = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not any(name.startswith(f"{p}.") for p in packed)
    }
    return tensors, other
