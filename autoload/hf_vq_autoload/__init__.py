"""Import hf_vq as soon as a program has imported Transformers' quantizers.

torch calls `install` at the end of `import torch` (entry point group `torch.backends`). Importing
hf_vq right there would drag Transformers into every torch program, so `install` only places a
finder on `sys.meta_path`. The finder never finds anything itself: it lets the other finders answer,
wraps the loader of two Transformers modules, and imports hf_vq once both are complete.

Nothing here may raise: an exception in this entry point would break `import torch` for the whole
environment. Set HF_VQ_AUTOLOAD=0 to switch it off.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

__all__ = ["install"]

# hf_vq needs the first to register and the second to wrap saving; whoever is imported first
# imports the other, so one of them is still half-initialised when the other one is done.
_TARGETS = ("transformers.quantizers", "transformers.modeling_utils")


def install() -> None:
    """Place the import hook, or register at once where Transformers is already there."""
    try:
        if os.environ.get("HF_VQ_AUTOLOAD", "1").lower() in ("0", "false", "no", "off"):
            return
        if any(isinstance(finder, _Finder) for finder in sys.meta_path):
            return
        finder = _Finder()
        sys.meta_path.insert(0, finder)
        # a half-imported torch (this runs at its very end) must not be used yet unless
        # Transformers is complete already, which means that torch was reloaded
        finder.register_if_ready()
    except Exception as error:
        _warn(error)


class _Finder(importlib.abc.MetaPathFinder):
    """Watches imports until hf_vq is registered, then removes itself."""

    def __init__(self) -> None:
        self._busy = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        try:
            if self._busy or not fullname.startswith("transformers."):
                return None
            # Where Transformers began importing before this hook was placed, its loaders are not
            # wrapped; the next module of it that is looked for tells the time as well.
            self.register_if_ready()
            if fullname not in _TARGETS or self not in sys.meta_path:
                return None
            return self._wrapped_spec(fullname, path, target)
        except Exception as error:
            self._remove()
            _warn(error)
            return None

    def _wrapped_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> importlib.machinery.ModuleSpec | None:
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    self._wrap(spec.loader, fullname)
                return spec
        return None

    def _wrap(self, loader: importlib.abc.Loader, fullname: str) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.register_if_ready(finished=fullname)

        # an attribute of this one loader object: it stays the loader that introspection expects
        loader.exec_module = exec_module  # type: ignore[method-assign]

    def register_if_ready(self, finished: str | None = None) -> None:
        """Import hf_vq when the quantizers are there and no target is half-initialised."""
        if self._busy or not _complete("transformers.quantizers", finished):
            return
        if any(name in sys.modules and not _complete(name, finished) for name in _TARGETS):
            return
        self._busy = True
        try:
            importlib.import_module("hf_vq")
        except Exception as error:
            _warn(error)
        finally:
            self._remove()

    def _remove(self) -> None:
        self._busy = True
        if self in sys.meta_path:
            sys.meta_path.remove(self)


def _complete(name: str, finished: str | None) -> bool:
    """Whether a module has been executed to its end (`finished`: the one that just was)."""
    module = sys.modules.get(name)
    if module is None:
        return False
    if name == finished:
        return True
    spec = getattr(module, "__spec__", None)
    return not getattr(spec, "_initializing", False)


def _warn(error: Exception) -> None:
    message = " ".join(str(error).split())
    warnings.warn(
        f"hf-vq-autoload could not register hf_vq ({type(error).__name__}: {message}); "
        "packed models will load with random weights in this process",
        RuntimeWarning,
        stacklevel=2,
    )
