"""How much an error in each matrix costs, by what `hf_vq.engine.objective` calls a cost.

To first order, errors in the outputs of the linear layers add up, so one backward pass with random
numbers at its top measures them all. An error of variance v in every weight of a matrix, placed by
error feedback, becomes ``v sum_j R_jj^2`` in each of its outputs (H = R R^T,
`hf_vq.methods.feedback`), and costs ``v sum_j R_jj^2 sum_o mean (d s / d y_o)^2``, with s what the
pass starts from. `measure` returns that for v = mean W^2, and the terms of the last sum, by which
a method may tell the rows of a matrix apart. A token embedding is the same with inputs of one 1.

The backward pass goes block by block: what is held is the input of every block, for the few
thousand tokens this needs, and the graph and Hessians of one block.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    placed,
    replaced,
)
from hf_vq.engine.ends import find_ends
from hf_vq.engine.objective import Objective, frozen
from hf_vq.engine.precision import products_in_float32
from hf_vq.methods.feedback import factorize
from hf_vq.methods.statistics import HessianAccumulator

# Enough for the figures of matrices to change by a few percent only with other tokens.
_TOKENS = 1 << 13
_DAMPING = 0.01


class SensitivityError(ValueError):
    """The gradients are no basis for anything: they vanish or are not finite."""


@dataclass(frozen=True)
class Sensitivities:
    """What errors cost, by the name of the layer.

    gains: what the whole energy of the weights would, as an error; a spec whose expected error is
    r, relative to that energy, costs r times as much. rows: float32 (out_features,) on the CPU,
    what a unit of squared error in an output costs. Layers that no token reaches have gain 0 and
    no rows; embeddings and the output head have no rows either.
    """

    gains: dict[str, float]
    rows: dict[str, torch.Tensor]


def measure(
    model: nn.Module,
    names: list[str],
    samples: torch.Tensor,
    device: torch.device,
    seed: int = 0,
    objective: str = "loss",
    by_weight: bool = False,
    energies: Mapping[str, float] | None = None,
) -> Sensitivities:
    """Sensitivities of the linear layers (and embeddings) called `names`, from one backward pass.

    model: a Transformers decoder whose base model returns `last_hidden_state`. samples: int64
    (n, seqlen) tokens, of which the first few thousand are used. device: where blocks are run.
    objective: "loss", "hidden" or "pca", see `hf_vq.engine.objective`. by_weight: `rows` hold what
    a unit of squared error costs weight by weight, float32 (out_features, in_features): the G^2 of
    CVXQ section 3. energies: mean squares of the original weights, for a model already packed.
    Raises `SensitivityError`, and `BlockError` for a model whose blocks cannot be run one by one.
    """
    with products_in_float32(next(model.parameters()).dtype):
        return _measure(model, names, samples, device, seed, objective, by_weight, energies)


def _measure(
    model: nn.Module,
    names: list[str],
    samples: torch.Tensor,
    device: torch.device,
    seed: int,
    objective: str,
    by_weight: bool,
    energies: Mapping[str, float] | None,
) -> Sensitivities:
    blocks = find_blocks(model)
    home = next(model.parameters()).device
    batches = [b.to(home) for b in samples[: max(1, _TOKENS // samples.shape[1])].split(1)]
    captured = capture(model, list(blocks.values()), batches, type(model).__name__)
    inputs = [captured.hidden]
    for index, block in enumerate(blocks.values()):
        with placed(block, device):
            path = BlockPath(block, index, captured, device)
            outputs = []
            for batch, hidden in enumerate(inputs[-1]):
                out = path.run(batch, hidden)
                assert out is not None
                outputs.append(out.to(home))
            inputs.append(outputs)

    def mean_square(name: str) -> float:
        if energies is not None:
            return energies[name]
        return float(model.get_parameter(f"{name}.weight").detach().float().square().mean())

    ends = find_ends(model, names)
    top = Objective(model, list(blocks.values()), captured, objective, seed, ends.measure_head)
    last = inputs.pop()
    top.prepare(batches, last)
    gradients = [top.gradient(batch, h).to(home) for batch, h in zip(batches, last, strict=True)]
    found = Sensitivities(dict.fromkeys(names, 0.0), {})
    for index, (name, block) in reversed(list(enumerate(blocks.items()))):
        inside = {n.removeprefix(f"{name}."): n for n in names if n.startswith(f"{name}.")}
        with placed(block, device), frozen(block):
            path = BlockPath(block, index, captured, device)
            linears = {n: block.get_submodule(n) for n in inside}
            sums = _BlockSums(path, linears, inputs[index][0], by_weight)
            for batch, hidden in enumerate(inputs.pop()):
                gradients[batch] = sums.step(hidden, gradients[batch]).to(home)
            for n, value in sums.values().items():
                found.gains[inside[n]] = value * mean_square(inside[n])
            found.rows.update({inside[n]: rows for n, rows in sums.rows().items()})
    if ends.embedding is not None:
        energy = _embedding_energy(model, list(blocks.values()), captured, batches, gradients)
        found.gains[ends.embedding] += energy * mean_square(ends.embedding)
    computes = ends.head or (ends.embedding if ends.tied else None)
    if computes is not None and top.inputs is not None:
        upper = factorize(top.inputs.statistics().hessian, _DAMPING, in_place=True).upper
        reached = float(upper.diagonal().double().square().sum())
        found.gains[computes] += top.head_gain(reached, mean_square(computes))
    _check(found.gains)
    return found


def _embedding_energy(
    model: Any,
    blocks: list[nn.Module],
    captured: Captured,
    batches: list[torch.Tensor],
    gradients: list[torch.Tensor],
) -> float:
    """Mean over tokens of the squared gradient by the embedding, given that by the first block."""
    seen: dict[str, torch.Tensor] = {}

    def note(_: nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
        seen["leaf"] = out.detach().requires_grad_(True)
        return seen["leaf"]

    def stub(index: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            states = args[0] if args else kwargs["hidden_states"]
            if index == 0:
                seen["states"] = states
            return (states,) if captured.tuples else states

        return forward

    energy, tokens = 0.0, 0
    base = getattr(model, "base_model", model)
    handle = model.get_input_embeddings().register_forward_hook(note)
    try:
        for batch, gradient in zip(batches, gradients, strict=True):
            with torch.enable_grad(), frozen(model), replaced(blocks, stub):
                base(input_ids=batch, use_cache=False)
                by_leaf = torch.autograd.grad(
                    seen["states"], seen["leaf"], gradient.to(seen["states"])
                )[0]
            energy += float(by_leaf.float().square().sum(dtype=torch.float64))
            tokens += batch.numel()
    finally:
        handle.remove()
    return energy / max(tokens, 1)


class _BlockSums:
    """Second moments of the inputs, and squared gradients of the outputs, of a block's linears."""

    def __init__(
        self, path: BlockPath, linears: dict[str, Any], hidden: torch.Tensor, by_weight: bool
    ):
        self.path, self.linears, self.by_weight = path, linears, by_weight
        self.maps: dict[str, torch.Tensor] = {}
        self.groups = path.probe(linears, hidden).groups if linears else []
        self.hessians = {
            g[0]: HessianAccumulator(linears[g[0]].in_features, path.device) for g in self.groups
        }
        self.energy: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, int] = {}

    def step(self, hidden: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Gradient by the block's input (batch, seqlen, width), given that by its output."""
        outputs: dict[str, torch.Tensor] = {}
        seen: dict[str, torch.Tensor] = {}

        def note(name: str) -> Any:
            def hook(_: nn.Module, args: tuple, out: torch.Tensor) -> None:
                if name in self.hessians:
                    self.hessians[name].add(args[0].detach())
                outputs[name] = out
                if self.by_weight:
                    seen[name] = args[0].detach().flatten(0, -2).float()

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
                if self.by_weight:  # of one sequence with its own signs: squared, then summed
                    square = (rows.float().T @ seen[name]).square_()
                    self.maps[name] = square.add_(self.maps.get(name, 0))
        return torch.zeros_like(start) if found[0] is None else found[0]

    def values(self) -> dict[str, float]:
        """What an error of variance 1 in every weight costs.

        Placed by error feedback; by weight, where it happens to fall.
        """
        if self.by_weight:
            return {
                n: float(m.sum(dtype=torch.float64)) / max(self.tokens[n], 1)
                for n, m in self.maps.items()
            }
        out = {}
        for group in self.groups:
            statistics = self.hessians.pop(group[0]).statistics()
            if not statistics.tokens:
                continue
            upper = factorize(statistics.hessian, _DAMPING, in_place=True).upper
            reached = float(upper.diagonal().double().square().sum())
            for name in group:
                if name in self.energy:
                    energy = float(self.energy[name].sum(dtype=torch.float64))
                    out[name] = reached * energy / statistics.tokens
        return out

    def rows(self) -> dict[str, torch.Tensor]:
        sums = self.maps if self.by_weight else self.energy
        return {n: (e / max(self.tokens[n], 1)).cpu() for n, e in sums.items()}


def _check(found: dict[str, float]) -> None:
    bad = [n for n, value in found.items() if not value < float("inf")]
    if bad or not any(found.values()):
        what = f"of {bad[0]} are not finite" if bad else "vanish in all layers"
        raise SensitivityError(
            f"the gradients {what}, so bits cannot be put where they matter; load the model in "
            'float32 or bfloat16, or use allocation="uniform"'
        )
