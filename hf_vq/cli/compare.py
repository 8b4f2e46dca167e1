"""`hf-vq compare`: methods beside each other at equal size, one table and one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markdown import Markdown

from hf_vq.cli.arguments import Model
from hf_vq.cli.common import (
    check_dtype,
    check_model,
    load_tokenizer,
    one_line_errors,
    stderr,
    stdout,
)
from hf_vq.evaluation.comparison import KNOWN, ComparisonRow, compare_methods, table, write


@one_line_errors
def compare(
    model: Model,
    dataset: Annotated[str, typer.Option(help="Calibration text, as for `hf-vq quantize`.")],
    eval_dataset: Annotated[str, typer.Option(help="Held-out text to compare on.")],
    methods: Annotated[
        str, typer.Option(help="With commas, of: " + ", ".join(KNOWN) + ".")
    ] = ",".join(KNOWN),
    bits: Annotated[str, typer.Option(help="With commas.")] = "2,3,4",
    out: Annotated[
        Path | None, typer.Option(help="Folder for comparison.md, .json and .png.")
    ] = None,
    nsamples: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 128,
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens per sequence and window.")] = 512,
    max_windows: Annotated[int, typer.Option(min=1, help="Windows to compare on at most.")] = 100,
    dtype: Annotated[
        str, typer.Option(help="As in from_pretrained; float32 is faster on many CPUs.")
    ] = "auto",
) -> None:
    """Quantize MODEL with every method at every size and compare the results with it.

    A size of b bits is what scalar rounding with groups of 64 costs, everything counted: ours get
    the same. Other libraries take part where they are installed.
    """
    from hf_vq.engine.calibration import describe_dataset, load_tokens
    from hf_vq.environment import environment
    from hf_vq.evaluation.metrics import windows

    check_dtype(dtype)
    check_model(model)
    chosen = [name.strip() for name in methods.split(",") if name.strip()]
    for name in chosen:
        if name not in KNOWN:
            known = ", ".join(KNOWN)
            raise typer.BadParameter(f"{name!r} is none of {known}", param_hint="--methods")
    try:
        sizes = [int(size) for size in bits.split(",")]
    except ValueError:
        raise typer.BadParameter("whole numbers, with commas", param_hint="--bits") from None
    if not all(1 <= size <= 8 for size in sizes):
        raise typer.BadParameter("from 1 to 8", param_hint="--bits")
    tools = load_tokenizer(model) or model
    samples = windows(load_tokens(dataset, tools)[: nsamples * seqlen], seqlen)
    held_out = windows(load_tokens(eval_dataset, tools)[: max_windows * seqlen], seqlen)

    machine = environment()
    protocol = (
        f"{Path(model).name}: calibrated on {len(samples)} x {seqlen} tokens of "
        f"{describe_dataset(dataset)}, compared on {len(held_out)} windows of {seqlen} tokens "
        f"of {describe_dataset(eval_dataset)}, with decoded weights in float32; quantized "
        f"{'in its own dtype' if dtype == 'auto' else f'in {dtype}'}; hf_vq "
        f"{machine['hf_vq']}, torch {machine['torch']}, {machine['device']}, {machine['threads']} "
        f"thread{'s' * (machine['threads'] > 1)}. CPU seconds are of loading and quantizing."
    )

    def say(itself: float, rows: list[ComparisonRow]) -> None:
        row = rows[-1]
        found = row.note if row.kl is None else f"{row.bits:.3f} bits, KL {row.kl:.4f}"
        stderr.print(f"{row.method} {row.nominal}: {found}", markup=False, highlight=False)
        if out is not None:  # after every row: hours of them must not be lost with the last
            write(out, itself, rows, {"protocol": protocol, "environment": machine})

    itself, rows = compare_methods(model, chosen, sizes, samples, held_out, say=say, dtype=dtype)
    stdout().print(Markdown(table(itself, rows)))
    if out is not None:
        print(f"written: {out / 'comparison.md'}")
