"""The gptvq v1 format: vectors of consecutive input columns, looked up in blocks' codebooks.

Geometry. A matrix of shape (out_features, in_features) is cut into *stripes* of `group_columns`
columns and *row groups* of `group_rows` rows (the last of each may be smaller); every
(stripe, row group) block owns one codebook of `num_centroids` vectors of `vector_dim` weights.
Columns are padded with zeros to a multiple of `vector_dim`; the padding is not stored as weights
but its codes are.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch

from hf_vq.formats.base import LayerSpec, TensorLayout


@dataclass(frozen=True)
class GPTVQSpec(LayerSpec):
    """Geometry and precision of one GPTVQ matrix."""

    method: ClassVar[str] = "gptvq"

    vector_dim: int
    num_centroids: int
    group_rows: int
    group_columns: int
    codebook_dtype: str = "int8"  # "int8", "int4" or "float16"
    scale_block: int = 0  # columns that share one 4-bit scale in a row; 0: no scales
    scale_domain: str = "log"  # "log" or "linear"
    svd_rank: int = 0  # vector_dim 1 only: codebooks stored as rank-r factors; 0: as they are

    @property
    def index_bits(self) -> int:
        return (self.num_centroids - 1).bit_length()

    @property
    def num_vectors(self) -> int:
        """Vectors per row."""
        return ceil(self.in_features / self.vector_dim)

    @property
    def num_stripes(self) -> int:
        return ceil(self.in_features / self.group_columns)

    @property
    def num_row_groups(self) -> int:
        return ceil(self.out_features / self.group_rows)

    @property
    def num_scale_blocks(self) -> int:
        return ceil(self.in_features / self.scale_block) if self.scale_block else 0

    def layout(self) -> dict[str, TensorLayout]:
        groups = (self.num_stripes, self.num_row_groups)
        entries = self.num_centroids * self.vector_dim
        out = {
            "indices": TensorLayout(
                (self.out_features, ceil(self.num_vectors * self.index_bits / 32)), torch.int32
            )
        }
        if self.svd_rank:
            dtype = {"int8": torch.int8, "float16": torch.float16}[self.codebook_dtype]
            out["codebook_factors"] = TensorLayout((*groups, self.svd_rank), dtype)
            out["codebook_basis"] = TensorLayout(
                (self.svd_rank, self.num_centroids), torch.float16
            )
        elif self.codebook_dtype == "int4":
            out["codebooks"] = TensorLayout((*groups, ceil(entries * 4 / 32)), torch.int32)
        else:
            dtype = {"int8": torch.int8, "float16": torch.float16}[self.codebook_dtype]
            out["codebooks"] = TensorLayout((*groups, self.num_centroids, self.vector_dim), dtype)
        if self.codebook_dtype != "float16":
            # bfloat16: the integers are fitted to the rounded scale, so range matters, digits do not
            out["codebook_scales"] = TensorLayout(groups, torch.bfloat16)
        if self.scale_block:
            blocks = self.num_scale_blocks
            out["scale_codes"] = TensorLayout(
                (self.out_features, ceil(blocks * 4 / 32)), torch.int32
            )
            out["scale_grid"] = TensorLayout((2, blocks), torch.bfloat16)
        return out


@dataclass
class GPTVQCodes:
    """What quantization produces and `pack` stores. Shapes: r x c matrix, S stripes, G row groups.

    indices: int64 (r, num_vectors). codebooks: (S, G, k, d), integers (any dtype) when the codebook
    is int8/int4, floats for float16. codebook_scales: float (S, G) or None. scale_codes: uint8
    (r, num_scale_blocks), 0..15, or None. scale_grid: float (2, num_scale_blocks) = (offset, step)
    or None: scale = 2 ** (offset + step * code) for "log", offset + step * code for "linear".
    codebook_factors (S, G, rank) and codebook_basis (rank, k) replace codebooks under svd_rank.
    """

    indices: torch.Tensor
    codebooks: torch.Tensor | None = None
    codebook_scales: torch.Tensor | None = None
    scale_codes: torch.Tensor | None = None
    scale_grid: torch.Tensor | None = None
    codebook_factors: torch.Tensor | None = None
    codebook_basis: torch.Tensor | None = None
