"""The `hf-vq` command. Thin: every verb is a call into the library and some printing."""

from __future__ import annotations

from typing import Annotated

import typer

from hf_vq import __version__
from hf_vq.cli.compare import compare as compare_command
from hf_vq.cli.evaluate import evaluate as evaluate_command
from hf_vq.cli.inspect import inspect as inspect_command
from hf_vq.cli.plan import plan as plan_command
from hf_vq.cli.push import push as push_command
from hf_vq.cli.quantize import quantize as quantize_command
from hf_vq.cli.report import report as report_command
from hf_vq.cli.run import run as run_command
from hf_vq.cli.sweep import sweep as sweep_command

app = typer.Typer(
    name="hf-vq",
    help="Vector quantization of language models to 1-4 bits per weight.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("quantize")(quantize_command)
app.command("plan")(plan_command)
app.command("sweep")(sweep_command)
app.command("eval")(evaluate_command)
app.command("compare")(compare_command)
app.command("inspect")(inspect_command)
app.command("push")(push_command)
app.command("report")(report_command)
app.command(
    "run",
    # everything after the target belongs to the target, its --help included
    context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True},
)(run_command)


def _show_version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the `hf-vq` script."""
    app()


__all__ = ["app", "main"]
