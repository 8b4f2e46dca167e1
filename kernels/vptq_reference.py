"""What the VPTQ operators compute, in plain differentiable fp32 torch. Speed does not matter here.

The tensors are those of the packed VPTQ format (docs/format.md). A vector is `vector_dim`
consecutive rows of one column, so that in the order of the stored columns, outliers first,

    decoded[i, outliers + g * width + c] = centroids[g, main[g, i // vector_dim, c], i % vector_dim]
                                         + res_centroids[g, res[...], i % vector_dim]
    weight[:, perm] = decoded;  weight = weight * weight_scale + weight_bias

The sum, the product and the second sum are each rounded to fp32; then comes one cast to the
activations' dtype.
"""

from __future__ import annotations

import torch
from hf_vq_kernels.bits import unpack_bits
from torch import Tensor


def unsigned_16(stored: Tensor) -> Tensor:
    """int16 elements that hold uint16 bit patterns, as int64 in 0..65535."""
    return stored.to(torch.int64) & 0xFFFF


def _columns(index: Tensor, book: Tensor) -> Tensor:
    """Index (blocks, n) of vectors in book (K, v) -> their columns, float32 (blocks * v, n)."""
    return book.float()[index].transpose(1, 2).flatten(0, 1)


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
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The dense weight, (out_features, in_features)."""
    groups = centroids.shape[0]
    books = centroids.unflatten(1, (-1, vector_dim))
    main_bits = (books.shape[1] - 1).bit_length()
    res_books, res_bits = None, 0
    if res_centroids is not None:
        res_books = res_centroids.unflatten(1, (-1, vector_dim))
        res_bits = (res_books.shape[1] - 1).bit_length()
    outliers = 0 if outlier_indices is None else outlier_indices.shape[-1]
    width = (in_features - outliers) // groups

    code = unpack_bits(indices, main_bits + res_bits, width).long()
    parts = []
    if outlier_indices is not None and outlier_centroids is not None:
        book = outlier_centroids.view(-1, outlier_vector_dim)
        parts.append(_columns(unsigned_16(outlier_indices[0]), book)[:out_features])
    for group in range(groups):
        part = _columns(code[group] & (2**main_bits - 1), books[group])
        if res_books is not None:
            part = part + _columns(code[group] >> main_bits & (2**res_bits - 1), res_books[group])
        parts.append(part[:out_features])
    weight = torch.cat(parts, dim=1)
    if perm is not None:
        weight = weight[:, unsigned_16(perm).argsort()]
    if weight_scale is not None and weight_bias is not None:
        shape = (-1, 1) if norm_rows else (1, -1)
        weight = weight * weight_scale.float().view(shape) + weight_bias.float().view(shape)
    return weight.to(dtype)


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
    """x (..., in_features) @ weight.T + bias -> (..., out_features), in the dtype of x."""
    weight = vptq_dequantize(
        indices, centroids, res_centroids, outlier_indices, outlier_centroids, perm, weight_scale,
        weight_bias, x.shape[-1], out_features, vector_dim, outlier_vector_dim, norm_rows, x.dtype,
    )  # fmt: skip
    y = x @ weight.T
    return y if bias is None else y + bias.to(x.dtype)
