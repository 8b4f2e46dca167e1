"""`hf-vq run`: somebody else's program, with hf_vq registered in its process."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import runpy
import sys
from typing import Annotated

import typer

import hf_vq  # noqa: F401  - importing it is what registers it


def run(
    target: Annotated[str, typer.Argument(help="A .py file, a console script, or a module.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Passed on as they are, options too.")
    ] = None,
) -> None:
    """Run a program that loads packed models but does not import hf_vq itself.

    Without hf_vq in the process, Transformers gives packed models random weights. Use it in front
    of what you would type: hf-vq run lm_eval --model hf ...; hf-vq run train.py. It does not reach
    processes that the program starts; those need hf-vq-autoload.
    """
    sys.argv = [target, *(arguments or [])]
    if os.path.isfile(target):
        sys.path.insert(0, os.path.dirname(os.path.abspath(target)))
        runpy.run_path(target, run_name="__main__")
        return
    sys.path.insert(0, os.getcwd())
    for entry in importlib.metadata.entry_points(group="console_scripts", name=target):
        raise SystemExit(entry.load()())
    try:
        found = importlib.util.find_spec(target) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        raise typer.BadParameter(
            f"{target} is no file, no installed console script and no module", param_hint="TARGET"
        )
    runpy.run_module(target, run_name="__main__", alter_sys=True)
