"""The sections of benchmarks/gpu.py that measure inference: products, memory, a whole model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from gpu_cases import FORMATS, compile_in_parallel
from gpu_model import LLAMA_8B, TINY, Decoder
from gpu_report import DEVICE, GPU, Report, Shape, peak_memory
from hf_vq_kernels.dispatch import use_backend


def copy_bandwidth(report: Report) -> float:
    """Bytes per second, read and written, of a copy of 1 GiB."""
    source = torch.empty(report.sizes.copied, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    seconds = report.seconds(lambda: [target.copy_(source) for _ in range(4)])
    speed = 2 * source.numel() / seconds * 4
    report.say(f"Copy bandwidth (read + written): {speed / 1e9:.0f} GB/s\n")
    return speed


def _compile(jobs: list[tuple[str, int, int, int]]) -> None:
    """Compile for this GPU what `jobs` (format, rows, columns, tokens) need."""
    if GPU and torch.version.hip is None:
        device = torch.cuda.get_device_properties(0)
        target = ("cuda", device.major * 10 + device.minor, 32)
        compile_in_parallel(jobs, target, device.multi_processor_count)


def _dense_seconds(report: Report, shape: Shape, counts: tuple[int, ...]) -> dict[int, float]:
    rows, columns = shape
    weights = [
        torch.randn(rows, columns, device=DEVICE, dtype=torch.bfloat16)
        for _ in range(report.copies(2 * rows * columns))
    ]
    functions = [lambda x, w=w: F.linear(x, w) for w in weights]
    return {count: report.rotating(functions, count, columns) for count in counts}


def products(
    report: Report, copied: float, shapes: tuple[Shape, ...], counts: tuple[int, ...]
) -> None:
    """Products of `counts` tokens: time, GB/s, share of the copy, ratio to cuBLAS in bfloat16."""
    for shape in shapes:
        if not report.has(50, f"products, {shape[0]} x {shape[1]}"):
            continue
        tuned = sorted({n if n <= 4 else max(16, min(n, 128)) for n in counts})
        _compile([(name, *shape, count) for name in report.formats(FORMATS) for count in tuned])
        dense = _dense_seconds(report, shape, counts)
        report.say(f"## {shape[0]} x {shape[1]}\n")
        report.say("Time in microseconds, and of the dense layer over that of the packed one.\n")
        report.say("| format | bits | GB/s at 1 | of copy | " + " | ".join(map(str, counts)) + " |")
        report.say("|---" * (4 + len(counts)) + "|")
        slower: list[str] = []
        for name, make in report.formats(FORMATS).items():
            if not report.has(8, f"{name}, {shape[0]} x {shape[1]}"):
                continue
            cases = [make(*shape, DEVICE)]
            cases += [make(*shape, DEVICE) for _ in range(report.copies(cases[0].nbytes) - 1)]
            with use_backend("triton"):
                seconds = {
                    n: report.rotating([c.linear for c in cases], n, shape[1]) for n in counts
                }
            speed = cases[0].nbytes / seconds[1]
            cells = " | ".join(
                f"{1e6 * seconds[n]:.1f} ({dense[n] / seconds[n]:.2f})" for n in counts
            )
            report.say(
                f"| {name} | {cases[0].bits:.2f} | {speed / 1e9:.0f} | {speed / copied:.0%} "
                f"| {cells} |"
            )
            slower += [f"{name} at {n}" for n in counts if seconds[n] > dense[n]]
        us = " | ".join(f"{1e6 * dense[n]:.1f}" for n in counts)
        speed = 2 * shape[0] * shape[1] / dense[1]
        report.say(f"| dense | 16 | {speed / 1e9:.0f} | {speed / copied:.0%} | {us} |")
        report.say(f"\nSlower than dense: {', '.join(slower) or 'none'}.\n")


def crossover(report: Report) -> None:
    """From how many tokens on a dense weight wins: what DENSE_FROM should hold."""
    from hf_vq_kernels import triton_backend  # imports triton

    rows, columns = report.sizes.main[0]
    tested = [n for n in report.sizes.tokens if n >= 16][:7]
    report.say(f"## Tiles or a dense weight, {rows} x {columns}, microseconds\n")
    report.say("| format | " + " | ".join(map(str, tested)) + " | dense wins from |")
    report.say("|---" * (2 + len(tested)) + "|")
    before = dict(triton_backend.DENSE_FROM)
    try:
        for name, make in report.formats(FORMATS).items():
            if not report.has(10, f"where a dense weight wins, {name}"):
                continue
            cells, wins = [], None
            cases = [make(rows, columns, DEVICE) for _ in range(2 if report.dry else 8)]
            for tokens in tested:
                pair = []
                for threshold in (1 << 30, 0):  # always tiles, always dense
                    triton_backend.DENSE_FROM.update(dict.fromkeys(before, threshold))
                    with use_backend("triton"):
                        calls = [c.linear for c in cases]
                        pair.append(1e6 * report.rotating(calls, tokens, columns))
                wins = wins or (tokens if pair[1] < pair[0] else None)
                cells.append(f"{pair[0]:.0f} / {pair[1]:.0f}")
            report.say(f"| {name} | " + " | ".join(cells) + f" | {wins or 'never'} |")
    finally:
        triton_backend.DENSE_FROM.update(before)
    report.say()


def memory(report: Report) -> None:
    """What a call allocates beyond its input and its result."""
    rows, columns = report.sizes.main[min(1, len(report.sizes.main) - 1)]
    counts = [n for n in (1, 16, 64, 1024) if n in report.sizes.tokens]
    report.say(f"## Memory of a call beyond input and result, {rows} x {columns}, MB\n")
    report.say("| format | packed | dense bf16 | " + " | ".join(map(str, counts)) + " tokens |")
    report.say("|---" * (3 + len(counts)) + "|")
    for name, make in report.formats(FORMATS).items():
        if not report.has(5, f"memory, {name}"):
            continue
        case, cells = make(rows, columns, DEVICE), []
        for tokens in counts:
            x = torch.randn(tokens, columns, device=DEVICE).bfloat16()
            with use_backend("triton"):
                size = case.linear(x).nbytes
                extra, _ = peak_memory(lambda case=case, x=x: case.linear(x))
            cells.append(f"{max(0, extra - size) / 1e6:.2f}")
        dense = 2 * rows * columns / 1e6
        report.say(
            f"| {name} | {case.nbytes / 1e6:.1f} | {dense:.1f} | " + " | ".join(cells) + " |"
        )
    report.say()


def launches(report: Report) -> None:
    """Kernels that a call launches, of ours and of torch's, counted by the profiler."""
    rows, columns = report.sizes.main[0]
    report.say(f"## Launches per call, {rows} x {columns}\n")
    calls = ("1 token", "16 tokens", "input gradient", "packed gradients", "embedding")
    report.say("| format | " + " | ".join(calls) + " |\n" + "|---" * (1 + len(calls)) + "|")
    activity = torch.profiler.ProfilerActivity
    for name, make in report.formats(FORMATS).items():
        if not report.has(5, f"launches, {name}"):
            continue
        case = make(rows, columns, DEVICE)
        trained = case.trainable()
        x = torch.randn(16, columns, device=DEVICE).bfloat16()
        grad = torch.randn(16, rows, device=DEVICE).bfloat16()
        ids = torch.arange(2, device=DEVICE)
        cells = []
        for run in (
            lambda case=case, x=x: case.linear(x[:1]),
            lambda case=case, x=x: case.linear(x),
            lambda case=case, grad=grad: case.input_gradient(grad),
            lambda case=trained, grad=grad, x=x: case.packed_gradients(grad, x),
            lambda case=case, ids=ids: case.embedding(ids, torch.bfloat16),
        ):
            with use_backend("triton"):
                run()
                kinds = [activity.CPU, activity.CUDA] if GPU else [activity.CPU]
                with torch.profiler.profile(activities=kinds) as profile:
                    run()
            found = Counter(
                event.name for event in profile.events() if "CUDA" in str(event.device_type)
            )
            cells.append(str(sum(found.values())))
        report.say(f"| {name} | " + " | ".join(cells) + " |")
    report.say()


def embeddings(report: Report) -> None:
    """Look-ups in a table of Llama's vocabulary."""
    rows, columns = report.sizes.vocabulary, report.sizes.main[0][1]
    counts = [n for n in (1, 16, 2048) if n in report.sizes.tokens]
    report.say(f"## Look-ups in a table of {rows} x {columns}, microseconds\n")
    report.say("| format | " + " | ".join(f"{n} rows" for n in counts) + " |")
    report.say("|---" * (1 + len(counts)) + "|")
    for name, make in report.formats(FORMATS).items():
        if not report.has(8, f"look-ups, {name}"):
            continue
        case, cells = make(rows, columns, DEVICE), []
        for count in counts:
            ids = torch.randint(0, rows, (count,), device=DEVICE)
            with use_backend("triton"):
                seconds = report.seconds(
                    lambda case=case, ids=ids: case.embedding(ids, torch.bfloat16)
                )
            cells.append(f"{1e6 * seconds:.1f}")
        report.say(f"| {name} | " + " | ".join(cells) + " |")
    report.say()


def whole_model(report: Report) -> None:
    """Decoding of a Llama-8B-shaped model with random weights, as a CUDA graph."""
    size = TINY if report.dry else LLAMA_8B
    report.say("## Decoding, Llama-8B-shaped, batch 1, context 512, static cache, CUDA graph\n")
    report.say("| layers | GB read per token | tokens/s | GB/s |\n|---|---|---|---|")

    def dense(rows: int, columns: int) -> tuple[Callable[..., torch.Tensor], int]:
        weight = torch.empty(rows, columns, device=DEVICE, dtype=torch.bfloat16).normal_(0, 0.02)
        return (lambda x: F.linear(x, weight)), weight.nbytes

    def packed(name: str) -> Callable[[int, int], tuple[Callable[..., torch.Tensor], int]]:
        def make(rows: int, columns: int) -> tuple[Callable[..., torch.Tensor], int]:
            case = FORMATS[name](rows, columns, DEVICE)
            return case.linear, case.nbytes

        return make

    makers = {"dense bf16": dense, **{name: packed(name) for name in report.formats(FORMATS)}}
    for name, make in makers.items():
        if not report.has(25, f"decoding with {name}"):
            continue
        if name in FORMATS:
            _compile([(name, *shape, 1) for shape in sorted(set(size.shapes))])
        total = 0

        def counted(rows: int, columns: int, make=make) -> Callable[..., torch.Tensor]:
            nonlocal total
            layer, nbytes = make(rows, columns)
            total += nbytes
            return layer

        decoder = Decoder(counted, 512, DEVICE, size)
        total += decoder.head.nbytes + decoder.cache.nbytes
        with torch.no_grad(), use_backend("triton"):
            seconds = report.seconds(decoder.step)
        report.say(
            f"| {name} | {total / 1e9:.2f} | {1 / seconds:.1f} | {total / seconds / 1e9:.0f} |"
        )
        del decoder
        if GPU:
            torch.cuda.empty_cache()
    report.say()


def aqlm(report: Report) -> None:
    """AQLM's public kernels, on the same shape and in the same way, where they can be imported."""
    from aqlm import QuantizedLinear

    rows, columns = report.sizes.main[0]
    report.say(f"## AQLM's kernels, {rows} x {columns}, float16\n")
    report.say("| format | us at 1 token |\n|---|---|")
    count = 2 if report.dry else 32
    for books, bits in ((1, 16), (2, 8)):
        try:
            layers = [
                QuantizedLinear(
                    columns, rows, 8, 1, books, bits, bias=False, device=DEVICE,
                    dtype=torch.float16,
                )
                for _ in range(count)
            ]  # fmt: skip
            x = torch.randn(1, columns, device=DEVICE, dtype=torch.float16)
            with torch.no_grad():
                for layer in layers:
                    layer.codes.data.random_()
                    layer.codebooks.data.normal_()
                    layer.scales.data.fill_(1)
                seconds = report.seconds(lambda layers=layers, x=x: [f(x) for f in layers]) / count
            report.say(f"| {books}x{bits}, groups of 8 | {1e6 * seconds:.1f} |")
        except Exception as error:
            report.not_measured.append(f"AQLM {books}x{bits} ({type(error).__name__}: {error})")
    report.say()
