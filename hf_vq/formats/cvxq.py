"""The cvxq v1 format: scalar codes of 0 to 8 bits, one bit depth for every small group of weights.

Geometry. The rows of a matrix (out_features, in_features) are put in an order of their own (if
`permuted`) and cut into *clusters* of `group_rows` rows, the same for all columns; the last may be
smaller, and is stored as if it were not. A *group* is one cluster in one input column: it has a bit
depth, a scale and perhaps a location, and its codes start in a 32-bit word of their own. How many
words a matrix takes follows from its depths, so the spec says it. docs/format.md is the complete
description.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from hf_vq.formats.base import LayerSpec, TensorLayout
from hf_vq.formats.bitstream import packed_words

FORMAT_VERSION = "1.0"

MAX_DEPTH = 8

_FLOATS = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class CVXQSpec(LayerSpec):
    """Geometry and precision of one CVXQ matrix.

    `weight = location + scale * level_table(levels)[depth][code]`; see `hf_vq_kernels.levels`.
    Raises ValueError, with the allowed range, for values that describe no matrix.
    """

    method: ClassVar[str] = "cvxq"

    group_rows: int  # rows of a cluster: weights of a group
    num_words: int  # 32-bit words of all codes; see `count_words`
    scale_dtype: str = "log8"  # "log8": 8-bit codes on a grid per cluster; "float16", "float32"
    location: str = "none"  # "int8": in 1/64 of the scale; "float16", "float32"
    levels: str = "lloyd"  # "lloyd" (of a Gaussian) or "laplace" (compander)
    permuted: bool = False  # rows are clustered in another order than the matrix's

    def __post_init__(self) -> None:
        def refuse_unless(ok: bool, field: str, allowed: str) -> None:
            if not ok:
                raise ValueError(f"{field} must be {allowed}, got {getattr(self, field)!r}")

        for field in ("out_features", "in_features", "group_rows", "num_words"):
            value = getattr(self, field)
            integer = isinstance(value, int) and not isinstance(value, bool)
            refuse_unless(integer, field, "an integer")
        refuse_unless(self.out_features >= 1, "out_features", "at least 1")
        refuse_unless(self.in_features >= 1, "in_features", "at least 1")
        refuse_unless(
            1 <= self.group_rows <= self.out_features, "group_rows", f"1..{self.out_features}"
        )
        most = self.num_groups * packed_words(self.group_rows, MAX_DEPTH)
        refuse_unless(
            0 <= self.num_words <= most, "num_words", f"0..{most}, that of {MAX_DEPTH} bits"
        )
        refuse_unless(
            self.scale_dtype in ("log8", *_FLOATS), "scale_dtype", '"log8", "float16" or "float32"'
        )
        refuse_unless(
            self.location in ("none", "int8", *_FLOATS),
            "location",
            '"none", "int8", "float16" or "float32"',
        )
        refuse_unless(self.levels in ("lloyd", "laplace"), "levels", '"lloyd" or "laplace"')
        refuse_unless(isinstance(self.permuted, bool), "permuted", "true or false")
        refuse_unless(
            not self.permuted or self.num_clusters > 1,
            "permuted",
            "false where all rows are one cluster",
        )

    @property
    def trainable(self) -> CVXQSpec | None:
        """With 16-bit floats as float32. None for scales that are codes on a grid; see `widen`."""
        if self.scale_dtype == "log8":
            return None
        location = "float32" if self.location == "float16" else self.location
        return dataclasses.replace(self, scale_dtype="float32", location=location)

    @property
    def num_clusters(self) -> int:
        return ceil(self.out_features / self.group_rows)

    @property
    def num_groups(self) -> int:
        return self.num_clusters * self.in_features

    def layout(self) -> dict[str, TensorLayout]:
        groups = (self.num_clusters, self.in_features)
        out = {
            "words": TensorLayout((self.num_words,), torch.int32),
            "depths": TensorLayout((groups[0], packed_words(groups[1], 4)), torch.int32),
        }
        if self.scale_dtype == "log8":
            out["scale_codes"] = TensorLayout(groups, torch.uint8)
            out["scale_grid"] = TensorLayout((2, groups[0]), torch.float16)
        else:
            out["scales"] = TensorLayout(groups, _FLOATS[self.scale_dtype])
        if self.location != "none":
            dtype = _FLOATS.get(self.location, torch.int8)
            out["location"] = TensorLayout(groups, dtype)
        if self.permuted:
            dtype = torch.int16 if self.out_features <= 65536 else torch.int32
            out["row_perm"] = TensorLayout((self.out_features,), dtype)
        return out


@dataclass
class CVXQCodes:
    """What quantization produces and `pack` stores. M clusters of g rows, I columns, O rows.

    depths: uint8 (M, I), 0..8. codes: int64 (M, I, g), 0 .. 2**depth - 1, and 0 in the rows of the
    last cluster that the matrix has not. Either scales: float (M, I), or, for "log8", scale_codes:
    uint8 (M, I) and scale_grid: float (2, M) = (offset, step), scale = 2 ** (offset + step * code).
    location: (M, I), integers -128..127 in 1/64 of the scale for "int8", else floats. row_perm:
    int64 (O,), position in the clustered order -> row of the matrix, so that
    ``weight[row_perm] = clustered`` and cluster m is ``row_perm[m * g : (m + 1) * g]``. Parts that
    the spec has not are None.
    """

    depths: Tensor
    codes: Tensor
    scales: Tensor | None = None
    scale_codes: Tensor | None = None
    scale_grid: Tensor | None = None
    location: Tensor | None = None
    row_perm: Tensor | None = None


def group_words(depths: Tensor, group_rows: int) -> Tensor:
    """32-bit words of every group's codes: integers of any shape -> int64 of that shape."""
    return (depths.to(torch.int64) * group_rows + 31) // 32


def count_words(depths: Tensor, group_rows: int) -> int:
    """`CVXQSpec.num_words` of a matrix with these depths."""
    return int(group_words(depths, group_rows).sum())
