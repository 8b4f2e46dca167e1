"""What the commands share: one clear line for an error, and checks of the folders given."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import typer
from rich.console import Console

Command = TypeVar("Command", bound=Callable[..., Any])

stderr = Console(stderr=True, soft_wrap=True)
"""Lines stay whole: what reads them from a file has a width of its own."""


def stdout() -> Console:
    """Where tables go: as wide as the terminal, and wide enough for layers' names in a file."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def one_line_errors(command: Command) -> Command:
    """Turn an exception into one line on stderr and exit code 1 (130 for Ctrl-C).

    HF_VQ_DEBUG=1 lets the exception through with its traceback.
    """

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if os.environ.get("HF_VQ_DEBUG", "0") not in ("", "0"):
            return command(*args, **kwargs)
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.BadParameter, typer.Abort):
            raise
        except KeyboardInterrupt:
            _print("interrupted")
            raise typer.Exit(130) from None
        except Exception as error:
            message = " ".join(str(error).split()) or type(error).__name__
            # these say nothing useful without their name: KeyError('x') prints as 'x'
            if isinstance(error, (KeyError, AttributeError, AssertionError, NotImplementedError)):
                message = f"{type(error).__name__}: {message} (HF_VQ_DEBUG=1 shows where)"
            _print(message)
            raise typer.Exit(1) from None

    return wrapper  # type: ignore[return-value]


def _print(message: str) -> None:
    stderr.print(f"error: {message}", style="red", highlight=False, markup=False)


def check_output_folder(out: Path, model: str) -> None:
    """Refuse an output folder that would destroy something, before any work is done.

    Raises:
        typer.BadParameter: `out` is a file, is or contains the model, or holds something that is
            not a model.
    """
    out, source = out.resolve(), Path(model).resolve()
    if source.exists() and (out == source or out in source.parents):
        raise typer.BadParameter(
            f"{out} is or contains MODEL; choose another folder", param_hint="OUT"
        )
    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"{out} is a file, not a folder", param_hint="OUT")
    if out.is_dir() and any(out.iterdir()) and not (out / "config.json").is_file():
        raise typer.BadParameter(
            f"{out} is not empty and holds no model that could be replaced", param_hint="OUT"
        )


def check_model(name: str) -> None:
    """Refuse what is written like a folder but is none, before it is looked for on the Hub."""
    folder = Path(name)
    written_as_path = folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if written_as_path and not folder.is_dir():
        raise OSError(f"there is no folder {name}")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise OSError(f"the folder {name} holds no model (it has no config.json)")


def packed_folder(folder: Path) -> Path:
    """`folder` if it holds a model; raises typer.BadParameter otherwise."""
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is no folder"
        raise typer.BadParameter(
            f"{folder} {what}; give the folder of a packed model", param_hint="OUT"
        )
    return folder


def load_tokenizer(name: str, **kwargs: Any) -> Any:
    """The tokenizer at `name`, or None where there is none to be found."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, **kwargs)
    except (OSError, ValueError):
        return None
