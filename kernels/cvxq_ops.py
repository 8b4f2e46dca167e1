"""The operators `hf_vq::cvxq_linear` and `hf_vq::cvxq_dequantize`.

As in ops.py: each is defined once, with a default implementation that any torch device runs; faster
backends register theirs for their device key. What is computed is written down in
cvxq_reference.py.

The codes of a group start in a word of their own, whose number is the sum of the sizes of all
groups before it: any row of any group can be read without the others. These sums are made anew in
every call, from the depths: a few numbers per group, and nothing besides the format to keep.

Gradients: to `x` and `bias`, and to floating scales and locations when they require grad. Words,
depths, scale codes and their grid, int8 locations and the permutation have none.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hf_vq_kernels.autograd import (
    define_input_gradient,
    register_gradients,
    register_product,
)
from hf_vq_kernels.bits import unpack_bits
from hf_vq_kernels.cvxq_reference import (
    LOCATION_UNIT,
    expand_location,
    expand_scales,
    row_numbers,
)
from hf_vq_kernels.dispatch import call, register_default
from hf_vq_kernels.levels import level_table_on
from hf_vq_kernels.lookup import vectors_at_once
from torch import Tensor

_PACKED = (
    "Tensor words, Tensor depths, Tensor scales, Tensor? scale_grid, Tensor? location, "
    "Tensor? row_perm"
)
_GEOMETRY = "int out_features, int group_rows, str levels"

torch.library.define(
    "hf_vq::cvxq_dequantize",
    f"({_PACKED}, int in_features, {_GEOMETRY}, ScalarType dtype) -> Tensor",
)
torch.library.define(
    "hf_vq::cvxq_linear", f"(Tensor x, {_PACKED}, Tensor? bias, {_GEOMETRY}) -> Tensor"
)


def cvxq_dequantize(
    words: Tensor,
    depths: Tensor,
    scales: Tensor,
    scale_grid: Tensor | None,
    location: Tensor | None,
    row_perm: Tensor | None,
    in_features: int,
    out_features: int,
    group_rows: int,
    levels: str,
    dtype: torch.dtype,
) -> Tensor:
    """The dense weight (out_features, in_features) in `dtype`.

    `words` int32 (n,) holds the codes of clusters of `group_rows` rows in one column, cluster by
    cluster, column by column; `depths` int32 (clusters, ceil(in_features / 8)) their bits, 4 bits
    each. `scales` (clusters, in_features): floating, or uint8 with a `scale_grid` (2, clusters).
    `location` (clusters, in_features): floating, or int8 in 1/64 of the scale. `row_perm`
    (out_features,): int32, or int16 holding uint16 bit patterns. `levels`: "lloyd" or "laplace".
    Raises RuntimeError for `scales` of another width.
    """
    return call("cvxq_dequantize", (
        words, depths, scales, scale_grid, location, row_perm, in_features, out_features,
        group_rows, levels, dtype,
    ))  # fmt: skip


def cvxq_linear(
    x: Tensor,
    words: Tensor,
    depths: Tensor,
    scales: Tensor,
    scale_grid: Tensor | None,
    location: Tensor | None,
    row_perm: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_rows: int,
    levels: str,
) -> Tensor:
    """x (..., in_features) times the packed weight, plus bias: (..., out_features), dtype of x.

    The packed tensors are those of `cvxq_dequantize`; `bias` (out_features,) is cast to x.dtype.
    """
    return call("cvxq_linear", (
        x, words, depths, scales, scale_grid, location, row_perm, bias, out_features, group_rows,
        levels,
    ))  # fmt: skip


# ---------------------------------------------------------------------------------- default backend


def first_words(depth: Tensor, group_rows: int) -> Tensor:
    """Number of the first word of every group, int64, of depths (clusters, columns)."""
    sizes = (depth.flatten().long() * group_rows + 31) >> 5
    return (sizes.cumsum(0) - sizes).view(depth.shape)


def _dequantize_default(
    words: Tensor,
    depths: Tensor,
    scales: Tensor,
    scale_grid: Tensor | None,
    location: Tensor | None,
    row_perm: Tensor | None,
    in_features: int,
    out_features: int,
    group_rows: int,
    levels: str,
    dtype: torch.dtype,
) -> Tensor:
    if scales.shape[1] != in_features:
        raise RuntimeError(
            f"scales of shape {tuple(scales.shape)} do not describe a weight of {in_features} "
            "columns"
        )
    device, clusters = words.device, scales.shape[0]
    depth = unpack_bits(depths, 4, in_features)
    scale = expand_scales(scales, scale_grid)
    shift = None if location is None else expand_location(location, scale).unsqueeze(-1)
    scale = scale.unsqueeze(-1)
    number = torch.int32 if words.numel() < 2**31 - 1 else torch.int64
    first = first_words(depth, group_rows).to(number).unsqueeze(-1)
    # Every word with its successor above it: a code is in one of these, wherever it starts. The
    # last is for groups of no bits at the end, whose first word would be the one after all.
    following = F.pad(words, (0, 2)).long()
    pairs = following[:-1] & 0xFFFFFFFF | following[1:] << 32
    level_base = (1 << depth).unsqueeze(-1)
    depth = depth.unsqueeze(-1)
    table = level_table_on(levels, device)
    order = None if row_perm is None else row_numbers(row_perm)

    # zeros, because the all-zero permutation of a layer without values names one row only
    make = torch.empty if order is None else torch.zeros
    weight = make((out_features, in_features), dtype=dtype, device=device)
    # In slices of whole clusters, or of rows of one, so that what is held besides the result stays
    # small (and in the CPU's cache: a group's codes are read along its rows).
    together = vectors_at_once(device) // (4 * in_features)
    rows_at_once = max(1, min(group_rows, together))
    clusters_at_once = max(1, together // group_rows)
    for low in range(0, clusters, clusters_at_once):
        part = slice(low, min(low + clusters_at_once, clusters))
        for start in range(0, group_rows, rows_at_once):
            stop = min(start + rows_at_once, group_rows)
            row = low * group_rows + start
            if row >= out_features:
                break  # the rest of the last cluster
            bit = depth[part] * torch.arange(start, stop, dtype=number, device=device)
            at = (bit >> 5).add_(first[part])
            code = pairs.index_select(0, at.flatten()).view(at.shape)
            code = (code >> bit.bitwise_and_(31)).bitwise_and_(level_base[part] - 1)
            code = code.bitwise_or_(level_base[part])
            values = table.index_select(0, code.flatten()).view(code.shape).mul_(scale[part])
            if shift is not None:
                values.add_(shift[part])
            values = values.transpose(1, 2).reshape(-1, in_features)[: out_features - row]
            rows = slice(row, row + values.shape[0])
            if order is None:
                weight[rows] = values
            else:
                weight.index_copy_(0, order[rows], values.to(dtype).contiguous())
    return weight


register_default("cvxq_dequantize", _dequantize_default)
register_product("cvxq", num_packed=6)
define_input_gradient("cvxq", 6, _PACKED, _GEOMETRY)


# ---------------------------------------------------------------------------------- shape inference


@torch.library.register_fake("hf_vq::cvxq_dequantize")
def _dequantize_fake(*args: Any) -> Tensor:
    words, in_features, out_features, dtype = args[0], args[6], args[7], args[10]
    return words.new_empty((out_features, in_features), dtype=dtype)


@torch.library.register_fake("hf_vq::cvxq_linear")
def _linear_fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], rest[7]))


# ---------------------------------------------------------------------------------------- gradients


def _gradients(
    grad_weight: Tensor,
    needed: tuple[bool, ...],
    packed: tuple[Any, ...],
    geometry: tuple[Any, ...],
) -> list[Tensor | None]:
    """Gradients of the six packed tensors, given that of the dense weight (out, in)."""
    words, depths, scales, _, location, row_perm = packed
    out_features, group_rows, _ = geometry
    clusters, in_features = scales.shape
    out: list[Tensor | None] = [None] * 6

    def sum_groups(clustered: Tensor) -> Tensor:
        padded = F.pad(clustered, (0, 0, 0, clusters * group_rows - out_features))
        return padded.view(clusters, group_rows, in_features).sum(1)

    grad = grad_weight.float()
    if row_perm is not None:
        grad = grad.index_select(0, row_numbers(row_perm))
    in_units = location is not None and not location.is_floating_point()
    sums = sum_groups(grad) if needed[4] or in_units else None
    if needed[2]:
        ones = torch.ones_like(scales, dtype=torch.float32)
        level = torch.ops.hf_vq.cvxq_dequantize(
            words, depths, ones, None, None, None, in_features, *geometry, torch.float32
        )
        total = sum_groups(level.mul_(grad))
        if in_units and sums is not None:
            total += sums * location.float() * LOCATION_UNIT
        out[2] = total.to(scales.dtype)
    if needed[4] and sums is not None:
        out[4] = sums.to(location.dtype)
    return out


register_gradients("cvxq", 6, _PACKED, _GEOMETRY, (2, 4), _gradients)
