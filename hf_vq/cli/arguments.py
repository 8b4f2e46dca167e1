"""Arguments and options that several commands take, said once."""

from __future__ import annotations

from typing import Annotated

import typer

from hf_vq.registry import METHODS

Model = Annotated[str, typer.Argument(help="Folder or Hub id of the original model.")]
Method = Annotated[str, typer.Option(help="One of: " + ", ".join(METHODS) + ".")]
NotConverted = Annotated[
    list[str] | None,
    typer.Option(help="Name or pattern of modules to leave dense; repeatable."),
]
Overrides = Annotated[
    str | None,
    typer.Option(help='Fields per layer, as JSON: {"re:.*down_proj": {"vector_dim": 2}}.'),
]
CalibrationDevice = Annotated[
    str | None, typer.Option(help="Where blocks are calibrated; unset: a GPU if there is one.")
]
DeviceMap = Annotated[
    str | None, typer.Option(help='As in from_pretrained: "auto", "cpu", "cuda:0".')
]
Dtype = Annotated[str, typer.Option(help="As in from_pretrained.")]
Revision = Annotated[str | None, typer.Option(help="Revision of MODEL on the Hub.")]
