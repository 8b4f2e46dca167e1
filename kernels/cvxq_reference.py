"""What the CVXQ operators compute, in plain differentiable fp32 torch. Speed does not matter here.

The tensors are those of the cvxq v1 format (docs/format.md). Row r of the clustered order belongs
to cluster m = r // group_rows; with the depth, scale and location of its group (m, column),

    clustered[r, column] = location + scale * level[(1 << depth) + code]
    weight[row_perm] = clustered

The scale is rounded to fp32 once, from float64; the product and the sum are each rounded to fp32;
then comes one cast to the activations' dtype.
"""

from __future__ import annotations

import torch
from hf_vq_kernels.bits import unpack_bits
from hf_vq_kernels.levels import level_table
from hf_vq_kernels.reference import wide
from hf_vq_kernels.vptq_reference import unsigned_16
from torch import Tensor

LOCATION_UNIT = 1 / 64
"""int8 locations are multiples of this part of their group's scale."""


def expand_scales(scales: Tensor, scale_grid: Tensor | None) -> Tensor:
    """Scale of every group, float32 (clusters, columns).

    `scales` is floating, or uint8 codes when `scale_grid` (2, clusters) = (offset, step) is given:
    2 ** (offset + step * code), evaluated in float64 and rounded once.
    """
    if scale_grid is None:
        return scales.float()
    offset, step = wide(scale_grid).unsqueeze(-1)
    return torch.exp2(offset + step * scales).float()


def expand_location(location: Tensor, scales: Tensor) -> Tensor:
    """Location of every group, float32 (clusters, columns); `scales` are those of expand_scales."""
    if location.is_floating_point():
        return location.float()
    return location.float() * LOCATION_UNIT * scales


def row_numbers(row_perm: Tensor) -> Tensor:
    """A stored permutation, int16 (unsigned) or int32, as int64."""
    return unsigned_16(row_perm) if row_perm.dtype == torch.int16 else row_perm.long()


def unpack_codes(words: Tensor, depth: Tensor, group_rows: int) -> Tensor:
    """The codes of all groups: int64 (clusters, columns, group_rows).

    `depth`: integers (clusters, columns). Groups follow each other in its order, each from the
    start of a word.
    """
    depth = depth.long()
    sizes = (depth * group_rows + 31) // 32
    first_word = (sizes.flatten().cumsum(0) - sizes.flatten()).view(depth.shape)
    first_bit = 32 * first_word[..., None] + depth[..., None] * torch.arange(group_rows)
    stream = torch.nn.functional.pad(words.long(), (0, 1))
    codes = torch.zeros_like(first_bit)
    for b in range(int(depth.max())):
        inside = b < depth[..., None]
        at = torch.where(inside, first_bit + b, 0)
        codes += torch.where(inside, (stream[at // 32] >> at % 32 & 1) << b, 0)
    return codes


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
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The dense weight, (out_features, in_features)."""
    depth = unpack_bits(depths, 4, in_features)
    number = (1 << depth[..., None].long()) + unpack_codes(words, depth, group_rows)
    scale = expand_scales(scales, scale_grid)
    values = scale[..., None] * level_table(levels)[number]
    if location is not None:
        values = values + expand_location(location, scale)[..., None]
    clustered = values.transpose(1, 2).flatten(0, 1)[:out_features]
    if row_perm is not None:
        clustered = clustered[row_numbers(row_perm).argsort()]
    return clustered.to(dtype)


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
    """x (..., in_features) @ weight.T + bias -> (..., out_features), in the dtype of x."""
    weight = cvxq_dequantize(
        words, depths, scales, scale_grid, location, row_perm, x.shape[-1], out_features,
        group_rows, levels, x.dtype,
    )  # fmt: skip
    y = x @ weight.T
    return y if bias is None else y + bias.to(x.dtype)
