"""What the operators compute, in plain differentiable fp32 torch. Speed does not matter here.

The tensors are those of the gptvq v1 format (docs/format.md). Weight (i, j) of the matrix belongs
to row group i // group_rows, stripe j // group_columns, vector j // vector_dim of its row and scale
block j // scale_block:

    weight[i, j] = codebook[stripe, group, index, j mod vector_dim] * scale[i, block]

Every codebook value and every scale is rounded to fp32 once, from float64; then comes one fp32
product, then one cast to the activations' dtype.
"""

from __future__ import annotations

import torch
from hf_vq_kernels.bits import unpack_bits
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in float64: codebook values and scales are evaluated there, then rounded once."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()  # mps: no float64


def expand_codebooks(
    codebooks: Tensor,
    codebook_scales: Tensor | None,
    codebook_basis: Tensor | None,
    num_centroids: int,
    vector_dim: int,
) -> Tensor:
    """Codebook values, float32 (stripes, row groups, num_centroids, vector_dim).

    `codebooks` is int8 or floating (S, G, k, d), int32 (S, G, words) holding two's complement
    nibbles, or, with `codebook_basis` (rank, k), the factors (S, G, rank) of 1-D codebooks.
    """
    if codebooks.dtype == torch.int32:
        nibbles = unpack_bits(codebooks, 4, num_centroids * vector_dim)
        codebooks = ((nibbles ^ 8) - 8).unflatten(-1, (num_centroids, vector_dim))
    values = wide(codebooks)
    if codebook_basis is not None:
        values = (values @ wide(codebook_basis)).unsqueeze(-1)
    if codebook_scales is not None:
        values = values * wide(codebook_scales)[..., None, None]
    return values.float()


def expand_scales(
    scale_codes: Tensor, scale_grid: Tensor, num_blocks: int, log_scales: bool
) -> Tensor:
    """Scale of every (row, block of columns), float32 (out_features, num_blocks)."""
    codes = unpack_bits(scale_codes, 4, num_blocks)
    offset, step = wide(scale_grid)
    scales = offset + step * codes
    return (torch.exp2(scales) if log_scales else scales).float()


def gptvq_dequantize(
    indices: Tensor,
    codebooks: Tensor,
    codebook_scales: Tensor | None,
    codebook_basis: Tensor | None,
    scale_codes: Tensor | None,
    scale_grid: Tensor | None,
    in_features: int,
    vector_dim: int,
    num_centroids: int,
    group_rows: int,
    group_columns: int,
    scale_block: int,
    log_scales: bool,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The dense weight, (out_features, in_features)."""
    device = indices.device
    index_bits = (num_centroids - 1).bit_length()
    num_vectors = -(-in_features // vector_dim)
    index = unpack_bits(indices, index_bits, num_vectors).long()

    row = torch.arange(indices.shape[0], device=device)[:, None]
    column = torch.arange(in_features, device=device)[None, :]
    values = expand_codebooks(codebooks, codebook_scales, codebook_basis, num_centroids, vector_dim)
    weight = values[
        column // group_columns,
        row // group_rows,
        index[row, column // vector_dim],
        column % vector_dim,
    ]
    if scale_codes is not None and scale_grid is not None:
        scales = expand_scales(scale_codes, scale_grid, scale_grid.shape[1], log_scales)
        weight = weight * scales[row, column // scale_block]
    return weight.to(dtype)


def gptvq_linear(
    x: Tensor,
    indices: Tensor,
    codebooks: Tensor,
    codebook_scales: Tensor | None,
    codebook_basis: Tensor | None,
    scale_codes: Tensor | None,
    scale_grid: Tensor | None,
    bias: Tensor | None,
    vector_dim: int,
    num_centroids: int,
    group_rows: int,
    group_columns: int,
    scale_block: int,
    log_scales: bool,
) -> Tensor:
    """x (..., in_features) @ weight.T + bias -> (..., out_features), in the dtype of x."""
    weight = gptvq_dequantize(
        indices, codebooks, codebook_scales, codebook_basis, scale_codes, scale_grid,
        x.shape[-1], vector_dim, num_centroids, group_rows, group_columns, scale_block,
        log_scales, x.dtype,
    )  # fmt: skip
    y = x @ weight.T
    return y if bias is None else y + bias.to(x.dtype)
