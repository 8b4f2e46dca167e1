"""How much an error in each matrix moves the model's final hidden states.

To first order, errors in the outputs of the linear layers add up in the final hidden states z; with
random signs e the gradient of ``e . z`` has an expected square of the squared column norms of the
Jacobian, so one backward pass measures them all (Hutchinson; CVXQ section 2 with random signs).
An error of variance v in every weight of a matrix, placed by error feedback, becomes
``v sum_j R_jj^2`` in each of its outputs (H = R R^T, `hf_vq.methods.feedback`), and
``v sum_j R_jj^2 sum_o mean (d e.z / d y_o)^2`` in z. `measure` returns that for v = mean W^2, and
the terms of the last sum, by which a method may tell the rows of a matrix apart.

The backward pass goes block by block: what is held is the input of every block, for the few
thousand tokens this needs, and the graph and Hessians of one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_vq.engine.blocks import (
    BlockPath,
    Captured,
    capture,
    find_blocks,
    first_output,
    replaced,
)
from hf_vq.methods.feedback import factorize
from hf_vq.methods.statistics import HessianAccumulator

# Enough for the figures of matrices to change by a few percent only with other tokens.
_TOKENS = 1 << 13
_DAMPING = 0.01


class SensitivityError(ValueError):
    """The gradients are no basis for anything: they vanish or are not finite."""


@dataclass(frozen=True)
class Sensitivities:
    """What errors cost in the final states, by the name of the linear layer.

    gains: what the whole energy of the weights would, as an error; a spec whose expected error is
    r, relative to that energy, costs r times as much. rows: float32 (out_features,) on the CPU,
    what a unit of squared error in an output costs. Layers that no token reaches have gain 0 and
    no rows.
    """

    gains: dict[str, float]
    rows: dict[str, torch.Tensor]


def measure(
    model: nn.Module,
    names: list[str],
    samples: torch.Tensor,
    device: torch.device,
    seed: int = 0,
) -> Sensitivities:
    """Sensitivities of the linear layers called `names`, from one backward pass.

    model: a Transformers decoder whose base model returns `last_hidden_state`. samples: int64
    (n, seqlen) tokens, of which the first few thousand are used. device: where blocks are run.
    Raises `SensitivityError`, and `BlockError` for a model whose blocks cannot be run one by one.
    """
    blocks = find_blocks(model)
    home = next(model.parameters()).device
    batches = [b.to(home) for b in samples[: max(1, _TOKENS // samples.shape[1])].split(1)]
    captured = capture(model, list(blocks.values()), batches, type(model).__name__)
    inputs = [captured.hidden]
    for index, block in enumerate(blocks.values()):
        with _on(block, device):
            path = BlockPath(block, index, captured, device)
            outputs = []
            for batch, hidden in enumerate(inputs[-1]):
                out = path.run(batch, hidden)
                assert out is not None
                outputs.append(out.to(home))
            inputs.append(outputs)
    generator = torch.Generator().manual_seed(seed)
    pairs = zip(batches, inputs.pop(), strict=True)
    gradients = [
        _from_the_top(model, list(blocks.values()), captured, batch, hidden, generator)
        for batch, hidden in pairs
    ]
    found = Sensitivities(dict.fromkeys(names, 0.0), {})
    for index, (name, block) in reversed(list(enumerate(blocks.items()))):
        inside = {n.removeprefix(f"{name}."): n for n in names if n.startswith(f"{name}.")}
        with _on(block, device), _frozen(block):
            path = BlockPath(block, index, captured, device)
            linears = {n: block.get_submodule(n) for n in inside}
            sums = _BlockSums(path, linears, inputs[index][0])
            for batch, hidden in enumerate(inputs.pop()):
                gradients[batch] = sums.step(hidden, gradients[batch]).to(home)
            found.gains.update({inside[n]: value for n, value in sums.values().items()})
            found.rows.update({inside[n]: rows for n, rows in sums.rows().items()})
    _check(found.gains)
    return found


def _from_the_top(
    model: nn.Module,
    blocks: list[nn.Module],
    captured: Captured,
    batch: torch.Tensor,
    hidden: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Gradient of the randomly signed sum of the final states by the last block's output."""
    leaf = hidden.detach().requires_grad_(True)

    def stub(index: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            states = args[0] if args else kwargs["hidden_states"]
            states = leaf if index == len(blocks) - 1 else states
            return (states,) if captured.tuples else states

        return forward

    base = getattr(model, "base_model", model)
    with torch.enable_grad(), replaced(blocks, stub), _frozen(model):
        states = first_output(base(input_ids=batch, use_cache=False).to_tuple())
        signs = torch.randint(0, 2, states.shape, generator=generator) * 2 - 1
        # divided by the size of the sum: half floats must not overflow on the way back
        total = (states * (signs.to(states) * states.shape[1] ** -0.5)).sum()
        return torch.autograd.grad(total, leaf)[0]


class _BlockSums:
    """Second moments of the inputs, and squared gradients of the outputs, of a block's linears."""

    def __init__(self, path: BlockPath, linears: dict[str, Any], hidden: torch.Tensor):
        self.path, self.linears = path, linears
        self.groups = path.probe(linears, hidden).groups if linears else []
        self.hessians = {
            g[0]: HessianAccumulator(linears[g[0]].in_features, path.device) for g in self.groups
        }
        self.energy: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, int] = {}

    def step(self, hidden: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Gradient by the block's input (batch, seqlen, width), given that by its output."""
        outputs: dict[str, torch.Tensor] = {}

        def note(name: str) -> Any:
            def hook(_: nn.Module, args: tuple, out: torch.Tensor) -> None:
                if name in self.hessians:
                    self.hessians[name].add(args[0].detach())
                outputs[name] = out

            return hook

        handles = [m.register_forward_hook(note(n)) for n, m in self.linears.items()]
        try:
            with torch.enable_grad():
                start = hidden.to(self.path.device).detach().requires_grad_(True)
                args, kwargs = self.path.calls[tuple(hidden.shape[:-1])]
                end = first_output(self.path.block(start, *args, **kwargs))
                found = torch.autograd.grad(
                    end,
                    [start, *outputs.values()],
                    gradient.to(self.path.device),
                    allow_unused=True,
                )
        finally:
            for handle in handles:
                handle.remove()
        for name, by_output in zip(outputs, found[1:], strict=True):
            if by_output is not None:
                rows = by_output.detach().flatten(0, -2)
                energy = rows.float().square().sum(0)
                self.energy[name] = energy + self.energy.get(name, 0)
                self.tokens[name] = self.tokens.get(name, 0) + len(rows)
        return torch.zeros_like(start) if found[0] is None else found[0]

    def values(self) -> dict[str, float]:
        out = {}
        for group in self.groups:
            statistics = self.hessians.pop(group[0]).statistics()
            if not statistics.tokens:
                continue
            upper = factorize(statistics.hessian, _DAMPING, in_place=True).upper
            reached = float(upper.diagonal().double().square().sum())
            for name in group:
                if name in self.energy:
                    weight = float(self.linears[name].weight.float().square().mean())
                    energy = float(self.energy[name].sum(dtype=torch.float64))
                    out[name] = weight * reached * energy / statistics.tokens
        return out

    def rows(self) -> dict[str, torch.Tensor]:
        return {n: (e / max(self.tokens[n], 1)).cpu() for n, e in self.energy.items()}


def _check(found: dict[str, float]) -> None:
    bad = [n for n, value in found.items() if not value < float("inf")]
    if bad or not any(found.values()):
        what = f"of {bad[0]} are not finite" if bad else "vanish in all layers"
        raise SensitivityError(
            f"the gradients {what}, so bits cannot be put where they matter; load the model in "
            'float32 or bfloat16, or use allocation="uniform"'
        )


@contextmanager
def _on(block: nn.Module, device: torch.device) -> Iterator[None]:
    home = next(block.parameters()).device
    block.to(device)
    try:
        yield
    finally:
        block.to(home)


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No gradients for parameters: they would take as much memory as the module."""
    trained = [p for p in module.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
