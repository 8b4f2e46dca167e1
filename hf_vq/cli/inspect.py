"""`hf-vq inspect`: where the bytes of a packed model are, and how well each layer fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from hf_vq.cli.common import one_line_errors, packed_folder, stdout
from hf_vq.hub.checkpoint import Checkpoint, read_checkpoint


@one_line_errors
def inspect(
    out: Annotated[Path, typer.Argument(help="Folder of a packed model.")],
    layers: Annotated[bool, typer.Option(help="List every packed layer.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Print the size ledger and the layers' errors of OUT; reads no weights."""
    checkpoint = read_checkpoint(packed_folder(out))
    if as_json:
        print(json.dumps(as_dict(checkpoint), indent=2))
    else:
        print_checkpoint(checkpoint, layers=layers)


def as_dict(c: Checkpoint) -> dict:
    """The ledger as plain JSON types."""
    return {
        "method": c.method,
        "settings": c.settings,
        "packed": {
            "weights": c.packed_weights,
            "bytes": c.packed_bytes,
            "bits_per_weight": c.packed_bits,
        },
        "dense": {"weights": c.dense_weights, "bytes": c.dense_bytes},
        "dense_because": (c.report or {}).get("dense"),
        "model_bits_per_weight": c.model_bits,
        "file_bytes": c.file_bytes,
        "layers": [
            {
                "name": m.name,
                "shape": [m.out_features, m.in_features],
                "bytes": m.nbytes,
                "bits_per_weight": m.bits_per_weight,
                "relative_error": m.relative_error,
                "seconds": m.seconds,
            }
            for m in c.matrices
        ],
    }


def print_checkpoint(c: Checkpoint, console: Console | None = None, layers: bool = True) -> None:
    """Print the ledger as tables."""
    console = console or stdout()
    if layers:
        table = Table(
            box=box.SIMPLE_HEAD,
            title=f"{len(c.matrices)} matrices packed with {c.method}",
            title_justify="left",
        )
        table.add_column("layer", overflow="fold")
        for name in ("shape", "bytes", "bits", "rel. error", "seconds"):
            table.add_column(name, justify="right")
        for m in c.matrices:
            table.add_row(
                m.name,
                f"{m.out_features}x{m.in_features}",
                f"{m.nbytes:,}",
                f"{m.bits_per_weight:.3f}",
                "" if m.relative_error is None else f"{m.relative_error:.4f}",
                "" if m.seconds is None else f"{m.seconds:.2f}",
            )
        console.print(table)
    ledger = Table(box=box.SIMPLE_HEAD, title="size", title_justify="left")
    ledger.add_column("")
    for name in ("weights", "bytes", "bits per weight"):
        ledger.add_column(name, justify="right")
    ledger.add_row(
        "packed, everything counted",
        f"{c.packed_weights:,}",
        f"{c.packed_bytes:,}",
        f"{c.packed_bits:.3f}",
    )
    if c.dense_weights:
        bits = 8 * c.dense_bytes / c.dense_weights
        ledger.add_row("left dense", f"{c.dense_weights:,}", f"{c.dense_bytes:,}", f"{bits:.3f}")
    ledger.add_row(
        "whole model",
        f"{c.packed_weights + c.dense_weights:,}",
        f"{c.packed_bytes + c.dense_bytes:,}",
        f"{c.model_bits:.3f}",
    )
    ledger.add_row("files, with their headers", "", f"{c.file_bytes:,}", "")
    console.print(ledger)
    for reason, names in _reasons(c).items():
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        console.print(f"dense, {reason}: {shown}", highlight=False, markup=False)
    if c.report is None:
        console.print("no quantization_report.json beside the model: no errors to show")


def _reasons(c: Checkpoint) -> dict[str, list[str]]:
    """Why matrices are dense -> which."""
    found: dict[str, list[str]] = {}
    for name, reason in ((c.report or {}).get("dense") or {}).items():
        found.setdefault(reason, []).append(name)
    return found
