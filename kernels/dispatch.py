"""Who computes an operator, and why the others do not.

Every operator `hf_vq::NAME` is defined once (ops.py, vptq_ops.py, cvxq_ops.py), with "torch", the
default implementation that runs anywhere, and may have backends: faster implementations of the
same function of the same arguments. `run` asks them in the order of `_MODULES` and takes the first
that is available here and does not refuse these arguments.

How to add a backend: a module of this package with a tuple `BACKENDS` of `Backend`, one per
operator, named in `_MODULES` together with the package that it imports. It is imported when its
operator first runs, and only if that package is installed, so it may import that package at its
top. Example, in triton_gptvq.py:

    BACKENDS = (Backend("triton", "gptvq_linear", ("cuda", "xpu"), unavailable, refuses, linear),)

A backend computes with tensors as they are stored, keeps nothing between calls but what layouts.py
can drop, raises nothing
for arguments that it accepted, and leaves gradients to the operator, whose backward pass calls
further operators (autograd.py). Arguments of "NAME_linear" are
those of the schema, `(x, *packed, bias, *geometry)`; of "NAME_dequantize"
`(*packed, in_features, *geometry, dtype)`.

`use_backend`, the environment variable HF_VQ_BACKEND, or else `demand` for the tensors of one model
forces a backend by name: operators that have it then run it or raise. Otherwise a backend that
fails is reported once by a warning and not asked again, and the next one computes.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

Reason = str
"""Why not, in words that follow "because" or a colon: "no C compiler was found"."""


def _nothing(*_: Any) -> Reason | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of one operator.

    `devices`: the device types it computes on, () for any. `unavailable()` says why it cannot run
    in this process (asked once) and `refuses(*arguments)` why not with these arguments (asked in
    every call, so it must be cheap); None means it can. `run(*arguments)` computes.
    """

    name: str
    operator: str
    devices: tuple[str, ...]
    unavailable: Callable[[], Reason | None]
    refuses: Callable[..., Reason | None]
    run: Callable[..., Any]


# (module, a package it needs or "", what to call it where that package is missing); best first
_MODULES = {
    "gptvq": (
        ("triton_gptvq", "triton", "triton"),
        ("cpu_gptvq", "", "c"),
        ("cpu_numba", "", "numba"),
    ),
    "vptq": (("triton_vptq", "triton", "triton"), ("cpu_vptq", "", "c")),
    "cvxq": (
        ("triton_cvxq", "triton", "triton"),
        ("cpu_cvxq", "", "c"),
        ("cpu_numba", "", "numba"),
    ),
}
DEFAULT = "torch"


@dataclass
class _Entry:
    backend: Backend
    broken: Reason | None = None  # for this process: unavailable, or it has failed
    asked: bool = False
    elsewhere: dict[str, Reason] = field(default_factory=dict)

    def why_not(self, device: str, arguments: tuple[Any, ...]) -> Reason | None:
        """Why this backend does not take a call on `device`; None if it does."""
        backend = self.backend
        if backend.devices and device not in backend.devices:
            if device not in self.elsewhere:
                names = ", ".join(backend.devices)
                self.elsewhere[device] = f"it computes on {names}, not on {device}"
            return self.elsewhere[device]
        if not self.asked:
            self.broken, self.asked = backend.unavailable(), True
        return self.broken or backend.refuses(*arguments)


_defaults: dict[str, Backend] = {}
_entries: dict[str, list[_Entry]] = {}
_state = threading.local()  # .forced: name or None; .log: list of Decision while explaining
_lock = threading.Lock()
_demanded: dict[int, tuple[Any, str]] = {}  # id of a storage -> reference to it, backend


@dataclass
class Decision:
    """Which backend computed one call of an operator, and why those before it did not."""

    operator: str
    shapes: str
    chosen: str = ""
    refused: dict[str, Reason] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.operator}({self.shapes}): {self.chosen}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


@dataclass
class Explanation:
    """The decisions of all calls of operators in one computation, equal ones once."""

    decisions: list[Decision]

    def __str__(self) -> str:
        return "\n".join(map(str, self.decisions)) or "no operator of hf_vq was called"


def register_default(operator: str, function: Callable[..., Any]) -> None:
    """Make `function` the default of `hf_vq::{operator}`, and let its calls go through `run`."""
    _defaults[operator] = Backend(DEFAULT, operator, (), _nothing, _nothing, function)

    def dispatched(*arguments: Any) -> Any:
        return run(operator, arguments)

    torch.library.impl(f"hf_vq::{operator}", "CompositeExplicitAutograd", dispatched)


def backends(operator: str) -> list[str]:
    """Names of the backends of `operator`, in the order in which they are asked."""
    return [entry.backend.name for entry in _load(operator)]


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the block and this thread, operators that have backend `name` run it or raise.

    `None` or "auto" lets the dispatch choose. Stronger than HF_VQ_BACKEND.
    """
    before = getattr(_state, "forced", None)
    _state.forced = name
    try:
        yield
    finally:
        _state.forced = before


def forced_backend() -> str | None:
    """The name that `use_backend` or else HF_VQ_BACKEND demands; None where any may compute."""
    name = getattr(_state, "forced", None) or os.environ.get("HF_VQ_BACKEND", "")
    return None if name in ("", "auto") else name


def demand(codes: Tensor, name: str | None) -> None:
    """Let operators on packed tensors whose first is `codes` run backend `name`, or raise.

    It holds for the storage of `codes` until that dies or `name` is None or "auto", also in
    compiled graphs; `use_backend` and HF_VQ_BACKEND are stronger. Raises ValueError for a name that
    no backend has.
    """
    storage = codes.untyped_storage()
    number = id(storage)
    if name in (None, "", "auto"):
        _demanded.pop(number, None)
        return
    check_name(name)
    known = _demanded.get(number)
    if known is None or known[1] != name:
        _demanded[number] = (weakref.ref(storage, lambda _: _demanded.pop(number, None)), name)


def _demanded_of(operator: str, arguments: tuple[Any, ...]) -> str | None:
    """The backend that `demand` names for the packed tensors of a call."""
    if not _demanded:
        return None
    codes = arguments[0 if operator.endswith("_dequantize") else 1]
    return _demanded.get(id(codes.untyped_storage()), (None, None))[1]


def call(operator: str, arguments: tuple[Any, ...]) -> Tensor:
    """`torch.ops.hf_vq.{operator}(*arguments)`, which takes some ten microseconds by itself.

    Where nothing but the backend would see the call (plain tensors on a device, no gradient, no
    tracing, no modes), it goes straight to `run`.
    """
    if not torch.compiler.is_compiling() and _is_plain(arguments):
        return run(operator, arguments)
    return getattr(torch.ops.hf_vq, operator)(*arguments)


def _is_plain(arguments: tuple[Any, ...]) -> bool:
    grad = torch.is_grad_enabled()
    for value in arguments:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            if value.is_meta or (grad and value.requires_grad):
                return False
        elif isinstance(value, Tensor):
            return False
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


def run(operator: str, arguments: tuple[Any, ...]) -> Any:
    """Compute `hf_vq::{operator}`, given the arguments of its schema by position.

    Raises RuntimeError where a forced backend cannot, and ValueError where no operator has it.
    """
    entries = _entries.get(operator) or _load(operator)
    device = arguments[0].device.type
    name = forced_backend()
    if name is None:
        demanded = _demanded_of(operator, arguments)
        if demanded is not None:
            with use_backend(demanded):
                return run(operator, arguments)
    log = getattr(_state, "log", None)
    decision = None
    if log is not None:
        decision = Decision(operator, _shapes(arguments))
        log.append(decision)
    if name is not None:
        check_name(name)
        chosen = [entry for entry in entries if entry.backend.name == name]
        if chosen:
            return _run_forced(chosen[0], device, arguments, decision)
    failed: tuple[_Entry, Exception] | None = None
    for entry in entries:
        reason = entry.why_not(device, arguments)
        if reason is not None:
            if decision is not None:
                decision.refused[entry.backend.name] = reason
            continue
        if decision is not None:
            decision.chosen = entry.backend.name
        try:
            result = entry.backend.run(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if entry is entries[-1]:
                raise  # the default: what is wrong is the call, not a backend
            failed = (entry, error)
            if decision is not None:
                decision.refused[entry.backend.name] = f"failed: {error}"
            continue
        if failed is not None:
            _give_up(*failed, entry.backend.name)
        return result
    raise AssertionError(f"hf_vq::{operator} has no default")


def _run_forced(
    entry: _Entry, device: str, arguments: tuple[Any, ...], decision: Decision | None
) -> Any:
    backend = entry.backend
    reason = entry.why_not(device, arguments)
    if reason is not None:
        raise RuntimeError(
            f"hf_vq::{backend.operator}: the backend {backend.name!r} was demanded (HF_VQ_BACKEND, "
            f"use_backend or the config's backend) but cannot compute this call: {reason}. Demand "
            'another one, or "auto", which takes the first that can'
        )
    if decision is not None:
        decision.chosen = f"{backend.name} (demanded)"
    return backend.run(*arguments)


def explain(what: Any, *arguments: Any, **keywords: Any) -> Explanation:
    """Which backends compute `what(*arguments)`, and why others do not; it is computed once.

    `what`: a layer, a whole model, any callable, or the name of an operator ("gptvq_linear").
    Print the result to read it.
    """
    if isinstance(what, str):
        what = getattr(torch.ops.hf_vq, what)
    before = getattr(_state, "log", None)
    log: list[Decision] = []
    _state.log = log
    try:
        with torch.no_grad():
            what(*arguments, **keywords)
    finally:
        _state.log = before
    different = {str(decision): decision for decision in log}
    return Explanation(list(different.values()))


def check_name(name: str) -> None:
    """Raise ValueError unless some backend is called `name`."""
    known = {DEFAULT} | {called for modules in _MODULES.values() for *_, called in modules}
    if name not in known:
        raise ValueError(
            f"no backend is called {name!r} (HF_VQ_BACKEND, use_backend or a config's backend); "
            f"there are {', '.join(sorted(known))}, and auto"
        )


def _give_up(entry: _Entry, error: Exception, instead: str) -> None:
    entry.broken = f"it failed before: {error}"
    warnings.warn(
        f"hf_vq::{entry.backend.operator}: backend {entry.backend.name!r} failed "
        f"({type(error).__name__}: {error}); {instead!r} computes from now on in this process",
        RuntimeWarning,
        stacklevel=4,
    )


def _load(operator: str) -> list[_Entry]:
    """The entries of `operator`, best first; imports their modules."""
    with _lock:
        if operator in _entries:
            return _entries[operator]
        found = []
        for module, package, called in _MODULES.get(operator.split("_")[0], ()):
            reason = None
            try:
                if importlib.util.find_spec(f"{__package__}.{module}") is None:
                    continue
                if package and importlib.util.find_spec(package) is None:
                    reason = f"the package {package} is not installed"
                else:
                    code = importlib.import_module(f"{__package__}.{module}")
                    found += [b for b in code.BACKENDS if b.operator == operator]
            except Exception as error:  # a package that is installed but broken
                reason = f"it cannot be imported: {error}"
            if reason is not None:
                absent = Backend(
                    called, operator, (), _saying(reason), _nothing, _defaults[operator].run
                )
                found.append(absent)
        entries = [_Entry(backend) for backend in (*found, _defaults[operator])]
        _entries[operator] = entries
        return entries


def _saying(reason: Reason) -> Callable[[], Reason]:
    return lambda: reason


def _shapes(arguments: tuple[Any, ...]) -> str:
    first = arguments[0]
    shape = "x".join(map(str, first.shape)) or "scalar"
    return f"{shape} {str(first.dtype).removeprefix('torch.')} on {first.device}"
