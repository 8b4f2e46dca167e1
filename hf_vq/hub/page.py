"""A packed model on one page of HTML that needs nothing else: no network, no other file."""

from __future__ import annotations

import json
import math
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from hf_vq.files import write_text
from hf_vq.hub.card_rows import dtype_of, measured_rows, reproduce, settings_rows, task_rows
from hf_vq.hub.checkpoint import Checkpoint, read_checkpoint
from hf_vq.hub.record import read_record
from hf_vq.sizes import human

_WIDTH, _HEIGHT = 440, 250
_LEFT, _BOTTOM, _TOP, _RIGHT = 52, 38, 12, 14


def render_page(folder: str | Path) -> str:
    """The page of the packed model in `folder`; raises what `read_checkpoint` raises.

    Figures are those of the files' headers, `quantization_report.json` and `evaluation.json`.
    """
    folder = Path(folder)
    checkpoint = read_checkpoint(folder)
    report, record = checkpoint.report or {}, read_record(folder) or {}
    evaluations = record.get("evaluations", [])
    first = evaluations[0] if evaluations else None
    stored = checkpoint.settings
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    base = stored.get("base_model")
    template = (resources.files("hf_vq.model_cards") / "report.html.j2").read_text("utf-8")
    page = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    ).from_string(template)
    return page.render(
        title=base or folder.resolve().name,
        method=checkpoint.method.upper(),
        tiles=_tiles(checkpoint, report, first),
        ledger=_ledger(checkpoint),
        dense=_dense(report),
        layers=_layers(checkpoint),
        kinds=_kinds(checkpoint),
        charts=_charts(checkpoint),
        curve=_curve(first, checkpoint.packed_bits),
        evaluations=[(e, measured_rows(e)) for e in evaluations],
        samples=[e for e in evaluations if e.get("sample") is not None],
        tasks=task_rows(record.get("tasks", [])),
        settings=[(name, value.strip("`")) for name, value in settings_rows(stored, report)],
        command=reproduce(stored, dtype_of(config)),
        notes=report.get("notes", []),
    )


def write_page(folder: str | Path, file: str | Path) -> None:
    """Write `render_page(folder)` to `file`."""
    write_text(file, render_page(folder))


def _tiles(
    c: Checkpoint, report: dict[str, Any], evaluation: dict[str, Any] | None
) -> list[tuple[str, str, str]]:
    """(figure, what it is, what it was before) of the answers that come first."""
    before = (report.get("ledger") or {}).get("model_dense_bytes")
    size = c.packed_bytes + c.dense_bytes
    tiles = [
        (f"{c.packed_bits:.2f}", "bits per packed weight", "everything counted"),
        (human(size), "the model", f"before: {human(before)}" if before else ""),
    ]
    if evaluation is not None:
        dense = evaluation.get("perplexity_dense")
        was = "" if dense is None else f"original: {dense:.2f}"
        tiles.append((f"{evaluation['perplexity']:.2f}", "perplexity", was))
        if "kl" in evaluation:
            tiles.append((f"{evaluation['kl']:.3f}", "KL to the original", "nats per token"))
            tiles.append((f"{100 * evaluation['top1']:.1f} %", "same most likely token", ""))
    if report.get("seconds"):
        cpu = report.get("cpu_seconds")
        of_cpu = f"{cpu:.0f} s of processor time" if cpu else ""
        device = (report.get("environment") or {}).get("device", "")
        note = ", ".join(filter(None, (of_cpu, device)))
        tiles.append((f"{report['seconds']:.0f} s", "to quantize", note))
    return tiles


def _ledger(c: Checkpoint) -> list[dict[str, Any]]:
    """Rows with their share of all bytes."""
    total = c.packed_bytes + c.dense_bytes
    rows = [("packed layers", c.packed_weights, c.packed_bytes, c.packed_bits)]
    if c.dense_weights:
        bits = 8 * c.dense_bytes / c.dense_weights
        rows.append(("left dense", c.dense_weights, c.dense_bytes, bits))
    rows.append(("whole model", c.packed_weights + c.dense_weights, total, c.model_bits))
    return [
        {"name": n, "weights": w, "bytes": b, "bits": bits, "share": 100 * b / total}
        for n, w, b, bits in rows
    ]


def _dense(report: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Why matrices are dense -> which."""
    found: dict[str, list[str]] = {}
    for name, reason in (report.get("dense") or {}).items():
        found.setdefault(reason, []).append(name)
    return list(found.items())


def _kind(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _kinds(c: Checkpoint) -> list[str]:
    return list(dict.fromkeys(_kind(m.name) for m in c.matrices))


def _layers(c: Checkpoint) -> list[dict[str, Any]]:
    return [
        {
            "name": m.name,
            "shape": f"{m.out_features} x {m.in_features}",
            "weights": m.num_weights,
            "bytes": m.nbytes,
            "bits": m.bits_per_weight,
            "error": m.relative_error,
            "seconds": m.seconds,
        }
        for m in c.matrices
    ]


def _charts(c: Checkpoint) -> list[dict[str, Any]]:
    """Bars per layer, heights as shares of the largest value."""
    kinds = _kinds(c)
    charts = []
    for label, digits, values in (
        ("bits per weight", 2, [m.bits_per_weight for m in c.matrices]),
        ("relative error", 4, [m.relative_error for m in c.matrices]),
    ):
        known = [value for value in values if value is not None]
        if not known:
            continue
        top = max(known) or 1.0
        bars = [
            {
                "height": 100 * value / top,
                "kind": kinds.index(_kind(m.name)) % 8,
                "text": f"{m.name}: {value:.{digits + 1}f}",
            }
            for m, value in zip(c.matrices, values, strict=True)
            if value is not None
        ]
        mean = sum(known) / len(known)
        charts.append(
            {
                "label": label,
                "top": f"{top:.{digits}f}",
                "mean": f"{mean:.{digits}f}",
                "mean_at": 100 - 100 * mean / top,
                "bars": bars,
            }
        )
    return charts


def _curve(evaluation: dict[str, Any] | None, bits: float) -> dict[str, Any] | None:
    """KL over bits on a logarithmic axis, in the units of the picture; None without a peer."""
    if evaluation is None or not evaluation.get("rtn") or not evaluation.get("kl"):
        return None
    points = [(row["bits"], row["kl"]) for row in evaluation["rtn"] if row["kl"] > 0]
    own = (bits, evaluation["kl"])
    low_x = math.floor(min(x for x, _ in [*points, own]))
    high_x = math.ceil(max(x for x, _ in [*points, own]))
    decades = [math.log10(y) for _, y in [*points, own]]
    low_y, high_y = math.floor(min(decades)), math.ceil(max(decades))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - low_x) / (high_x - low_x)
        up = (math.log10(y) - low_y) / max(high_y - low_y, 1)
        return (
            round(_LEFT + across * (_WIDTH - _LEFT - _RIGHT), 1),
            round(_HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM), 1),
        )

    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": _WIDTH - _RIGHT,
        "bottom": _HEIGHT - _BOTTOM,
        "line": " ".join(f"{x},{y}" for x, y in (place(*p) for p in sorted(points))),
        "points": [(*place(*p), f"rounding, {p[0]:.2f} bits: KL {p[1]:.4f}") for p in points],
        "own": (*place(*own), f"this model, {own[0]:.2f} bits: KL {own[1]:.4f}"),
        "x_ticks": [(place(x, 10.0**low_y)[0], str(x)) for x in range(low_x, high_x + 1)],
        "y_ticks": [(place(low_x, 10.0**y)[1], f"{10.0**y:g}") for y in range(low_y, high_y + 1)],
    }
