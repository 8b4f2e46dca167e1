"""Giving freed memory back to the system, where the C library would keep it.

glibc puts arrays of up to 32 MiB into its heap and keeps what is freed there. The matrices of a
model are of that size and come and go in all shapes, so after a few of them a process owns several
times what it uses. Nothing here does anything with other C libraries.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Larger arrays get pages of their own and return them when freed. New pages cost time: the
# temporaries of which there are many (chunks of a `Lookup`) are smaller.
_OWN_PAGES = (1 << 20) + (1 << 16)
# Bytes of an array from which on this is worth the time.
_LARGE = 4 << 20
# Free memory at the heap's end that is kept.
_KEPT = 4 << 20
# What glibc itself ends up with in a process that has freed large arrays.
_USUAL = 32 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


@contextmanager
def returning_large_arrays(largest: int) -> Iterator[Callable[[], None]]:
    """Meanwhile, arrays are returned when they are freed (in the whole process).

    largest: bytes of the largest that there will be. Yields `release`; where arrays are small, a
    function that does nothing, and nothing is done.
    """
    library = _glibc()
    if library is None or largest < _LARGE:
        yield lambda: None
        return
    library.mallopt(_M_MMAP_THRESHOLD, _OWN_PAGES)
    library.mallopt(_M_TRIM_THRESHOLD, _KEPT)
    try:
        yield release
    finally:
        library.mallopt(_M_MMAP_THRESHOLD, _USUAL)
        library.mallopt(_M_TRIM_THRESHOLD, 2 * _USUAL)
        library.malloc_trim(0)


def release() -> None:
    """Return all free pages of the heap."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


@functools.cache
def _glibc() -> Any:
    """The C library of this process if it is glibc, else None."""
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version, library.mallopt, library.malloc_trim  # noqa: B018
    except (OSError, AttributeError, TypeError):  # TypeError: Windows wants a name
        return None
    return library
