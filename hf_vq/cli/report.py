"""`hf-vq report`: everything known about a packed model, in the terminal or on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from hf_vq.cli.common import one_line_errors, packed_folder, stdout
from hf_vq.cli.inspect import print_checkpoint
from hf_vq.hub.card_rows import measured_rows
from hf_vq.hub.checkpoint import read_checkpoint
from hf_vq.hub.page import write_page
from hf_vq.hub.record import read_record


@one_line_errors
def report(
    out: Annotated[Path, typer.Argument(help="Folder of a packed model.")],
    html: Annotated[
        bool, typer.Option("--html", help="Write a page for a browser instead, in one file.")
    ] = False,
    file: Annotated[
        Path | None, typer.Option(help="Where the page goes; unset: OUT/report.html.")
    ] = None,
) -> None:
    """Show what is known about OUT: sizes, layers, what was evaluated. Reads no weights.

    The page needs no network, and no other file.
    """
    folder = packed_folder(out)
    if html:
        target = file or folder / "report.html"
        write_page(folder, target)
        print(f"written: {target}")
        return
    if file is not None:
        raise typer.BadParameter("goes with --html", param_hint="--file")
    console = stdout()
    print_checkpoint(read_checkpoint(folder), console)
    for evaluation in (read_record(folder) or {}).get("evaluations", []):
        title = f"{evaluation['dataset']}: {evaluation['windows']} x {evaluation['seqlen']} tokens"
        table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
        for name in ("", "original", "this model"):
            table.add_column(name, justify="right" if name else "left")
        for row in measured_rows(evaluation):
            table.add_row(*row)
        console.print(table)
