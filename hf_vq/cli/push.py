"""`hf-vq push`: publish a packed model on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from hf_vq.cli.common import one_line_errors, packed_folder, stderr, stdout
from hf_vq.hub.push import contents, push_folder
from hf_vq.sizes import human


@one_line_errors
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of the packed model.")],
    repo: Annotated[str, typer.Argument(help="NAME, or OWNER/NAME, on the Hub.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would go; asks nobody, sends nothing.")
    ] = False,
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Of a new repository; unset: your default."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch; made if there is none.")] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Tag for the card; repeatable.")] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Pattern of more files than those of a model; repeatable."),
    ] = None,
) -> None:
    """Publish the packed model in FOLDER as REPO, with its card, tokenizer and figures.

    Everything goes in one commit; a push that was interrupted is completed by the next one.
    """
    found = contents(packed_folder(folder), include or ())
    table = Table(box=box.SIMPLE_HEAD, title=f"{folder} -> {repo}", title_justify="left")
    table.add_column("file", overflow="fold")
    table.add_column("bytes", justify="right")
    for name, (_, size) in found.files.items():
        table.add_row(name, f"{size:,}")
    table.add_row(f"{len(found.files)} files", f"{found.total:,} ({human(found.total)})")
    stdout().print(table)
    for name, reason in found.left_out.items():
        stderr.print(f"left out: {name}, {reason}", markup=False, highlight=False)
    if dry_run:
        print("nothing was sent; the card is joined with the one at the Hub when it is")
        return
    info = push_folder(
        folder,
        repo,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=message,
        tags=tag or (),
        include=include or (),
        say=lambda line: stderr.print(f"note: {line}", markup=False, highlight=False),
    )
    print(f"published: {info.pr_url or info.commit_url}")
