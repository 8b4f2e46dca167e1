"""The README.md written beside a packed model: what it is, how to load it, what was measured.

Only figures that were measured appear; where there are none, the card says so.
"""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_vq.configs import RECORDED_FIELDS
from hf_vq.registry import get_method

CARD_NAME = "README.md"
_PLACEHOLDER = "FOLDER_OR_REPOSITORY"


def render_card(
    model_config: dict[str, Any],
    report: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    *,
    repository: str | None = None,
) -> str:
    """Fill the template.

    Args:
        model_config: the saved `config.json`, with its `quantization_config`.
        report: `quantization_report.json`, for sizes and versions; None leaves them out.
        evaluation: `hf_vq.evaluation.Evaluation.to_dict()`; None says that nothing was measured.
        repository: where the card's snippet loads from; None leaves a placeholder.

    Returns:
        Markdown with a YAML header, as the Hub expects it.

    Raises:
        ValueError: `model_config` describes no model packed by hf_vq.
    """
    stored = model_config.get("quantization_config")
    if not stored or not stored.get("layers"):
        raise ValueError(
            "the config describes no packed model, so there is no card to write for it"
        )
    method = get_method(stored["quant_method"])
    base = stored.get("base_model")
    ledger = (report or {}).get("ledger") or {}
    bits = ledger.get("decoder_bits", stored.get("bits"))
    title = (
        f"{base.split('/')[-1] if base else model_config.get('model_type', 'model')}-{method.name}"
    )
    template = (resources.files("hf_vq.model_cards") / "card.md.j2").read_text(encoding="utf-8")
    card = ModelCard.from_template(
        _card_data(title, method.name, base, bits, evaluation),
        template_str=template,
        title=title,
        base_model=base,
        base_model_revision=stored.get("base_model_revision"),
        method=method.name,
        paper=_paper(method.config),
        bits=bits,
        repository=repository or _PLACEHOLDER,
        size=_size(ledger),
        metrics=_metrics(evaluation),
        protocol=_protocol(evaluation),
        settings=_settings(stored),
    )
    return str(card)


def write_card(folder: str | Path, report_name: str = "quantization_report.json") -> bool:
    """Write README.md into the folder of a packed model that has none; whether it was written.

    An existing card belongs to its author. A folder without a packed model is left alone.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored = config.get("quantization_config")
    if not stored or not stored.get("layers") or (folder / CARD_NAME).exists():
        return False
    report = folder / report_name
    figures = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else None
    (folder / CARD_NAME).write_text(render_card(config, figures), encoding="utf-8")
    return True


def _card_data(
    title: str, method: str, base: str | None, bits: float | None, evaluation: dict[str, Any] | None
) -> ModelCardData:
    tags = ["hf-vq", method, "quantized"]
    if bits is not None:
        tags.append(f"{round(bits)}-bit")
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    if base:
        # without the relation the Hub lists formats that it does not know as fine-tunes
        fields |= {"base_model": base, "base_model_relation": "quantized"}
    if evaluation and evaluation.get("dataset"):
        fields["model_name"] = title
        fields["eval_results"] = [
            EvalResult(
                task_type="text-generation",
                dataset_type=evaluation["dataset"],
                dataset_name=evaluation["dataset"],
                metric_type="perplexity",
                metric_value=round(evaluation["perplexity"], 4),
            )
        ]
    return ModelCardData(**fields)


def _paper(config: type) -> str | None:
    """The paper that a method's config names in its docstring."""
    found = re.search(r"arXiv:? ?(\d{4}\.\d{4,5})", config.__doc__ or "")
    return f"https://arxiv.org/abs/{found[1]}" if found else None


def _size(ledger: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if "decoder_bits" in ledger:
        rows.append(("bits per packed weight, everything counted", f"{ledger['decoder_bits']:.3f}"))
    if "model_bits" in ledger:
        rows.append(("bits per parameter, whole model", f"{ledger['model_bits']:.3f}"))
    if "model_dense_bytes" in ledger:
        rows.append(("bytes before", f"{ledger['model_dense_bytes']:,}"))
    if "model_bytes" in ledger:
        rows.append(("bytes after", f"{ledger['model_bytes']:,}"))
    return rows


def _metrics(evaluation: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    if not evaluation:
        return []
    dense = evaluation.get("perplexity_dense")
    rows = [
        (
            "perplexity",
            "not measured" if dense is None else f"{dense:.3f}",
            f"{evaluation['perplexity']:.3f}",
        )
    ]
    if "kl" in evaluation:
        rows.append(("KL to the original (nats per token)", "0", f"{evaluation['kl']:.4f}"))
    if "top1" in evaluation:
        rows.append(("same most likely token", "100 %", f"{100 * evaluation['top1']:.1f} %"))
    return rows


def _protocol(evaluation: dict[str, Any] | None) -> str:
    if not evaluation:
        return ""
    data = f" of {evaluation['dataset']}" if evaluation.get("dataset") else ""
    return (
        f"{evaluation['windows']} non-overlapping windows of {evaluation['seqlen']} tokens{data}, "
        "softmax in float32."
    )


def _settings(stored: dict[str, Any]) -> list[tuple[str, str]]:
    """What was asked for, without what follows from it and without fields left to the library."""
    rows: list[tuple[str, str]] = []
    for name, value in stored.items():
        if name in RECORDED_FIELDS or name == "quant_method" or value in (None, {}, []):
            continue
        rows.append((name, f"`{_escape(value)}`"))
    for name, value in (stored.get("calibration") or {}).items():
        if value is not None:
            rows.append((f"calibration {name}", f"`{_escape(value)}`"))
    for name in ("format_version", "hf_vq_version"):
        if stored.get(name):
            rows.append((name, f"`{_escape(stored[name])}`"))
    return rows


def _escape(value: Any) -> str:
    """One table cell: no line breaks, no column marks, no end of code."""
    text = " ".join(str(value).split()).replace("|", "\\|").replace("`", "'")
    return text if len(text) <= 200 else text[:197] + "..."
