"""Methods beside each other at equal size: ours, scalar baselines, other libraries' quantizers.

The measure is the scalar format: b bits with a scale and a zero per 64 columns cost b + (16 + b)/64
bits. Ours are given exactly that, everything counted; what other libraries really store is counted
after they have quantized. All are compared with one pass of the original over the same windows,
with decoded weights in float32, so that nothing but the weights differs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_vq.evaluation.baselines import BASELINES, bits_per_weight, quantize_baseline
from hf_vq.evaluation.metrics import compare
from hf_vq.evaluation.others import OTHERS, Unavailable, quantize_other
from hf_vq.evaluation.teacher import Teacher
from hf_vq.files import write_text
from hf_vq.loading import packed_layers
from hf_vq.registry import METHODS
from hf_vq.tying import make_dense


@dataclass(frozen=True)
class ComparisonRow:
    """One method at one size. nominal: the bits asked for; bits: all-in, as stored.

    seconds, cpu: of loading and quantizing, by the clock and of the CPU. The figures are as in
    `hf_vq.evaluation.Comparison`; None, with a note that says why, where the method did not run.
    """

    method: str
    nominal: int
    bits: float | None = None
    perplexity: float | None = None
    kl: float | None = None
    kl_p99: float | None = None
    top1: float | None = None
    seconds: float | None = None
    cpu: float | None = None
    note: str = ""


KNOWN = (*METHODS, *BASELINES, *OTHERS)


def compare_methods(
    model: str,
    methods: Iterable[str],
    bits: Iterable[int],
    samples: Tensor,
    windows: Tensor,
    *,
    say: Callable[[float, list[ComparisonRow]], None] = lambda itself, rows: None,
    dtype: Any = "auto",
) -> tuple[float, list[ComparisonRow]]:
    """Quantize `model` with every method at every size; the original's perplexity, and the rows.

    samples, windows: int64 (n, seqlen), for calibration and held out. say: called after every row
    with what is known by then. dtype: of the model while ours and the baselines quantize it. A
    method that cannot run is a row with its reason. Raises ValueError for an unknown method.
    """
    from transformers import AutoModelForCausalLM

    methods, bits = list(methods), list(bits)
    if unknown := [name for name in methods if name not in KNOWN]:
        raise ValueError(f"there is no method {unknown[0]!r}; known are {', '.join(KNOWN)}")
    original = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).float()
    teacher = Teacher.measure(original, windows)
    itself = compare(teacher, original, windows).perplexity_dense
    rows = []
    for nominal in bits:
        for method in methods:
            began, began_cpu = time.perf_counter(), time.process_time()
            try:
                quantized, stored = _quantize(model, method, nominal, samples, dtype)
                cost = time.perf_counter() - began, time.process_time() - began_cpu
                found = compare(teacher, quantized, windows)
            except Unavailable as reason:
                rows.append(ComparisonRow(method, nominal, note=str(reason)))
            except Exception as error:  # of another library, which may not know this model or CPU
                if method not in OTHERS:
                    raise
                note = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
                rows.append(ComparisonRow(method, nominal, note=note))
            else:
                figures = (found.perplexity_quantized, found.kl, found.kl_p99, found.top1)
                rows.append(ComparisonRow(method, nominal, stored, *figures, *cost))
            say(itself, rows)
    return itself, rows


def _quantize(
    model: str, method: str, bits: int, samples: Tensor, dtype: Any
) -> tuple[nn.Module, float]:
    """The quantized model with decoded weights, in float32, and its all-in bits."""
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained
    if method in METHODS:
        make: Any = METHODS[method].config
        count, length = samples.shape
        config = make(bits=bits_per_weight(bits), dataset=samples, nsamples=count, seqlen=length)
        packed: Any = load(model, quantization_config=config, dtype=dtype)
        stored = packed.hf_quantizer.report["ledger"]["decoder_bits"]
        for name in packed_layers(packed):
            make_dense(packed, name, torch.float32)
        return nn.Module.float(packed), stored  # its own refuses what was quantized
    if method in BASELINES:
        dense = load(model, dtype=dtype)
        stored = quantize_baseline(dense, method, bits, samples)
        return dense.float(), stored
    return quantize_other(model, method, bits)


def table(itself: float, rows: list[ComparisonRow]) -> str:
    """Markdown, one line per row; the best KL of every size in bold."""
    lines = [
        "| bits asked | method | bits, everything counted | perplexity | KL | "
        "KL, 99th percentile | same most likely token | CPU s |",
        "|---|---|---|---|---|---|---|---|",
        f"| | original | | {itself:.3f} | 0 | 0 | 100 % | |",
    ]
    best = {n: _best(rows, n) for n in {row.nominal for row in rows}}
    for r in rows:
        if r.kl is None:
            lines.append(f"| {r.nominal} | {r.method} | {r.note} | | | | | |")
            continue
        kl = f"**{r.kl:.4f}**" if r is best[r.nominal] else f"{r.kl:.4f}"
        lines.append(
            f"| {r.nominal} | {r.method} | {r.bits:.3f} | {r.perplexity:.3f} | {kl} | "
            f"{r.kl_p99:.3f} | {100 * (r.top1 or 0):.1f} % | {r.cpu:.1f} |"
        )
    return "\n".join(lines) + "\n"


def _best(rows: list[ComparisonRow], nominal: int) -> ComparisonRow | None:
    found = [row for row in rows if row.nominal == nominal and row.kl is not None]
    return min(found, key=lambda row: row.kl or 0.0, default=None)


def write(folder: Path, itself: float, rows: list[ComparisonRow], about: dict[str, Any]) -> None:
    """comparison.json, comparison.md and, with matplotlib, comparison.png into `folder`.

    Rows of an earlier comparison there stay if it was made in the same way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = _with_earlier(folder / "comparison.json", rows, about)
    content = {**about, "perplexity_dense": itself, "rows": [asdict(row) for row in rows]}
    write_text(folder / "comparison.json", json.dumps(content, indent=2) + "\n")
    text = f"# Methods at equal size\n\n{about['protocol']}\n\n{table(itself, rows)}"
    write_text(folder / "comparison.md", text)
    try:
        draw(rows, folder / "comparison.png")
    except ImportError:
        return


def _with_earlier(
    file: Path, rows: list[ComparisonRow], about: dict[str, Any]
) -> list[ComparisonRow]:
    try:
        earlier = json.loads(file.read_text(encoding="utf-8"))
        old = [ComparisonRow(**row) for row in earlier["rows"]]
    except (OSError, ValueError, KeyError, TypeError):
        return rows
    if earlier.get("protocol") != about["protocol"]:
        return rows
    new = {(row.nominal, row.method): row for row in rows}
    joined = {(row.nominal, row.method): row for row in old} | new
    return sorted(joined.values(), key=lambda row: row.nominal)


def draw(rows: list[ComparisonRow], path: Path) -> None:
    """KL over all-in bits, one line per method, as a PNG. Raises ImportError without matplotlib.

    Ours are thick and full; the legend has the methods from the worst to the best, as they stand
    above each other at the smallest size.
    """
    from hf_vq.evaluation.plots import new_figure

    figure = new_figure(8, 4.2)
    axes = figure.subplots()
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.kl is not None and row.bits is not None:
            curves.setdefault(row.method, []).append((row.bits, row.kl))
    # whatever runs, a method looks the same
    looks = {name: (f"C{i % 10}", "oDs^vP*Xd"[i % 9]) for i, name in enumerate(KNOWN)}
    for method in sorted(curves, key=lambda name: -min(curves[name])[1]):
        color, marker = looks[method]
        ours: dict[str, Any] = {"linestyle": "-", "linewidth": 2.2, "zorder": 3}
        theirs: dict[str, Any] = {"linestyle": "--", "linewidth": 1}
        axes.plot(
            *zip(*sorted(curves[method]), strict=True),
            **(ours if method in METHODS else theirs),
            color=color,
            marker=marker,
            markersize=6,
            label=method,
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("bits per weight, everything counted")
    axes.set_ylabel("KL to the original (nats per token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120, metadata={"Software": None})
