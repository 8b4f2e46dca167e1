"""A matrix as look-ups in blocks' codebooks: the one state that sweep and refinement work on.

Rows are padded to whole row groups and columns to whole vectors, so that every step is one batched
operation; padded rows have no say in the codebooks (`row_mask`) and are cut off at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Lookup:
    """codebooks (S, G, k, d) float32; index int64 (r, V); scale float32 (r, V) or None.

    r = G * rows per group rows (padded), V vectors per row, S stripes of `vectors_per_stripe`.
    row_mask: float32 (r, 1), 0 for padded rows.
    """

    codebooks: torch.Tensor
    index: torch.Tensor
    scale: torch.Tensor | None
    vectors_per_stripe: int
    row_mask: torch.Tensor

    @property
    def dim(self) -> int:
        return self.codebooks.shape[-1]

    def address(self) -> torch.Tensor:
        """Row of every vector's centroid in ``codebooks.reshape(-1, d)``, (r, V)."""
        _, groups, k, _ = self.codebooks.shape
        rows, vectors = self.index.shape
        device = self.index.device
        stripe = torch.arange(vectors, device=device) // self.vectors_per_stripe
        group = torch.arange(rows, device=device) // (rows // groups)
        return (stripe[None] * groups + group[:, None]) * k + self.index

    def decode(self, codebooks: torch.Tensor | None = None) -> torch.Tensor:
        """The dense (r, V * d) matrix."""
        table = (self.codebooks if codebooks is None else codebooks).reshape(-1, self.dim)
        # index_select beats fancy indexing on a CPU by an order of magnitude
        q = table.index_select(0, self.address().reshape(-1))
        if self.scale is not None:
            q = q * self.scale.reshape(-1, 1)
        return q.reshape(len(self.index), -1)

    def choose(self, vector: int, linear: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
        """Set and return the best q (r, d) for vector column `vector` of every row.

        Minimizes ``q metric q^T - 2 linear . q`` over the row's codebook; linear (r, d).
        """
        book = self.codebooks[vector // self.vectors_per_stripe]
        groups, k, d = book.shape
        square = ((book @ metric) * book).sum(-1)
        step = linear.reshape(groups, -1, d)
        if self.scale is None:
            cost = torch.baddbmm(square[:, None], step, book.transpose(1, 2), alpha=-2)
        else:
            s = self.scale[:, vector].reshape(groups, -1, 1)
            cost = torch.baddbmm(s * square[:, None], step, book.transpose(1, 2), alpha=-2)
            # s > 0 divides out of s^2 quad - 2 s linear.c
        best = cost.argmin(-1)
        self.index[:, vector] = best.reshape(-1)
        flat = (best + k * torch.arange(groups, device=best.device)[:, None]).reshape(-1)
        q = book.reshape(-1, d).index_select(0, flat)
        return q if self.scale is None else q * self.scale[:, vector : vector + 1]
