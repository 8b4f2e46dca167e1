"""What the Triton kernels take of a GPU, per configuration, from the compiler: no GPU is needed.

    python benchmarks/gpu_resources.py [--arch 90] [--formats WORD] [--kernels WORD] [--out FILE.md]

Every configuration of every kernel is compiled for 4096 x 4096 (an embedding of 32000 x 4096) in
bfloat16, and by ptxas, which comes with Triton. The table: registers per thread, bytes of spilled
registers, bytes of shared memory, warps that fit a multiprocessor (64 is all) as far as registers
and shared memory go, and how many loads of how many bytes the kernel has. `local` is memory that
threads take beside spills: tensors indexed at run time. Counts are of instructions, not of how
often they run. Exits with 1 if a configuration that may be chosen spills.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

os.environ.pop("TRITON_INTERPRET", None)  # this is about the compiler
import triton
from gpu_cases import FORMATS, Absent, Case, gptvq
from hf_vq_kernels import triton_common, triton_embedding, triton_product
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

ROWS, COLUMNS = 4096, 4096
REGISTERS, SHARED, WARPS = 65536, 227 << 10, 64  # of a multiprocessor of compute capability 9.0
CASES = {
    **FORMATS,
    "gptvq 2-D k16, scales": lambda r, c, d: gptvq(r, c, d, 2, 16, (16, 256), 32),
}
_WIDTH = {"8": 1, "16": 2, "32": 4, "64": 8}


class Kernels:
    """Compiles what is launched, in all configurations, instead of running it."""

    def __init__(self, arch: int) -> None:
        driver.set_active(Absent(("cuda", arch, 32)))
        triton_common._multiprocessors = lambda device: 132
        self.compiled: list[tuple[str, str, Any]] = []
        self.config = ""
        run, kernels = JITFunction.run, self

        def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
            kernels.compiled.append((self.__name__.strip("_"), kernels.config, kernel))
            return kernel

        def every(self: Any, *args: Any, **kwargs: Any) -> None:
            named = dict(zip(self.arg_names, args, strict=False)) | kwargs
            configs = self.space
            if self.early_config_prune:
                configs = self.early_config_prune(configs, named)
            for config in configs:
                kernels.config = str(config).replace("num_ctas: 1, ", "").split(", maxnreg")[0]
                self.fn.run(*args, **kwargs, **config.all_kwargs())
            kernels.config = ""

        JITFunction.run, Autotuner.run = compile_only, every
        triton_common._may_time = lambda: True

    def launched(self, call: Any, *arguments: Any) -> list[tuple[str, str, Any]]:
        """What `call(*arguments)` launches: (kernel, configuration, what Triton compiled)."""
        self.compiled.clear()
        call(*arguments)
        return list(self.compiled)


def resources(ptx: str, arch: int) -> dict[str, int]:
    """Registers, spilled bytes, and bytes of local memory, by ptxas."""
    capability = re.search(r"\.target (sm_\w+)", ptx)
    assert capability is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        done = subprocess.run(
            [get_ptxas(arch).path, "-v", f"--gpu-name={capability[1]}", str(source), "-o",
             str(source.with_suffix(".cubin"))],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    said = done.stderr

    def number(pattern: str) -> int:
        found = re.search(pattern, said)
        return int(found[1]) if found else 0

    return {
        "registers": number(r"Used (\d+) registers"),
        "spilled": number(r"(\d+) bytes spill stores"),
        "local": number(r"(\d+) bytes stack frame"),
    }


def loads(ptx: str) -> dict[int, int]:
    """Bytes of a load of one thread -> how many such instructions there are."""
    found: collections.Counter[int] = collections.Counter()
    for line in ptx.splitlines():
        match = re.search(r"\bld\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[bus](\d+)", line)
        if match:
            found[int(match[1] or 1) * _WIDTH[match[2]]] += 1
    return dict(sorted(found.items(), reverse=True))


def occupancy(registers: int, shared: int, warps: int) -> int:
    """Warps that fit a multiprocessor, by registers (given out by 256 a warp) and shared memory."""
    per_warp = max(1, -(-registers * 32 // 256) * 256)
    blocks = REGISTERS // (per_warp * warps)
    if shared:
        blocks = min(blocks, SHARED // (shared + 1024))
    return min(WARPS, blocks * warps)


def work(case: Case) -> dict[str, Any]:
    """Name -> what launches the kernels of an operator for `case`, without arguments."""
    module = importlib.import_module(f"hf_vq_kernels.triton_{case.method}")
    matrix = module.matrix(*case.packed, case.in_features, *case.geometry)
    arrange = getattr(module, "arranged", lambda x, matrix: (x, matrix))
    by_row = getattr(module, "by_row", lambda matrix: matrix)

    def tensor(count: int, width: int) -> torch.Tensor:
        return torch.zeros((count, width), dtype=torch.bfloat16)

    rows, columns = case.out_features, case.in_features
    few = {
        f"decode, {n} tokens": lambda n=n: module.decode(tensor(n, columns), matrix, None)
        for n in (1, 4)
    }
    tiles = {
        f"tiles, {n} tokens": lambda n=n: triton_product.product(
            *arrange(tensor(n, columns), matrix), None
        )
        for n in (16, 128)
    }
    return {
        **few,
        **tiles,
        "input gradient, 128 tokens": lambda: triton_product.transposed_product(
            tensor(128, rows), matrix
        ),
        "packed gradients": lambda: module.packed_gradients(
            tensor(256, rows), tensor(256, columns), case.packed, case.geometry,
            tuple(t is not None and t.is_floating_point() for t in case.packed),
        ),
        "dequantize": lambda: triton_product.dequantize(matrix, torch.bfloat16),
        "embedding": lambda: triton_embedding.embedding(
            torch.zeros(1, dtype=torch.int64), by_row(matrix), torch.bfloat16
        ),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90, help="compute capability (default 90)")
    parser.add_argument("--formats", default="", help="only those with this in their name")
    parser.add_argument("--kernels", default="", help="only those with this in their name")
    parser.add_argument("--out", type=Path, help="also write the table here")
    options = parser.parse_args()
    kernels = Kernels(options.arch)
    lines = [
        f"# What the kernels take, sm_{options.arch}, {ROWS} x {COLUMNS}, bfloat16\n",
        f"triton {triton.__version__}; `python benchmarks/gpu_resources.py`. Columns: see there.\n",
        "| format | kernel | configuration | registers | spilled | local | shared | warps "
        "| loads: bytes x count |",
        "|---" * 9 + "|",
    ]
    print("\n".join(lines), flush=True)
    spilled = 0
    for name, make in CASES.items():
        if options.formats not in name:
            continue
        for what, call in work(make(ROWS, COLUMNS, "cpu")).items():
            if options.kernels not in what:
                continue
            seen = set()
            for kernel, config, binary in kernels.launched(call):
                if not config and what != "embedding":
                    continue  # small helpers
                ptx = binary.asm["ptx"]
                if (kernel, config) in seen:
                    continue
                seen.add((kernel, config))
                taken, shared = resources(ptx, options.arch), binary.metadata.shared
                spilled += taken["spilled"] > 0
                warps = occupancy(taken["registers"], shared, binary.metadata.num_warps)
                wide = ", ".join(f"{size} x {count}" for size, count in loads(ptx).items())
                config = config or f"num_warps: {binary.metadata.num_warps}"
                lines.append(
                    f"| {name} | {what}: {kernel} | {config} | {taken['registers']} "
                    f"| {taken['spilled']} | {taken['local']} | {shared} | {warps} | {wide} |"
                )
                print(lines[-1], flush=True)
    lines.append(f"\n{spilled} configurations spill.")
    print(lines[-1])
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
