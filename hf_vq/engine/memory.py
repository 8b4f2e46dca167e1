"""Giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def release() -> None:
    """Hand the pages of freed tensors back, where the C library would keep them.

    glibc holds on to freed chunks of up to 32 MiB, and they are scattered: after a few matrices a
    process owned several times what it used. Does nothing with other C libraries.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # TypeError: Windows wants a name
        return None
