"""Rows of packed tables in Triton, against the same rows of the dense matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers_triton import DEVICE, TOLERANCE, relative
from hf_vq_kernels.dispatch import explain, use_backend
from torch import Tensor

from hf_vq.layers.operators import OPERATORS, arguments
from tests.kernels.test_embedding_ops import ODD, REFERENCES, packed

NAMES = [name for name, spec in ODD.items() if spec.num_weights < 20_000]


def check(spec: Any, ids: Tensor, dtype: torch.dtype) -> None:
    tensors = packed(spec)
    dense = REFERENCES[spec.method](*arguments(tensors, spec), torch.float32)
    tensors = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
    with use_backend("triton"):
        ours = OPERATORS[spec.method].embedding(ids.to(DEVICE), tensors, spec, dtype)
    assert ours.dtype == dtype and ours.shape == (*ids.shape, spec.in_features)
    # Scales are evaluated in float32 here, in float64 by the reference; the interpreter cuts
    # bfloat16 off instead of rounding.
    bound = 1e-6 if dtype == torch.float32 else TOLERANCE[dtype]
    assert relative(ours.cpu(), dense[ids].to(dtype)) < bound


@pytest.mark.parametrize("name", NAMES)
def test_every_row_of_odd_tables(name: str) -> None:
    check(ODD[name], torch.arange(ODD[name].out_features).flip(0), torch.float32)


@pytest.mark.parametrize("method", ["gptvq-2d-int8-log", "vptq-outliers-rows", "cvxq-log8-int8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_shapes_and_dtypes(method: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check(ODD[method], torch.randint(0, 20, shape).int(), dtype)


def test_many_rows_share_a_program() -> None:
    check(ODD["cvxq-one-weight"], torch.zeros(301, dtype=torch.int64), torch.float32)
    check(ODD["vptq-one-weight"], torch.zeros(301, dtype=torch.int64), torch.float32)
    check(ODD["gptvq-1d-one-row"], torch.arange(301) % 11, torch.float32)


def test_a_layer_without_values_decodes_to_zeros() -> None:
    spec = ODD["cvxq-log8-int8"]  # permuted: all rows are stored in place 0
    tensors = {name: torch.zeros_like(t).to(DEVICE) for name, t in packed(spec).items()}
    ids = torch.arange(4, device=DEVICE)
    with use_backend("triton"):
        rows = OPERATORS["cvxq"].embedding(ids, tensors, spec, torch.float32)
    assert not rows.any()


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU it is an assertion that ends the process")
@pytest.mark.parametrize("name", ["gptvq-2d-int8", "vptq-groups", "cvxq-log8"])
def test_numbers_beyond_the_table_are_refused(name: str) -> None:
    spec = ODD[name]
    for bad in (-1, spec.out_features, 2**31):
        with use_backend("triton"), pytest.raises(IndexError, match="out of range"):
            OPERATORS[spec.method].embedding(
                torch.tensor([0, bad]), packed(spec), spec, torch.float32
            )


def test_who_computes_them() -> None:
    spec = ODD["gptvq-2d-int8"]
    tensors = [t.to(DEVICE) if isinstance(t, Tensor) else t for t in arguments(packed(spec), spec)]
    ids = torch.tensor([3, 1], device=DEVICE)
    with use_backend("triton"):
        text = str(explain("gptvq_embedding", ids, *tensors, torch.bfloat16))
    assert text == f"gptvq_embedding(2 int64 on {ids.device}): triton (demanded)"
