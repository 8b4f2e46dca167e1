"""What a backend derives from packed tensors and keeps beside them: layouts at run time.

A layout belongs to the storages of the tensors it was made from. It is neither a parameter nor a
buffer, so it is not saved, moved or counted by the model: what is stored stays as it is, and a
loaded model is saved as the same bytes. It is dropped when the first of its storages dies (also by
moving the model, which makes new ones) or when `forget` says so, and made anew when one of the
tensors has been changed in place, as autograd counts changes (`Tensor._version`); writing through
`.data` or numpy is not seen by that, so call `forget` afterwards.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


def _marks(tensors: tuple[Tensor, ...]) -> list[tuple[int, int]]:
    """Where each tensor is, and how often it was changed (RuntimeError for inference tensors)."""
    return [(tensor.data_ptr(), tensor._version) for tensor in tensors]


class Layouts(Generic[T]):
    """The layouts of one backend: at most one per address of the first tensor."""

    def __init__(self, size: Callable[[T], int]) -> None:
        """`size(layout)`: its bytes, for `nbytes`."""
        self._size = size
        self._kept: dict[int, tuple[list[Any], Hashable, T, list[Any]]] = {}
        _ALL.append(self)

    def find(self, tensors: tuple[Tensor, ...], key: Hashable) -> T | None:
        """The layout kept for these tensors as they are now, and an equal `key`; or None."""
        found = self._kept.get(tensors[0].data_ptr())
        if found is None or found[1] != key:
            return None
        try:
            return found[2] if found[0] == _marks(tensors) else None
        except RuntimeError:  # an inference tensor, which has no version
            return None

    def keep(self, tensors: tuple[Tensor, ...], key: Hashable, layout: T) -> None:
        """Keep `layout` for `find`. Not where changes could not be noticed (inference tensors)."""
        if any(t.is_inference() or not t.is_contiguous() for t in tensors):
            return
        address = tensors[0].data_ptr()

        def drop(dead: Any) -> None:
            kept = self._kept.get(address)
            if kept is not None and dead in kept[3]:
                del self._kept[address]

        # while none of them has died, nothing else can be at their addresses
        alive = [weakref.ref(t.untyped_storage(), drop) for t in tensors]
        self._kept[address] = (_marks(tensors), key, layout, alive)

    def forget(self) -> None:
        """Drop all; they are made again where they are needed."""
        self._kept.clear()

    def nbytes(self) -> int:
        """Bytes of all that are kept."""
        return sum(self._size(kept[2]) for kept in list(self._kept.values()))


_ALL: list[Layouts[Any]] = []


def forget() -> None:
    """Drop every layout of every backend, for instance after writing through `.data`."""
    for layouts in _ALL:
        layouts.forget()


def nbytes() -> int:
    """Bytes of memory that the layouts of all backends take now."""
    return sum(layouts.nbytes() for layouts in _ALL)
