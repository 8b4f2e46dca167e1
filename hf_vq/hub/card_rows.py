"""The rows of a card's tables. Every figure is one of the JSON files', and nothing else is."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

from hf_vq.registry import get_method
from hf_vq.rules import Flag
from hf_vq.sizes import human

NOT_EVALUATED = "not evaluated"
WORST = 5
"""Layers that a card names."""

_ORIGINAL, _TEXT = "ORIGINAL", "TEXT"


def size_rows(ledger: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of each size that the report's ledger has."""
    names = {
        "model_dense_bytes": ("bytes of the original", "{:,}"),
        "model_bytes": ("bytes of this model", "{:,}"),
        "packed_bytes": ("of these, compressed layers", "{:,}"),
        "decoder_bits": ("bits per compressed weight, everything counted", "{:.3f}"),
        "model_bits": ("bits per parameter, whole model", "{:.3f}"),
    }
    return [(text, form.format(ledger[k])) for k, (text, form) in names.items() if k in ledger]


def headline(
    report: dict[str, Any], evaluation: dict[str, Any] | None, bits: float | None
) -> list[str]:
    """The answer in up to three sentences: sizes, quality, what it cost to make."""
    ledger = report.get("ledger") or {}
    size = []
    after, before = ledger.get("model_bytes"), ledger.get("model_dense_bytes")
    if after is not None:
        size.append(f"{human(before)} → {human(after)}" if before else human(after))
    if bits is not None:
        size.append(f"{bits:.3f} bits per compressed weight, everything counted")
    quality = ["quality not evaluated"] if evaluation is None else _quality(evaluation)
    made = ""
    if report.get("seconds"):
        made = f"quantized in {report['seconds']:.1f} s"
        if cpu := report.get("cpu_seconds"):  # other work on the machine is not in it
            made += f" ({cpu:.1f} s of processor time)"
        peak = _peak(report.get("peak_memory_bytes") or {})
        made += f" with a peak of {human(peak)} of memory" if peak else ""
        device = (report.get("environment") or {}).get("device")
        made += f" on {device}" if device else ""
    sentences = [", ".join(size), ", ".join(quality), made]
    return [f"{text[0].upper()}{text[1:]}." for text in sentences if text]


def _quality(e: dict[str, Any]) -> list[str]:
    dense, own = e.get("perplexity_dense"), f"{e['perplexity']:.3f}"
    parts = [f"perplexity {own}" if dense is None else f"perplexity {dense:.3f} → {own}"]
    if "kl" in e:
        parts.append(f"KL {e['kl']:.4f} nats per token")
        parts.append(f"{100 * e['top1']:.1f} % same most likely token")
    parts[-1] += f" ({e['dataset']}, context {e['seqlen']})"
    return parts


def _peak(peaks: dict[str, int]) -> int | None:
    """Of the GPUs where there are any, of the process elsewhere."""
    devices = [size for name, size in peaks.items() if ":" in name]
    return sum(devices) if devices else peaks.get("process")


def measured_rows(evaluation: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Name, the original's figure, this model's figure."""
    e = evaluation

    def figure(name: str, form: str = "{:.4f}", scale: float = 1) -> str:
        value = e.get(name)
        return NOT_EVALUATED if value is None else form.format(scale * value)

    rows = [("perplexity", figure("perplexity_dense", "{:.3f}"), figure("perplexity", "{:.3f}"))]
    compared = (
        ("kl", "KL to the original, mean (nats per token)", "0"),
        ("kl_median", "KL, median", "0"),
        ("kl_p99", "KL, 99th percentile", "0"),
    )
    rows += [(text, zero, figure(name)) for name, text, zero in compared]
    rows.append(("same most likely token", "100 %", _percent(figure("top1", "{:.1f}", 100))))
    g = e.get("generation")
    if g is not None:
        name = f"repeated 4-grams, greedy, {g['prompts']} x {g['new_tokens']} tokens"
        own, dense = (g.get(key) for key in ("repetition", "repetition_dense"))
        rows.append((name, _share(dense), _share(own)))
        if g.get("divergence") is not None:
            name = f"greedy tokens before the first difference, mean of at most {g['new_tokens']}"
            rows.append((name, "", f"{g['divergence']:.1f}"))
    s = e.get("speed")
    if s is not None:
        length = f"{s['new_tokens']} tokens after {s['prompt_tokens']}"
        name = f"greedy tokens per second, batch 1, {length}"
        rows.append((name, "", f"{s['tokens_per_second']:.1f}"))
        for device, size in s["peak_memory_bytes"].items():
            whose = "process, Python and PyTorch included" if device == "process" else device
            rows.append((f"peak memory while generating ({whose})", "", human(size)))
    return rows


def _percent(text: str) -> str:
    return text if text == NOT_EVALUATED else f"{text} %"


def _share(value: float | None) -> str:
    return NOT_EVALUATED if value is None else f"{100 * value:.1f} %"


def task_rows(tasks: list[dict[str, Any]]) -> list[list[str]]:
    """Cells in the order of lm-eval's own table."""
    rows = []
    for t in tasks:
        error = t.get("stderr")
        limit = "" if t.get("limit") is None else f" (first {t['limit']:g})"
        rows.append(
            [
                f"{t['task']}{limit}",
                str(t["version"]),
                str(t["filter"]),
                str(t["shots"]),
                str(t["metric"]),
                f"{t['value']:.4f}",
                "N/A" if error is None else f"{error:.4f}",
            ]
        )
    return rows


def worst_layers(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Name, bits and relative error of the layers that are represented worst."""
    rows = [m for m in report.get("matrices") or [] if m.get("relative_error") is not None]
    rows.sort(key=lambda m: -m["relative_error"])
    return [
        (f"`{m['name']}`", f"{m['bits']:.3f}", f"{m['relative_error']:.5f}") for m in rows[:WORST]
    ]


def dense_parts(report: dict[str, Any]) -> str:
    """What of the model kept its precision, norms aside, and why."""
    because: dict[str, list[str]] = {}
    for name, reason in (report.get("dense") or {}).items():
        because.setdefault(reason, []).append(f"`{name}`")
    parts = []
    for reason, names in because.items():
        more = f" and {len(names) - WORST} more" if len(names) > WORST else ""
        parts.append(f"{', '.join(names[:WORST])}{more} ({reason})")
    return "; ".join(parts)


def settings_rows(stored: dict[str, Any], report: dict[str, Any]) -> list[tuple[str, str]]:
    """What was asked for, without what follows from it and without fields left to the library."""
    rows: list[tuple[str, str]] = []
    recorded = get_method(stored["quant_method"]).config.recorded_fields()  # type: ignore[attr-defined]
    for name, value in stored.items():
        if name in recorded or name == "quant_method" or value in (None, {}, []):
            continue
        rows.append((name, f"`{_cell(value)}`"))
    for name, value in (stored.get("calibration") or {}).items():
        if value is not None:
            rows.append((f"calibration {name}", f"`{_cell(value)}`"))
    for name, text in (("seconds", "seconds"), ("cpu_seconds", "seconds of processor time")):
        if report.get(name):
            rows.append((f"quantized in, {text}", f"{report[name]:.1f}"))
    for name in ("format_version", "hf_vq_version"):
        if stored.get(name):
            rows.append((name, f"`{_cell(stored[name])}`"))
    for name, value in (report.get("environment") or {}).items():
        if name != "hf_vq":
            rows.append((name, f"`{_cell(value)}`"))
    return rows


def reproduce(stored: dict[str, Any], dtype: str | None = None) -> str | None:
    """The command that makes this model, as exactly as the config remembers it.

    Places of files are not in it: the names of the data and of the original are, or the words that
    `reproduce_notes` explains. dtype: the packed model's, which is that the original was loaded in.
    None: the model was packed by another program.
    """
    if stored.get("hf_vq_version") is None:
        return None
    method = get_method(stored["quant_method"])
    calibration = stored.get("calibration") or {}
    words = ["hf-vq", "quantize", stored.get("base_model") or _ORIGINAL, "OUT"]
    words += ["--method", method.name]
    if stored.get("base_model_revision"):
        words += ["--revision", stored["base_model_revision"]]
    if data := calibration.get("dataset"):
        words += ["--dataset", data if _nameable(data) else _TEXT]
    if dtype is not None:
        words += ["--dtype", dtype]
    default = method.config().to_dict()
    for name, rule in method.config.rules.items():  # type: ignore[attr-defined]
        # those with a default of their own say what was used
        value = calibration.get(name, stored.get(name))
        always = name in ("bits", "size", "seed", "nsamples", "seqlen") and value is not None
        if name not in stored or not (always or value != default.get(name)):
            continue
        if name == "bits" and stored.get("size") is not None:
            continue
        flag = name.replace("_", "-")
        if isinstance(rule, Flag) and isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", "none" if value is None else str(value)]
    for name in stored.get("modules_to_not_convert") or ():
        words += ["--modules-to-not-convert", name]
    if stored.get("overrides"):
        words += ["--overrides", json.dumps(stored["overrides"])]
    return shlex.join(words)


def dtype_of(model_config: dict[str, Any]) -> str | None:
    """The dtype that a saved `config.json` names, in the words of `--dtype`."""
    found = model_config.get("dtype") or model_config.get("torch_dtype")
    return str(found).removeprefix("torch.") if found else None


def reproduce_notes(stored: dict[str, Any]) -> list[str]:
    """What somebody else needs to know to run the command."""
    notes = []
    if stored.get("base_model") is None:
        notes.append(f"`{_ORIGINAL}` is the folder of the original model.")
    data = (stored.get("calibration") or {}).get("dataset")
    if data and not _nameable(data):
        notes.append(f"`{_TEXT}` stands for what was given in Python: {_cell(data)}.")
    elif data and "." in data and "/" not in data:
        notes.append(f"`{_cell(data)}` is a file of whoever made this model.")
    return notes


def _nameable(dataset: str) -> bool:
    """Whether a description of calibration data is an id or a file's name, which has no spaces."""
    return not re.search(r"\s", dataset)


def _cell(value: Any) -> str:
    """One table cell: no line breaks, no column marks, no end of code."""
    text = " ".join(str(value).split()).replace("|", "\\|").replace("`", "'")
    return text if len(text) <= 200 else text[:197] + "..."
