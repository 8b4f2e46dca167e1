"""Where a model came from, in terms that mean something on another machine."""

from __future__ import annotations

import os
import re

_CACHED = re.compile(r"models--((?:[\w.-]+--)?[\w.-]+)[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]")
_HUB_ID = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*")


def base_model_of(name_or_path: str, files: list[str]) -> tuple[str | None, str | None]:
    """(Hub id, commit) of a model loaded from `name_or_path`, whose weights are in `files`.

    (None, None) for a local folder: its path says nothing elsewhere, and may say too much. A
    snapshot in the Hub's cache is traced back to its repository.
    """
    for file in files:
        cached = _CACHED.search(file)
        if cached:
            return cached[1].replace("--", "/", 1), cached[2]
    if not os.path.exists(name_or_path) and _HUB_ID.fullmatch(name_or_path):
        return name_or_path, None
    return None, None
