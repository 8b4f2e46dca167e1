"""A matrix as look-ups in blocks' codebooks: the one state that sweep and refinement work on.

A vector covers `vector_rows` consecutive rows of `dim` consecutive columns: GPTVQ's lie along the
columns of one row, VPTQ's along the rows of one column. Rows are padded to whole row groups (and
vectors) and columns to whole vectors, so that every step is one batched operation; padded rows
have no say in the codebooks (`row_mask`) and are cut off at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

# Weights worked on at once: few enough to stay in a CPU's cache, or to fill a GPU.
_CHUNK = {"cpu": 1 << 18}
_CHUNK_ELSEWHERE = 1 << 25


@dataclass
class Lookup:
    """codebooks (S, G, k, d) float32; index int32 (R, V); scale float32 (R, V) or None.

    r = G * rows per group rows (padded), R = r / vector_rows, V vectors side by side, S stripes of
    `vectors_per_stripe`; d = vector_rows * dim numbers per vector. row_mask: float32 (r, 1), 0 for
    padded rows. residual (S, G, k2, d) and residual_index (R, V): a second codebook whose vectors
    are added. column_scale (V * dim,): what every column is multiplied by after the look-up.
    """

    codebooks: torch.Tensor
    index: torch.Tensor
    scale: torch.Tensor | None
    vectors_per_stripe: int
    row_mask: torch.Tensor
    vector_rows: int = 1
    residual: torch.Tensor | None = None
    residual_index: torch.Tensor | None = None
    column_scale: torch.Tensor | None = None

    @property
    def dim(self) -> int:
        """Columns of one vector."""
        return self.codebooks.shape[-1] // self.vector_rows

    @property
    def books(self) -> torch.Tensor:
        """All centroids: (S, G, k, d), or (S, G, k + k2, d) with those of the residual behind."""
        if self.residual is None:
            return self.codebooks
        return torch.cat([self.codebooks, self.residual], 2)

    @books.setter
    def books(self, books: torch.Tensor) -> None:
        k = self.codebooks.shape[2]
        self.codebooks = books[:, :, :k]
        if self.residual is not None:
            self.residual = books[:, :, k:]

    def copy(self) -> Lookup:
        """A state whose codes may be changed without changing these."""
        residual = None if self.residual_index is None else self.residual_index.clone()
        return replace(self, index=self.index.clone(), residual_index=residual)

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
        blocks, vectors = self.index.shape
        groups = self.codebooks.shape[1]
        each = blocks // groups
        size = vectors * self.codebooks.shape[-1]
        limit = max(1, _CHUNK.get(self.index.device.type, _CHUNK_ELSEWHERE) // size)
        if limit >= blocks:
            yield slice(0, blocks * self.vector_rows), slice(0, groups), self
            return
        for g in range(0, groups, max(1, limit // each)):
            last = min(g + max(1, limit // each), groups)
            step = (last - g) * each if each <= limit else limit
            for lo in range(g * each, last * each, step):
                hi = min(lo + step, last * each)
                rows = slice(lo * self.vector_rows, hi * self.vector_rows)
                yield rows, slice(g, last), self._part(slice(lo, hi), rows, slice(g, last))

    def _part(self, blocks: slice, rows: slice, groups: slice) -> Lookup:
        return replace(
            self,
            codebooks=self.codebooks[:, groups],
            residual=None if self.residual is None else self.residual[:, groups],
            index=self.index[blocks],
            residual_index=None if self.residual_index is None else self.residual_index[blocks],
            scale=None if self.scale is None else self.scale[blocks],
            row_mask=self.row_mask[rows],
        )

    def addresses(self) -> list[torch.Tensor]:
        """Row of every vector's centroid in ``books.reshape(-1, d)``, (R, V), one per codebook."""
        _, groups, k, _ = self.codebooks.shape
        total = k if self.residual is None else k + self.residual.shape[2]
        blocks, vectors = self.index.shape
        device = self.index.device
        stripe = torch.arange(vectors, device=device) // self.vectors_per_stripe
        group = torch.arange(blocks, device=device) // (blocks // groups)
        book = (stripe[None] * groups + group[:, None]) * total
        if self.residual_index is None:
            return [book + self.index]
        return [book + self.index, book + k + self.residual_index]

    def decode(
        self, books: torch.Tensor | None = None, addresses: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """The dense (r, V * dim) matrix; of other `books`, with known `addresses()`, if given."""
        table = (self.books if books is None else books).reshape(-1, self.codebooks.shape[-1])
        addresses = self.addresses() if addresses is None else addresses
        # index_select beats fancy indexing on a CPU by an order of magnitude
        q = table.index_select(0, addresses[0].reshape(-1))
        for more in addresses[1:]:
            q += table.index_select(0, more.reshape(-1))
        if self.scale is not None:
            q = q * self.scale.reshape(-1, 1)
        dense = self.as_matrix(q)
        return dense if self.column_scale is None else dense * self.column_scale

    def as_matrix(self, vectors: torch.Tensor) -> torch.Tensor:
        """(R * V, d) vectors in the places where they stand in the (r, V * dim) matrix."""
        blocks, count = self.index.shape
        if self.vector_rows == 1:
            return vectors.reshape(blocks, -1)
        tiles = vectors.reshape(blocks, count, self.vector_rows, self.dim).transpose(1, 2)
        return tiles.reshape(blocks * self.vector_rows, -1)

    def as_vectors(self, matrix: torch.Tensor) -> torch.Tensor:
        """The inverse of `as_matrix`."""
        if self.vector_rows == 1:
            return matrix.reshape(-1, self.dim)
        blocks, count = self.index.shape
        tiles = matrix.reshape(blocks, self.vector_rows, count, self.dim).transpose(1, 2)
        return tiles.reshape(blocks * count, -1)

    def scatter(
        self, matrix: torch.Tensor, addresses: list[torch.Tensor], squared: bool = False
    ) -> torch.Tensor:
        """The transpose of `decode`: what every entry of the books gets of a (r, V * dim) matrix.

        squared: with the squares of all scales. Returns the shape of `books`.
        """
        power = 2 if squared else 1
        if self.column_scale is not None:
            matrix = matrix * self.column_scale**power
        parts = self.as_vectors(matrix)
        if self.scale is not None:
            parts = parts * self.scale.reshape(-1, 1) ** power
        stripes, groups, k, d = self.codebooks.shape
        k += 0 if self.residual is None else self.residual.shape[2]
        table = torch.zeros(stripes * groups * k, d, device=matrix.device)
        for address in addresses:
            table.index_add_(0, address.reshape(-1), parts)
        return table.reshape(stripes, groups, k, d)


def diagonal_blocks(matrix: torch.Tensor, d: int) -> torch.Tensor:
    """The (c/d, d, d) blocks on the diagonal of a (c, c) matrix."""
    n = len(matrix) // d
    blocks = matrix.reshape(n, d, n, d).diagonal(dim1=0, dim2=2)
    return blocks.permute(2, 0, 1).contiguous()
