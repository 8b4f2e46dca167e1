"""The operators `hf_vq::vptq_linear` and `hf_vq::vptq_dequantize`, for the packed VPTQ format.

As in ops.py, each is defined once and has a default implementation that any torch device runs; what
is computed is written down in vptq_reference.py. Notable choices of the default: the codes are
brought into the order of the columns before the look-up, which moves a `vector_dim`-th of what the
decoded columns would; where there are far fewer pairs of centroids than vectors, the two
codebooks become one table of sums, and the packed code is its row number.

Gradients: to `x` and `bias`, and to the codebooks, `weight_scale` and `weight_bias` when they
require grad. Indices and the permutation have none.
"""

from __future__ import annotations

from math import lcm
from typing import Any, NamedTuple

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
from hf_vq_kernels.vptq_reference import unsigned_16
from torch import Tensor

_PACKED = (
    "Tensor indices, Tensor centroids, Tensor? res_centroids, Tensor? outlier_indices, "
    "Tensor? outlier_centroids, Tensor? perm, Tensor? weight_scale, Tensor? weight_bias"
)
_GEOMETRY = "int out_features, int vector_dim, int outlier_vector_dim, bool norm_rows"

torch.library.define(
    "hf_vq::vptq_dequantize",
    f"({_PACKED}, int in_features, {_GEOMETRY}, ScalarType dtype) -> Tensor",
)
torch.library.define(
    "hf_vq::vptq_linear", f"(Tensor x, {_PACKED}, Tensor? bias, {_GEOMETRY}) -> Tensor"
)


def vptq_dequantize(
    indices: Tensor,
    centroids: Tensor,
    res_centroids: Tensor | None,
    outlier_indices: Tensor | None,
    outlier_centroids: Tensor | None,
    perm: Tensor | None,
    weight_scale: Tensor | None,
    weight_bias: Tensor | None,
    in_features: int,
    out_features: int,
    vector_dim: int,
    outlier_vector_dim: int,
    norm_rows: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The dense weight (out_features, in_features) in `dtype`.

    `centroids` (G, K * vector_dim) and `res_centroids` (G, R * vector_dim) float, K and R powers of
    two. `indices` int32 (G, ceil(out_features / vector_dim), words) holds one code of
    log2 K + log2 R bits per column of a group, the main index in its low bits.
    `outlier_indices` int16 (1, ceil(out_features / outlier_vector_dim), outlier columns) and
    `outlier_centroids` (1, K0 * outlier_vector_dim) decode the columns before those of the groups.
    `perm` int16 (in_features,): the column of the matrix that each stored column is. int16 tensors
    hold uint16 bit patterns. `weight_scale`, `weight_bias`: one per column of the matrix, or per
    row under `norm_rows`. Raises RuntimeError for `indices` of another width.
    """
    return call("vptq_dequantize", (
        indices, centroids, res_centroids, outlier_indices, outlier_centroids, perm, weight_scale,
        weight_bias, in_features, out_features, vector_dim, outlier_vector_dim, norm_rows, dtype,
    ))  # fmt: skip


def vptq_linear(
    x: Tensor,
    indices: Tensor,
    centroids: Tensor,
    res_centroids: Tensor | None,
    outlier_indices: Tensor | None,
    outlier_centroids: Tensor | None,
    perm: Tensor | None,
    weight_scale: Tensor | None,
    weight_bias: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    vector_dim: int,
    outlier_vector_dim: int,
    norm_rows: bool,
) -> Tensor:
    """x (..., in_features) times the packed weight, plus bias: (..., out_features), dtype of x.

    The packed tensors are those of `vptq_dequantize`; `bias` (out_features,) is cast to x.dtype.
    """
    return call("vptq_linear", (
        x, indices, centroids, res_centroids, outlier_indices, outlier_centroids, perm,
        weight_scale, weight_bias, bias, out_features, vector_dim, outlier_vector_dim, norm_rows,
    ))  # fmt: skip


# ---------------------------------------------------------------------------------- default backend


class _Shape(NamedTuple):
    """What the shapes of the packed tensors say."""

    groups: int
    main_bits: int
    res_bits: int
    outliers: int  # columns
    width: int  # columns per group


def _shape(
    indices: Tensor,
    centroids: Tensor,
    res_centroids: Tensor | None,
    outlier_indices: Tensor | None,
    in_features: int,
    vector_dim: int,
) -> _Shape:
    groups = centroids.shape[0]
    main_bits = (centroids.shape[1] // vector_dim - 1).bit_length()
    res_bits = 0
    if res_centroids is not None:
        res_bits = (res_centroids.shape[1] // vector_dim - 1).bit_length()
    outliers = 0 if outlier_indices is None else outlier_indices.shape[-1]
    width, rest = (in_features - outliers) // groups, (in_features - outliers) % groups
    words = -(-width * (main_bits + res_bits) // 32)
    if rest or width < 1 or words != indices.shape[-1]:
        raise RuntimeError(
            f"indices of shape {tuple(indices.shape)} with {outliers} outlier columns do not "
            f"describe a weight of {in_features} columns"
        )
    return _Shape(groups, main_bits, res_bits, outliers, width)


def _codes(indices: Tensor, shape: _Shape) -> Tensor:
    """Code of every vector, in stored order: int32 (row blocks, groups * width)."""
    codes = unpack_bits(indices, shape.main_bits + shape.res_bits, shape.width)
    return codes.transpose(0, 1).flatten(1)


def _rows(codes: Tensor, first_bit: int, bits: int, group: Tensor | None) -> Tensor:
    """Rows of the stacked codebooks of 2**bits centroids that `codes` point to.

    `group`: int64, the group of every column; None if there is one group.
    """
    rows = codes >> first_bit if first_bit else codes
    rows = rows & (2**bits - 1)  # `>>` copies the sign of a 32-bit code down
    return rows if group is None else rows + (group << bits)


def _stored_order(perm: Tensor | None, in_features: int, device: torch.device) -> Tensor:
    """Where every column of the matrix is stored, int64 (in_features,)."""
    order = torch.arange(in_features, device=device)
    if perm is None:
        return order
    # Into zeros, so that the all-zero perm of a layer without values yet points inside as well.
    return torch.zeros_like(order).scatter_(0, unsigned_16(perm), order)


def _dequantize_default(
    indices: Tensor,
    centroids: Tensor,
    res_centroids: Tensor | None,
    outlier_indices: Tensor | None,
    outlier_centroids: Tensor | None,
    perm: Tensor | None,
    weight_scale: Tensor | None,
    weight_bias: Tensor | None,
    in_features: int,
    out_features: int,
    vector_dim: int,
    outlier_vector_dim: int,
    norm_rows: bool,
    dtype: torch.dtype,
) -> Tensor:
    shape = _shape(indices, centroids, res_centroids, outlier_indices, in_features, vector_dim)
    device, bits = indices.device, shape.main_bits
    table, res_table = centroids.float(), None
    if res_centroids is not None:
        res_table = res_centroids.float()
        pairs = shape.groups << (shape.main_bits + shape.res_bits)
        if 8 * pairs <= indices.shape[1] * in_features:
            bits += shape.res_bits
            main = table.view(shape.groups, 1, -1, vector_dim)
            table = main + res_table.view(shape.groups, -1, 1, vector_dim)
            res_table = None
    table = table.view(-1, vector_dim)
    if res_table is not None:
        res_table = res_table.view(-1, vector_dim)
    elif weight_scale is None:
        # Rounding before the look-up gives the same numbers and moves fewer bytes.
        table = table.to(dtype)

    source = group = None  # of every column of the matrix: its column in the codes, and its group
    if perm is not None or shape.outliers:
        # Outlier columns get the code of some other column here and their own values below.
        source = _stored_order(perm, in_features, device).sub_(shape.outliers).clamp_(min=0)
    if shape.groups > 1:
        column = torch.arange(in_features, device=device) if source is None else source
        group = column // shape.width
    scale = offset = None
    if weight_scale is not None and weight_bias is not None:
        view = (-1, 1) if norm_rows else (1, -1)
        scale, offset = weight_scale.float().view(view), weight_bias.float().view(view)
    outlier_book = outlier_columns = None
    if shape.outliers and outlier_centroids is not None:
        outlier_book = outlier_centroids.float().view(-1, outlier_vector_dim)
        outlier_columns = (
            torch.arange(shape.outliers, device=device)
            if perm is None
            else unsigned_16(perm[: shape.outliers])
        )

    weight = torch.empty((out_features, in_features), dtype=dtype, device=device)
    # In slices of whole vectors of both kinds, so that what is held besides the result stays small
    # (and in the CPU's cache: vectors are turned from rows into columns there).
    together = lcm(vector_dim, outlier_vector_dim or 1)
    step = vectors_at_once(device) // (4 * in_features) * vector_dim
    step = max(1, step // together) * together
    for start in range(0, out_features, step):
        stop = min(start + step, out_features)
        blocks = slice(start // vector_dim, -(-stop // vector_dim))
        codes = _codes(indices[:, blocks], shape)
        if source is not None:
            codes = codes.index_select(1, source)
        values = look_up(table, _rows(codes, 0, bits, group))
        if res_table is not None:
            values += look_up(res_table, _rows(codes, shape.main_bits, shape.res_bits, group))
        part = values.view(-1, in_features, vector_dim).transpose(1, 2)
        part = part.reshape(-1, in_features)[: stop - start]
        if outlier_indices is not None and outlier_book is not None:
            blocks = slice(start // outlier_vector_dim, -(-stop // outlier_vector_dim))
            flat = unsigned_16(outlier_indices[0, blocks])
            values = look_up(outlier_book, flat).view(-1, shape.outliers, outlier_vector_dim)
            values = values.transpose(1, 2).reshape(-1, shape.outliers)[: stop - start]
            part.index_copy_(1, outlier_columns, values.to(part.dtype))
        if scale is not None and offset is not None:
            rows = slice(start, stop) if norm_rows else slice(None)
            part.mul_(scale[rows]).add_(offset[rows])
        weight[start:stop] = part
    return weight


register_default("vptq_dequantize", _dequantize_default)
register_product("vptq", num_packed=8)
define_input_gradient("vptq", 8, _PACKED, _GEOMETRY)


# ---------------------------------------------------------------------------------- shape inference


@torch.library.register_fake("hf_vq::vptq_dequantize")
def _dequantize_fake(*args: Any) -> Tensor:
    indices, in_features, out_features, dtype = args[0], args[8], args[9], args[13]
    return indices.new_empty((out_features, in_features), dtype=dtype)


@torch.library.register_fake("hf_vq::vptq_linear")
def _linear_fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], rest[9]))


# ---------------------------------------------------------------------------------------- gradients


def _sum_vectors(grad: Tensor, flat: Tensor, rows: int, vector_dim: int) -> Tensor:
    """Sum over the vectors of `grad` (out, n) that share a row `flat` (blocks, n): (rows, v)."""
    blocks, columns = flat.shape
    grad = F.pad(grad, (0, 0, 0, blocks * vector_dim - grad.shape[0]))
    vectors = grad.view(blocks, vector_dim, columns).transpose(1, 2).reshape(-1, vector_dim)
    # int64: the CPU adds along int32 indices several times slower
    return vectors.new_zeros((rows, vector_dim)).index_add_(0, flat.flatten().long(), vectors)


def _gradients(
    grad_weight: Tensor,
    needed: tuple[bool, ...],
    packed: tuple[Any, ...],
    geometry: tuple[Any, ...],
) -> list[Tensor | None]:
    """Gradients of the eight packed tensors, given that of the dense weight (out, in)."""
    indices, centroids, res_centroids, outlier_indices, outlier_centroids, perm, scale, _ = packed
    _, vector_dim, outlier_vector_dim, norm_rows = geometry
    in_features = grad_weight.shape[1]
    shape = _shape(indices, centroids, res_centroids, outlier_indices, in_features, vector_dim)
    out: list[Tensor | None] = [None] * 8
    grad = grad_weight.float()
    if scale is not None:
        others = 1 if norm_rows else 0
        if needed[6]:
            plain = torch.ops.hf_vq.vptq_dequantize(
                *packed[:6], None, None, in_features, *geometry, torch.float32
            )
            out[6] = (grad * plain).sum(others).to(scale.dtype)
        if needed[7]:
            out[7] = grad.sum(others).to(packed[7].dtype)
        grad = grad * scale.float().view((-1, 1) if norm_rows else (1, -1))
    if not any(needed[:5]):
        return out
    if perm is not None:
        grad = grad.index_select(1, unsigned_16(perm))
    group = None
    if shape.groups > 1:
        group = torch.arange(in_features - shape.outliers, device=grad.device) // shape.width
    codes = _codes(indices, shape)
    for which, stored, first_bit, bits in (
        (1, centroids, 0, shape.main_bits),
        (2, res_centroids, shape.main_bits, shape.res_bits),
    ):
        if needed[which]:
            flat = _rows(codes, first_bit, bits, group)
            summed = _sum_vectors(grad[:, shape.outliers :], flat, shape.groups << bits, vector_dim)
            out[which] = summed.view(stored.shape).to(stored.dtype)
    if needed[4]:
        rows = outlier_centroids.numel() // outlier_vector_dim
        flat = unsigned_16(outlier_indices[0])
        summed = _sum_vectors(grad[:, : shape.outliers], flat, rows, outlier_vector_dim)
        out[4] = summed.view(outlier_centroids.shape).to(outlier_centroids.dtype)
    return out


register_gradients("vptq", 8, _PACKED, _GEOMETRY, (1, 2, 4, 6, 7), _gradients)
