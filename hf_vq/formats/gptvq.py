"""The gptvq v1 format: vectors of consecutive input columns, looked up in blocks' codebooks.

Geometry. A matrix of shape (out_features, in_features) is cut into *stripes* of `group_columns`
columns and *row groups* of `group_rows` rows (the last of each may be smaller); every
(stripe, row group) block owns one codebook of `num_centroids` vectors of `vector_dim` weights.
Columns are padded with zeros to a multiple of `vector_dim`; the padding is not stored as weights
but its codes are. docs/format.md is the complete description.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from hf_vq.formats.base import LayerSpec, TensorLayout
from hf_vq.formats.bitstream import pack_bits, unpack_bits
from hf_vq.formats.validation import FormatError, check_layout

FORMAT_VERSION = "1.0"

_FLOATS = {"float16": torch.float16, "float32": torch.float32}
_INTEGER_RANGE = {"int8": (-128, 127), "int4": (-8, 7)}


@dataclass(frozen=True)
class GPTVQSpec(LayerSpec):
    """Geometry and precision of one GPTVQ matrix.

    `group_rows` and `group_columns` may exceed the matrix (one block then). Raises ValueError, with
    the allowed range, for values that describe no matrix.
    """

    method: ClassVar[str] = "gptvq"

    vector_dim: int
    num_centroids: int
    group_rows: int
    group_columns: int
    codebook_dtype: str = "int8"  # "int8", "int4", "float16" or "float32"
    scale_block: int = 0  # columns that share one 4-bit scale in a row; 0: no scales
    scale_domain: str = "log"  # "log" or "linear"
    svd_rank: int = 0  # vector_dim 1 only: codebooks stored as rank-r factors; 0: as they are

    def __post_init__(self) -> None:
        def refuse_unless(ok: bool, field: str, allowed: str) -> None:
            if not ok:
                raise ValueError(f"{field} must be {allowed}, got {getattr(self, field)!r}")

        for field in dataclasses.fields(self):
            if field.name not in ("codebook_dtype", "scale_domain"):
                value = getattr(self, field.name)
                integer = isinstance(value, int) and not isinstance(value, bool)
                refuse_unless(integer, field.name, "an integer")
        refuse_unless(self.out_features >= 1, "out_features", "at least 1")
        refuse_unless(self.in_features >= 1, "in_features", "at least 1")
        refuse_unless(self.vector_dim in (1, 2, 4, 8), "vector_dim", "1, 2, 4 or 8")
        refuse_unless(2 <= self.num_centroids <= 65536, "num_centroids", "2..65536")
        refuse_unless(self.group_rows >= 1, "group_rows", "at least 1")
        multiple = f"multiple of vector_dim ({self.vector_dim})"
        refuse_unless(
            self.group_columns >= 1 and self.group_columns % self.vector_dim == 0,
            "group_columns",
            f"a positive {multiple}",
        )
        refuse_unless(
            self.scale_block >= 0 and self.scale_block % self.vector_dim == 0,
            "scale_block",
            f"0 (no scales) or a {multiple}",
        )
        refuse_unless(
            self.codebook_dtype in ("int8", "int4", *_FLOATS),
            "codebook_dtype",
            '"int8", "int4", "float16" or "float32"',
        )
        refuse_unless(self.scale_domain in ("log", "linear"), "scale_domain", '"log" or "linear"')
        refuse_unless(
            0 <= self.svd_rank <= self.num_centroids,
            "svd_rank",
            f"0 (codebooks stored as they are)..num_centroids ({self.num_centroids})",
        )
        if self.svd_rank:
            refuse_unless(self.vector_dim == 1, "vector_dim", "1 when svd_rank is used")
            refuse_unless(
                self.codebook_dtype != "int4",
                "codebook_dtype",
                '"int8", "float16" or "float32" when svd_rank is used',
            )

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
            dtype = _FLOATS.get(self.codebook_dtype, torch.int8)
            out["codebook_factors"] = TensorLayout((*groups, self.svd_rank), dtype)
            basis = torch.float32 if dtype == torch.float32 else torch.float16
            out["codebook_basis"] = TensorLayout((self.svd_rank, self.num_centroids), basis)
        elif self.codebook_dtype == "int4":
            out["codebooks"] = TensorLayout((*groups, ceil(entries * 4 / 32)), torch.int32)
        else:
            dtype = _FLOATS.get(self.codebook_dtype, torch.int8)
            out["codebooks"] = TensorLayout((*groups, self.num_centroids, self.vector_dim), dtype)
        if self.codebook_dtype not in _FLOATS:
            # bfloat16: the integers are fitted to the rounded scale; range matters, digits do not
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
    is int8/int4, else floats. codebook_scales: float (S, G) or None. scale_codes: uint8
    (r, num_scale_blocks), 0..15, or None. scale_grid: float (2, num_scale_blocks) = (offset, step)
    or None: scale = 2 ** (offset + step * code) for "log", offset + step * code for "linear".
    codebook_factors (S, G, rank) and codebook_basis (rank, k) replace codebooks under svd_rank.
    """

    indices: Tensor
    codebooks: Tensor | None = None
    codebook_scales: Tensor | None = None
    scale_codes: Tensor | None = None
    scale_grid: Tensor | None = None
    codebook_factors: Tensor | None = None
    codebook_basis: Tensor | None = None


def pack(codes: GPTVQCodes, spec: GPTVQSpec) -> dict[str, Tensor]:
    """The tensors of `spec.layout()`, contiguous, on the device of `codes`, which stay as they are.

    Floats are rounded to their stored dtype. Raises ValueError for codes that do not fit the spec:
    a part missing or superfluous, another shape, a value outside its range.
    """
    _check_codes(codes, spec)
    out = {"indices": pack_bits(codes.indices, spec.index_bits)}
    for name, stored in spec.layout().items():
        if name == "indices":
            continue
        values = getattr(codes, name)
        if name == "scale_codes":
            out[name] = pack_bits(values, 4)
        elif name == "codebooks" and spec.codebook_dtype == "int4":
            out[name] = pack_bits(values.flatten(-2).to(torch.int64) & 15, 4)
        else:
            out[name] = values.detach().to(stored.dtype, copy=True).contiguous()
    return out


def unpack(tensors: Mapping[str, Tensor], spec: GPTVQSpec) -> GPTVQCodes:
    """The codes stored in `tensors`. Integer codebooks come as int8, all floats as float32.

    `pack(unpack(tensors))` gives `tensors` back. Trusts its input; run `check` before.
    """
    parts: dict[str, Tensor] = {}
    for name in spec.layout():
        stored = tensors[name]
        if name == "indices":
            parts[name] = unpack_bits(stored, spec.index_bits, spec.num_vectors)
        elif name == "scale_codes":
            parts[name] = unpack_bits(stored, 4, spec.num_scale_blocks).to(torch.uint8)
        elif name == "codebooks" and spec.codebook_dtype == "int4":
            nibbles = unpack_bits(stored, 4, spec.num_centroids * spec.vector_dim)
            signed = ((nibbles ^ 8) - 8).to(torch.int8)
            parts[name] = signed.unflatten(-1, (spec.num_centroids, spec.vector_dim))
        elif stored.is_floating_point():
            parts[name] = stored.detach().to(torch.float32, copy=True)
        else:
            parts[name] = stored.detach().clone()
    return GPTVQCodes(**parts)


def check(tensors: Mapping[str, Tensor], spec: GPTVQSpec, where: str) -> None:
    """Refuse, with a `FormatError` naming layer `where`, tensors that cannot be decoded.

    Missing, unexpected, wrongly shaped or typed tensors; indices beyond the codebook; values that
    are not finite. On meta tensors only what needs no values is checked.
    """
    check_layout(tensors, spec, where)
    if any(t.is_meta for t in tensors.values()):
        return
    damaged = "the file is damaged; download or quantize it again."
    if spec.num_centroids & (spec.num_centroids - 1):  # else every index of that width is valid
        indices = unpack_bits(tensors["indices"], spec.index_bits, spec.num_vectors)
        beyond = indices >= spec.num_centroids
        if bool(beyond.any()):
            row, vector = beyond.nonzero()[0].tolist()
            raise FormatError(
                f"{where}: {int(beyond.sum())} of {indices.numel()} indices point beyond the "
                f"codebook of {spec.num_centroids} centroids (first: row {row}, vector {vector}, "
                f"index {int(indices[row, vector])}); {damaged}"
            )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise FormatError(f"{where}: {name!r} holds values that are not finite; {damaged}")
    if spec.scale_block and spec.scale_domain == "log":
        offset, step = tensors["scale_grid"].detach().float()
        largest = float(torch.maximum(offset, offset + 15 * step).max())
        if largest >= 128:  # 2**128 overflows fp32
            raise FormatError(
                f"{where}: 'scale_grid' asks for scales up to 2**{largest:g}, beyond float32; "
                f"{damaged}"
            )


def _check_codes(codes: GPTVQCodes, spec: GPTVQSpec) -> None:
    """Refuse codes that `pack` could not store without changing what they mean."""
    groups = (spec.num_stripes, spec.num_row_groups)
    shapes: dict[str, tuple[int, ...]] = {
        "indices": (spec.out_features, spec.num_vectors),
        "codebooks": (*groups, spec.num_centroids, spec.vector_dim),
        "scale_codes": (spec.out_features, spec.num_scale_blocks),
    }
    ranges = {"indices": (0, spec.num_centroids - 1), "scale_codes": (0, 15)}
    if spec.codebook_dtype in _INTEGER_RANGE:
        ranges["codebook_factors" if spec.svd_rank else "codebooks"] = _INTEGER_RANGE[
            spec.codebook_dtype
        ]
    layout = spec.layout()
    for field in dataclasses.fields(codes):
        values = getattr(codes, field.name)
        stored = layout.get(field.name)
        if (values is None) != (stored is None):
            state = "missing from" if values is None else "not part of"
            raise ValueError(f"{field.name} is {state} the codes of {spec}")
        if values is None or stored is None:
            continue
        shape = shapes.get(field.name, stored.shape)
        if tuple(values.shape) != shape:
            raise ValueError(f"{field.name} has shape {tuple(values.shape)}, expected {shape}")
        if values.is_meta:
            continue
        if field.name in ranges:
            low, high = ranges[field.name]
            if values.is_floating_point() and not torch.equal(values, values.round()):
                raise ValueError(f"{field.name} must be whole numbers in {low}..{high}")
            smallest, largest = values.min().item(), values.max().item()
            if smallest < low or largest > high:
                raise ValueError(
                    f"{field.name} spans {smallest:g}..{largest:g}, allowed are {low}..{high}"
                )
        elif not bool(torch.isfinite(values.to(stored.dtype)).all()):
            raise ValueError(f"{field.name} holds values that are not finite in {stored.dtype}")
