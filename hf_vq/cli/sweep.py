"""`hf-vq sweep`: quantize at several sizes from one measurement, and draw what each is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_vq.cli.arguments import (
    CalibrationDevice,
    DeviceMap,
    Dtype,
    Method,
    Model,
    NotConverted,
    Overrides,
    Revision,
)
from hf_vq.cli.common import (
    check_dtype,
    check_model,
    load_tokenizer,
    one_line_errors,
    stderr,
)
from hf_vq.cli.options import config_class, parse_overrides, with_config_options


@with_config_options
@one_line_errors
def sweep(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder for a folder per size and the curve.")],
    sizes: Annotated[str, typer.Option(help='As --size takes them, with commas: "1MB,1.2MB".')],
    method: Method = "gptvq",
    dataset: Annotated[
        str | None, typer.Option(help="Calibration text, as for `hf-vq quantize`.")
    ] = None,
    eval_dataset: Annotated[
        str | None,
        typer.Option(help="Held-out text to evaluate on; unset: sizes alone, and no curve."),
    ] = None,
    eval_seqlen: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    max_windows: Annotated[int, typer.Option(min=1, help="Windows to evaluate at most.")] = 100,
    measurement: Annotated[
        Path | None,
        typer.Option(help="File of the measurement; unset: OUT/measurement.safetensors."),
    ] = None,
    modules_to_not_convert: NotConverted = None,
    overrides: Overrides = None,
    calibration_device: CalibrationDevice = None,
    device_map: DeviceMap = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    *,
    fields: dict[str, Any],
) -> None:
    """Quantize MODEL to every one of the sizes, into OUT; write sweep.csv and sweep.png."""
    from hf_vq.engine.calibration import load_tokens
    from hf_vq.evaluation.sweep import MEASUREMENT, SweepRow, draw, folder_name, write_csv
    from hf_vq.evaluation.sweep import sweep as run_sweep

    make_config = config_class(method, fields)
    for name in ("bits", "size"):
        if name in fields:
            raise typer.BadParameter("a sweep takes --sizes", param_hint=f"--{name}")
    wanted = [size.strip() for size in sizes.split(",") if size.strip()]
    if not wanted or len({folder_name(size) for size in wanted}) < len(wanted):
        raise typer.BadParameter("give different sizes, with commas", param_hint="--sizes")
    check_dtype(dtype)
    check_model(model, revision)
    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"{out} is a file, not a folder", param_hint="OUT")
    where = {} if revision is None else {"revision": revision}
    tools = load_tokenizer(model, **where)
    configs = {
        size: make_config(
            **fields,
            size=size,
            dataset=dataset,
            tokenizer=tools,
            modules_to_not_convert=modules_to_not_convert or None,
            overrides=parse_overrides(overrides),
            calibration_device=calibration_device,
            measurement=measurement or out / MEASUREMENT,
        )
        for size in wanted
    }
    tokens = None
    if eval_dataset is not None:
        tokens = load_tokens(eval_dataset, tools if tools is not None else model)
        tokens = tokens[: max_windows * eval_seqlen]

    def say(row: SweepRow) -> None:
        quality = "" if row.kl is None else f", perplexity {row.perplexity:.3f}, KL {row.kl:.4f}"
        print(f"{out / row.folder}: {row.bytes:,} bytes, {row.bits:.3f} bits{quality}")

    rows = run_sweep(
        model,
        out,
        configs,
        tokenizer=tools,
        tokens=tokens,
        seqlen=eval_seqlen,
        say=say,
        device_map=device_map,
        dtype=dtype,
        **where,
    )
    write_csv(rows, out / "sweep.csv")
    if tokens is None:
        stderr.print("note: without --eval-dataset there is no curve to draw")
        return
    try:
        draw(rows, out / "sweep.png")
    except ImportError:
        stderr.print(
            f"note: {out / 'sweep.csv'} has the curve; pip install 'hf-vq\\[plots]' draws it too"
        )
