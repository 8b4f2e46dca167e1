"""Wide tensors are the same matrix, and narrowing gives back what was stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vq.formats import FORMATS
from hf_vq.formats.gptvq import GPTVQSpec
from hf_vq.formats.trainable import trained_names
from hf_vq.layers.operators import OPERATORS
from tests.helpers import gptvq_specs, random_gptvq
from tests.helpers_cvxq import cvxq_specs, random_cvxq, with_depths
from tests.helpers_vptq import random_vptq, vptq_specs


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Any, dict[str, torch.Tensor]]:
    """(spec, packed tensors) of any method."""
    seed = draw(st.integers(0, 2**20))
    method = draw(st.sampled_from(sorted(FORMATS)))
    if method == "cvxq":
        spec, seed = draw(cvxq_specs())
        codes: Any = random_cvxq(spec, seed)
    elif method == "vptq":
        spec = draw(vptq_specs())
        codes = random_vptq(spec, seed)
    else:
        spec = draw(gptvq_specs())
        codes = random_gptvq(spec, seed)
    return spec, FORMATS[method].pack(codes, spec)


def dense(spec: Any, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return OPERATORS[spec.method].dequantize(tensors, spec, torch.float32)


@settings(max_examples=60, deadline=None)
@given(matrices())
def test_there_and_back(matrix: tuple[Any, dict[str, torch.Tensor]]) -> None:
    spec, tensors = matrix
    known = FORMATS[spec.method]
    wide, wide_spec = known.widen(tensors, spec)
    known.check(wide, wide_spec, "wide")
    if getattr(spec, "svd_rank", 0):  # the scale is multiplied in before the sum, not behind it
        assert torch.allclose(dense(wide_spec, wide), dense(spec, tensors), rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(dense(wide_spec, wide), dense(spec, tensors))
    stored = known.narrow(wide, tensors, spec)
    known.check(stored, spec, "narrow")
    assert {n for n in stored if not torch.equal(stored[n], tensors[n])} == set()


@settings(max_examples=40, deadline=None)
@given(matrices(), st.floats(0.9, 1.1))
def test_trained_values_are_rounded_to_near_ones(
    matrix: tuple[Any, dict[str, torch.Tensor]], factor: float
) -> None:
    spec, tensors = matrix
    known = FORMATS[spec.method]
    wide, wide_spec = known.widen(tensors, spec)
    assert trained_names(wide_spec)
    for name in trained_names(wide_spec):
        wide[name] = wide[name] * factor
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    stored = known.narrow(wide, tensors, spec)
    known.check(stored, spec, "narrow")
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)  # left alone
    again, _ = known.widen(stored, spec)
    if spec.method == "cvxq":  # whose grid may end before the value; see below
        return
    for name in trained_names(wide_spec):
        error = (again[name] - wide[name]).abs().max()
        # 4-bit entries of a codebook that fills its range are cut off at 7 or 8 of their steps
        coarse = 0.2 if getattr(spec, "codebook_dtype", "") == "int4" else 0.02
        assert error <= coarse * wide[name].abs().max() + 1e-6


def test_int8_entries_that_outgrow_their_scale_get_a_larger_one() -> None:
    spec = GPTVQSpec(30, 172, 2, 16, 7, 64)
    tensors = FORMATS["gptvq"].pack(random_gptvq(spec), spec)
    wide, _ = FORMATS["gptvq"].widen(tensors, spec)
    stored = FORMATS["gptvq"].narrow({**wide, "codebooks": wide["codebooks"] * 3}, tensors, spec)
    again, _ = FORMATS["gptvq"].widen(stored, spec)
    peak = wide["codebooks"].abs().max()
    assert (again["codebooks"] - 3 * wide["codebooks"]).abs().max() < 3 * peak / 127
    assert bool((stored["codebook_scales"] > tensors["codebook_scales"]).all())


@pytest.mark.parametrize("scale_dtype", ["log8", "float16"])
def test_cvxq_scales_stay_on_their_grid(scale_dtype: str) -> None:
    spec = with_depths(30, 37, 7, scale_dtype)
    tensors = FORMATS["cvxq"].pack(random_cvxq(spec), spec)
    wide, _ = FORMATS["cvxq"].widen(tensors, spec)
    scales = wide["scales"] * (1 + 0.01 * torch.randn_like(wide["scales"]))
    stored = FORMATS["cvxq"].narrow({**wide, "scales": scales}, tensors, spec)
    again = FORMATS["cvxq"].widen(stored, spec)[0]["scales"]
    if scale_dtype == "log8":
        assert torch.equal(stored["scale_grid"], tensors["scale_grid"])
        offset, step = tensors["scale_grid"].float().unsqueeze(-1)
        within = (scales.log2() - offset) / step
        inside = (within > 0) & (within < 255)
        error = (again / scales).log2().abs()
        assert bool((error <= 0.51 * step.abs() + 1e-5)[inside].all())
    else:
        assert torch.equal(again, scales.half().float())
