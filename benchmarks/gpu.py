"""Every Triton kernel: first whether it is right, then how fast it is beside the dense layer.

    python benchmarks/gpu.py [--budget SECONDS] [--out FILE.md] [--dry]

On a GPU: correctness of every operator, copy bandwidth, products of 1 to 4096 tokens beside cuBLAS,
where a dense weight wins, a whole model's decoding, LoRA steps (beside bitsandbytes) and gradients
of codebooks, look-ups, memory, launches, and AQLM's kernels where they are installed, in under 9
minutes. What fails, or the budget leaves no time for, is listed as not measured and costs the
others nothing. Without a GPU: correctness alone, at small sizes, in Triton's interpreter. `--dry`:
every section once, at tiny sizes, wherever it is; its times mean nothing. Exits with 1 where a
result is wrong.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import gpu_sections
import gpu_training
import torch
from gpu_cases import FORMATS, Case, cvxq, gptvq
from gpu_report import DEVICE, DRY, GPU, INTERPRETED, Report, Sizes
from hf_vq_kernels.dispatch import use_backend

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}

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


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative error in the Frobenius norm."""
    ours, theirs = ours.double().cpu(), theirs.double().cpu()
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-30)).item()


def check(job: tuple[str, Sizes]) -> list[tuple[str, list[float]]]:
    """Worst error of each operator, one per dtype of TOLERANCE. Runs in a process of its own."""
    name, sizes = job
    os.environ["HF_VQ_TUNE"] = "0"  # one configuration is enough, and compiles sooner
    torch.manual_seed(0)
    rows, columns = sizes.checked
    case = CHECKED[name](rows, columns, DEVICE)
    reference = case.reference()
    ids = torch.tensor([rows - 1, 0, rows // 2], device=DEVICE)
    trained = case.trainable()
    cpu = trained.to("cpu")
    errors: dict[str, list[float]] = {}

    def note(operator: str, error: float) -> None:
        errors.setdefault(operator, []).append(error)

    for dtype in TOLERANCE:
        y = dx = 0.0
        with use_backend("triton"):
            note("dequantize", relative(case.dequantize(dtype), reference))
            note("rows", relative(case.embedding(ids, dtype), reference[ids.cpu()]))
            for count in sizes.checked_tokens:
                x = torch.randn((count, columns), device=DEVICE).to(dtype)
                y = max(y, relative(case.linear(x), x.float().cpu() @ reference.T))
                grad = torch.randn((count, rows), device=DEVICE).to(dtype)
                ours = case.input_gradient(grad)
                dx = max(dx, relative(ours, grad.float().cpu() @ reference))
            note("x @ W.T", y)
            note("g @ W", dx)
            ours_trained = trained.packed_gradients(grad, x)
        with use_backend("torch"):
            theirs = cpu.packed_gradients(grad.float().cpu(), x.float().cpu())
        note("gradients of the packed", max(map(relative, ours_trained, theirs)))
    return list(errors.items())


def correctness(report: Report) -> bool:
    """Every operator against the float32 reference: worst relative error per operator and dtype."""
    report.say("## Correctness\n")
    bounds = ", ".join(f"{str(dtype)[6:]} {bound:.0e}" for dtype, bound in TOLERANCE.items())
    rows, columns = report.sizes.checked
    report.say(
        f"Worst relative error (Frobenius) against the float32 reference, {rows} x {columns}; "
        f"bounds: {bounds}.\n"
    )
    report.say("| format | operator | float32 | float16 | bfloat16 |\n|---|---|---|---|---|")
    right = True
    checked = report.formats(CHECKED)
    jobs = [(name, report.sizes) for name in checked]
    if GPU:  # processes, because compiling takes most of the time
        with ProcessPoolExecutor(len(checked), get_context("spawn")) as pool:
            results = list(pool.map(check, jobs))
    else:
        results = [check(job) for job in jobs]
    for name, operators in zip(checked, results, strict=True):
        for operator, errors in operators:
            wrong = any(
                not error <= bound for error, bound in zip(errors, TOLERANCE.values(), strict=True)
            )
            right &= not wrong
            shown = " | ".join(f"{error:.1e}" for error in errors)
            report.say(f"| {name} | {operator} | {shown} |" + (" WRONG" if wrong else ""))
    report.say(f"\n{'All right.' if right else 'SOME RESULTS ARE WRONG.'}\n")
    return right


def sections(copied: float, sizes: Sizes) -> list[tuple[str, Callable[[Report], Any]]]:
    """What is measured, the most important first."""
    few = tuple(n for n in sizes.tokens if n in (1, 16))
    return [
        ("products", lambda r: gpu_sections.products(r, copied, sizes.main[:1], sizes.tokens)),
        ("decoding of a whole model", gpu_sections.whole_model),
        (
            "products, further shapes of Llama-8B",
            lambda r: gpu_sections.products(r, copied, sizes.main[1:], sizes.tokens),
        ),
        ("where a dense weight wins", gpu_sections.crossover),
        ("LoRA steps", gpu_training.lora),
        ("gradients of codebooks", gpu_training.packed_gradients),
        ("AQLM's kernels", gpu_sections.aqlm),
        ("look-ups", gpu_sections.embeddings),
        ("memory", gpu_sections.memory),
        ("launches", gpu_sections.launches),
        (
            "products, other shapes",
            lambda r: gpu_sections.products(r, copied, sizes.others, few),
        ),
    ]


def main() -> int:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=510, help="seconds (default 510)")
    parser.add_argument("--out", type=Path, help="also write the report here")
    parser.add_argument("--dry", action="store_true", help="every section, at tiny sizes")
    options = parser.parse_args()
    import triton  # late: it looks at TRITON_INTERPRET when it is imported

    torch.manual_seed(0)
    sizes = DRY if options.dry else Sizes() if GPU else INTERPRETED
    report = Report(options.budget, sizes, options.dry)
    device = torch.cuda.get_device_name() if GPU else f"{platform.machine()}, no GPU"
    report.say("# Triton kernels\n")
    if options.dry:
        report.say("DRY RUN: sizes are tiny, and no time or memory below means anything.\n")
    report.say(
        f"{time.strftime('%Y-%m-%d')}; {device}; torch {torch.__version__}, triton "
        f"{triton.__version__}, Python {platform.python_version()}; `python benchmarks/gpu.py`\n"
    )
    right = report.run("correctness", correctness)
    if GPU or options.dry:
        copied = report.run("copy bandwidth", gpu_sections.copy_bandwidth)
        for name, section in sections(copied or float("nan"), sizes):
            report.run(name, section)
    else:
        report.not_measured += [f"{name}: no GPU" for name, _ in sections(1.0, sizes)]
    if report.not_measured:
        report.say("## Not measured\n")
        for what in report.not_measured:
            report.say(f"- {what}")
    if options.out is not None:
        options.out.write_text("\n".join(report.lines) + "\n")
    for process in multiprocessing.active_children():  # compilers that the budget cut off
        process.terminate()
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
