"""A matrix as look-ups in blocks' codebooks: the one state that sweep and refinement work on.

Rows are padded to whole row groups and columns to whole vectors, so that every step is one batched
operation; padded rows have no say in the codebooks (`row_mask`) and are cut off at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

# Weights worked on at once: few enough to stay in a CPU's cache, or to fill a GPU.
_CHUNK = {"cpu": 1 << 20}
_CHUNK_ELSEWHERE = 1 << 25


@dataclass
class Lookup:
    """codebooks (S, G, k, d) float32; index int32 (r, V); scale float32 (r, V) or None.

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

    def panels(self, width: int) -> list[tuple[int, int]]:
        """Column ranges of about `width` columns that cover the matrix and respect its stripes."""
        columns = self.index.shape[1] * self.dim
        stripe = self.vectors_per_stripe * self.dim
        step = min(stripe, max(1, width // self.dim) * self.dim)
        out = []
        for begin in range(0, columns, stripe):
            end = min(begin + stripe, columns)
            out += [(a, min(a + step, end)) for a in range(begin, end, step)]
        return out

    def row_chunks(self) -> Iterator[tuple[slice, slice, Lookup]]:
        """(rows, row groups, the state of just these) in turn, so that temporaries stay small.

        A chunk is a run of whole row groups, or a part of a single one; indices and scales are
        views. Decoding it reads only its own groups' codebooks.
        """
        rows, vectors = self.index.shape
        groups = self.codebooks.shape[1]
        each = rows // groups
        limit = max(1, _CHUNK.get(self.index.device.type, _CHUNK_ELSEWHERE) // (vectors * self.dim))
        if limit >= rows:
            yield slice(0, rows), slice(0, groups), self
            return
        for g in range(0, groups, max(1, limit // each)):
            last = min(g + max(1, limit // each), groups)
            step = (last - g) * each if each <= limit else limit
            for lo in range(g * each, last * each, step):
                here = slice(lo, min(lo + step, last * each))
                part = replace(
                    self,
                    codebooks=self.codebooks[:, g:last],
                    index=self.index[here],
                    scale=None if self.scale is None else self.scale[here],
                    row_mask=self.row_mask[here],
                )
                yield here, slice(g, last), part

    def address(self) -> torch.Tensor:
        """Row of every vector's centroid in ``codebooks.reshape(-1, d)``, (r, V)."""
        _, groups, k, _ = self.codebooks.shape
        rows, vectors = self.index.shape
        device = self.index.device
        stripe = torch.arange(vectors, device=device) // self.vectors_per_stripe
        group = torch.arange(rows, device=device) // (rows // groups)
        return (stripe[None] * groups + group[:, None]) * k + self.index

    def decode(
        self, codebooks: torch.Tensor | None = None, address: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The dense (r, V * d) matrix; of other codebooks, with a known `address()`, if given."""
        table = (self.codebooks if codebooks is None else codebooks).reshape(-1, self.dim)
        address = self.address() if address is None else address
        # index_select beats fancy indexing on a CPU by an order of magnitude
        q = table.index_select(0, address.reshape(-1))
        if self.scale is not None:
            q = q * self.scale.reshape(-1, 1)
        return q.reshape(len(self.index), -1)

    def choose(
        self, vector: int, linear: torch.Tensor, book: torch.Tensor, square: torch.Tensor
    ) -> torch.Tensor:
        """Set and return the best q (r, d) for vector column `vector` of every row.

        Minimizes ``square(q) - 2 linear . q`` over the row's codebook. linear (r, d); book
        (G, k, d), the stripe's codebooks; square (G, k), the quadratic term of every centroid.
        """
        groups, k, d = book.shape
        step = linear.reshape(groups, -1, d)
        quadratic = square[:, None]
        if self.scale is not None:
            # s > 0 divides out of s^2 square - 2 s linear . c
            quadratic = self.scale[:, vector].reshape(groups, -1, 1) * quadratic
        cost = torch.baddbmm(quadratic, step, book.transpose(1, 2), alpha=-2)
        best = cost.min(-1).indices
        self.index[:, vector] = best.reshape(-1)
        flat = (best + k * torch.arange(groups, device=best.device)[:, None]).reshape(-1)
        q = book.reshape(-1, d).index_select(0, flat)
        return q if self.scale is None else q * self.scale[:, vector : vector + 1]


def diagonal_blocks(matrix: torch.Tensor, d: int) -> torch.Tensor:
    """The (c/d, d, d) blocks on the diagonal of a (c, c) matrix."""
    n = len(matrix) // d
    blocks = matrix.reshape(n, d, n, d).diagonal(dim1=0, dim2=2)
    return blocks.permute(2, 0, 1).contiguous()
