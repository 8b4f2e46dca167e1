"""The operators `hf_vq::{gptvq,vptq,cvxq}_embedding`: rows of a packed table, by number.

`f(ids, *packed, in_features, *geometry, dtype)` is row `ids` of what the `_dequantize` operator of
the same format makes of the same tensors, bit for bit; the readable specification is therefore
`reference.gptvq_dequantize(...)[ids]` and its like. Only the rows asked for are decoded: a table
of 100,000 tokens is never dense. A number beyond the table raises, as in `nn.Embedding`.

How far a row is from the others differs. GPTVQ packs every row by itself. In VPTQ a vector spans
`vector_dim` rows of a column, of which one number is kept. In CVXQ a row has one code in every
group of its cluster, whose place in the words follows from the depths of all groups before it.

There are no gradients: a packed table is not trained, and ids have none.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hf_vq_kernels.bits import unpack_bits
from hf_vq_kernels.cvxq_ops import first_words
from hf_vq_kernels.cvxq_reference import expand_location, expand_scales, row_numbers
from hf_vq_kernels.dispatch import register_default
from hf_vq_kernels.levels import level_table_on
from hf_vq_kernels.lookup import vectors_at_once
from hf_vq_kernels.reference import expand_codebooks
from hf_vq_kernels.reference import expand_scales as expand_row_scales
from hf_vq_kernels.vptq_ops import _rows, _shape, _stored_order
from hf_vq_kernels.vptq_reference import unsigned_16
from torch import Tensor

_SCHEMAS = {
    "gptvq": (
        "Tensor indices, Tensor codebooks, Tensor? codebook_scales, Tensor? codebook_basis, "
        "Tensor? scale_codes, Tensor? scale_grid, int in_features, int vector_dim, "
        "int num_centroids, int group_rows, int group_columns, int scale_block, bool log_scales"
    ),
    "vptq": (
        "Tensor indices, Tensor centroids, Tensor? res_centroids, Tensor? outlier_indices, "
        "Tensor? outlier_centroids, Tensor? perm, Tensor? weight_scale, Tensor? weight_bias, "
        "int in_features, int out_features, int vector_dim, int outlier_vector_dim, bool norm_rows"
    ),
    "cvxq": (
        "Tensor words, Tensor depths, Tensor scales, Tensor? scale_grid, Tensor? location, "
        "Tensor? row_perm, int in_features, int out_features, int group_rows, str levels"
    ),
}
"""Arguments between `ids` and `dtype`: those of the `_dequantize` operators."""
_IN_FEATURES = {"gptvq": 7, "vptq": 9, "cvxq": 7}
"""Where `in_features` stands among all arguments."""

for _method, _arguments in _SCHEMAS.items():
    torch.library.define(
        f"hf_vq::{_method}_embedding", f"(Tensor ids, {_arguments}, ScalarType dtype) -> Tensor"
    )


def gptvq_embedding(ids: Tensor, *arguments: Any) -> Tensor:
    """Rows `ids` (integers of any shape) of the weight: (*ids.shape, in_features) in `dtype`.

    arguments: those of `gptvq_dequantize`. Raises IndexError for a number beyond the rows.
    """
    return torch.ops.hf_vq.gptvq_embedding(ids, *arguments)


def vptq_embedding(ids: Tensor, *arguments: Any) -> Tensor:
    """Rows `ids` (integers of any shape) of the weight: (*ids.shape, in_features) in `dtype`.

    arguments: those of `vptq_dequantize`. Raises IndexError for a number beyond the rows.
    """
    return torch.ops.hf_vq.vptq_embedding(ids, *arguments)


def cvxq_embedding(ids: Tensor, *arguments: Any) -> Tensor:
    """Rows `ids` (integers of any shape) of the weight: (*ids.shape, in_features) in `dtype`.

    arguments: those of `cvxq_dequantize`. Raises IndexError for a number beyond the rows.
    """
    return torch.ops.hf_vq.cvxq_embedding(ids, *arguments)


# ---------------------------------------------------------------------------------- default backend


def _gptvq(
    ids: Tensor,
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
    rows = _checked(ids, indices.shape[0])
    vectors = -(-in_features // vector_dim)
    table = expand_codebooks(codebooks, codebook_scales, codebook_basis, num_centroids, vector_dim)
    stripes, groups = table.shape[:2]
    code = unpack_bits(
        indices.index_select(0, rows), (num_centroids - 1).bit_length(), vectors
    ).long()
    stripe = torch.arange(vectors, device=rows.device) // (group_columns // vector_dim)
    book = stripe.clamp(max=stripes - 1) * groups + (rows // group_rows)[:, None]
    values = table.view(-1, vector_dim)[book * num_centroids + code].flatten(1)[:, :in_features]
    if scale_codes is not None and scale_grid is not None:
        codes = scale_codes.index_select(0, rows)
        scales = expand_row_scales(codes, scale_grid, scale_grid.shape[1], log_scales)
        block = torch.arange(in_features, device=rows.device) // scale_block
        values = values * scales.index_select(1, block)
    return values.to(dtype).view(*ids.shape, in_features)


def _vptq(
    ids: Tensor,
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
    rows = _checked(ids, out_features)
    shape = _shape(indices, centroids, res_centroids, outlier_indices, in_features, vector_dim)
    codes = unpack_bits(
        indices.index_select(1, rows // vector_dim), shape.main_bits + shape.res_bits, shape.width
    )
    codes = codes.transpose(0, 1).flatten(1)  # (ids, stored columns but outliers)
    group = None
    if shape.groups > 1:
        group = torch.arange(codes.shape[1], device=rows.device) // shape.width
    part = (rows % vector_dim)[:, None]

    def component(book: Tensor, number: Tensor, which: Tensor, dim: int) -> Tensor:
        return book.float().flatten()[number.long() * dim + which]

    values = component(centroids, _rows(codes, 0, shape.main_bits, group), part, vector_dim)
    if res_centroids is not None:
        number = _rows(codes, shape.main_bits, shape.res_bits, group)
        values = values + component(res_centroids, number, part, vector_dim)
    if outlier_indices is not None and outlier_centroids is not None:
        dim = outlier_vector_dim
        number = unsigned_16(outlier_indices[0].index_select(0, rows // dim))
        outliers = component(outlier_centroids, number, (rows % dim)[:, None], dim)
        values = torch.cat([outliers, values], dim=1)
    if perm is not None:
        values = values.index_select(1, _stored_order(perm, in_features, rows.device))
    if weight_scale is not None and weight_bias is not None:
        scale, offset = weight_scale.float(), weight_bias.float()
        if norm_rows:
            scale, offset = scale[rows, None], offset[rows, None]
        values = values * scale + offset
    return values.to(dtype).view(*ids.shape, in_features)


def _cvxq(
    ids: Tensor,
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
    place = _checked(ids, out_features)
    if row_perm is not None:
        order = row_numbers(row_perm)
        # into zeros, so that the all-zero permutation of a layer without values points inside
        place = (
            torch.zeros_like(order)
            .scatter_(0, order, torch.arange(len(order), device=order.device))
            .index_select(0, place)
        )
    depth = unpack_bits(depths, 4, in_features)
    first = first_words(depth, group_rows)
    scale = expand_scales(scales, scale_grid)
    shift = None if location is None else expand_location(location, scale)
    table = level_table_on(levels, ids.device)
    stream = F.pad(words, (0, 2)).long() & 0xFFFFFFFF
    out = torch.empty((len(place), in_features), dtype=dtype, device=ids.device)
    step = max(1, vectors_at_once(ids.device) // in_features)
    for start in range(0, len(place), step):
        part = place[start : start + step]
        cluster, bits = part // group_rows, depth[part // group_rows].long()
        bit = bits * (part % group_rows)[:, None]
        at = first[cluster] + (bit >> 5)
        # a code is in the word where it starts and the one after
        pair = stream[at] | stream[at + 1] << 32
        base = 1 << bits
        values = table[base + (pair >> (bit & 31) & base - 1)] * scale[cluster]
        if shift is not None:
            values = values + shift[cluster]
        out[start : start + step] = values
    return out.view(*ids.shape, in_features)


def _checked(ids: Tensor, rows: int) -> Tensor:
    """`ids` as int64 (n,); raises for a number that is no row, on every device as look-ups do."""
    flat = ids.flatten().long()
    return torch.arange(rows, device=ids.device).index_select(0, flat)


for _method, _default in {"gptvq": _gptvq, "vptq": _vptq, "cvxq": _cvxq}.items():
    register_default(f"{_method}_embedding", _default)


# ---------------------------------------------------------------------------------- shape inference


def _register_fake(method: str) -> None:
    @torch.library.register_fake(f"hf_vq::{method}_embedding")
    def fake(ids: Tensor, *arguments: Any) -> Tensor:
        in_features, dtype = arguments[_IN_FEATURES[method] - 1], arguments[-1]
        return ids.new_empty((*ids.shape, in_features), dtype=dtype)


for _method in _SCHEMAS:
    _register_fake(_method)
