"""GPTVQ's Triton kernels against the fp32 reference: few tokens, tiles, every codebook type."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import ODD_SPECS
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
from hf_vq_kernels import reference, triton_gptvq

from hf_vq.formats.gptvq import GPTVQSpec
from tests.kernels.test_ops import arguments

# smaller than ODD_SPECS, since the interpreter takes its time
SMALL = {
    name: dataclasses.replace(spec, out_features=min(spec.out_features, 7))
    for name, spec in ODD_SPECS.items()
}


def case(spec: GPTVQSpec) -> Case:
    return make("gptvq", arguments, reference.gptvq_dequantize, spec)


@pytest.mark.parametrize("name", SMALL)
def test_dequantize(name: str) -> None:
    packed = case(ODD_SPECS[name])
    for dtype in TOLERANCE:
        ours = packed.dequantize(dtype)
        # scales are evaluated in float32 here, in float64 by the reference
        assert relative(ours, packed.weight.to(dtype)) < (1e-6 if dtype == torch.float32 else 5e-3)
        assert ours.dtype == dtype and ours.is_contiguous()


@pytest.mark.parametrize("name", SMALL)
def test_one_token(name: str) -> None:
    check_product(case(SMALL[name]), 1, torch.float32)


@DTYPES
@pytest.mark.parametrize("tokens", [1, 3, 4])
def test_few_tokens(tokens: int, dtype: torch.dtype) -> None:
    check_product(case(GPTVQSpec(9, 172, 4, 256, 4, 64, scale_block=32)), tokens, dtype)


@DTYPES
@pytest.mark.parametrize("name", ["2d-int8-log", "4d-int4-linear", "8d-float16"])
def test_tiles(name: str, dtype: torch.dtype) -> None:
    packed = case(ODD_SPECS[name])
    check_product(packed, 17, dtype)
    check_input_gradient(packed, 5, dtype)


@pytest.mark.parametrize("tokens", [2, 6])
def test_many_columns(tokens: int, many_splits: None) -> None:  # noqa: F811
    packed = case(GPTVQSpec(3, 896, 2, 16, 2, 256))
    check_product(packed, tokens, torch.bfloat16)
    check_product(packed, tokens, torch.float32, bias=False)
    check_input_gradient(packed, tokens, torch.float32)


@pytest.mark.parametrize("config", triton_gptvq._decode.space, ids=str)
def test_every_point_of_the_tuning_space(config: object) -> None:
    with only(triton_gptvq._decode, config):
        check_product(case(GPTVQSpec(5, 43, 4, 37, 3, 16)), 2, torch.float32)


def test_codes_beyond_the_last_are_ignored() -> None:
    # the format lets writers put anything there, which must not be looked up
    packed = case(GPTVQSpec(6, 10, 2, 9, 6, 10, "float16"))
    indices = packed.packed[0]
    assert indices is not None
    indices |= ~((1 << 20) - 1)
    check_product(packed, 1, torch.float32)
    check_product(packed, 6, torch.float32)
    assert relative(packed.dequantize(torch.float32), packed.weight) == 0
