"""Cases of the compiled CPU backend: odd shapes of every format, and what they are compared by."""

from __future__ import annotations

from typing import Any

import hf_vq_kernels
import pytest
import torch
from helpers import ODD_SPECS, random_gptvq
from helpers_cvxq import ODD_CVXQ, random_cvxq, with_depths
from helpers_vptq import ODD_VPTQ, random_vptq
from hf_vq_kernels import cpu_build
from torch import Tensor

from hf_vq.formats import cvxq, gptvq, vptq
from hf_vq.formats.gptvq import GPTVQSpec
from hf_vq.formats.vptq import VPTQSpec
from hf_vq.layers.operators import OPERATORS

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
needs_compiler = pytest.mark.skipif(
    cpu_build.unavailable() is not None, reason=f"no compiled backend: {cpu_build.unavailable()}"
)

# name: (out, in, d, k, group rows, group columns, codebook dtype, scale block); rows and columns
# that are no multiple of anything, tables of one to four registers, one or two rows per register
GPTVQ = {
    "2d-k16-tail": GPTVQSpec(37, 172, 2, 16, 37, 172),
    "2d-k16-scales": GPTVQSpec(45, 896, 2, 16, 19, 128, "int8", 32),
    "2d-k16-linear-scales": GPTVQSpec(17, 896, 2, 16, 8, 256, "int8", 16, "linear"),
    "4d-k256": GPTVQSpec(53, 4864, 4, 256, 21, 128),
    "4d-k256-scales": GPTVQSpec(33, 1100, 4, 256, 33, 128, "int8", 32),
    "4d-k100": GPTVQSpec(19, 260, 4, 100, 7, 128),
    "2d-k64": GPTVQSpec(35, 896, 2, 64, 13, 128, "int8", 64),
    "1d-k8": GPTVQSpec(18, 11008, 1, 8, 9, 512),
    "8d-k256": GPTVQSpec(21, 1032, 8, 256, 21, 1032),
    "4d-int4": GPTVQSpec(20, 172, 4, 64, 20, 64, "int4"),
    "4d-k1024": GPTVQSpec(20, 172, 4, 1024, 20, 64),
}
VPTQ = {
    "v8": VPTQSpec(61, 172, 8, 256),
    "v6-norm": VPTQSpec(50, 896, 6, 64, norm="columns", permuted=True),
    "v12-residual": VPTQSpec(50, 172, 12, 64, 32, norm="rows"),
    "v4-groups": VPTQSpec(29, 1024, 4, 256, num_groups=4, norm="columns"),
}
CVXQ = {
    "g128": with_depths(200, 172, 128),
    "g24-perm": with_depths(70, 896, 24, "log8", "int8", permuted=True),
}


def cases() -> dict[str, Any]:
    """name -> spec."""
    out: dict[str, Any] = {}
    for kind, specs in (
        ("gptvq", {**GPTVQ, **ODD_SPECS}),
        ("vptq", {**VPTQ, **ODD_VPTQ}),
        ("cvxq", {**CVXQ, **ODD_CVXQ}),
    ):
        small = {name: spec for name, spec in specs.items() if spec.out_features < 1000}
        out |= {f"{kind}-{name}": spec for name, spec in small.items()}
    return out


CASES = cases()
RANDOM = {"gptvq": random_gptvq, "vptq": random_vptq, "cvxq": random_cvxq}
PACK = {"gptvq": gptvq.pack, "vptq": vptq.pack, "cvxq": cvxq.pack}


def assert_close(name: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Relative error in the Frobenius norm, reported by name."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, name
    ours, theirs = ours.double(), theirs.double()
    error = (ours - theirs).norm() / theirs.norm().clamp_min(1e-30)
    assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


def packed_weight(spec: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Random packed tensors of `spec`, and the weight that they decode to."""
    packed = PACK[spec.method](RANDOM[spec.method](spec, 0), spec)
    with hf_vq_kernels.use_backend("torch"):
        return packed, OPERATORS[spec.method].dequantize(packed, spec, torch.float32)
