"""`hf-vq quantize`: load with a config, save."""

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
    check_output_folder,
    check_shard_size,
    load_tokenizer,
    load_whole,
    one_line_errors,
    stderr,
)
from hf_vq.cli.options import config_class, parse_overrides, with_config_options


@with_config_options
@one_line_errors
def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder for the packed model.")],
    method: Method = "gptvq",
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Calibration text: a .txt, .jsonl or .npy file, or a datasets id. Unset: without "
            "data (much worse)."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the tokenizer, if not MODEL's own.")
    ] = None,
    modules_to_not_convert: NotConverted = None,
    overrides: Overrides = None,
    measurement: Annotated[
        Path | None,
        typer.Option(
            help="File of the backward pass that tells where bits matter: written if there is "
            "none, used instead of another pass if there is."
        ),
    ] = None,
    calibration_device: CalibrationDevice = None,
    device_map: DeviceMap = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of the packed model.")] = "5GB",
    *,
    fields: dict[str, Any],
) -> None:
    """Quantize MODEL and save it to OUT, with its tokenizer."""
    make_config = config_class(method, fields)
    check_dtype(dtype)
    check_shard_size(max_shard_size)
    check_model(model, revision)
    check_output_folder(out, model)
    where = {} if revision is None else {"revision": revision}
    text_tools = load_tokenizer(tokenizer or model, **({} if tokenizer else where))
    if tokenizer is not None and text_tools is None:
        raise OSError(f"there is no tokenizer at {tokenizer}")
    config = make_config(
        **fields,
        dataset=dataset,
        tokenizer=text_tools,
        modules_to_not_convert=modules_to_not_convert or None,
        overrides=parse_overrides(overrides),
        calibration_device=calibration_device,
        measurement=measurement,
    )

    from hf_vq.saving import save_with_tokenizer

    packed = load_whole(
        model, quantization_config=config, device_map=device_map, dtype=dtype, **where
    )
    save_with_tokenizer(packed, text_tools, out, max_shard_size=max_shard_size)
    if text_tools is None:
        stderr.print(f"note: {model} has no tokenizer, so {out} has none", markup=False)
    print(f"saved {out}; next: hf-vq inspect {out}")
