"""The pictures of a card: bits and error of every layer, and quality over size. Need matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = "assets"
SIZE_QUALITY = f"{FOLDER}/size_quality.png"
"""The picture of quality over size; the others are of layers."""
_BLUE, _ORANGE, _GRAY = "#3b6fb6", "#d9822b", "#8a8f98"


def draw_plots(
    folder: Path, report: dict[str, Any], record: dict[str, Any]
) -> tuple[tuple[str, str], ...]:
    """Write the pictures there is data for into `folder`/assets.

    report, record: `quantization_report.json` and `evaluation.json`. Returns (file relative to
    `folder`, description) of each; none without matplotlib.
    """
    rows = [m for m in report.get("matrices") or [] if m.get("relative_error") is not None]
    curves = [e for e in record.get("evaluations", []) if e.get("rtn") and e.get("kl") is not None]
    if not rows and not curves:
        return ()
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return ()
    drawn = []
    if rows:
        drawn.append(_save(_bars(rows, "bits", "bits per weight"), folder, "bits_per_layer"))
        drawn.append(
            _save(_bars(rows, "relative_error", "relative error"), folder, "error_per_layer")
        )
    bits = (report.get("ledger") or {}).get("decoder_bits")
    if curves and bits is not None:
        drawn.append(_save(_curve(curves[0], bits), folder, "size_quality"))
    texts = {
        "bits_per_layer": "Bits per weight of every compressed layer",
        "error_per_layer": "Relative error of every compressed layer",
        "size_quality": "KL to the original over bits per weight, beside rounding to nearest",
    }
    return tuple((f"{FOLDER}/{name}.png", texts[name]) for name in drawn)


def new_figure(width: float, height: float) -> Any:
    """An empty figure that needs no display. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, folder: Path, name: str) -> str:
    path = folder / FOLDER / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    # without its version number the picture is the same bytes wherever it is drawn alike
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return name


def _bars(rows: list[dict[str, Any]], field: str, label: str) -> Any:
    """One bar per layer in the order of the model, coloured by what the layer is."""
    figure = new_figure(9, 2.6)
    axes = figure.subplots()
    kinds = list(dict.fromkeys(row["name"].rsplit(".", 1)[-1] for row in rows))
    colors = [f"C{i % 10}" for i in range(len(kinds))]
    for kind, color in zip(kinds, colors, strict=True):
        at = [i for i, row in enumerate(rows) if row["name"].rsplit(".", 1)[-1] == kind]
        axes.bar(at, [rows[i][field] for i in at], color=color, label=kind, width=0.85)
    axes.set_ylabel(label)
    axes.set_xlabel("layer, in the order of the model")
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, ncols=1, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _curve(evaluation: dict[str, Any], bits: float) -> Any:
    figure = new_figure(6, 3.4)
    axes = figure.subplots()
    points = sorted((row["bits"], row["kl"]) for row in evaluation["rtn"])
    axes.plot(
        *zip(*points, strict=True), "o--", color=_GRAY, label="rounding to nearest, groups of 64"
    )
    axes.plot([bits], [evaluation["kl"]], "o", color=_ORANGE, markersize=9, label="this model")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("bits per compressed weight, everything counted")
    axes.set_ylabel("KL to the original (nats per token)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure
