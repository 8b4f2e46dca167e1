"""Small files of text: read with an error that says which, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: it is no JSON, or no object; names the file.
        OSError: it is missing or cannot be read.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ones
        raise ValueError(f"{path} is no valid JSON ({error}); repair or delete it") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(f"{path} holds a {kind}, not a JSON object; repair or delete it")
    return content


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8 text under another name, then rename: a full disk leaves what was there."""
    path = Path(path)
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        staging.write_text(text, encoding="utf-8")
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)
