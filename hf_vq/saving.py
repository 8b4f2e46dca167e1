"""Saving a packed model so that a crash leaves what was there before.

`save_pretrained` writes straight into its folder: an interrupt or a full disk leaves a config of
one model beside the weights of another. Here everything is first written into a temporary folder
on the same file system, flushed to disk, and only then moved into place file by file, with what
it replaces kept aside until the last move has worked.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError

from hf_vq.hub.card import write_card
from hf_vq.hub.push import push_folder
from hf_vq.hub.record import drop_stale

_WEIGHTS = re.compile(
    r"model(\.[\w-]+)?(-\d{5}-of-\d{5})?\.safetensors(\.index(\.[\w-]+)?\.json)?"
    r"|pytorch_model(-\d{5}-of-\d{5})?\.bin(\.index\.json)?"
)
"""Weight files that must not survive beside others: loaders would pick the wrong ones."""


_PUSHING = (
    *("repo_id", "private", "revision", "create_pr", "commit_message", "commit_description"),
    "tags",
)


def save_atomically(
    save: Callable[..., Any], model: Any, save_directory: str | os.PathLike, **kwargs: Any
) -> Any:
    """Run `save(model, folder, **kwargs)` on a temporary folder, then move its files into place.

    Files of `save_directory` that `save` does not write are kept, except for the weights that the
    new ones replace. Whatever `save` raises leaves `save_directory` as it was, and nothing else
    behind.
    """
    # a link is followed, so that its target gets the files
    target = os.path.realpath(os.fspath(save_directory))
    existed = os.path.isdir(target)
    push = _push_options(kwargs, os.path.basename(os.path.normpath(os.fspath(save_directory))))
    source = model.name_or_path
    with _staging_folder(target) as staging:
        files = os.path.join(staging, "new")
        os.mkdir(files)
        quantizer = model.hf_quantizer
        quantizer.report_folder, quantizer.state_dict = files, kwargs.get("state_dict")
        try:
            result = save(model, files, **kwargs)
            drop_stale(files)  # the model may have been trained since it was evaluated
            write_card(files, unless_in=target, base_folder=source or None)
        finally:
            quantizer.report_folder = quantizer.state_dict = None
        _flush(files)
        if existed:
            _move_in(files, target, os.path.join(staging, "old"))
        else:
            os.rename(files, target)
    if push is not None:  # what is published is what was saved
        push_folder(target, base_folder=source or None, **push)
    return result


def save_with_tokenizer(
    model: Any, tokenizer: Any, save_directory: str | os.PathLike, **kwargs: Any
) -> None:
    """Save a packed model and its tokenizer, if it has one, both or neither.

    kwargs: as for `save_pretrained`. Raises OSError, naming the folder, if that cannot be done.
    """
    plain = type(model).save_pretrained.__wrapped__  # `hf_vq.registration` has wrapped it

    def save(model: Any, folder: str, **kwargs: Any) -> None:
        plain(model, folder, **kwargs)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    try:
        save_atomically(save, model, save_directory, **kwargs)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"the model could not be saved to {save_directory} ({error}); nothing there has "
            "changed; make room, or give another folder"
        ) from error


def _push_options(kwargs: dict[str, Any], name: str) -> dict[str, Any] | None:
    """What of `save_pretrained`'s options is about publishing, taken out; None: nothing."""
    options = {key: kwargs.pop(key) for key in _PUSHING if key in kwargs}
    if not kwargs.pop("push_to_hub", False):
        return None
    options.setdefault("repo_id", name)
    options["token"] = kwargs.get("token")
    return options


@contextmanager
def _staging_folder(target: str) -> Iterator[str]:
    """A temporary folder on the file system of `target`, removed at the end.

    Beside `target` where possible; inside of it where that is a mount point or the parent is
    read-only.
    """
    parent = os.path.dirname(target)
    created = _make_parents(parent)
    where = parent
    if os.path.isdir(target) and (
        os.stat(target).st_dev != os.stat(parent).st_dev or not os.access(parent, os.W_OK)
    ):
        where = target
    done = False
    try:
        staging = tempfile.mkdtemp(prefix=f".{os.path.basename(target)}.saving-", dir=where)
        try:
            yield staging
            done = True
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    finally:
        if not done:
            for folder in reversed(created):
                os.rmdir(folder)


def _make_parents(folder: str) -> list[str]:
    """Create missing folders; returns those created, outermost first."""
    missing = []
    while not os.path.isdir(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    missing.reverse()
    for path in missing:
        os.mkdir(path)
    return missing


def _flush(folder: str) -> None:
    """Have the disk confirm the files: a full one may complain only now."""
    for path in _files(folder):
        with open(os.path.join(folder, path), "rb+") as file:
            os.fsync(file.fileno())


def _files(folder: str) -> list[str]:
    """Relative paths of all files under `folder`."""
    return sorted(
        os.path.relpath(os.path.join(root, name), folder)
        for root, _, names in os.walk(folder)
        for name in names
    )


def _move_in(new: str, target: str, old: str) -> None:
    """Move the files of `new` into `target`, and those they replace to `old`; all or nothing."""
    incoming = _files(new)
    stale = [
        name
        for name in os.listdir(target)
        if _WEIGHTS.fullmatch(name) and name not in incoming and _same_kind(name, incoming)
    ]
    moves: list[tuple[str, str]] = []
    try:
        for path in [*stale, *incoming]:
            here = os.path.join(target, path)
            if os.path.lexists(here):
                _move(here, os.path.join(old, path), moves)
            if path in incoming:
                _move(os.path.join(new, path), here, moves)
    except BaseException:
        for source, destination in reversed(moves):
            if os.path.lexists(destination) and not os.path.lexists(source):
                os.replace(destination, source)
        raise


def _same_kind(name: str, incoming: list[str]) -> bool:
    """Whether the new files hold weights of the same variant as the old file `name`."""

    def variant(file: str) -> str | None:
        match = _WEIGHTS.fullmatch(file)
        return None if match is None else (match[1] or match[4] or "")

    return variant(name) in {variant(f) for f in incoming} - {None}


def _move(source: str, destination: str, moves: list[tuple[str, str]]) -> None:
    os.makedirs(os.path.dirname(destination), exist_ok=True)
    moves.append((source, destination))  # before the move: an interrupt between would lose it
    os.replace(source, destination)
