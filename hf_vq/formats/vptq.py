"""The published VPTQ format: vectors of consecutive output rows of one input column.

Geometry. The columns of a matrix (out_features, in_features) are first permuted (if `permuted`) and
normalised (if `norm`), then cut in *outlier columns*, which come first, and `num_groups` equal
*groups*. A group owns one codebook of `num_centroids` vectors of `vector_dim` rows and, with
`num_res_centroids`, a second one whose vectors are added; outlier columns share one codebook of
their own shape. Rows are padded to whole vectors. docs/format.md is the complete description.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from hf_vq.formats.base import LayerSpec, TensorLayout

FORMAT_VERSION = "1.0"

FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class VPTQSpec(LayerSpec):
    """Geometry and precision of one VPTQ matrix.

    Raises ValueError, with the allowed range, for values that describe no matrix.
    """

    method: ClassVar[str] = "vptq"

    vector_dim: int
    num_centroids: int  # a power of two
    num_res_centroids: int = 0  # a power of two, or 0: no residual codebook
    num_groups: int = 1
    outlier_columns: int = 0
    outlier_vector_dim: int = 0  # 0 exactly if there are no outlier columns
    outlier_centroids: int = 0
    norm: str = "none"  # "none"; "columns": scale and bias per input column; "rows": per output row
    permuted: bool = False
    codebook_dtype: str = "float16"  # "float16", "bfloat16" or "float32"
    storage: str = "packed"  # "packed"; "int16" or "float16": one 16-bit element per index

    @property
    def index_bits(self) -> int:
        """Of a vector's main and residual index together."""
        return self.main_bits + self.res_bits

    @property
    def main_bits(self) -> int:
        return (self.num_centroids - 1).bit_length()

    @property
    def res_bits(self) -> int:
        return (self.num_res_centroids - 1).bit_length() if self.num_res_centroids else 0

    @property
    def group_columns(self) -> int:
        """Columns of one group."""
        return (self.in_features - self.outlier_columns) // self.num_groups

    @property
    def num_row_blocks(self) -> int:
        """Vectors per column."""
        return ceil(self.out_features / self.vector_dim)

    @property
    def num_outlier_row_blocks(self) -> int:
        return ceil(self.out_features / self.outlier_vector_dim) if self.outlier_columns else 0

    def layout(self) -> dict[str, TensorLayout]:
        groups, rows, width = self.num_groups, self.num_row_blocks, self.group_columns
        floats = FLOATS[self.codebook_dtype]
        index = {"int16": torch.int16, "float16": torch.float16}.get(self.storage, torch.int32)
        words = ceil(width * self.index_bits / 32) if self.storage == "packed" else width
        out = {
            "indices": TensorLayout((groups, rows, words), index),
            "centroids.weight": TensorLayout((groups, self.num_centroids * self.vector_dim), floats),
        }
        if self.num_res_centroids:
            size = self.num_res_centroids * self.vector_dim
            if self.storage != "packed":
                out["res_indices"] = TensorLayout((groups, rows, width), index)
            out["res_centroids.weight"] = TensorLayout((groups, size), floats)
        if self.outlier_columns:
            size = self.outlier_centroids * self.outlier_vector_dim
            shape = (1, self.num_outlier_row_blocks, self.outlier_columns)
            outlier = torch.float16 if self.storage == "float16" else torch.int16
            out["outlier_indices"] = TensorLayout(shape, outlier)
            out["outlier_centroids.weight"] = TensorLayout((1, size), floats)
        if self.norm != "none":
            length = self.in_features if self.norm == "columns" else self.out_features
            out["weight_scale"] = TensorLayout((length,), floats)
            out["weight_bias"] = TensorLayout((length,), floats)
        if self.permuted:
            perm = torch.int16 if self.storage == "packed" else torch.int64
            out["perm"] = TensorLayout((self.in_features,), perm)
        return out


@dataclass
class VPTQCodes:
    """What quantization produces and `pack` stores. G groups, b row blocks, w columns per group.

    indices, res_indices: int64 (G, b, w), of columns in permuted order. centroids (G, K, v),
    res_centroids (G, R, v): floats. outlier_indices: int64 (b0, outlier columns);
    outlier_centroids: (K0, v0). perm: int64 (in_features,), position in the permuted order ->
    original column, so that ``decoded[:, perm] = permuted``. scale, bias: floats per original column
    or per row, ``weight = decoded * scale + bias``. Parts that the spec has not are None.
    """

    indices: Tensor
    centroids: Tensor
    res_indices: Tensor | None = None
    res_centroids: Tensor | None = None
    outlier_indices: Tensor | None = None
    outlier_centroids: Tensor | None = None
    perm: Tensor | None = None
    scale: Tensor | None = None
    bias: Tensor | None = None
