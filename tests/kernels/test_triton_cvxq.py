"""CVXQ's Triton kernels against the fp32 reference: every depth, scale, location, permutation."""

from __future__ import annotations

import pytest
import torch
from helpers_cvxq import ODD_CVXQ, with_depths
from helpers_triton import (
    DTYPES,
    TOLERANCE,
    Case,
    check_input_gradient,
    check_product,
    make,
    many_splits,  # noqa: F401
    only,
    relative,
)
from hf_vq_kernels import cvxq_reference, triton_common, triton_cvxq, triton_product

from hf_vq.formats.cvxq import CVXQSpec
from tests.kernels.test_cvxq_ops import arguments

SMALL = [name for name, spec in ODD_CVXQ.items() if spec.out_features < 1000]


def case(spec: CVXQSpec) -> Case:
    return make("cvxq", arguments, cvxq_reference.cvxq_dequantize, spec)


@pytest.mark.parametrize("name", SMALL)
def test_dequantize(name: str) -> None:
    packed = case(ODD_CVXQ[name])
    for dtype in TOLERANCE:
        ours = packed.dequantize(dtype)
        # scales are evaluated in float32 here, in float64 by the reference
        assert relative(ours, packed.weight.to(dtype)) < (1e-6 if dtype == torch.float32 else 5e-3)


def test_a_permutation_beyond_32767() -> None:
    packed = case(with_depths(32900, 2, 20000, permuted=True))
    with only(triton_product._dequantize, triton_common.config(4, ROWS=4096)):
        assert relative(packed.dequantize(torch.float32), packed.weight) < 1e-6


@pytest.mark.parametrize("name", SMALL)
def test_one_token(name: str) -> None:
    check_product(case(ODD_CVXQ[name]), 1, torch.float32)


@DTYPES
@pytest.mark.parametrize("tokens", [1, 3, 4])
def test_few_tokens(tokens: int, dtype: torch.dtype) -> None:
    check_product(case(with_depths(23, 172, 7, "log8", "int8", permuted=True)), tokens, dtype)


@DTYPES
@pytest.mark.parametrize("name", ["log8", "log8-int8", "float16-float16", "one-row-clusters"])
def test_tiles(name: str, dtype: torch.dtype) -> None:
    packed = case(ODD_CVXQ[name])
    check_product(packed, 17, dtype)
    check_input_gradient(packed, 5, dtype)


@pytest.mark.parametrize("tokens", [2, 6])
def test_many_columns(tokens: int, many_splits: None) -> None:  # noqa: F811
    # more column tiles than a program of the sizes takes, and clusters that end within a tile
    packed = case(with_depths(9, 1100, 4, "log8", "float16", permuted=True))
    check_product(packed, tokens, torch.float32)
    check_input_gradient(packed, tokens, torch.float32)


@pytest.mark.parametrize("config", triton_cvxq._decode.space, ids=str)
def test_every_point_of_the_tuning_space(config: object) -> None:
    with only(triton_cvxq._decode, config):
        check_product(case(with_depths(19, 300, 9, "float16", "int8")), 2, torch.float32)
