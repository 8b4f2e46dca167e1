"""Rows of packed tables, against the same rows of the dense matrix, bit for bit."""

from __future__ import annotations

from typing import Any

import hf_vq_kernels
import pytest
import torch
from helpers import ODD_SPECS, gptvq_specs, random_gptvq
from helpers_cvxq import ODD_CVXQ, cvxq_specs, random_cvxq
from helpers_vptq import ODD_VPTQ, random_vptq, vptq_specs
from hf_vq_kernels import cvxq_reference, reference, vptq_reference
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vq.formats import FORMATS
from hf_vq.layers.operators import OPERATORS, arguments

REFERENCES = {
    "gptvq": reference.gptvq_dequantize,
    "vptq": vptq_reference.vptq_dequantize,
    "cvxq": cvxq_reference.cvxq_dequantize,
}
RANDOM = {"gptvq": random_gptvq, "vptq": random_vptq, "cvxq": random_cvxq}
ODD = {
    f"{method}-{name}": spec
    for method, specs in (("gptvq", ODD_SPECS), ("vptq", ODD_VPTQ), ("cvxq", ODD_CVXQ))
    for name, spec in specs.items()
    if spec.num_weights < 100_000
}


def packed(spec: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    return FORMATS[spec.method].pack(RANDOM[spec.method](spec, seed), spec)


def check(spec: Any, seed: int, ids: torch.Tensor, dtype: torch.dtype) -> None:
    tensors = packed(spec, seed)
    ours = OPERATORS[spec.method].embedding(ids, tensors, spec, dtype)
    dense = REFERENCES[spec.method](*arguments(tensors, spec), dtype)
    assert ours.dtype == dtype and ours.shape == (*ids.shape, spec.in_features)
    assert torch.equal(ours, dense[ids])


@pytest.mark.parametrize("name", ODD)
def test_every_row_of_odd_tables(name):
    spec = ODD[name]
    check(spec, 0, torch.arange(spec.out_features).flip(0), torch.float32)


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_any_rows_of_any_table(data, dtype):
    seed = data.draw(st.integers(0, 2**32))
    spec = data.draw(st.one_of(gptvq_specs(), vptq_specs(), cvxq_specs()))
    if isinstance(spec, tuple):
        spec, seed = spec
    shape = data.draw(st.sampled_from([(0,), (1,), (2, 3), (7,), ()]))
    ids = torch.randint(0, spec.out_features, shape)
    check(spec, seed, ids.int() if seed % 2 else ids, dtype)


@pytest.mark.parametrize("name", ["gptvq-2d-int8", "vptq-groups", "cvxq-log8"])
def test_numbers_beyond_the_table_are_refused(name):
    """Also those that would fall into the padding of the last cluster or vector."""
    spec = ODD[name]
    for bad in (-1, spec.out_features, 2**31):
        with pytest.raises(IndexError, match="out of range"):
            OPERATORS[spec.method].embedding(
                torch.tensor([0, bad]), packed(spec), spec, torch.float32
            )


@pytest.mark.parametrize("name", ["gptvq-2d-int8-log", "vptq-outliers", "cvxq-log8-int8"])
def test_torch_accepts_the_operators(name):
    spec = ODD[name]
    ids = torch.tensor([[3, 1], [0, 3]])
    operator = getattr(torch.ops.hf_vq, f"{spec.method}_embedding").default
    given_ = (ids, *arguments(packed(spec), spec), torch.bfloat16)
    torch.library.opcheck(operator, given_)
    assert "torch" in str(hf_vq_kernels.explain(f"{spec.method}_embedding", *given_))
