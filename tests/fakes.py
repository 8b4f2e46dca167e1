"""Small stacks of blocks in plain torch, with the habits that models out there have."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

WIDTH, VOCAB = 32, 50


class MLP(nn.Module):
    def __init__(self, width: int = WIDTH, inner: int = 48):
        super().__init__()
        self.gate, self.up = nn.Linear(width, inner), nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.runs = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return self.down(torch.relu(self.gate(x)) * self.up(x))


class Mixer(nn.Module):
    """Stands in for attention: every token sees the mean of those before it. Returns a tuple."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)
        self.o = nn.Linear(width, width)
        self.runs = 0

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, None]:
        self.runs += 1
        mean = self.k(x).cumsum(1) / position[:, None]
        return self.o(torch.tanh(self.q(x)) * mean), None


class Block(nn.Module):
    """returns: "tensor" or "tuple". factor: every so many tokens of a sequence become one."""

    def __init__(self, returns: str = "tensor", factor: int = 1):
        super().__init__()
        self.mixer, self.mlp = Mixer(), MLP()
        self.norm = nn.LayerNorm(WIDTH)
        self.returns, self.factor = returns, factor

    def forward(self, hidden_states: torch.Tensor, position: torch.Tensor) -> Any:
        h = hidden_states + self.mixer(self.norm(hidden_states), position)[0]
        h = h + self.mlp(self.norm(h))
        h = h[:, :: self.factor]
        return (h, None) if self.returns == "tuple" else h


class Router(nn.Module):
    """Sends every token to one expert by the sign of its first channels; never to the last."""

    def __init__(self, experts: int):
        super().__init__()
        self.experts = nn.ModuleList(MLP() for _ in range(experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        choice = (x[..., 0] > 0).long() + (x[..., 1] > 0).long()
        for e, expert in enumerate(self.experts[:-1]):
            here = choice == e
            if bool(here.any()):
                out[here] = expert(x[here])
        return out


class SparseBlock(Block):
    def __init__(self, experts: int = 4):
        super().__init__()
        self.mlp = Router(experts)


class Model(nn.Module):
    """between: what happens to the states between blocks ("nothing", "add", "shorten")."""

    def __init__(self, blocks: list[nn.Module], between: str = "nothing", runs_blocks: bool = True):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.between, self.runs_blocks = between, runs_blocks

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        h = self.embed(input_ids)
        position = torch.arange(1, h.shape[1] + 1, dtype=h.dtype)
        for block in self.layers if self.runs_blocks else ():
            if getattr(block, "returns", "tensor") == "tuple":
                h = block(h, position=position)[0]
            else:
                h = block(hidden_states=h, position=position[: h.shape[1]])
            if self.between == "add":
                h = h + 1
            elif self.between == "shorten":
                h = h[:, ::2]
        return self.head(self.norm(h))


def model(kind: str = "plain", layers: int = 3, seed: int = 0, **options: Any) -> Model:
    """kind: "plain", "tuple", "sparse" or "halving"."""
    make = {
        "plain": Block,
        "tuple": lambda: Block("tuple"),
        "sparse": SparseBlock,
        "halving": lambda: Block(factor=2),
    }[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Model([make() for _ in range(layers)], **options).eval()


def ids(rows: int = 6, length: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
