"""Running `hf_vq.tuning.peft.install` when, and only if, a program imports PEFT."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

_MODULE = "peft.tuners.tuners_utils"


def wrap_peft() -> None:
    """Wrap PEFT now if it is there, else as soon as it is imported. Idempotent."""
    module = sys.modules.get(_MODULE)
    if module is not None and hasattr(module, "BaseTuner"):
        from hf_vq.tuning.peft import install

        install()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: wraps the loader that is found for one module of PEFT."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            wrap_peft()

        # an attribute of this one loader object: it stays the loader that introspection expects
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
