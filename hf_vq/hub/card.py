"""The README.md written beside a packed model: what it is, how to load it, what was measured.

Only figures that were measured appear; where there are none, the card says so, and how to get them.
"""

from __future__ import annotations

import logging
import re
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_vq.evaluation.plots import SIZE_QUALITY
from hf_vq.files import read_json, write_text
from hf_vq.formats import packed_settings
from hf_vq.hub.base_card import inherit
from hf_vq.hub.card_rows import (
    dense_parts,
    dtype_of,
    headline,
    measured_rows,
    reproduce,
    reproduce_notes,
    settings_rows,
    size_rows,
    task_rows,
    worst_layers,
)
from hf_vq.hub.card_text import TOOL, Merged, has_generated_part, merge_cards, parse_card, seal
from hf_vq.hub.checkpoint import REPORT_NAME, read_checkpoint
from hf_vq.hub.record import read_record
from hf_vq.registry import get_method

logger = logging.getLogger(__name__)

CARD_NAME = "README.md"
PLACEHOLDER = "FOLDER_OR_REPOSITORY"


def render_card(
    model_config: dict[str, Any],
    report: dict[str, Any] | None = None,
    record: dict[str, Any] | None = None,
    *,
    repository: str | None = None,
    inherited: dict[str, Any] | None = None,
    plots: tuple[tuple[str, str], ...] = (),
    tags: tuple[str, ...] = (),
) -> str:
    """Fill the template.

    Args:
        model_config: the saved `config.json`, with its `quantization_config`.
        report: `quantization_report.json`, for sizes, errors and versions; None leaves them out.
        record: `evaluation.json` (`hf_vq.hub.record`); None says that nothing was measured.
        repository: where the card's snippet loads from; None leaves a placeholder.
        inherited: license and languages of the base model (`hf_vq.hub.base_card`).
        plots: (file, description) of pictures in the repository, as `draw_plots` returns them.
        tags: more tags.

    Returns:
        Markdown with a YAML header, as the Hub expects it.

    Raises:
        ValueError: `model_config` describes no model packed by hf_vq.
    """
    stored = packed_settings(model_config)
    if stored is None:
        raise ValueError(
            "the config describes no packed model, so there is no card to write for it"
        )
    report, record = report or {}, record or {}
    method = get_method(stored["quant_method"])
    base = stored.get("base_model")
    bits = (report.get("ledger") or {}).get("decoder_bits", stored.get("bits"))
    name = base.split("/")[-1] if base else model_config.get("model_type", "model")
    title = repository.split("/")[-1] if repository else f"{name}-{method.name}"
    evaluations = record.get("evaluations", [])
    template = (resources.files("hf_vq.model_cards") / "card.md.j2").read_text(encoding="utf-8")
    data = _card_data(title, stored, bits, record, inherited or {}, tags)
    card = ModelCard.from_template(
        data,
        template_str=template,
        title=title,
        architecture=next(iter(model_config.get("architectures") or ()), None),
        base_model=base,
        base_model_revision=stored.get("base_model_revision"),
        method=method.name,
        paper=_paper(method.config),
        headline=headline(report, evaluations[0] if evaluations else None, bits),
        repository=repository or PLACEHOLDER,
        size=size_rows(report.get("ledger") or {}),
        evaluations=[(e, measured_rows(e)) for e in evaluations],
        tasks=task_rows(record.get("tasks", [])),
        task_version=next((t["lm_eval_version"] for t in record.get("tasks", [])), None),
        dense=dense_parts(report),
        worst=worst_layers(report),
        curve=next((plot for plot in plots if plot[0] == SIZE_QUALITY), None),
        plots=[plot for plot in plots if plot[0] != SIZE_QUALITY],
        settings=settings_rows(stored, report),
        command=reproduce(stored, dtype_of(model_config)),
        notes=reproduce_notes(stored),
        license=(inherited or {}).get("license"),
    )
    header, body = str(card).split("\n---\n", 1)
    return f"{header}\n---\n\n{seal(body)}"


def write_card(
    folder: str | Path,
    *,
    unless_in: str | Path | None = None,
    base_folder: str | Path | None = None,
) -> bool:
    """Write README.md into the folder of a packed model; whether it was written.

    What somebody wrote into the card, here or in the folder `unless_in` (the one that `folder` will
    replace), stays: see `hf_vq.hub.card_text`. A card that has nothing of ours, or broken metadata,
    is left as it is, and so is a folder without a packed model. base_folder: where the base model
    was loaded from, for its license.
    """
    folder = Path(folder)
    if not all(has_generated_part(_text(card)) for card in _cards(unless_in, folder)):
        return False
    try:
        card = folder_card(folder, edited_in=unless_in, base_folder=base_folder)
    except ValueError as error:
        logger.warning("%s is left as it is: %s", CARD_NAME, error)
        return False
    if card is None:
        return False
    write_text(folder / CARD_NAME, card.text)
    return True


def folder_card(
    folder: Path,
    *,
    edited_in: str | Path | None = None,
    base_folder: str | Path | None = None,
    repository: str | None = None,
    tags: tuple[str, ...] = (),
    token: Any = None,
) -> Merged | None:
    """The card of the packed model in `folder`, joined with the one there; None without a model.

    Draws the pictures too, if matplotlib is installed. Raises ValueError if a card there has broken
    metadata.
    """
    config = read_json(folder / "config.json")
    stored = packed_settings(config)
    if stored is None:
        return None
    report_file = folder / REPORT_NAME
    known = report_file.is_file()
    report = read_json(report_file) if known else _sizes(folder)
    record = read_record(folder)
    base, revision = stored.get("base_model"), stored.get("base_model_revision")
    inherited = inherit(base, revision, base_folder, token)
    old = next((_text(card) for card in _cards(edited_in, folder)), None)
    text = render_card(
        config,
        report,
        record,
        repository=repository,
        inherited={**_license_in(old), **inherited.fields},
        plots=_draw(folder, report, record),
        tags=tags,
    )
    merged = Merged(text, []) if old is None else merge_cards(text, old, CARD_NAME)
    if parse_card(merged.text, CARD_NAME).data.get("license") is None:
        note = f"the card names no license ({inherited.problem}); add `license:` to its metadata"
        merged.notes.append(note)
    return merged


def _cards(*places: str | Path | None) -> list[Path]:
    """The cards that there are in these folders."""
    cards = [Path(place) / CARD_NAME for place in places if place is not None]
    return [card for card in cards if card.is_file()]


def _license_in(card: str | None) -> dict[str, Any]:
    """What an earlier card says about the license: the base model may be out of reach by now."""
    data = None if card is None else parse_card(card, CARD_NAME).data
    names = ("license", "license_name", "license_link")
    return {} if data is None else {n: data.get(n) for n in names if data.get(n) is not None}


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _draw(
    folder: Path, report: dict[str, Any] | None, record: dict[str, Any] | None
) -> tuple[tuple[str, str], ...]:
    from hf_vq.evaluation.plots import draw_plots

    return draw_plots(folder, report or {}, record or {})


def _sizes(folder: Path) -> dict[str, Any] | None:
    """The sizes that a report would have, of a model that was packed elsewhere."""
    try:
        checkpoint = read_checkpoint(folder)
    except (OSError, ValueError):  # no safetensors, or an architecture from elsewhere
        return None
    size = checkpoint.packed_bytes + checkpoint.dense_bytes
    bits = {"decoder_bits": checkpoint.packed_bits, "model_bits": checkpoint.model_bits}
    return {"ledger": {**bits, "model_bytes": size}}


def _card_data(
    title: str,
    stored: dict[str, Any],
    bits: float | None,
    record: dict[str, Any],
    inherited: dict[str, Any],
    more_tags: tuple[str, ...],
) -> ModelCardData:
    tags = ["hf-vq", stored["quant_method"], "quantized"]
    if bits is not None:
        tags.append(f"{round(bits)}-bit")
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **inherited,
        "tags": [*tags, *(tag for tag in more_tags if tag not in tags)],
    }
    if base := stored.get("base_model"):
        # without the relation the Hub lists formats that it does not know as fine-tunes
        fields |= {"base_model": base, "base_model_relation": "quantized"}
    data = (stored.get("calibration") or {}).get("dataset") or ""
    if found := re.fullmatch(r"([\w.-]+/[\w.-]+)(:.*)?", data):  # an id of the Hub, and no file
        fields["datasets"] = [found[1]]
    results = _results(record)
    if results:
        fields |= {"model_name": title, "eval_results": results}
    return ModelCardData(**fields)


def _results(record: dict[str, Any]) -> list[EvalResult]:
    results = []
    for e in record.get("evaluations", []):
        for name, pretty in (
            ("perplexity", "Perplexity"),
            ("kl", "KL divergence to the original"),
            ("top1", "Top-1 agreement with the original"),
        ):
            if e.get(name) is None:
                continue
            protocol = {"seqlen": e["seqlen"], "windows": e["windows"], "tool": TOOL}
            results.append(_result(e["dataset"], name, pretty, e[name], protocol))
    for t in record.get("tasks", []):
        protocol = {"num_fewshot": t["shots"], "tool": TOOL}
        if t.get("limit") is not None:
            protocol["limit"] = t["limit"]
        results.append(_result(t["task"], t["metric"], t["metric"], t["value"], protocol))
    return results


def _result(dataset: str, metric: str, pretty: str, value: float, args: dict) -> EvalResult:
    # a file's name is no id of a data set, and the Hub refuses ids that are none
    identifier = re.sub(r"[^\w./-]+", "-", dataset.split(":")[0]).strip("-./") or "text"
    return EvalResult(
        task_type="text-generation",
        dataset_type=identifier,
        dataset_name=dataset,
        metric_type=metric,
        metric_name=pretty,
        metric_value=value,
        metric_args=args,
    )


def _paper(config: type) -> str | None:
    """The paper that a method's config names in its docstring."""
    found = re.search(r"arXiv:? ?(\d{4}\.\d{4,5})", config.__doc__ or "")
    return f"https://arxiv.org/abs/{found[1]}" if found else None
