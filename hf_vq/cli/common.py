"""What the commands share: one clear line for an error, and checks of the folders given."""

from __future__ import annotations

import functools
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
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

    SIGTERM, which job schedulers send, also ends the command with what it had begun to write
    removed (exit code 143).
    HF_VQ_DEBUG=1 lets the exception through with its traceback.
    """

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if os.environ.get("HF_VQ_DEBUG", "0") not in ("", "0"):
            return command(*args, **kwargs)
        try:
            with _ended_by_sigterm():
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


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that half a model does not stay behind."""

    def leave(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print(message: str) -> None:
    stderr.print(f"error: {message}", style="red", highlight=False, markup=False)


def check_output_folder(out: Path, model: str) -> None:
    """Refuse an output folder that would destroy something, before any work is done.

    Raises:
        typer.BadParameter: `out` is a file, is or contains the model, holds something that is not
            a model, or cannot be written to.
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
    there = next(place for place in (out, *out.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):  # seen before quantizing, not after
        raise typer.BadParameter(f"{there} is no folder that can be written to", param_hint="OUT")


def check_model(name: str, revision: str | None = None) -> None:
    """Refuse a folder without a whole model, and what is no folder nor to be had from the Hub.

    Raises OSError, or ValueError for a damaged file.
    """
    folder = Path(name)
    written_as_path = folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if written_as_path and not folder.is_dir():
        raise OSError(f"there is no folder {name}")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise OSError(f"the folder {name} holds no model (it has no config.json)")
    if folder.is_dir():
        from hf_vq.hub.checkpoint import read_headers

        read_headers(folder)  # names a file that is cut off
    else:
        from transformers.utils import cached_file

        try:
            cached_file(name, "config.json", revision=revision)
        except OSError as error:
            reason = " ".join(str(error).split())
            raise OSError(
                f"there is no folder {name} here, and no model of that name came from the Hub: "
                f"{reason}"
            ) from None


def load_whole(name: str, **kwargs: Any) -> Any:
    """The model at `name`; raises ValueError if some of its weights are in no file.

    Transformers makes random ones in their place. kwargs: as for `from_pretrained`.
    """
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **kwargs)
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{name} lacks {len(missing)} of its weights (the first: {missing[0]}), which are "
            "random therefore: its config.json does not fit its files, or says that something "
            "packed them which is not here"
        )
    return model


def check_dtype(name: str) -> None:
    """Refuse what is neither "auto" nor one of torch's floats; raises typer.BadParameter."""
    found = None if name == "auto" else getattr(torch, name, None)
    if name != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise typer.BadParameter(
            f"{name!r} is neither auto nor a float of torch, such as bfloat16", param_hint="--dtype"
        )


def check_shard_size(text: str) -> None:
    """Refuse a size that would fail only after quantizing; raises typer.BadParameter."""
    if not re.fullmatch(r"\d+(\.\d+)?[KMGT]B", text, re.IGNORECASE):
        raise typer.BadParameter(
            f"{text!r} is no size such as 5GB or 500MB", param_hint="--max-shard-size"
        )


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
