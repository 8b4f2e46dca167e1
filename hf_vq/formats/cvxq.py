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
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from hf_vq_kernels.cvxq_reference import expand_location, expand_scales
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
    def descending(self) -> bool:
        return True  # groups lie in one column, so any order of work can be undone

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


def pack(codes: CVXQCodes, spec: CVXQSpec) -> dict[str, Tensor]:
    """The tensors of `spec.layout()`, contiguous, on the device of `codes`, which stay as they are.

    Floats are rounded to their stored dtype. Raises ValueError for codes that do not fit the spec:
    a part missing or superfluous, another shape, a value outside its range, depths that ask for
    another number of words.
    """
    _check_codes(codes, spec)
    out: dict[str, Tensor] = {}
    for name, stored in spec.layout().items():
        if name == "words":
            out[name] = pack_words(codes, spec)
        elif name == "depths":
            out[name] = pack_bits(codes.depths, 4)
        elif stored.dtype == torch.int16:
            out[name] = to_16_bits(codes.row_perm.detach())  # type: ignore[union-attr]
        else:
            values = getattr(codes, name).detach()
            out[name] = values.to(stored.dtype, copy=True, memory_format=torch.contiguous_format)
    return out


def pack_words(codes: CVXQCodes, spec: CVXQSpec) -> Tensor:
    """The stored tensor "words": the codes of all groups, int32 (num_words,)."""
    depths = codes.depths.to(torch.int64)
    words = torch.zeros(spec.num_words, dtype=torch.int32, device=depths.device)
    if depths.is_meta:
        return words
    first = _first_words(depths, spec.group_rows)
    for depth in range(1, MAX_DEPTH + 1):
        groups = depths == depth
        packed = pack_bits(codes.codes.detach()[groups], depth)
        offsets = torch.arange(packed.shape[1], device=depths.device)
        words[first[groups].unsqueeze(1) + offsets] = packed
    return words


def unpack(tensors: Mapping[str, Tensor], spec: CVXQSpec) -> CVXQCodes:
    """The codes stored in `tensors`: depths, scale codes and int8 locations as they are stored,
    other integers as int64, all floats as float32.

    `pack(unpack(tensors))` gives `tensors` back. Trusts its input; run `check` before.
    """
    parts: dict[str, Tensor] = {}
    for name, dtype in ((name, stored.dtype) for name, stored in spec.layout().items()):
        stored = tensors[name].detach()
        if name == "depths":
            parts[name] = unpack_bits(stored, 4, spec.in_features).to(torch.uint8)
        elif name == "row_perm":
            parts[name] = from_16_bits(stored) if dtype == torch.int16 else stored.long()
        elif name != "words":
            parts[name] = stored.to(torch.float32 if dtype.is_floating_point else dtype, copy=True)
    return CVXQCodes(codes=_unpack_words(tensors["words"].detach(), parts["depths"], spec), **parts)


def _unpack_words(words: Tensor, depths: Tensor, spec: CVXQSpec) -> Tensor:
    shape = (*depths.shape, spec.group_rows)
    codes = torch.zeros(shape, dtype=torch.int64, device=words.device)
    if words.is_meta:
        return codes
    first = _first_words(depths, spec.group_rows)
    for depth in range(1, MAX_DEPTH + 1):
        groups = depths == depth
        offsets = torch.arange(packed_words(spec.group_rows, depth), device=words.device)
        packed = words[first[groups].unsqueeze(1) + offsets]
        codes[groups] = unpack_bits(packed, depth, spec.group_rows)
    return codes


def check(tensors: Mapping[str, Tensor], spec: CVXQSpec, where: str) -> None:
    """Refuse, with a `FormatError` naming layer `where`, tensors that cannot be decoded.

    Missing, unexpected, wrongly shaped or typed tensors; depths beyond 8 or of another number of
    words; a permutation that is none; values that are not finite, or decode to such. On meta
    tensors only what needs no values is checked.
    """
    check_layout(tensors, spec, where)
    if any(t.is_meta for t in tensors.values()):
        return
    damaged = "the file is damaged; download or quantize it again."
    depths = unpack_bits(tensors["depths"], 4, spec.in_features)
    beyond = depths > MAX_DEPTH
    if bool(beyond.any()):
        cluster, column = beyond.nonzero()[0].tolist()
        raise FormatError(
            f"{where}: {int(beyond.sum())} of {depths.numel()} depths are beyond {MAX_DEPTH} bits "
            f"(first: cluster {cluster}, column {column}, {int(depths[cluster, column])} bits); "
            f"{damaged}"
        )
    words = count_words(depths, spec.group_rows)
    if words != spec.num_words:
        raise FormatError(
            f"{where}: 'depths' ask for {words} words of codes, but there are {spec.num_words}; "
            f"{damaged}"
        )
    if spec.permuted:
        perm = tensors["row_perm"]
        perm = from_16_bits(perm) if perm.dtype == torch.int16 else perm.long()
        if not torch.equal(perm.sort().values, torch.arange(len(perm), device=perm.device)):
            raise FormatError(
                f"{where}: 'row_perm' is no permutation: it names {len(perm.unique())} different "
                f"rows from {int(perm.min())} to {int(perm.max())} of the {len(perm)}; {damaged}"
            )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise FormatError(f"{where}: {name!r} holds values that are not finite; {damaged}")
    if spec.scale_dtype == "log8":
        largest = _largest_exponent(tensors["scale_codes"], tensors["scale_grid"])
        if largest > _MOST_EXPONENT:
            raise FormatError(
                f"{where}: 'scale_grid' asks for scales up to 2**{largest:g}, beyond those of "
                f"float32 weights; {damaged}"
            )


_MOST_EXPONENT = 124.0
"""Levels and int8 locations are below 2**3, and float32 below 2**128."""


def _largest_exponent(scale_codes: Tensor, scale_grid: Tensor) -> float:
    offset, step = scale_grid.detach().double().unsqueeze(-1)  # being loaded it is a parameter
    return float((offset + step * scale_codes).max())


def widen(tensors: Mapping[str, Tensor], spec: CVXQSpec) -> tuple[dict[str, Tensor], CVXQSpec]:
    """The same matrix with scales, and locations if it has any, as float32: tensors and spec.

    Decodes to the same weights, bit for bit, also where `spec.trainable` is None. Trusts its
    input; run `check` before.
    """
    wide = dataclasses.replace(
        spec, scale_dtype="float32", location="none" if spec.location == "none" else "float32"
    )
    out = {name: tensors[name] for name in wide.layout() if name in tensors}
    scales = tensors["scales" if "scales" in tensors else "scale_codes"].detach()
    out["scales"] = expand_scales(scales, tensors.get("scale_grid"))
    if "location" in tensors:
        out["location"] = expand_location(tensors["location"].detach(), out["scales"])
    return {name: out[name] for name in wide.layout()}, wide


def _first_words(depths: Tensor, group_rows: int) -> Tensor:
    """Number of the first word of every group, of the shape of `depths`."""
    words = group_words(depths, group_rows).flatten()
    return (words.cumsum(0) - words).view(depths.shape)


def _check_codes(codes: CVXQCodes, spec: CVXQSpec) -> None:
    """Refuse codes that `pack` could not store without changing what they mean."""
    groups = (spec.num_clusters, spec.in_features)
    layout = spec.layout()
    shapes = {name: stored.shape for name, stored in layout.items()}
    shapes |= {"depths": groups, "codes": (*groups, spec.group_rows)}
    ranges = {
        "depths": (0, MAX_DEPTH),
        "scale_codes": (0, 255),
        "row_perm": (0, spec.out_features - 1),
    }
    if spec.location == "int8":
        ranges["location"] = (-128, 127)
    for field in dataclasses.fields(codes):
        name, values = field.name, getattr(codes, field.name)
        if (values is None) != (name not in shapes):
            state = "missing from" if values is None else "not part of"
            raise ValueError(f"{name} is {state} the codes of {spec}")
        if values is None:
            continue
        if tuple(values.shape) != shapes[name]:
            raise ValueError(f"{name} has shape {tuple(values.shape)}, expected {shapes[name]}")
        if (name == "codes" or name in ranges) and values.is_floating_point():
            raise ValueError(f"{name} must be integers, got {values.dtype}")
        if values.is_meta or name == "codes":
            continue
        if name in ranges:
            low, high = ranges[name]
            smallest, largest = int(values.min()), int(values.max())
            if smallest < low or largest > high:
                raise ValueError(f"{name} spans {smallest}..{largest}, allowed are {low}..{high}")
        elif not bool(torch.isfinite(values.to(layout[name].dtype)).all()):
            raise ValueError(f"{name} holds values that are not finite in {layout[name].dtype}")
    if codes.depths.is_meta:
        return
    words = count_words(codes.depths, spec.group_rows)
    if words != spec.num_words:
        raise ValueError(f"the depths ask for {words} words, but num_words is {spec.num_words}")
    if codes.row_perm is not None and len(codes.row_perm.unique()) < spec.out_features:
        raise ValueError("row_perm is no permutation: it names a row twice")
    if codes.scale_codes is not None and codes.scale_grid is not None:
        largest_exponent = _largest_exponent(codes.scale_codes, codes.scale_grid.half())
        if largest_exponent > _MOST_EXPONENT:
            raise ValueError(f"scale_grid asks for scales up to 2**{largest_exponent:g}")
    for depth in range(MAX_DEPTH + 1):
        values = codes.codes[codes.depths == depth]
        if values.numel() and (int(values.min()) < 0 or int(values.max()) >= 1 << depth):
            raise ValueError(
                f"codes of {depth} bits span {int(values.min())}..{int(values.max())}, allowed are "
                f"0..{(1 << depth) - 1}"
            )
    beyond = spec.num_clusters * spec.group_rows - spec.out_features
    if beyond and bool(codes.codes[-1, :, -beyond:].any()):
        raise ValueError("codes of rows beyond the last one of the matrix must be 0")
