"""Compile the Triton kernels for a GPU that need not be there, and report what they take.

    python triton_compile.py cuda 90          (or: cuda 80, hip gfx942)

The kernels are called as always, on CPU tensors, with a driver that only knows its target: Triton
compiles what the call needs and launches nothing. Prints one JSON object per kernel: its name,
bytes of shared memory, and instructions of the two kinds that should not be there: conversions of
layouts within loops (ttgir), and local memory (ptx). TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton.testing
from helpers import random_gptvq
from helpers_cvxq import random_cvxq, with_depths
from helpers_vptq import random_vptq
from hf_vq_kernels import triton_common, triton_cvxq, triton_gptvq, triton_product, triton_vptq
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hf_vq.formats import FORMATS
from hf_vq.formats.gptvq import GPTVQSpec
from hf_vq.formats.vptq import VPTQSpec


class _Absent:
    """What Triton asks a driver before it compiles."""

    def __init__(self, backend: str, arch: str) -> None:
        self.target = (
            GPUTarget(backend, int(arch), 32) if backend == "cuda" else GPUTarget(backend, arch, 64)
        )

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _conversions_in_loops(ttgir: str) -> int:
    depth, found = 0, 0
    for line in ttgir.splitlines():
        if "scf.for" in line or "scf.while" in line:
            depth += 1
        elif line.strip().startswith("}") and depth:
            depth -= 1
        found += depth > 0 and "convert_layout" in line
    return found


def main(backend: str, arch: str) -> None:
    driver.set_active(_Absent(backend, arch))
    compiled = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((f"{self.__module__.split('.')[-1]}.{self.__name__}", kernel))
        return kernel

    JITFunction.run = compile_only

    gptvq = GPTVQSpec(64, 1024, 4, 256, 64, 256)
    tensors = FORMATS["gptvq"].pack(random_gptvq(gptvq), gptvq)
    matrices = [
        (
            triton_gptvq,
            triton_gptvq.matrix(
                tensors["indices"], tensors["codebooks"], tensors["codebook_scales"], None, None,
                None, 1024, 4, 256, 64, 256, 0, False,
            ),
        )
    ]  # fmt: skip
    vptq = VPTQSpec(64, 1024, 8, 4096, 16, norm="columns", permuted=True)
    tensors = FORMATS["vptq"].pack(random_vptq(vptq), vptq)
    matrices.append(
        (
            triton_vptq,
            triton_vptq.matrix(
                tensors["indices"], tensors["centroids.weight"], tensors["res_centroids.weight"],
                None, None, tensors["perm"], tensors["weight_scale"], tensors["weight_bias"], 1024,
                64, 8, 0, False,
            ),
        )
    )  # fmt: skip
    cvxq = with_depths(64, 1024, 32, "log8", "int8")
    tensors = FORMATS["cvxq"].pack(random_cvxq(cvxq), cvxq)
    matrices.append(
        (
            triton_cvxq,
            triton_cvxq.matrix(
                tensors["words"], tensors["depths"], tensors["scale_codes"], tensors["scale_grid"],
                tensors["location"], None, 1024, 64, 32, cvxq.levels,
            ),
        )
    )  # fmt: skip
    bias = torch.zeros(64)
    for module, matrix in matrices:
        module.decode(torch.zeros((1, 1024), dtype=torch.bfloat16), matrix, bias)
        triton_product.product(torch.zeros((16, 1024), dtype=torch.bfloat16), matrix, bias)
        triton_product.transposed_product(torch.zeros((16, 64), dtype=torch.bfloat16), matrix)
        triton_product.dequantize(matrix, torch.bfloat16)
    # As where kernels can be timed: all configurations, and a record of the times on disk.
    tuner, before = triton_product._dequantize, len(compiled)
    triton_common._may_time = lambda: True
    triton.testing.do_bench = lambda call, **_: (call(), [1.0, 1.0, 1.0])[1]
    for _ in range(2):
        tuner.cache.clear()
        triton_product.dequantize(matrices[0][1], torch.bfloat16)
    assert len(compiled) - before == len(tuner.space) + 2, "the second time from the record"
    del compiled[before:]

    for name, kernel in compiled:
        report = {
            "name": name,
            "shared": kernel.metadata.shared,
            "conversions": _conversions_in_loops(kernel.asm["ttgir"]),
            "local": sum("local" in line for line in kernel.asm.get("ptx", "").splitlines()),
            "binary": len(kernel.asm["cubin" if backend == "cuda" else "hsaco"]),
        }
        print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
