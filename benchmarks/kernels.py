"""Packed layers on a CPU beside torch's dense ones: time, bytes read per second, error.

    python benchmarks/kernels.py [--tokens 1,4,64] [--shapes 4096x4096,14336x4096] [--repeat N]
                                 [--threads N] [--cpu-time] [--dtype bfloat16]
                                 [--cases NAME] [--march x86-64-v3] [--out FILE.md] [--append]

Codes are random, geometries those the planner takes (or near them). The peer is `F.linear` in
the same dtype, timed alternately with the packed layer; both go round copies of their weights of
some hundred megabytes in all, which is more than most caches, if not all last-level ones, hold.
Medians. --append: to the file instead of over it. --march: let the C backend be compiled for this
processor, as cc has it, instead of the one at hand; torch's layers use all that there is.
--cpu-time: with one thread, the CPU time of it instead, where other programs use the machine too.
GB/s counts the packed tensors; its share is of a memory copy (read and write) measured in the same
run. The error is that of the dtype in and out to float32 arithmetic on the decoded weight.
"""

from __future__ import annotations

import argparse
import datetime
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable

import hf_vq_kernels
import torch
import torch.nn.functional as F
from hf_vq_kernels import cpu_build
from torch import Tensor

DENSE_BYTES, PACKED_BYTES = 700e6, 300e6
Layer = tuple[list["Tensor | None"], Callable[..., Tensor], Callable[..., Tensor]]


def words(rows: int, bits: int) -> Tensor:
    """Random codes: int32 (rows, bits / 32)."""
    return torch.randint(-(2**31), 2**31, (rows, -(-bits // 32))).to(torch.int32)


def gptvq(out: int, width: int, d: int, k: int, gr: int, gc: int, block: int = 0) -> Layer:
    """GPTVQ with int8 codebooks."""
    stripes, groups, blocks = -(-width // gc), -(-out // gr), width // max(block, 1)
    books = torch.randint(-127, 128, (stripes, groups, k, d)).to(torch.int8)
    scales = (torch.rand(stripes, groups) * 1e-3).bfloat16()
    codes = words(out, 4 * blocks) if block else None
    grid = torch.stack([-torch.rand(blocks), torch.rand(blocks) / 8]).bfloat16() if block else None
    packed = [words(out, width // d * (k - 1).bit_length()), books, scales, None, codes, grid]
    geometry = (d, k, gr, gc, block, True)
    return (
        packed,
        lambda x, p: hf_vq_kernels.gptvq_linear(x, *p, None, *geometry),
        lambda p: hf_vq_kernels.gptvq_dequantize(*p, width, *geometry, torch.float32),
    )


def vptq(out: int, width: int, v: int, k: int, res: int = 0) -> Layer:
    """VPTQ with one group, a permutation and a norm per column."""
    bits = (k - 1).bit_length() + max(res - 1, 0).bit_length()
    blocks = -(-out // v)
    packed = [
        words(blocks, width * bits)[None],
        torch.randn(1, k * v).half(),
        torch.randn(1, res * v).half() if res else None,
        None,
        None,
        torch.randperm(width).to(torch.int16),
        torch.rand(width).half(),
        torch.zeros(width).half(),
    ]
    return (
        packed,
        lambda x, p: hf_vq_kernels.vptq_linear(x, *p, None, out, v, 0, False),
        lambda p: hf_vq_kernels.vptq_dequantize(*p, width, out, v, 0, False, torch.float32),
    )


def cvxq(out: int, width: int, mean: int, group_rows: int = 128) -> Layer:
    """CVXQ with depths about a mean, log scales and a permutation of rows."""
    clusters = -(-out // group_rows)
    depth = (torch.randn(clusters, width) + mean).round().clamp(0, 8).long()
    n = int(((depth * group_rows + 31) // 32).sum())
    nibbles = F.pad(depth, (0, -width % 8)).view(clusters, -1, 8) << torch.arange(0, 32, 4)
    packed = [
        words(1, 32 * n)[0],
        nibbles.sum(-1).to(torch.int32),
        torch.randint(0, 256, (clusters, width)).to(torch.uint8),
        torch.tensor([[-6.0], [1 / 64]]).expand(2, clusters).half(),
        None,
        torch.randperm(out).to(torch.int16),
    ]
    return (
        packed,
        lambda x, p: hf_vq_kernels.cvxq_linear(x, *p, None, out, group_rows, "lloyd"),
        lambda p: hf_vq_kernels.cvxq_dequantize(*p, width, out, group_rows, "lloyd", torch.float32),
    )


CASES: dict[str, Callable[[int, int], Layer]] = {
    "GPTVQ 2-D k16": lambda o, i: gptvq(o, i, 2, 16, o, 128),
    "GPTVQ 2-D k16, gs 2048": lambda o, i: gptvq(o, i, 2, 16, 8, 256),
    "GPTVQ 4-D k256": lambda o, i: gptvq(o, i, 4, 256, 1366, 128),
    "GPTVQ 4-D k256, scales": lambda o, i: gptvq(o, i, 4, 256, 1366, 128, 32),
    "GPTVQ 2-D k64": lambda o, i: gptvq(o, i, 2, 64, 133, 128),
    "VPTQ v8 K4096": lambda o, i: vptq(o, i, 8, 4096),
    "VPTQ v6 K4096": lambda o, i: vptq(o, i, 6, 4096),
    "VPTQ v4 K256": lambda o, i: vptq(o, i, 4, 256),
    "VPTQ v8 K256+256": lambda o, i: vptq(o, i, 8, 256, 256),
    "VPTQ v8 K65536": lambda o, i: vptq(o, i, 8, 65536),
    "CVXQ 3 bits": lambda o, i: cvxq(o, i, 3),
    "CVXQ 2 bits": lambda o, i: cvxq(o, i, 2),
}


clock = time.perf_counter


def alternate(functions: list[Callable[[int], object]], repeat: int) -> list[float]:
    """Median seconds of every function, called in turn with the number of the round."""
    times: list[list[float]] = [[] for _ in functions]
    for i in range(repeat + 3):
        for function, taken in zip(functions, times, strict=True):
            start = clock()
            function(i)
            taken.append(clock() - start)
    return [statistics.median(taken[3:]) for taken in times]


def dense_product(x: Tensor, weights: list[Tensor]) -> Callable[[int], Tensor]:
    """Round i: x times dense weight i."""
    return lambda i: F.linear(x, weights[i % len(weights)])


def packed_product(
    x: Tensor, copies: list[list[Tensor | None]], linear: Callable[..., Tensor]
) -> Callable[[int], Tensor]:
    """Round i: x times packed weight i."""
    return lambda i: linear(x, copies[i % len(copies)])


def processor() -> str:
    """Its name where Linux tells it, else its architecture."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", default="1,4,64")
    parser.add_argument("--shapes", default="4096x4096,14336x4096")
    parser.add_argument("--cases", default="", help="only those whose name contains this")
    parser.add_argument("--repeat", type=int, default=25)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--append", action="store_true")
    parser.add_argument("--march", help="compile the C backend for another processor")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    if options.cpu_time:
        global clock
        clock, options.threads = time.thread_time, 1
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.march:
        cpu_build._VARIANTS = ((f"-march={options.march}", "-fopenmp"),)
    dtype = getattr(torch, options.dtype)
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    source = torch.empty(2**28, dtype=torch.uint8).fill_(1)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / alternate([lambda i: target.copy_(source)], 5)[0]
    reason = cpu_build.unavailable()
    say(f"`python benchmarks/kernels.py {' '.join(sys.argv[1:])}`")
    say("")
    say(
        f"{processor()} ({torch.backends.cpu.get_cpu_capability()}), {options.threads} "
        f"threads, torch {torch.__version__}, {datetime.date.today()}; memory copy "
        f"{copy / 1e9:.1f} GB/s; compiled backend: {reason or 'yes'}. Medians of {options.repeat}"
        f"{', CPU time of the thread' if options.cpu_time else ''}. {options.dtype}."
    )
    say("")
    say(
        "| layer | shape | bits | tokens | dense ms | packed ms | times faster | GB/s | of copy "
        "| error |"
    )
    say("|---|---|---|---|---|---|---|---|---|---|")
    for shape in options.shapes.split(","):
        out, width = map(int, shape.split("x"))
        weight = torch.randn(out, width).to(dtype)
        dense = [weight.clone() for _ in range(max(2, int(DENSE_BYTES / weight.nbytes)))]
        for name, make in CASES.items():
            if options.cases not in name:
                continue
            packed, linear, dequantize = make(out, width)
            size = sum(t.nbytes for t in packed if t is not None)
            copies = [
                [None if t is None else t.clone() for t in packed]
                for _ in range(max(2, int(PACKED_BYTES / size)))
            ]
            reference = dequantize(packed)
            for tokens in map(int, options.tokens.split(",")):
                x = torch.randn(tokens, width).to(dtype)
                y, right = linear(x, packed).float(), x.float() @ reference.T
                error = float((y - right).norm() / right.norm())
                for other in copies:  # layouts at run time are made by the first call
                    linear(x, other)
                theirs, ours = alternate(
                    [dense_product(x, dense), packed_product(x, copies, linear)], options.repeat
                )
                say(
                    f"| {name} | {shape} | {8 * size / (out * width):.2f} | {tokens} | "
                    f"{theirs * 1e3:.2f} | {ours * 1e3:.2f} | {theirs / ours:.2f} | "
                    f"{size / ours / 1e9:.1f} | {size / ours / copy:.0%} | {error:.1e} |"
                )
    if options.out:
        with options.out.open("a" if options.append else "w") as file:
            file.write(("\n" if options.append else "") + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
