"""VPTQ's Triton kernels against the fp32 reference: residuals, outliers, permutations, norms."""

from __future__ import annotations

import pytest
import torch
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
from helpers_vptq import ODD_VPTQ
from hf_vq_kernels import triton_common, triton_vptq, vptq_reference

from hf_vq.formats.vptq import VPTQSpec
from tests.kernels.test_vptq_ops import arguments

SMALL = [name for name, spec in ODD_VPTQ.items() if spec.in_features < 1000]
EVERYTHING = ODD_VPTQ["outliers"]


def case(spec: VPTQSpec) -> Case:
    return make("vptq", arguments, vptq_reference.vptq_dequantize, spec)


@pytest.mark.parametrize("name", SMALL)
def test_dequantize(name: str) -> None:
    packed = case(ODD_VPTQ[name])
    for dtype in TOLERANCE:
        ours = packed.dequantize(dtype)
        assert relative(ours, packed.weight.to(dtype)) < (1e-6 if dtype == torch.float32 else 5e-3)


def test_a_permutation_beyond_32767() -> None:
    packed = case(VPTQSpec(3, 32900, 16, 2, 2, permuted=True))
    with only(triton_vptq._decode, triton_common.config(4, BLOCKS=1, LANES=4096, WIDE=1)):
        check_product(packed, 1, torch.float32)


@pytest.mark.parametrize("name", SMALL)
def test_one_token(name: str) -> None:
    check_product(case(ODD_VPTQ[name]), 1, torch.float32)


@DTYPES
@pytest.mark.parametrize("tokens", [1, 3])
def test_few_tokens(tokens: int, dtype: torch.dtype) -> None:
    spec = VPTQSpec(21, 172, 8, 4096, 16, norm="columns", permuted=True)
    check_product(case(spec), tokens, dtype)


@DTYPES
@pytest.mark.parametrize("name", ["main", "residual-32-bits", "outliers-rows"])
def test_tiles(name: str, dtype: torch.dtype) -> None:
    packed = case(ODD_VPTQ[name])
    check_product(packed, 17, dtype)
    check_input_gradient(packed, 5, dtype)


@pytest.mark.parametrize(("tokens", "norm"), [(2, "columns"), (2, "rows"), (6, "columns")])
def test_many_columns(tokens: int, norm: str, many_splits: None) -> None:  # noqa: F811
    packed = case(VPTQSpec(7, 896, 4, 256, 0, 1, 8, 4, 16, norm, permuted=True))
    check_product(packed, tokens, torch.float32)
    check_input_gradient(packed, tokens, torch.float32)


@pytest.mark.parametrize("config", triton_vptq._decode.space, ids=str)
def test_every_point_of_the_tuning_space(config: object) -> None:
    with only(triton_vptq._decode, config):
        check_product(case(EVERYTHING), 2, torch.float32)
