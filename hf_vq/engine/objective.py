"""What an error in a model is measured by, and its gradient by what the last block puts out.

"loss": the divergence of the model's predictions from what they were. To second order it is the
error's square in the metric of Fisher's information, and the gradient of log p(y), with y drawn
from the model's own predictions, has just that for its expected square.
"hidden": the squared error of the final hidden states (CVXQ section 2). With random signs e the
gradient of ``e . z`` has an expected square of the squared column norms of the Jacobian, so one
backward pass takes the place of one per state (Hutchinson).
"pca": that along the leading principal components of these states alone (CVXQ section 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hf_vq.engine.blocks import Captured, first_output, replaced
from hf_vq.methods.statistics import HessianAccumulator

PCA_SHARE = 4
"""Principal components: one of so many (the paper takes 1024 of 4096)."""


class Objective:
    """Gradients of one objective, sequence by sequence.

    kind: "loss", "hidden" or "pca"; a model without an output head has no predictions, so "loss"
    means "hidden" there. head: whether the statistics of the output head are wanted too.
    """

    def __init__(
        self,
        model: Any,
        blocks: list[nn.Module],
        captured: Captured,
        kind: str,
        seed: int,
        head: bool = False,
    ) -> None:
        self.model, self.blocks, self.captured = model, blocks, captured
        find = getattr(model, "get_output_embeddings", None)
        self.head: nn.Module | None = find() if find is not None else None
        self.kind = "hidden" if kind == "loss" and self.head is None else kind
        self.generator = torch.Generator().manual_seed(seed)
        self.basis: torch.Tensor | None = None
        self.inputs: HessianAccumulator | None = None
        self.energy, self.length = 0.0, 1
        self._measure_head = head and self.head is not None

    def prepare(self, batches: list[torch.Tensor], hidden: list[torch.Tensor]) -> None:
        """See all final states first, where the objective depends on them."""
        if self.kind != "pca":
            return
        states = [self.final_states(b, h.detach()) for b, h in zip(batches, hidden, strict=True)]
        flat = torch.cat([s.flatten(0, -2).float() for s in states])
        self.basis = principal_components(flat, max(1, flat.shape[1] // PCA_SHARE))

    def gradient(self, batch: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """By the last block's output `hidden` (1, seqlen, width), for the tokens `batch`.

        Divided by the root of seqlen: half floats must not overflow on the way back.
        """
        self.length = batch.shape[1]
        leaf = hidden.detach().requires_grad_(True)
        with torch.enable_grad(), frozen(self.model):
            if self.kind == "loss":
                total = self._log_likelihood(batch, leaf)
            else:
                states = self.final_states(batch, leaf)
                self._note(states)
                total = (states * self._signs(states)).sum()
            return torch.autograd.grad(total * self.length**-0.5, leaf)[0]

    def head_gain(self, reached: float, weight: float) -> float:
        """What the whole energy of the head's weights would cost, as an error.

        reached: what an error of variance 1 in each of its weights becomes in an output. weight:
        its mean square. With "loss" the same as for any layer. Final states do not feel the head:
        there it is the error of the states that would move the outputs as much.
        """
        assert self.inputs is not None
        if self.kind == "loss":
            return weight * reached * self.energy / max(self.inputs.tokens, 1)
        return reached / self.length

    def _log_likelihood(self, batch: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
        def note(_: nn.Module, args: tuple, out: torch.Tensor) -> None:
            self._note(args[0])
            if self.inputs is not None and out.requires_grad:
                out.register_hook(self._add_energy)

        assert self.head is not None
        handle = self.head.register_forward_hook(note)
        try:
            with replaced(self.blocks, self._stub(leaf)):
                logits = first_output(self.model(input_ids=batch, use_cache=False).to_tuple())
        finally:
            handle.remove()
        chances = logits.float().log_softmax(-1)
        weights = chances.detach().flatten(0, -2).exp().cpu()
        if not bool(torch.isfinite(weights).all()):
            return chances.sum()  # no number either, which `measure` will say
        drawn = torch.multinomial(weights, 1, generator=self.generator)
        return chances.flatten(0, -2).gather(1, drawn.to(chances.device)).sum()

    def final_states(self, batch: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
        """What the model ends with if its last block puts out `leaf`."""
        base = getattr(self.model, "base_model", self.model)
        with replaced(self.blocks, self._stub(leaf)):
            return first_output(base(input_ids=batch, use_cache=False).to_tuple())

    def _stub(self, leaf: torch.Tensor) -> Any:
        def stub(index: int) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                states = args[0] if args else kwargs["hidden_states"]
                states = leaf if index == len(self.blocks) - 1 else states
                return (states,) if self.captured.tuples else states

            return forward

        return stub

    def _signs(self, states: torch.Tensor) -> torch.Tensor:
        width = states.shape[-1] if self.basis is None else len(self.basis)
        shape = (*states.shape[:-1], width)
        signs = (torch.randint(0, 2, shape, generator=self.generator) * 2 - 1).to(states)
        return signs if self.basis is None else signs @ self.basis.to(states)

    def _note(self, states: torch.Tensor) -> None:
        if self._measure_head:
            if self.inputs is None:
                self.inputs = HessianAccumulator(states.shape[-1], states.device)
            self.inputs.add(states.detach())

    def _add_energy(self, gradient: torch.Tensor) -> None:
        self.energy += float(gradient.float().square().sum(dtype=torch.float64))


def principal_components(states: torch.Tensor, number: int) -> torch.Tensor:
    """Orthonormal rows (number, width): the leading ones of states (n, width), largest first."""
    centred = states.double() - states.double().mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred / len(states))
    return vectors.flip(1)[:, :number].T.float().contiguous()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No gradients for parameters: they would take as much memory as the module."""
    trained = [p for p in module.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
