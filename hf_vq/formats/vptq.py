"""The published VPTQ format: vectors of consecutive output rows of one input column.

Geometry. The columns of a matrix (out_features, in_features) are first normalised (if `norm`) and
permuted (if `permuted`), then cut in *outlier columns*, which come first, and `num_groups` equal
*groups*. A group owns one codebook of `num_centroids` vectors of `vector_dim` rows and, with
`num_res_centroids`, a second one whose vectors are added; outlier columns share one codebook of
their own shape. Rows are padded to whole vectors. docs/format.md is the complete description.
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
from hf_vq.formats.bitstream import (
    from_16_bits,
    pack_bits,
    packed_words,
    to_16_bits,
    unpack_bits,
)
from hf_vq.formats.validation import FormatError, check_layout

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
    outlier_vector_dim: int = 0  # 0: no outlier codebook, and no outlier columns
    outlier_centroids: int = 0  # a power of two, or 0 together with outlier_vector_dim
    norm: str = "none"  # "columns": scale and bias per input column; "rows": per output row
    permuted: bool = False
    codebook_dtype: str = "float16"  # "float16", "bfloat16" or "float32"
    storage: str = "packed"  # "packed"; "int16" or "float16": one 16-bit element per index

    def __post_init__(self) -> None:
        def refuse_unless(ok: bool, field: str, allowed: str) -> None:
            if not ok:
                raise ValueError(f"{field} must be {allowed}, got {getattr(self, field)!r}")

        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "permuted":
                refuse_unless(isinstance(value, bool), field.name, "true or false")
            elif field.name not in ("norm", "codebook_dtype", "storage"):
                integer = isinstance(value, int) and not isinstance(value, bool)
                refuse_unless(integer, field.name, "an integer")
        refuse_unless(self.out_features >= 1, "out_features", "at least 1")
        refuse_unless(self.in_features >= 1, "in_features", "at least 1")
        refuse_unless(1 <= self.vector_dim <= 16, "vector_dim", "1..16")
        # 16 bits each: what an element of the unpacked storages holds, and 32 bits together
        refuse_unless(
            _is_power_of_two(self.num_centroids, 2), "num_centroids", "a power of two in 2..65536"
        )
        refuse_unless(
            self.num_res_centroids == 0 or _is_power_of_two(self.num_res_centroids, 1),
            "num_res_centroids",
            "0 (no residual codebook) or a power of two in 1..65536",
        )
        # 1 is how published files say "no outliers"
        refuse_unless(
            self.outlier_vector_dim == 0 or 2 <= self.outlier_vector_dim <= 16,
            "outlier_vector_dim",
            "0 (no outlier codebook) or 2..16",
        )
        refuse_unless(
            _is_power_of_two(self.outlier_centroids, 2)
            if self.outlier_vector_dim
            else self.outlier_centroids == 0,
            "outlier_centroids",
            "a power of two in 2..65536 when outlier_vector_dim is given"
            if self.outlier_vector_dim
            else "0 when outlier_vector_dim is 0",
        )
        refuse_unless(
            0 <= self.outlier_columns < self.in_features,
            "outlier_columns",
            f"0..{self.in_features - 1}, fewer than the columns",
        )
        refuse_unless(
            self.outlier_columns == 0 or self.outlier_vector_dim > 0,
            "outlier_columns",
            "0 when outlier_vector_dim and outlier_centroids are 0",
        )
        rest = self.in_features - self.outlier_columns
        refuse_unless(
            self.num_groups >= 1 and rest % self.num_groups == 0,
            "num_groups",
            f"a divisor of the {rest} columns that are not outliers",
        )
        refuse_unless(
            self.norm in ("none", "columns", "rows"), "norm", '"none", "columns" or "rows"'
        )
        refuse_unless(
            self.codebook_dtype in FLOATS,
            "codebook_dtype",
            '"float16", "bfloat16" or "float32"',
        )
        refuse_unless(
            self.storage in ("packed", "int16", "float16"),
            "storage",
            '"packed", "int16" or "float16"',
        )
        refuse_unless(
            not self.permuted or self.storage != "packed" or self.in_features <= 65536,
            "permuted",
            "false beyond 65536 columns, whose numbers need more than 16 bits",
        )

    @property
    def descending(self) -> bool:
        return self.permuted or (self.num_groups == 1 and not self.outlier_columns)

    @property
    def trainable(self) -> VPTQSpec:
        return dataclasses.replace(self, codebook_dtype="float32")

    @property
    def index_bits(self) -> int:
        """Bits of a vector's main and residual index together: 1..32."""
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
        """Vectors per outlier column."""
        return ceil(self.out_features / self.outlier_vector_dim) if self.outlier_vector_dim else 0

    def layout(self) -> dict[str, TensorLayout]:
        groups, rows, width = self.num_groups, self.num_row_blocks, self.group_columns
        floats = FLOATS[self.codebook_dtype]
        index = {"int16": torch.int16, "float16": torch.float16}.get(self.storage, torch.int32)
        words = packed_words(width, self.index_bits) if self.storage == "packed" else width
        out = {
            "indices": TensorLayout((groups, rows, words), index),
            "centroids.weight": TensorLayout(
                (groups, self.num_centroids * self.vector_dim), floats
            ),
        }
        if self.num_res_centroids:
            size = self.num_res_centroids * self.vector_dim
            if self.storage != "packed":
                out["res_indices"] = TensorLayout((groups, rows, width), index)
            out["res_centroids.weight"] = TensorLayout((groups, size), floats)
        if self.outlier_vector_dim:  # published files may have the codebook and no such column
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
    original column, so that ``decoded[:, perm] = permuted``. scale, bias: floats per original
    column or per row, ``weight = decoded * scale + bias``. Parts that the spec has not are None.
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


# Field of VPTQCodes -> name of the tensor that stores it. Residual indices are tensors of their own
# in the unpacked storages only.
_TENSORS = {
    "indices": "indices",
    "centroids": "centroids.weight",
    "res_indices": "res_indices",
    "res_centroids": "res_centroids.weight",
    "outlier_indices": "outlier_indices",
    "outlier_centroids": "outlier_centroids.weight",
    "perm": "perm",
    "scale": "weight_scale",
    "bias": "weight_bias",
}
_INDICES = ("indices", "res_indices", "outlier_indices")


def pack(codes: VPTQCodes, spec: VPTQSpec) -> dict[str, Tensor]:
    """The tensors of `spec.layout()`, contiguous, on the device of `codes`, which stay as they are.

    Floats are rounded to their stored dtype. Raises ValueError for codes that do not fit the spec:
    a part missing or superfluous, another shape, a value outside its range.
    """
    _check_codes(codes, spec)
    fields = {tensor: field for field, tensor in _TENSORS.items()}
    out: dict[str, Tensor] = {}
    for name, stored in spec.layout().items():
        values = getattr(codes, fields[name]).detach()
        if name == "indices" and spec.storage == "packed":
            both = values.to(torch.int64)
            if codes.res_indices is not None:
                both = both | codes.res_indices.detach().to(torch.int64) << spec.main_bits
            out[name] = pack_bits(both, spec.index_bits)
        elif name in _INDICES or (name == "perm" and stored.dtype == torch.int16):
            out[name] = to_16_bits(values).view(stored.dtype).reshape(stored.shape)
        else:
            values = values.to(stored.dtype, copy=True, memory_format=torch.contiguous_format)
            out[name] = values.reshape(stored.shape)
    return out


def unpack(tensors: Mapping[str, Tensor], spec: VPTQSpec) -> VPTQCodes:
    """The codes stored in `tensors`: all integers as int64, all floats as float32.

    `pack(unpack(tensors))` gives `tensors` back. Trusts its input; run `check` before.
    """
    layout, shapes = spec.layout(), _shapes(spec)
    parts: dict[str, Tensor] = {}
    for field, name in _TENSORS.items():
        if name not in layout:
            continue
        stored = tensors[name].detach()
        if name == "indices" and spec.storage == "packed":
            both = unpack_bits(stored, spec.index_bits, spec.group_columns)
            parts[field] = both & (spec.num_centroids - 1)
            if spec.num_res_centroids:
                parts["res_indices"] = both >> spec.main_bits
        elif name in _INDICES or (name == "perm" and stored.dtype == torch.int16):
            parts[field] = from_16_bits(stored).reshape(shapes[field])
        else:
            dtype = torch.float32 if stored.is_floating_point() else torch.int64
            parts[field] = stored.to(dtype, copy=True).reshape(shapes[field])
    return VPTQCodes(**parts)


def modernize(tensors: Mapping[str, Tensor], spec: VPTQSpec) -> tuple[dict[str, Tensor], VPTQSpec]:
    """An unpacked matrix of the first generation, stored as packed: its tensors and its spec.

    Decodes to the same weights, bit for bit. What is packed already comes back as it is. Trusts its
    input; run `check` before. Raises ValueError for a permuted matrix of more than 65536 columns.
    """
    if spec.storage == "packed":
        return dict(tensors), spec
    packed = dataclasses.replace(spec, storage="packed")
    return pack(unpack(tensors, spec), packed), packed


def check(tensors: Mapping[str, Tensor], spec: VPTQSpec, where: str) -> None:
    """Refuse, with a `FormatError` naming layer `where`, tensors that cannot be decoded.

    Missing, unexpected, wrongly shaped or typed tensors; indices beyond their codebook; a
    permutation that is none; values that are not finite. On meta tensors only what needs no values
    is checked.
    """
    check_layout(tensors, spec, where)
    if any(t.is_meta for t in tensors.values()):
        return
    damaged = "the file is damaged; download or quantize it again."
    for name, centroids in (
        ("indices", spec.num_centroids),
        ("res_indices", spec.num_res_centroids),
        ("outlier_indices", spec.outlier_centroids),
    ):
        if name not in tensors or tensors[name].dtype == torch.int32 or centroids == 65536:
            continue  # every code of a bit stream is valid: codebooks are powers of two
        indices = from_16_bits(tensors[name])
        beyond = indices >= centroids
        if bool(beyond.any()):
            group, block, column = beyond.nonzero()[0].tolist()
            raise FormatError(
                f"{where}: {int(beyond.sum())} of {indices.numel()} elements of {name!r} point "
                f"beyond the codebook of {centroids} centroids (first: group {group}, row block "
                f"{block}, column {column}, index {int(indices[group, block, column])}); {damaged}"
            )
    if spec.permuted:
        perm = tensors["perm"]
        perm = from_16_bits(perm) if perm.dtype == torch.int16 else perm
        if not torch.equal(perm.sort().values, torch.arange(len(perm), device=perm.device)):
            raise FormatError(
                f"{where}: 'perm' is no permutation: it names {len(perm.unique())} different "
                f"columns from {int(perm.min())} to {int(perm.max())} of the {len(perm)}; {damaged}"
            )
    for name, tensor in tensors.items():
        if name in _INDICES or not tensor.is_floating_point():
            continue  # float16 indices are bit patterns, some of them those of NaN
        if not bool(torch.isfinite(tensor).all()):
            raise FormatError(f"{where}: {name!r} holds values that are not finite; {damaged}")


def _is_power_of_two(value: int, least: int) -> bool:
    return least <= value <= 65536 and value & (value - 1) == 0


def _shapes(spec: VPTQSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every field of VPTQCodes that `spec` has."""
    groups, columns = spec.num_groups, (spec.in_features,)
    vectors = (groups, spec.num_row_blocks, spec.group_columns)
    shapes: dict[str, tuple[int, ...]] = {
        "indices": vectors,
        "centroids": (groups, spec.num_centroids, spec.vector_dim),
    }
    if spec.num_res_centroids:
        shapes["res_indices"] = vectors
        shapes["res_centroids"] = (groups, spec.num_res_centroids, spec.vector_dim)
    if spec.outlier_vector_dim:
        shapes["outlier_indices"] = (spec.num_outlier_row_blocks, spec.outlier_columns)
        shapes["outlier_centroids"] = (spec.outlier_centroids, spec.outlier_vector_dim)
    if spec.permuted:
        shapes["perm"] = columns
    if spec.norm != "none":
        shapes["scale"] = columns if spec.norm == "columns" else (spec.out_features,)
        shapes["bias"] = shapes["scale"]
    return shapes


def _check_codes(codes: VPTQCodes, spec: VPTQSpec) -> None:
    """Refuse codes that `pack` could not store without changing what they mean."""
    shapes = _shapes(spec)
    allowed = {
        "indices": spec.num_centroids,
        "res_indices": spec.num_res_centroids,
        "outlier_indices": spec.outlier_centroids,
        "perm": spec.in_features,
    }
    for field in dataclasses.fields(codes):
        name, values = field.name, getattr(codes, field.name)
        if (values is None) != (name not in shapes):
            state = "missing from" if values is None else "not part of"
            raise ValueError(f"{name} is {state} the codes of {spec}")
        if values is None:
            continue
        if tuple(values.shape) != shapes[name]:
            raise ValueError(f"{name} has shape {tuple(values.shape)}, expected {shapes[name]}")
        if name in allowed and values.is_floating_point():
            raise ValueError(f"{name} must be integers, got {values.dtype}")
        if values.is_meta or not values.numel():
            continue
        if name in allowed:
            smallest, largest = int(values.min()), int(values.max())
            if smallest < 0 or largest >= allowed[name]:
                raise ValueError(
                    f"{name} spans {smallest}..{largest}, allowed are 0..{allowed[name] - 1}"
                )
            if name == "perm" and len(values.unique()) < len(values):
                raise ValueError("perm is no permutation: it names a column twice")
        elif not bool(torch.isfinite(values.to(FLOATS[spec.codebook_dtype])).all()):
            raise ValueError(f"{name} holds values that are not finite in {spec.codebook_dtype}")
