"""float32 copies of all that is trained; the model runs with what would be stored of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hf_vq.formats.trainable import trained_names
from hf_vq.layers import PackedLinear
from hf_vq.tuning.codebooks import rounded, trainable_linears


class Masters:
    """float32 masters of everything trained; the model holds what would be stored of them."""

    def __init__(self, model: nn.Module):
        self.layers: list[tuple[PackedLinear, dict[str, Tensor]]] = []
        # norms and dense weights, or an adapter
        self.others: list[tuple[nn.Parameter, Tensor]] = []
        for layer in trainable_linears(model).values():
            live = layer.packed()
            mine = {name: live[name].detach().clone() for name in trained_names(layer.spec)}
            self.layers.append((layer, mine))
        packed = {id(live) for layer, _ in self.layers for live in layer.packed().values()}
        for parameter in model.parameters():
            if parameter.requires_grad and id(parameter) not in packed:
                self.others.append((parameter, parameter.detach().float().clone()))

    @property
    def masters(self) -> list[Tensor]:
        return [m for _, mine in self.layers for m in mine.values()] + [m for _, m in self.others]

    def _live(self) -> Iterator[Tensor]:
        for layer, mine in self.layers:
            live = layer.packed()
            yield from (live[name] for name in mine)
        yield from (parameter for parameter, _ in self.others)

    def optimizer(self, rate: float, relative: bool = True) -> torch.optim.Optimizer:
        """Adam; rate: with `relative`, in root mean squares of each tensor as it is now."""
        sizes = [
            float(m.square().mean().sqrt().clamp_min(1e-12)) if relative else 1.0
            for m in self.masters
        ]
        groups = [{"params": [m], "lr": rate * s} for m, s in zip(self.masters, sizes, strict=True)]
        return torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-12)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Move the masters by the gradients of what is stored, and store them anew."""
        for master, live in zip(self.masters, self._live(), strict=True):
            master.grad = None if live.grad is None else live.grad.float()
            live.grad = None
        optimizer.step()
        self._store()

    @torch.no_grad()
    def _store(self) -> None:
        for layer, mine in self.layers:
            live = layer.packed()
            for name, value in rounded(layer, mine).items():
                live[name].copy_(value)
        for parameter, master in self.others:
            parameter.copy_(master)

    def state(self) -> list[Tensor]:
        return [master.clone() for master in self.masters]

    def load(self, state: list[Tensor]) -> None:
        """Back to `state`. The layers' own values are what is stored at the end, so they follow."""
        for master, value in zip(self.masters, state, strict=True):
            master.copy_(value)
        self._store()
