"""`hf-vq eval`: perplexity, KL to the original, agreement, generation, tasks; kept in the card."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from hf_vq.cli.arguments import DeviceMap, Dtype
from hf_vq.cli.common import (
    check_dtype,
    check_model,
    load_tokenizer,
    load_whole,
    one_line_errors,
    stderr,
    stdout,
)
from hf_vq.evaluation import Teacher, print_evaluation, windows
from hf_vq.evaluation import evaluate as run_evaluation
from hf_vq.evaluation.generation import speed as measure_speed
from hf_vq.files import read_json, write_text


@one_line_errors
def evaluate(
    out: Annotated[str, typer.Argument(help="Folder or Hub id of the packed model.")],
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Held-out text: a .txt, .jsonl or .npy file, or a datasets id. Not what the model "
            "was calibrated on."
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the original; unset: perplexity only.")
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            help="File of the original's logits: written if there is none, used instead of the "
            "original if there is. 2 or 4 bytes per token and entry of the vocabulary."
        ),
    ] = None,
    rtn: Annotated[
        bool,
        typer.Option(help="Rounding to nearest at 2, 3 and 4 bits too, for the card's picture."),
    ] = False,
    tasks: Annotated[
        str | None, typer.Option(help="lm-eval tasks, with commas (needs the eval extra).")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents per task at most.")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Examples in their prompts.")] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="Folder of more lm-eval tasks, as YAML.")
    ] = None,
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    max_windows: Annotated[int, typer.Option(min=1, help="Windows to evaluate at most.")] = 100,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the tokenizer, if not OUT's own.")
    ] = None,
    prompt: Annotated[
        str, typer.Option(help='Text that both models continue; "" for none.')
    ] = "The purpose of this",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the sample.")] = 40,
    generate: Annotated[
        bool, typer.Option(help="Check greedy continuations, and measure their speed.")
    ] = True,
    device_map: DeviceMap = None,
    dtype: Dtype = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file too.")
    ] = None,
    card: Annotated[
        bool, typer.Option(help="Keep the figures in OUT/evaluation.json and the card.")
    ] = True,
) -> None:
    """Evaluate the packed model OUT, beside its original."""
    from hf_vq.engine.calibration import describe_dataset, load_tokens
    from hf_vq.environment import environment
    from hf_vq.hub.record import read_record

    if dataset is None and tasks is None:
        raise typer.BadParameter("give --dataset TEXT, --tasks, or both", param_hint="--dataset")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {json_file.parent}", param_hint="--json")
    for option, given in (("--rtn", rtn), ("--teacher", teacher is not None)):
        if given and (against is None or dataset is None):
            raise typer.BadParameter("needs --against and --dataset", param_hint=option)
    check_dtype(dtype)
    for name in (out, against):
        if name is not None:
            check_model(name)
    tools = load_tokenizer(tokenizer or out) or (load_tokenizer(against) if against else None)

    def load(name: str) -> Any:
        return load_whole(name, device_map=device_map, dtype=dtype)

    if card and Path(out).is_dir():
        read_record(out)  # figures that could not be kept beside it had better not be measured

    cut = None
    if dataset is not None:
        tokens = load_tokens(dataset, tools if tools is not None else out)
        cut = windows(tokens[: max_windows * seqlen], seqlen)
    model = load(out)
    record: dict[str, Any] = {"model": out, "original": against}
    evaluation, rows = None, []
    if cut is not None:
        assert dataset is not None
        # before the original is loaded, or its memory would be measured too
        speed = measure_speed(model, cut) if generate else None
        dense = _original(against, teacher, cut, load)
        result = run_evaluation(
            model,
            cut,
            seqlen,
            dense=dense,
            tokenizer=tools,
            prompt=(prompt or None) if tools is not None else None,
            max_new_tokens=max_new_tokens,
            generate=generate,
            speed=speed,
        )
        print_evaluation(result, stdout())
        words = ["hf-vq", "eval", "OUT", "--dataset", str(describe_dataset(dataset))]
        words += ["--against", _name(against)] if against else []
        words += ["--seqlen", str(seqlen), "--max-windows", str(max_windows)]
        evaluation = {
            "dataset": describe_dataset(dataset),
            **result.to_dict(),
            "command": shlex.join([*words, *(["--rtn"] if rtn else [])]),
            "environment": environment(),
        }
        if rtn and against is not None:
            evaluation["rtn"] = _rounded(against, dense, cut, load)
        record |= evaluation
    if tasks is not None:
        from hf_vq.evaluation.harness import run_tasks

        names = [name.strip() for name in tasks.split(",") if name.strip()]
        rows = run_tasks(model, tools, names, limit=limit, shots=shots, include_path=task_folder)
        _print_tasks(rows)
        record["tasks"] = rows
    if json_file is not None:
        write_text(json_file, json.dumps(record, indent=2) + "\n")
    if card and Path(out).is_dir():
        _keep(Path(out), evaluation, rows, against)


def _original(against: str | None, file: Path | None, cut: Any, load: Any) -> Any:
    """The original, or what it said where that is kept; None without one."""
    if against is None:
        return None
    if file is None:
        return load(against)
    source = _name(against)
    if file.exists():
        return Teacher.load(file, cut, source)
    return Teacher.measure(load(against), cut, file, source)


def _name(model: str) -> str:
    """A Hub id as it is; of a folder its name alone."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def _rounded(against: str, dense: Any, cut: Any, load: Any) -> list[dict[str, Any]]:
    from hf_vq.evaluation.baselines import quantize_baseline
    from hf_vq.evaluation.metrics import compare

    rows = []
    for bits in (2, 3, 4):
        other = load(against)
        stored = quantize_baseline(other, "rtn", bits)
        # in float32, or rounding to the model's dtype would be a second quantization
        found = compare(dense, other.float(), cut)
        figures = {"perplexity": found.perplexity_quantized, "kl": found.kl, "top1": found.top1}
        rows.append({"bits": stored, **figures})
    return rows


def _print_tasks(rows: list[dict[str, Any]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, title="lm-eval", title_justify="left")
    for name in ("task", "shots", "metric", "value", "stderr"):
        table.add_column(name)
    for r in rows:
        error = "" if r["stderr"] is None else f"{r['stderr']:.4f}"
        table.add_row(r["task"], str(r["shots"]), r["metric"], f"{r['value']:.4f}", error)
    stdout().print(table)


def _keep(
    folder: Path,
    evaluation: dict[str, Any] | None,
    rows: list[dict[str, Any]],
    original: str | None,
) -> None:
    from hf_vq.formats import packed_settings
    from hf_vq.hub.card import write_card
    from hf_vq.hub.record import add_to_record

    if packed_settings(read_json(folder / "config.json")) is None:
        return  # an original, evaluated for comparison
    add_to_record(folder, evaluation, rows)
    base = original if original is not None and Path(original).is_dir() else None
    if not write_card(folder, base_folder=base):
        stderr.print("note: README.md is not ours and stays; evaluation.json has the figures")
