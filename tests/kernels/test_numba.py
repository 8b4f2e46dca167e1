"""The numba backend against the default one, and that nothing imports numba before it computes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import hf_vq_kernels
import pytest
import torch
from helpers import ODD_SPECS, random_gptvq
from helpers_cvxq import ODD_CVXQ, random_cvxq, with_depths

from hf_vq.formats import cvxq, gptvq
from hf_vq.formats.gptvq import GPTVQSpec
from hf_vq.layers.operators import OPERATORS

CASES = {
    **{f"gptvq-{name}": spec for name, spec in ODD_SPECS.items() if spec.out_features < 1000},
    "gptvq-2d-k16-scales": GPTVQSpec(45, 896, 2, 16, 19, 128, "int8", 32),
    "gptvq-4d-k100": GPTVQSpec(19, 260, 4, 100, 7, 128),
    **{f"cvxq-{name}": spec for name, spec in ODD_CVXQ.items() if spec.out_features < 1000},
    "cvxq-g128": with_depths(200, 172, 128),
}
RANDOM = {"gptvq": random_gptvq, "cvxq": random_cvxq}
PACK = {"gptvq": gptvq.pack, "cvxq": cvxq.pack}


@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(name: str) -> None:
    pytest.importorskip("numba")
    spec = CASES[name]
    packed = PACK[spec.method](RANDOM[spec.method](spec, 0), spec)
    with hf_vq_kernels.use_backend("torch"):
        weight = OPERATORS[spec.method].dequantize(packed, spec, torch.float32)
    bias = torch.randn(spec.out_features)
    for dtype, tolerance, tokens in ((torch.float32, 1e-5, 3), (torch.bfloat16, 1e-2, 1)):
        x = torch.randn(tokens, spec.in_features).to(dtype)
        right = (x.double() @ weight.double().T + bias).to(dtype)
        with hf_vq_kernels.use_backend("numba"):
            y = OPERATORS[spec.method].linear(x, packed, spec, bias)
        assert y.dtype == dtype
        error = (y.double() - right.double()).norm() / right.double().norm().clamp_min(1e-30)
        assert error <= tolerance


def test_without_a_compiler_numba_computes(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    program = """
import sys
import torch, hf_vq_kernels
from hf_vq_kernels import explain
words = torch.zeros(4, 1, dtype=torch.int32)
books = torch.ones(1, 1, 16, 2, dtype=torch.int8)
rest = (words, books, None, None, None, None, None, 2, 16, 4, 16, 0, True)
print(explain("gptvq_linear", torch.ones(7, 16), *rest))
print("numba" in sys.modules)
print(explain("gptvq_linear", torch.ones(1, 16), *rest))
"""
    environment = {
        "PATH": "", "HF_VQ_CACHE": str(tmp_path), "CC": "", "NUMBA_CACHE_DIR": str(tmp_path)
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    many, few = done.stdout.split("False\n")
    assert "): torch" in many and "not numba: it multiplies fewer than 6 tokens" in many
    assert "gptvq_linear(1x16 float32 on cpu): numba" in few
    assert "not c: no C compiler was found" in few
