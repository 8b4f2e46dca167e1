"""Compile the Triton kernels for a GPU that need not be there, and report what they take.

    python triton_compile.py cuda 90          (or: cuda 80, hip gfx942)

The kernels are called as always, on CPU tensors, with a driver that only knows its target: Triton
compiles what the call needs and launches nothing. Prints one JSON object per kernel: its name, the
format where it is one of WIDE, bytes of shared memory, instructions of the two kinds that should
not be there, conversions of layouts within loops (ttgir) and local memory (ptx), exchanges between
threads of a warp (ptx), and loads of 16 bytes. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

if sys.argv[1] == "hip":
    torch.version.hip = "6"  # as where this torch is for AMD's GPUs, whose warps have 64 threads

import triton.testing
from helpers import random_gptvq
from helpers_cvxq import random_cvxq, with_depths
from helpers_vptq import random_vptq
from hf_vq_kernels import (
    triton_common,
    triton_cvxq,
    triton_embedding,
    triton_gptvq,
    triton_product,
    triton_vptq,
)
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hf_vq.formats import FORMATS
from hf_vq.formats.gptvq import GPTVQSpec
from hf_vq.formats.vptq import VPTQSpec

# Common geometries whose streams of codes are read 16 bytes at a time by some configuration.
WIDE = {
    "gptvq 2-D k16": GPTVQSpec(64, 1024, 2, 16, 16, 256),
    "gptvq 4-D k256": GPTVQSpec(64, 1024, 4, 256, 64, 256),
    "vptq v8 k4096": VPTQSpec(64, 1024, 8, 4096),
    "vptq v8 k65536": VPTQSpec(64, 1024, 8, 65536),
}


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


def _wide_loads(kernel: Any) -> int:
    """Loads of 16 bytes from global memory."""
    if "ptx" in kernel.asm:
        return sum(
            "ld.global" in line and (".v4.b32" in line or ".v2.b64" in line)
            for line in kernel.asm["ptx"].splitlines()
        )
    return kernel.asm["amdgcn"].count("load_dwordx4") + kernel.asm["amdgcn"].count("load_b128")


def _decode_wide(spec: Any, shifted: bool = False) -> None:
    """Launch the product for one token with four words read at a time.

    shifted: of GPTVQ codes in a view that does not begin at a multiple of 16 bytes.
    """
    x = torch.zeros((1, spec.in_features), dtype=torch.bfloat16)
    if isinstance(spec, GPTVQSpec):
        tensors = FORMATS["gptvq"].pack(random_gptvq(spec), spec)
        if shifted:
            stored = tensors["indices"]
            room = torch.zeros(stored.numel() + 1, dtype=torch.int32)
            tensors["indices"] = room[1:].view(stored.shape).copy_(stored)
        matrix = triton_gptvq.matrix(
            tensors["indices"], tensors["codebooks"], tensors["codebook_scales"], None, None, None,
            spec.in_features, spec.vector_dim, spec.num_centroids, spec.group_rows,
            spec.group_columns, 0, False,
        )  # fmt: skip
        module: Any = triton_gptvq
    else:
        tensors = FORMATS["vptq"].pack(random_vptq(spec), spec)
        matrix = triton_vptq.matrix(
            tensors["indices"], tensors["centroids.weight"], None, None, None, None, None, None,
            spec.in_features, spec.out_features, spec.vector_dim, 0, False,
        )  # fmt: skip
        module = triton_vptq
    kernel = module._decode
    before = kernel.configs
    kernel.configs = [next(c for c in kernel.space if c.kwargs["WIDE"] == 4)]
    module.decode(x, matrix, None)
    kernel.configs = before


def main(backend: str, arch: str) -> None:
    driver.set_active(_Absent(backend, arch))
    compiled = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((f"{self.__module__.split('.')[-1]}.{self.__name__}", kernel))
        return kernel

    JITFunction.run = compile_only

    wide = {}
    for name, spec in WIDE.items():
        _decode_wide(spec)
        wide[name] = compiled[-1]
    _decode_wide(WIDE["gptvq 4-D k256"], shifted=True)
    wide["shifted"] = compiled[-1]
    compiled.clear()

    gptvq = GPTVQSpec(64, 1024, 4, 256, 64, 256)
    tensors = FORMATS["gptvq"].pack(random_gptvq(gptvq), gptvq)
    packed_gptvq = (
        tensors["indices"], tensors["codebooks"], tensors["codebook_scales"], None, None, None,
    )  # fmt: skip
    vptq = VPTQSpec(64, 1024, 8, 4096, 16, norm="columns", permuted=True)
    tensors = FORMATS["vptq"].pack(random_vptq(vptq), vptq)
    packed_vptq = (
        tensors["indices"], tensors["centroids.weight"], tensors["res_centroids.weight"], None,
        None, tensors["perm"], tensors["weight_scale"], tensors["weight_bias"],
    )  # fmt: skip
    cvxq = with_depths(64, 1024, 32, "log8", "int8")
    tensors = FORMATS["cvxq"].pack(random_cvxq(cvxq), cvxq)
    packed_cvxq = (
        tensors["words"], tensors["depths"], tensors["scale_codes"], tensors["scale_grid"],
        tensors["location"], None,
    )  # fmt: skip
    gradients: list[Any] = [
        (triton_gptvq, packed_gptvq, (4, 256, 64, 256, 0, False), (1,)),
        (triton_vptq, packed_vptq, (64, 8, 0, False), (1, 2, 6, 7)),
        (triton_cvxq, packed_cvxq, (64, 32, cvxq.levels), (2,)),
    ]
    matrices: list[Any] = [
        (module, module.matrix(*packed, 1024, *geometry))
        for module, packed, geometry, _ in gradients
    ]
    bias = torch.zeros(64)
    for module, matrix in matrices:
        module.decode(torch.zeros((1, 1024), dtype=torch.bfloat16), matrix, bias)
        triton_product.product(torch.zeros((16, 1024), dtype=torch.bfloat16), matrix, bias)
        triton_product.transposed_product(torch.zeros((16, 64), dtype=torch.bfloat16), matrix)
        triton_product.dequantize(matrix, torch.bfloat16)
        rows = matrix if module is not triton_cvxq else triton_cvxq.by_row(matrix)
        triton_embedding.embedding(torch.zeros(1, dtype=torch.int64), rows, torch.bfloat16)
    x, grad = torch.zeros((8, 1024)).bfloat16(), torch.zeros((8, 64)).bfloat16()
    for module, packed, geometry, trained in gradients:
        needed = tuple(i in trained for i in range(len(packed)))
        module.packed_gradients(grad, x, packed, geometry, needed)
    # As where kernels can be timed: all configurations, and a record of the times on disk.
    tuner, before = triton_product._dequantize, len(compiled)
    triton_common._may_time = lambda: True
    triton.testing.do_bench = lambda call, **_: (call(), [1.0, 1.0, 1.0])[1]
    for _ in range(2):
        tuner.cache.clear()
        triton_product.dequantize(matrices[0][1], torch.bfloat16)
    assert len(compiled) - before == len(tuner.space) + 2, "the second time from the record"
    del compiled[before:]

    named = [(name, "", kernel) for name, kernel in compiled]
    named += [(kernel[0], name, kernel[1]) for name, kernel in wide.items()]
    for name, format_, kernel in named:
        report = {
            "name": name,
            "format": format_,
            "wide": _wide_loads(kernel),
            "shared": kernel.metadata.shared,
            "conversions": _conversions_in_loops(kernel.asm["ttgir"]),
            "exchanged": kernel.asm.get("ptx", "").count("shfl.sync"),
            "local": sum("local" in line for line in kernel.asm.get("ptx", "").splitlines()),
            "binary": len(kernel.asm["cubin" if backend == "cuda" else "hsaco"]),
        }
        print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
