"""The operators `hf_vq::gptvq_linear` and `hf_vq::gptvq_dequantize`.

Each is defined once (schema, shape inference, gradients) and has a default implementation that any
torch device runs; faster backends register theirs for their device key. The default decodes the
weight into the dtype of the activations and calls the dense product, so a forward pass holds one
dense matrix for the length of the call; the backward pass decodes again and nothing dense is kept
in between. What is computed is written down in reference.py.

Gradients: to `x` and `bias`, and to floating codebooks (and factors, basis, codebook scales) when
they require grad. Indices, scale codes and the scale grid have none.
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
from hf_vq_kernels.dispatch import call, register_default
from hf_vq_kernels.lookup import look_up, vectors_at_once
from hf_vq_kernels.reference import expand_codebooks, wide
from torch import Tensor

_PACKED = (
    "Tensor indices, Tensor codebooks, Tensor? codebook_scales, Tensor? codebook_basis, "
    "Tensor? scale_codes, Tensor? scale_grid"
)
_GEOMETRY = (
    "int vector_dim, int num_centroids, int group_rows, int group_columns, int scale_block, "
    "bool log_scales"
)

torch.library.define(
    "hf_vq::gptvq_dequantize",
    f"({_PACKED}, int in_features, {_GEOMETRY}, ScalarType dtype) -> Tensor",
)
torch.library.define(
    "hf_vq::gptvq_linear", f"(Tensor x, {_PACKED}, Tensor? bias, {_GEOMETRY}) -> Tensor"
)


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
    dtype: torch.dtype,
) -> Tensor:
    """The dense weight (out_features, in_features) in `dtype`.

    `indices` int32 (out_features, words) holds ceil(in_features / vector_dim) codes of
    (num_centroids - 1).bit_length() bits per row. `codebooks`: int8 or floating (stripes, row
    groups, num_centroids, vector_dim), int32 (stripes, row groups, words) for 4-bit entries, or
    the factors (stripes, row groups, rank) when `codebook_basis` (rank, num_centroids) is given.
    `codebook_scales`: (stripes, row groups). `scale_codes` int32 (out_features, words) and
    `scale_grid` (2, blocks) give every row one scale per `scale_block` columns.
    """
    return call("gptvq_dequantize", (
        indices, codebooks, codebook_scales, codebook_basis, scale_codes, scale_grid, in_features,
        vector_dim, num_centroids, group_rows, group_columns, scale_block, log_scales, dtype,
    ))  # fmt: skip


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
    """x (..., in_features) times the packed weight, plus bias: (..., out_features), dtype of x.

    The packed tensors are those of `gptvq_dequantize`; `bias` (out_features,) is cast to x.dtype.
    """
    return call("gptvq_linear", (
        x, indices, codebooks, codebook_scales, codebook_basis, scale_codes, scale_grid, bias,
        vector_dim, num_centroids, group_rows, group_columns, scale_block, log_scales,
    ))  # fmt: skip


# ---------------------------------------------------------------------------------- default backend


def _entry_numbers(
    indices: Tensor,
    shape: torch.Size,
    num_vectors: int,
    vectors_per_stripe: int,
    group_rows: int,
    first_row: int = 0,
) -> Tensor:
    """Row of every vector in the stacked codebooks of `shape` (S, G, k, d): (rows, num_vectors).

    `indices` are those of the rows from `first_row` on.
    """
    stripes, groups, k, _ = shape
    device = indices.device
    flat = unpack_bits(indices, (k - 1).bit_length(), num_vectors)
    dtype = torch.int32 if stripes * groups * k < 2**31 else torch.int64
    flat = flat.to(dtype)
    if groups > 1:
        row = torch.arange(first_row, first_row + indices.shape[0], device=device, dtype=dtype)
        group = row // group_rows
        flat = flat + (group * k)[:, None]
    if stripes > 1:
        stripe = torch.arange(num_vectors, device=device, dtype=dtype) // vectors_per_stripe
        flat = flat + stripe * (groups * k)
    return flat


def _scale_table(scale_grid: Tensor, log_scales: bool) -> Tensor:
    """The 16 scales of every block, float32 (blocks, 16).

    Evaluated in float64 and rounded once, so that every platform gets the same bits.
    """
    offset, step = wide(scale_grid).unsqueeze(-1)
    table = offset + step * torch.arange(16, device=scale_grid.device)
    return (torch.exp2(table) if log_scales else table).float()


def _scales(scale_codes: Tensor, scale_grid: Tensor, log_scales: bool) -> Tensor:
    """Scale of every (row, block), float32 (out, blocks)."""
    table = _scale_table(scale_grid, log_scales)
    blocks = table.shape[0]
    flat = unpack_bits(scale_codes, 4, blocks)
    flat = flat + torch.arange(0, blocks * 16, 16, device=flat.device, dtype=torch.int32)
    return table.flatten().index_select(0, flat.flatten()).view(flat.shape)


def _scale_columns_(weight: Tensor, scales: Tensor, scale_block: int) -> None:
    """Multiply `weight` (out, columns) by its blocks' `scales` (out, blocks) in place."""
    whole = weight.shape[1] // scale_block
    if whole:
        view = weight[:, : whole * scale_block].unflatten(1, (whole, scale_block))
        view *= scales[:, :whole, None]
    if whole < scales.shape[1]:
        weight[:, whole * scale_block :] *= scales[:, whole:]


def _dequantize_default(
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
    dtype: torch.dtype,
) -> Tensor:
    table = expand_codebooks(codebooks, codebook_scales, codebook_basis, num_centroids, vector_dim)
    shape, table = table.shape, table.view(-1, vector_dim)
    rows, num_vectors = indices.shape[0], -(-in_features // vector_dim)
    if scale_codes is None or scale_grid is None:
        # Rounding before the look-up gives the same numbers and moves fewer bytes.
        table = table.to(dtype)
    weight = torch.empty((rows, in_features), dtype=dtype, device=indices.device)
    # In slices, so that what is held besides the result stays small (and in the CPU's cache).
    step = max(1, vectors_at_once(indices.device) // num_vectors)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        flat = _entry_numbers(
            indices[part], shape, num_vectors, group_columns // vector_dim, group_rows, start
        )
        values = look_up(table, flat)[:, :in_features]
        if scale_codes is not None and scale_grid is not None:
            scales = _scales(scale_codes[part], scale_grid, log_scales)
            _scale_columns_(values, scales, scale_block)
        weight[part] = values
    return weight


register_default("gptvq_dequantize", _dequantize_default)
register_product("gptvq", num_packed=6)
define_input_gradient("gptvq", 6, _PACKED, _GEOMETRY)


# ---------------------------------------------------------------------------------- shape inference


@torch.library.register_fake("hf_vq::gptvq_dequantize")
def _dequantize_fake(*args: Any) -> Tensor:
    indices, in_features, dtype = args[0], args[6], args[13]
    return indices.new_empty((indices.shape[0], in_features), dtype=dtype)


@torch.library.register_fake("hf_vq::gptvq_linear")
def _linear_fake(x: Tensor, indices: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], indices.shape[0]))


# ---------------------------------------------------------------------------------------- gradients


def _codebook_gradients(
    grad_weight: Tensor,
    needed: tuple[bool, ...],
    packed: tuple[Any, ...],
    geometry: tuple[Any, ...],
) -> list[Tensor | None]:
    """Gradients of the six packed tensors, given that of the dense weight (out, in)."""
    indices, codebooks, _, _, scale_codes, scale_grid = packed
    vector_dim, k, group_rows, group_columns, scale_block, log_scales = geometry
    shape = torch.Size((*codebooks.shape[:2], k, vector_dim))
    num_vectors = -(-grad_weight.shape[1] // vector_dim)

    grad = grad_weight.float()
    if scale_codes is not None:
        grad = grad.clone()
        _scale_columns_(grad, _scales(scale_codes, scale_grid, log_scales), scale_block)
    grad = F.pad(grad, (0, num_vectors * vector_dim - grad.shape[1]))
    flat = _entry_numbers(indices, shape, num_vectors, group_columns // vector_dim, group_rows)
    values = grad.new_zeros((shape.numel() // vector_dim, vector_dim))
    # int64: the CPU adds along int32 indices several times slower
    values = values.index_add_(0, flat.flatten().long(), grad.reshape(-1, vector_dim)).view(shape)
    return stored_gradients(values, needed, packed)


def stored_gradients(
    values: Tensor, needed: tuple[bool, ...], packed: tuple[Any, ...]
) -> list[Tensor | None]:
    """Gradients of the six packed tensors, given that of the codebook values (S, G, k, d)."""
    _, codebooks, codebook_scales, codebook_basis, *_ = packed
    k, vector_dim = values.shape[2:]
    out: list[Tensor | None] = [None] * 6
    scaled = values
    if codebook_scales is not None:
        scaled = values * codebook_scales.float()[..., None, None]
    if needed[1]:
        stored = scaled
        if codebook_basis is not None:
            stored = scaled.squeeze(-1) @ codebook_basis.float().T
        out[1] = stored.to(codebooks.dtype)
    if needed[2]:
        unscaled = expand_codebooks(codebooks, None, codebook_basis, k, vector_dim)
        out[2] = (values * unscaled).sum((-2, -1)).to(codebook_scales.dtype)
    if needed[3]:
        factors = codebooks.float().flatten(0, 1)
        out[3] = (factors.T @ scaled.reshape(-1, k)).to(codebook_basis.dtype)
    return out


register_gradients("gptvq", 6, _PACKED, _GEOMETRY, (1, 2, 3), _codebook_gradients)
