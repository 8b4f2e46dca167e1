"""Giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_... in glibc's malloc.h
LARGE = 1 << 20
"""Bytes from which an array gets pages of its own, and free ones at the heap's end go back."""
_USUAL = 32 << 20
"""Bytes where glibc's own threshold ends up once arrays of that size have been freed; it keeps
twice as much at the heap's end."""
RESULT = 1 << 14
"""Bytes from which what stays gets pages of its own: between what is freed it would hold those."""
_sizes = [_USUAL]


def release() -> None:
    """Hand the pages of freed tensors back, where the C library would keep them.

    glibc holds on to freed chunks of up to 32 MiB, and they are scattered: after a few matrices a
    process owned several times what it used. Does nothing with other C libraries.
    """
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


@contextmanager
def own_pages(wanted: bool = True, size: int = LARGE) -> Iterator[None]:
    """Inside, every array of `size` bytes or more has pages of its own, which go back when freed.

    Without it the peak of quantizing matrices of a few million weights is a third higher; every new
    array costs page faults, though, some percent of the time of such a model and more of a small
    one's, hence `wanted`. May be nested. Does nothing with other C libraries than glibc.
    """
    library = _glibc() if wanted else None
    if library is None:
        yield
        return
    _sizes.append(size)
    _set(library, size)
    try:
        yield
    finally:
        _sizes.pop()
        _set(library, _sizes[-1])


def _set(library: Any, size: int) -> None:
    library.mallopt(_MMAP_THRESHOLD, size)
    library.mallopt(_TRIM_THRESHOLD, 2 * size if size == _USUAL else size)


@functools.cache
def _glibc() -> Any:
    """The C library, if it has the functions used here."""
    try:
        library = ctypes.CDLL(None)
        functions: tuple[Callable, ...] = (library.malloc_trim, library.mallopt)
    except (OSError, AttributeError, TypeError):  # TypeError: Windows wants a name
        return None
    return library if functions else None
