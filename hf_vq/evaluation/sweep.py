"""The curve of size against quality: one model quantized at several sizes from one measurement."""

from __future__ import annotations

import csv
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from hf_vq.config_base import VQConfig
from hf_vq.evaluation.report import evaluate

MEASUREMENT = "measurement.safetensors"


class SweepRow(NamedTuple):
    """One size. bytes: of the weight files, their index and config.json.

    bits: all-in per packed weight. The last four as in `hf_vq.evaluation.Evaluation`; None where
    nothing was evaluated.
    """

    size: str
    folder: str
    bytes: int
    bits: float
    seconds: float
    perplexity: float | None = None
    kl: float | None = None
    top1: float | None = None
    perplexity_dense: float | None = None


def folder_name(size: str | int) -> str:
    """ "fits:8GB@4096" -> "fits-8GB-4096"."""
    return re.sub(r"[^\w.+]+", "-", str(size)).strip("-")


def saved_bytes(folder: Path) -> int:
    """Bytes of `*.safetensors`, their index and config.json: what `size` means in a config."""
    files = [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]
    return sum(file.stat().st_size for file in [*files, folder / "config.json"])


def sweep(
    model: str,
    out: Path,
    configs: dict[str, VQConfig],
    *,
    tokenizer: Any = None,
    tokens: Tensor | None = None,
    seqlen: int = 512,
    max_shard_size: str = "5GB",
    say: Callable[[SweepRow], None] = lambda row: None,
    **loading: Any,
) -> list[SweepRow]:
    """Quantize `model` with every config and save it to a folder of `out` named as the key.

    All are planned first, so that a size out of reach is refused before any work. tokenizer: saved
    along. tokens: held-out integers (N,), on which every result is compared with the original in
    windows of `seqlen`; None: nothing is evaluated. say: called with every row when it is there.
    loading: for `from_pretrained` (dtype, device_map, revision). Raises what quantizing and
    `hf_vq.evaluation.evaluate` raise.
    """
    from transformers import AutoModelForCausalLM

    from hf_vq.hub.planning import plan_model
    from hf_vq.saving import save_with_tokenizer

    where = {name: loading[name] for name in ("dtype", "revision") if name in loading}
    for config in configs.values():
        ahead = type(config).from_dict(config.to_dict())  # without the measurement to come
        plan_model(model, ahead, **where)
    load = AutoModelForCausalLM.from_pretrained
    dense: nn.Module | None = None if tokens is None else load(model, **loading)
    rows = []
    for size, config in configs.items():
        began = time.perf_counter()
        packed: Any = load(model, quantization_config=config, **loading)
        seconds = time.perf_counter() - began
        folder = out / folder_name(size)
        save_with_tokenizer(packed, tokenizer, folder, max_shard_size=max_shard_size)
        figures: dict[str, Any] = {}
        if tokens is not None:
            found = evaluate(packed, tokens, seqlen, dense=dense).to_dict()
            kept = ("perplexity", "kl", "top1", "perplexity_dense")
            figures = {name: found.get(name) for name in kept}
        ledger = packed.hf_quantizer.report["ledger"]
        row = SweepRow(
            size, folder.name, saved_bytes(folder), ledger["decoder_bits"], seconds, **figures
        )
        rows.append(row)
        say(row)
        del packed
    return rows


def write_csv(rows: Iterable[SweepRow], path: Path) -> None:
    """One line per size under a line of names; empty where nothing was evaluated."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(SweepRow._fields)
        writer.writerows(rows)


def draw(rows: list[SweepRow], path: Path) -> None:
    """Perplexity and KL over size, as a PNG. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = sorted(rows, key=lambda row: row.bytes)
    unit, factor = ("GB", 1e9) if rows[-1].bytes >= 1e9 else ("MB", 1e6)
    sizes = [row.bytes / factor for row in rows]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot(sizes, [row.perplexity for row in rows], "o-", color="tab:blue", label="quantized")
    if rows[0].perplexity_dense is not None:
        left.axhline(rows[0].perplexity_dense, ls="--", color="gray", label="original")
    left.set_ylabel("perplexity")
    left.legend()
    right.plot(sizes, [row.kl for row in rows], "o-", color="tab:orange")
    right.set_yscale("log")
    right.set_ylabel("KL to the original (nats per token)")
    for axes in (left, right):
        axes.set_xlabel(f"saved files ({unit})")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
