"""Every Triton kernel: first whether it is right, then how fast it is beside the dense layer.

    python benchmarks/gpu.py [--budget SECONDS] [--out FILE.md]

On a GPU: correctness, copy bandwidth, products of 1 to 4096 tokens, where a dense weight wins,
memory, and a whole model's decoding, in under 9 minutes; what the budget leaves no time for is
listed as not measured. Without a GPU: correctness alone, at small sizes, in Triton's interpreter.
Exits with 1 where a result is wrong.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu_cases import FORMATS, Case, compile_in_parallel, cvxq, gptvq
from gpu_model import SHAPES, Decoder
from hf_vq_kernels.dispatch import use_backend

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before an operator imports triton
DEVICE = "cuda" if GPU else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
TOKENS = [2**i for i in range(13)]
MAIN_SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336)]
OTHER_SHAPES = [  # Llama-7B, the keys and values of 8B, 70B
    (11008, 4096), (4096, 11008), (1024, 4096), (8192, 8192), (28672, 8192), (8192, 28672),
]  # fmt: skip
ROTATED = 256 << 20  # bytes of weights that a measurement goes through: several second-level caches


class Report:
    """Lines for the screen and the file, and the time that is left."""

    def __init__(self, budget: float) -> None:
        self.lines: list[str] = []
        self.not_measured: list[str] = []
        self.end = time.monotonic() + budget

    def say(self, line: str = "") -> None:
        print(line, flush=True)
        self.lines.append(line)

    def has(self, seconds: float, what: str) -> bool:
        """Whether so many seconds are left; otherwise `what` is noted as not measured."""
        if time.monotonic() + seconds <= self.end:
            return True
        self.not_measured.append(what)
        return False


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.double().cpu(), theirs.double().cpu()
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-30)).item()


# name -> (rows, columns, device) -> Case; checked, not timed
CHECKED: dict[str, Callable[[int, int, str], Case]] = {
    "gptvq 1-D k8": lambda r, c, d: gptvq(r, c, d, 1, 8, (4, 128)),
    "gptvq 2-D k16, scales": lambda r, c, d: gptvq(r, c, d, 2, 16, (16, 256), 32),
    "gptvq 4-D k256": FORMATS["gptvq 4-D k256"],
    "gptvq 8-D float16": lambda r, c, d: gptvq(r, c, d, 8, 512, (64, 128), 16, torch.float16),
    "vptq v6 k4096": FORMATS["vptq v6 k4096"],
    "vptq v8 k65536+256": FORMATS["vptq v8 k65536+256"],
    "cvxq 3 bits": cvxq,
}
CHECKED_SHAPE = (517, 4864) if GPU else (13, 172)


def check(name: str) -> list[tuple[str, list[float]]]:
    """Worst error of each kernel, one per dtype of TOLERANCE. Runs in a process of its own."""
    os.environ["HF_VQ_TUNE"] = "0"  # one configuration is enough, and compiles sooner
    torch.manual_seed(0)
    rows, columns = CHECKED_SHAPE
    case = CHECKED[name](rows, columns, DEVICE)
    reference = case.reference()
    errors: dict[str, list[float]] = {"dequantize": [], "x @ W.T": [], "g @ W": []}
    for dtype in TOLERANCE:
        y = dx = 0.0
        with use_backend("triton"):
            errors["dequantize"].append(relative(case.dequantize(dtype), reference))
            for count in [1, 3, 17, 130] if GPU else [1, 3, 17]:
                x = torch.randn((count, columns), device=DEVICE).to(dtype)
                y = max(y, relative(case.linear(x), x.float().cpu() @ reference.T))
                grad = torch.randn((count, rows), device=DEVICE).to(dtype)
                ours = case.input_gradient(grad)
                dx = max(dx, relative(ours, grad.float().cpu() @ reference))
        errors["x @ W.T"].append(y)
        errors["g @ W"].append(dx)
    return list(errors.items())


def correctness(report: Report) -> bool:
    """Every kernel against the float32 reference: worst relative error per kernel and dtype."""
    report.say("## Correctness\n")
    bounds = ", ".join(f"{str(dtype)[6:]} {bound:.0e}" for dtype, bound in TOLERANCE.items())
    rows, columns = CHECKED_SHAPE
    report.say(
        f"Worst relative error (Frobenius) against the float32 reference, {rows} x {columns}; "
        f"bounds: {bounds}.\n"
    )
    report.say("| format | kernel | float32 | float16 | bfloat16 |\n|---|---|---|---|---|")
    right = True
    if GPU:  # processes, because compiling takes most of the time
        with ProcessPoolExecutor(len(CHECKED), get_context("spawn")) as pool:
            results = list(pool.map(check, CHECKED))
    else:
        results = [check(name) for name in CHECKED]
    for name, kernels in zip(CHECKED, results, strict=True):
        for kernel, errors in kernels:
            wrong = any(
                not error <= bound for error, bound in zip(errors, TOLERANCE.values(), strict=True)
            )
            right &= not wrong
            shown = " | ".join(f"{error:.1e}" for error in errors)
            report.say(f"| {name} | {kernel} | {shown} |" + (" WRONG" if wrong else ""))
    report.say(f"\n{'All right.' if right else 'SOME RESULTS ARE WRONG.'}\n")
    return right


def graphed(run: Callable[[], None], repeats: int = 20) -> float:
    """Median seconds of `run` replayed as a CUDA graph; it is tuned and compiled before."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times[2:])


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / graphed(lambda: [target.copy_(source) for _ in range(4)]) * 4


def rotating(functions: list[Callable[[torch.Tensor], object]], tokens: int, columns: int) -> float:
    """Seconds per call of functions of one activation each, over weights that no cache holds."""
    xs = [torch.randn(tokens, columns, device=DEVICE).bfloat16() for _ in functions]

    def run() -> None:
        for function, x in zip(functions, xs, strict=True):
            function(x)

    return graphed(run) / len(functions)


def copies(nbytes: int) -> int:
    return max(2, min(64, ROTATED // nbytes))


def dense_seconds(rows: int, columns: int, counts: list[int]) -> dict[int, float]:
    weights = [
        torch.randn(rows, columns, device=DEVICE, dtype=torch.bfloat16)
        for _ in range(copies(2 * rows * columns))
    ]
    functions = [lambda x, w=w: F.linear(x, w) for w in weights]
    return {count: rotating(functions, count, columns) for count in counts}


def products(report: Report, copied: float, plan: list[tuple[tuple[int, int], list[int]]]) -> None:
    """Products of 1 to 4096 tokens: GB/s, share of the copy, ratio to cuBLAS in bfloat16."""
    for shape, counts in plan:
        if not report.has(60, f"products, {shape[0]} x {shape[1]}"):
            continue
        device = torch.cuda.get_device_properties(0)
        tuned = sorted({n if n <= 4 else max(16, min(n, 128)) for n in counts})
        jobs = [(name, *shape, count) for name in FORMATS for count in tuned]
        if torch.version.hip is None:
            target = ("cuda", device.major * 10 + device.minor, 32)
            compile_in_parallel(jobs, target, device.multi_processor_count)
        dense = dense_seconds(*shape, counts)
        report.say(f"## {shape[0]} x {shape[1]}\n")
        report.say("Time of the dense layer over that of the packed one, by tokens.\n")
        report.say("| format | bits | GB/s at 1 | of copy | " + " | ".join(map(str, counts)) + " |")
        report.say("|---" * (4 + len(counts)) + "|")
        for name, make in FORMATS.items():
            if not report.has(10, f"{name}, {shape[0]} x {shape[1]}"):
                continue
            cases = [make(*shape, DEVICE)]
            cases += [make(*shape, DEVICE) for _ in range(copies(cases[0].nbytes) - 1)]
            seconds = {n: rotating([c.linear for c in cases], n, shape[1]) for n in counts}
            speed = cases[0].nbytes / seconds[1]
            ratios = " | ".join(f"{dense[n] / seconds[n]:.2f}" for n in counts)
            report.say(
                f"| {name} | {cases[0].bits:.2f} | {speed / 1e9:.0f} | {speed / copied:.0%} "
                f"| {ratios} |"
            )
        us = " | ".join(f"{1e6 * dense[n]:.1f}" for n in counts)
        speed = 2 * shape[0] * shape[1] / dense[1]
        report.say(f"| dense, µs | 16 | {speed / 1e9:.0f} | {speed / copied:.0%} | {us} |\n")


def crossover(report: Report) -> None:
    """From how many tokens on a dense weight wins: what DENSE_FROM should hold."""
    if not report.has(60, "where a dense weight wins"):
        return
    from hf_vq_kernels import triton_backend  # imports triton

    rows, columns = MAIN_SHAPES[0]
    report.say("## Tiles or a dense weight, 4096 x 4096, µs\n")
    report.say("| format | " + " | ".join(map(str, TOKENS[5:11])) + " |")
    report.say("|---" * 7 + "|")
    before = dict(triton_backend.DENSE_FROM)
    for name, make in FORMATS.items():
        cells = []
        cases = [make(rows, columns, DEVICE) for _ in range(8)]
        for tokens in TOKENS[5:11]:
            pair = []
            for threshold in (1 << 30, 0):  # always tiles, always dense
                triton_backend.DENSE_FROM.update(dict.fromkeys(before, threshold))
                pair.append(1e6 * rotating([c.linear for c in cases], tokens, columns))
            cells.append(f"{pair[0]:.0f} / {pair[1]:.0f}")
        triton_backend.DENSE_FROM.update(before)
        report.say(f"| {name} | " + " | ".join(cells) + " |")
    report.say()


def memory(report: Report) -> None:
    """What a call allocates beyond its input and its result."""
    if not report.has(30, "memory"):
        return
    report.say("## Memory of a call beyond input and result, 14336 x 4096, MB\n")
    report.say("| format | packed | dense bf16 | 1 token | 16 | 64 | 1024 |\n" + "|---" * 7 + "|")
    rows, columns = MAIN_SHAPES[1]
    for name, make in FORMATS.items():
        case, cells = make(rows, columns, DEVICE), []
        for tokens in (1, 16, 64, 1024):
            x = torch.randn(tokens, columns, device=DEVICE).bfloat16()
            y = case.linear(x)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            case.linear(x)
            extra = torch.cuda.max_memory_allocated() - before - y.nbytes
            cells.append(f"{max(0, extra) / 1e6:.2f}")
        dense = 2 * rows * columns / 1e6
        report.say(
            f"| {name} | {case.nbytes / 1e6:.1f} | {dense:.1f} | " + " | ".join(cells) + " |"
        )
    report.say()


def whole_model(report: Report) -> None:
    """Decoding of a Llama-8B-shaped model with random weights, as a CUDA graph."""
    report.say("## Decoding, Llama-8B-shaped, batch 1, context 512, CUDA graph\n")
    report.say("| layers | GB read per token | tokens/s | GB/s |\n|---|---|---|---|")

    def dense(rows: int, columns: int) -> tuple[Callable[..., torch.Tensor], int]:
        weight = torch.empty(rows, columns, device=DEVICE, dtype=torch.bfloat16).normal_(0, 0.02)
        return (lambda x: F.linear(x, weight)), weight.nbytes

    def packed(name: str) -> Callable[[int, int], tuple[Callable[..., torch.Tensor], int]]:
        def make(rows: int, columns: int) -> tuple[Callable[..., torch.Tensor], int]:
            case = FORMATS[name](rows, columns, DEVICE)
            return case.linear, case.nbytes

        return make

    makers = {"dense bf16": dense, **{name: packed(name) for name in FORMATS}}
    for name, make in makers.items():
        if not report.has(45, f"decoding with {name}"):
            continue
        if name in FORMATS and torch.version.hip is None:
            device = torch.cuda.get_device_properties(0)
            jobs = [(name, *shape, 1) for shape in sorted(set(SHAPES))]
            target = ("cuda", device.major * 10 + device.minor, 32)
            compile_in_parallel(jobs, target, device.multi_processor_count)
        total = 0

        def counted(rows: int, columns: int, make=make) -> Callable[..., torch.Tensor]:
            nonlocal total
            layer, nbytes = make(rows, columns)
            total += nbytes
            return layer

        decoder = Decoder(counted, 512, DEVICE)
        total += decoder.head.nbytes + decoder.cache.nbytes
        with torch.no_grad():
            seconds = graphed(decoder.step)
        report.say(
            f"| {name} | {total / 1e9:.2f} | {1 / seconds:.1f} | {total / seconds / 1e9:.0f} |"
        )
        del decoder
        torch.cuda.empty_cache()
    report.say()


def aqlm(report: Report) -> None:
    """AQLM's public kernels, on the same shape and in the same way, where they can be imported."""
    try:
        from aqlm import QuantizedLinear
    except Exception as error:
        report.not_measured.append(f"AQLM's kernels ({type(error).__name__}: {error})")
        return
    report.say("## AQLM's kernels, 4096 x 4096, float16\n\n| format | µs at 1 token |\n|---|---|")
    for books, bits in ((1, 16), (2, 8)):
        try:
            layers = [
                QuantizedLinear(
                    4096, 4096, 8, 1, books, bits, bias=False, device=DEVICE, dtype=torch.float16
                )
                for _ in range(32)
            ]
            x = torch.randn(1, 4096, device=DEVICE, dtype=torch.float16)
            with torch.no_grad():
                for layer in layers:
                    layer.codes.data.random_()
                    layer.codebooks.data.normal_()
                    layer.scales.data.fill_(1)
                seconds = graphed(lambda layers=layers, x=x: [layer(x) for layer in layers]) / 32
            report.say(f"| {books}x{bits}, groups of 8 | {1e6 * seconds:.1f} |")
        except Exception as error:
            report.not_measured.append(f"AQLM {books}x{bits} ({type(error).__name__}: {error})")
    report.say()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=510, help="seconds (default 510)")
    parser.add_argument("--out", type=Path, help="also write the report here")
    options = parser.parse_args()
    import triton  # late: it looks at TRITON_INTERPRET when it is imported

    torch.manual_seed(0)
    report = Report(options.budget)
    device = torch.cuda.get_device_name() if GPU else f"{platform.machine()}, no GPU"
    report.say("# Triton kernels\n")
    report.say(
        f"{time.strftime('%Y-%m-%d')}; {device}; torch {torch.__version__}, triton "
        f"{triton.__version__}, Python {platform.python_version()}; `python benchmarks/gpu.py`\n"
    )
    right = correctness(report)
    if GPU:
        copied = copy_bandwidth()
        report.say(f"Copy bandwidth (read + written): {copied / 1e9:.0f} GB/s\n")
        main_plan = [(shape, TOKENS) for shape in MAIN_SHAPES]
        other_plan = [(shape, [1, 16]) for shape in OTHER_SHAPES]
        for name, section in (
            ("products, Llama-8B", lambda: products(report, copied, main_plan)),
            ("decoding of a whole model", lambda: whole_model(report)),
            ("AQLM's kernels", lambda: aqlm(report)),
            ("where a dense weight wins", lambda: crossover(report)),
            ("memory", lambda: memory(report)),
            ("products, other shapes", lambda: products(report, copied, other_plan)),
        ):
            try:
                section()
            except Exception as error:  # one section must not cost the others
                report.not_measured.append(f"{name}: {type(error).__name__}: {error}")
                torch.cuda.empty_cache()
    else:
        report.not_measured += [
            "copy bandwidth", "products of 1 to 4096 tokens", "where a dense weight wins",
            "memory", "decoding of a whole model", "AQLM's kernels",
        ]  # fmt: skip
    if report.not_measured:
        report.say("## Not measured\n")
        for what in report.not_measured:
            report.say(f"- {what}")
    if options.out is not None:
        options.out.write_text("\n".join(report.lines) + "\n")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
