"""Which operator computes with which method's packed tensors: the one table layers ask."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import hf_vq_kernels
import torch
from torch import Tensor

from hf_vq.formats.cvxq import CVXQSpec
from hf_vq.formats.gptvq import GPTVQSpec
from hf_vq.formats.vptq import VPTQSpec

Packed = Mapping[str, Any]  # name -> Tensor, as in spec.layout()


class Operator(NamedTuple):
    """linear(x, packed, spec, bias) -> x @ W.T + bias; dequantize(packed, spec, dtype) -> W.

    embedding(ids, packed, spec, dtype) -> W[ids], of which only these rows are decoded.
    """

    linear: Callable[[Tensor, Packed, Any, Tensor | None], Tensor]
    dequantize: Callable[[Packed, Any, torch.dtype], Tensor]
    embedding: Callable[[Tensor, Packed, Any, torch.dtype], Tensor]


def _gptvq_tensors(packed: Packed) -> tuple[Tensor | None, ...]:
    """The stored tensors in the operators' order; 1-D factors take the place of codebooks."""
    codebooks = packed["codebook_factors"] if "codebook_factors" in packed else packed["codebooks"]
    return (
        packed["indices"],
        codebooks,
        packed.get("codebook_scales"),
        packed.get("codebook_basis"),
        packed.get("scale_codes"),
        packed.get("scale_grid"),
    )


def _gptvq_geometry(spec: GPTVQSpec) -> tuple[int, int, int, int, int, bool]:
    return (
        spec.vector_dim,
        spec.num_centroids,
        spec.group_rows,
        spec.group_columns,
        spec.scale_block,
        spec.scale_domain == "log",
    )


def _gptvq_linear(x: Tensor, packed: Packed, spec: GPTVQSpec, bias: Tensor | None) -> Tensor:
    return hf_vq_kernels.gptvq_linear(x, *_gptvq_tensors(packed), bias, *_gptvq_geometry(spec))


def _gptvq_arguments(packed: Packed, spec: GPTVQSpec) -> tuple[Any, ...]:
    return (*_gptvq_tensors(packed), spec.in_features, *_gptvq_geometry(spec))


def _gptvq_dequantize(packed: Packed, spec: GPTVQSpec, dtype: torch.dtype) -> Tensor:
    return hf_vq_kernels.gptvq_dequantize(*_gptvq_arguments(packed, spec), dtype)


def _gptvq_embedding(ids: Tensor, packed: Packed, spec: GPTVQSpec, dtype: torch.dtype) -> Tensor:
    return hf_vq_kernels.gptvq_embedding(ids, *_gptvq_arguments(packed, spec), dtype)


_VPTQ_TENSORS = (
    "indices", "centroids.weight", "res_centroids.weight", "outlier_indices",
    "outlier_centroids.weight", "perm", "weight_scale", "weight_bias",
)  # fmt: skip


def _vptq_tensors(packed: Packed, spec: VPTQSpec) -> tuple[Tensor | None, ...]:
    if spec.storage != "packed":
        raise ValueError(
            f'the operators compute with storage "packed", not {spec.storage!r}: store the matrix '
            "again with hf_vq.formats.vptq.modernize"
        )
    return tuple(packed.get(name) for name in _VPTQ_TENSORS)


def _vptq_geometry(spec: VPTQSpec) -> tuple[int, int, int, bool]:
    return spec.out_features, spec.vector_dim, spec.outlier_vector_dim, spec.norm == "rows"


def _vptq_linear(x: Tensor, packed: Packed, spec: VPTQSpec, bias: Tensor | None) -> Tensor:
    tensors = _vptq_tensors(packed, spec)
    return hf_vq_kernels.vptq_linear(x, *tensors, bias, *_vptq_geometry(spec))


def _vptq_arguments(packed: Packed, spec: VPTQSpec) -> tuple[Any, ...]:
    return (*_vptq_tensors(packed, spec), spec.in_features, *_vptq_geometry(spec))


def _vptq_dequantize(packed: Packed, spec: VPTQSpec, dtype: torch.dtype) -> Tensor:
    return hf_vq_kernels.vptq_dequantize(*_vptq_arguments(packed, spec), dtype)


def _vptq_embedding(ids: Tensor, packed: Packed, spec: VPTQSpec, dtype: torch.dtype) -> Tensor:
    return hf_vq_kernels.vptq_embedding(ids, *_vptq_arguments(packed, spec), dtype)


def _cvxq_tensors(packed: Packed) -> tuple[Tensor | None, ...]:
    """The stored tensors in the operators' order; codes on a grid take the place of scales."""
    return (
        packed["words"],
        packed["depths"],
        packed["scale_codes"] if "scale_codes" in packed else packed["scales"],
        packed.get("scale_grid"),
        packed.get("location"),
        packed.get("row_perm"),
    )


def _cvxq_linear(x: Tensor, packed: Packed, spec: CVXQSpec, bias: Tensor | None) -> Tensor:
    return hf_vq_kernels.cvxq_linear(
        x, *_cvxq_tensors(packed), bias, spec.out_features, spec.group_rows, spec.levels
    )


def _cvxq_arguments(packed: Packed, spec: CVXQSpec) -> tuple[Any, ...]:
    geometry = (spec.in_features, spec.out_features, spec.group_rows, spec.levels)
    return (*_cvxq_tensors(packed), *geometry)


def _cvxq_dequantize(packed: Packed, spec: CVXQSpec, dtype: torch.dtype) -> Tensor:
    return hf_vq_kernels.cvxq_dequantize(*_cvxq_arguments(packed, spec), dtype)


def _cvxq_embedding(ids: Tensor, packed: Packed, spec: CVXQSpec, dtype: torch.dtype) -> Tensor:
    return hf_vq_kernels.cvxq_embedding(ids, *_cvxq_arguments(packed, spec), dtype)


_ARGUMENTS: dict[str, Callable[[Packed, Any], tuple[Any, ...]]] = {
    "gptvq": _gptvq_arguments,
    "vptq": _vptq_arguments,
    "cvxq": _cvxq_arguments,
}

OPERATORS: dict[str, Operator] = {
    "gptvq": Operator(_gptvq_linear, _gptvq_dequantize, _gptvq_embedding),
    "vptq": Operator(_vptq_linear, _vptq_dequantize, _vptq_embedding),
    "cvxq": Operator(_cvxq_linear, _cvxq_dequantize, _cvxq_embedding),
}


def arguments(packed: Packed, spec: Any) -> tuple[Any, ...]:
    """What the `_dequantize` and `_embedding` operators of the spec's method take before `dtype`.

    The tensors in their order, in_features, and the geometry.
    """
    return _ARGUMENTS[spec.method](packed, spec)
