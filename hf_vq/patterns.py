"""Patterns that pick modules by name, for overrides and exceptions."""

from __future__ import annotations

import fnmatch
import re
from typing import Any


def check_pattern(pattern: Any, where: str) -> None:
    """Raise ValueError for a pattern that is no string or no valid regular expression."""
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"{where}: a pattern must be a non-empty string, not {pattern!r}")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise ValueError(f"{where}: {pattern!r} is no regular expression: {error}") from None


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern picks the module `name`.

    "re:<expression>" has to match the whole name, a glob (with *, ? or [) too; anything else is a
    run of whole name components: "down_proj" and "layers.1" pick model.layers.1.mlp.down_proj, but
    "layers.1" does not pick model.layers.10.
    """
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."
