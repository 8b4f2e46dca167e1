"""`hf-vq eval`: perplexity, KL to the original, agreement, and a sample of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_vq.cli.common import check_model, load_tokenizer, one_line_errors, stdout
from hf_vq.evaluation import evaluate as run_evaluation
from hf_vq.evaluation import print_evaluation


@one_line_errors
def evaluate(
    out: Annotated[str, typer.Argument(help="Folder or Hub id of the packed model.")],
    dataset: Annotated[
        str,
        typer.Option(
            help="Held-out text: a .txt, .jsonl or .npy file, or a datasets id. Not what the model "
            "was calibrated on."
        ),
    ],
    against: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the original; unset: perplexity only.")
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
    device_map: Annotated[str | None, typer.Option(help="As in from_pretrained.")] = None,
    dtype: Annotated[str, typer.Option(help="As in from_pretrained.")] = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file too.")
    ] = None,
) -> None:
    """Evaluate the packed model OUT, beside its original."""
    from transformers import AutoModelForCausalLM

    from hf_vq.engine.calibration import load_tokens

    for name in (out, against):
        if name is not None:
            check_model(name)
    tools = load_tokenizer(tokenizer or out) or (load_tokenizer(against) if against else None)
    tokens = load_tokens(dataset, tools if tools is not None else out)[: max_windows * seqlen]
    if tools is None:
        prompt = ""

    def load(name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(name, device_map=device_map, dtype=dtype)

    result = run_evaluation(
        load(out),
        tokens,
        seqlen,
        dense=None if against is None else load(against),
        tokenizer=tools,
        prompt=prompt or None,
        max_new_tokens=max_new_tokens,
    )
    print_evaluation(result, stdout())
    if json_file is not None:
        record = {"model": out, "original": against, "dataset": dataset, **result.to_dict()}
        json_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
