"""Walking a decoder block by block without running the rest of the model.

`find_blocks` names the repeated blocks; `capture` runs the model's own preamble (embeddings, rotary
tables, masks) with the blocks replaced by stubs, so that it records what every block is called
with at the price of an embedding look-up; `BlockPath` then runs one block on its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


class StopForward(Exception):
    """Raised from a hook to leave a forward pass once what it was run for is known."""


class BlockError(ValueError):
    """The model's blocks cannot be found or called one by one."""


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Full name -> module of the repeated blocks, in execution order.

    Blocks are the members of the `nn.ModuleList`s whose class the model declares unsplittable
    (`_no_split_modules`); without such a declaration, the ModuleList with the most parameters.
    """
    declared = set(getattr(model, "_no_split_modules", None) or ())
    lists: list[tuple[int, dict[str, nn.Module]]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 0:
            members = {f"{name}.{i}": child for i, child in enumerate(module)}
            if any(isinstance(m, nn.Linear) for c in module for m in c.modules()):
                size = sum(p.numel() for c in module for p in c.parameters())
                if declared & {type(c).__name__ for c in module}:
                    size += 1 << 62
                lists.append((size, members))
    return max(lists, key=lambda item: item[0])[1] if lists else {}


@dataclass
class Captured:
    """Inputs of the first block for every batch, and every block's other arguments.

    hidden: one (batch, seqlen, width) tensor per batch. calls[shape][i]: (args, kwargs) that block
    i gets besides its hidden states for batches of that (batch, seqlen) shape. tuples: blocks have
    to return their states in a tuple.
    """

    hidden: list[torch.Tensor] = field(default_factory=list)
    calls: dict[tuple[int, ...], list[tuple[tuple, dict]]] = field(default_factory=dict)
    tuples: bool = False


def _split_hidden(args: tuple, kwargs: dict) -> tuple[torch.Tensor, tuple, dict]:
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


@contextmanager
def replaced(blocks: list[nn.Module], make: Callable[[int], Callable]) -> Iterator[None]:
    """Let block i run make(i) in the place of its forward."""
    try:
        for i, block in enumerate(blocks):
            block.forward = make(i)  # type: ignore[method-assign]
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


@torch.no_grad()
def capture(
    model: nn.Module, blocks: list[nn.Module], batches: list[torch.Tensor], name: str = "model"
) -> Captured:
    """Record what every block would be called with, for int64 token batches (batch, seqlen).

    Raises `BlockError` if the model does not hand the blocks their hidden states one after another.
    """
    found = Captured()

    def make(i: int) -> Callable:
        def stub(*args: Any, **kwargs: Any) -> Any:
            hidden, rest, options = _split_hidden(args, kwargs)
            if i == 0:
                found.hidden.append(hidden.detach())
            first = found.hidden[-1]
            if not found.tuples and hidden.shape == first.shape[1:]:
                raise _ReturnsTuples
            if hidden.shape != first.shape or not _same(hidden, first):
                raise BlockError(
                    f"{name}: block {i} is not given what block {i - 1} returns, but states of "
                    "another shape or with something done to them in between; hf_vq walks plain "
                    "stacks of decoder blocks"
                )
            shape = tuple(first.shape)
            calls = found.calls.setdefault(shape[:-1], [])
            if (
                len(calls) > i
            ):  # a batch of this shape has been recorded: the first input is all we need
                raise StopForward
            calls.append((rest, options))
            if i == len(blocks) - 1:
                raise StopForward
            return (hidden,) if found.tuples else hidden

        return stub

    for batch in batches:
        for _ in range(2):
            try:
                with replaced(blocks, make):
                    model(input_ids=batch, use_cache=False)
                raise BlockError(
                    f"{name}: its forward pass does not run the blocks that were found"
                )
            except StopForward:
                break
            except _ReturnsTuples:
                found.tuples = True
                shape = tuple(found.hidden.pop().shape)
                found.calls.pop(shape[:-1], None)
    return found


def _same(hidden: torch.Tensor, first: torch.Tensor) -> bool:
    """Equal, or not a number, which is for `hf_vq.engine.walk` to complain about."""
    first = first.to(hidden.device)
    return bool(((hidden == first) | hidden.isnan()).all())


class _ReturnsTuples(Exception):
    """The model indexes its blocks' outputs, so a stub has to return a tuple."""


def move(value: Any, device: torch.device) -> Any:
    """Move every tensor in nested tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: move(v, device) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(move(v, device) for v in value)
    return value


@dataclass
class Layout:
    """What one run of a block shows of its structure.

    groups: names of the linears that read the very same tensor, in execution order (q/k/v, and
    gate/up, share one input and so one Hessian). A linear that the run never reached (an expert no
    token was routed to) comes last, in a group of its own. tails: child module -> the linear whose
    output the child returns as it is, and how many Nones follow it in a tuple (None: no tuple).
    replayable: children with such linears that run exactly once. small: those without (norms) that
    do, and return one tensor like the hidden states. order: all children, as they first finish.
    """

    groups: list[list[str]]
    tails: dict[str, tuple[str, int | None]]
    replayable: set[str]
    small: set[str]
    order: list[str]

    def settled(self, done: Iterable[str]) -> set[str]:
        """Children whose output is final once the linears `done` are: nothing before them waits."""
        done, out = set(done), set()
        waiting = {n.split(".")[0] for group in self.groups for n in group if n not in done}
        for child in self.order:
            if child in waiting:
                break
            out.add(child)
        return out


class BlockPath:
    """One block, run on captured hidden states, that does not compute its children twice.

    Collecting statistics group by group runs the block several times, each time further. Once the
    output of a child (attention, MLP) is final it is kept per batch, for the next run to hand back.
    """

    def __init__(self, block: nn.Module, index: int, captured: Captured, device: torch.device):
        self.block, self.device = block, device
        self.calls = {s: move(c[index], device) for s, c in captured.calls.items()}
        self.recording: set[str] = set()
        self.stop_after: str | None = None
        self._kept: dict[str, dict[int, Any]] = {}
        self._batch = -1

    def __enter__(self) -> BlockPath:
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._kept:
            self.block.get_submodule(name).__dict__.pop("forward", None)

    @torch.no_grad()
    def run(self, batch: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """The block's output for states (batch, seqlen, width); None if a hook stopped it."""
        self._batch = batch
        call = self.calls.get(tuple(hidden.shape[:-1]))
        if call is None:
            raise BlockError(
                "the model's blocks change the shape of their hidden states; hf_vq walks plain "
                "stacks of decoder blocks"
            )
        args, kwargs = call
        try:
            out = self.block(hidden.to(self.device), *args, **kwargs)
        except StopForward:
            return None
        return first_output(out)

    def replay(self, names: set[str]) -> None:
        """Let these children's outputs be kept, from when they are named in `recording`."""
        for name in names:
            child = self.block.get_submodule(name)
            self._kept[name] = {}
            child.forward = self._replaying(name, child.forward)  # type: ignore[method-assign]

    def keep(self, name: str, batch: int, output: Any) -> None:
        """Hand `output` back the next time that child `name` is run on this batch."""
        self._kept[name][batch] = move(output, torch.device("cpu"))

    def forget(self, batch: int) -> None:
        """Free what is kept of a batch that will not be run again."""
        for kept in self._kept.values():
            kept.pop(batch, None)

    def skips(self, name: str, batches: int) -> bool:
        """Whether child `name` will not be run again: its output is kept for every batch."""
        return len(self._kept.get(name, ())) == batches

    def _replaying(self, name: str, forward: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            kept = self._kept[name]
            if self._batch in kept:
                return move(kept[self._batch], self.device)
            out = forward(*args, **kwargs)
            if name in self.recording:
                self.keep(name, self._batch, out)
            if name == self.stop_after:
                raise StopForward
            return out

        return call

    def probe(self, linears: Mapping[str, nn.Module], hidden: torch.Tensor) -> Layout:
        """Run once and look at which tensors go where."""
        children = dict(self.block.named_children())
        holding = {n for n in children if any(m.startswith(f"{n}.") for m in linears)}
        groups: dict[tuple, list[str]] = {}
        outputs: dict[int, str] = {}
        tails: dict[str, tuple[str, int | None]] = {}
        runs: dict[str, int] = {}
        alike: set[str] = set()
        alive: list[torch.Tensor] = []  # or a freed tensor's address could be taken for another's

        def before(name: str) -> Callable:
            def hook(_: nn.Module, args: tuple) -> None:
                x = args[0]
                alive.append(x)
                groups.setdefault((x.data_ptr(), x.shape, x.stride()), []).append(name)

            return hook

        def after(name: str) -> Callable:
            def hook(_: nn.Module, args: tuple, out: torch.Tensor) -> None:
                alive.append(out)
                outputs[out.data_ptr()] = name

            return hook

        def child_after(name: str) -> Callable:
            def hook(_: nn.Module, args: tuple, out: Any) -> None:
                runs[name] = runs.get(name, 0) + 1
                if isinstance(out, torch.Tensor) and out.shape == hidden.shape:
                    alike.add(name)
                if name not in holding:
                    return
                first = first_output(out)
                others = None if isinstance(out, torch.Tensor) else out[1:]
                tail = outputs.get(first.data_ptr())
                if tail and tail.startswith(f"{name}.") and all(o is None for o in others or ()):
                    tails[name] = (tail, None if others is None else len(others))

            return hook

        handles = [m.register_forward_pre_hook(before(n)) for n, m in linears.items()]
        handles += [m.register_forward_hook(after(n)) for n, m in linears.items()]
        handles += [c.register_forward_hook(child_after(n)) for n, c in children.items()]
        try:
            self.run(-1, hidden)
        finally:
            for handle in handles:
                handle.remove()
        seen: set[str] = set()
        ordered = []
        for group in groups.values():
            fresh = [n for n in dict.fromkeys(group) if n not in seen]
            seen.update(fresh)
            ordered += [fresh] if fresh else []
        ordered += [[n] for n in linears if n not in seen]
        once = {n for n, c in children.items() if runs.get(n) == 1 and not isinstance(c, nn.Linear)}
        return Layout(ordered, tails, once & holding, (once & alike) - holding, list(runs))


def first_output(out: Any) -> torch.Tensor:
    """The hidden states that a block or a child returns, alone or in front of other things."""
    return out if isinstance(out, torch.Tensor) else out[0]


def twin(block: nn.Module) -> nn.Module:
    """A copy of the modules that shares every parameter and buffer, so that it costs no memory."""
    shared = {id(t): t for t in (*block.parameters(), *block.buffers())}
    return copy.deepcopy(block, shared)


@contextmanager
def placed(block: nn.Module, device: torch.device) -> Iterator[None]:
    """Have `block` on `device` for the moment."""
    home = next(block.parameters()).device
    block.to(device)
    try:
        yield
    finally:
        block.to(home)
