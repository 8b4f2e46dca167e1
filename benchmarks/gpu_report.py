"""What the sections of benchmarks/gpu.py share: the report, the sizes, the clock."""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before an operator imports triton
DEVICE = "cuda" if GPU else "cpu"

Shape = tuple[int, int]


@dataclass(frozen=True)
class Sizes:
    """What is computed: of a Llama of 8 billion weights, or small enough for the interpreter."""

    checked: Shape = (517, 4864)
    checked_tokens: tuple[int, ...] = (1, 3, 17, 130)
    tokens: tuple[int, ...] = tuple(2**i for i in range(13))
    main: tuple[Shape, ...] = ((4096, 4096), (14336, 4096), (4096, 14336))
    # Llama-7B, the keys and values of 8B, 70B
    others: tuple[Shape, ...] = (
        (11008, 4096), (4096, 11008), (1024, 4096), (8192, 8192), (28672, 8192), (8192, 28672),
    )  # fmt: skip
    vocabulary: int = 128256
    rotated: int = 256 << 20  # bytes of weights of a measurement: several second-level caches
    copied: int = 1 << 30
    repeats: int = 20
    training_tokens: int = 2048
    training_blocks: int = 4
    rank: int = 16


INTERPRETED = Sizes(checked=(13, 172), checked_tokens=(1, 3, 17))
DRY = Sizes(
    checked=(5, 44), checked_tokens=(1, 5), tokens=(1, 16), main=((16, 64),), others=((8, 64),),
    vocabulary=40, rotated=0, copied=1 << 10, repeats=1, training_tokens=4, training_blocks=1,
    rank=2,
)  # fmt: skip


class OutOfTime(Exception):
    """The budget is spent."""


@dataclass
class Report:
    """Lines for the screen and the file, the time that is left, and how large things are."""

    budget: float
    sizes: Sizes = field(default_factory=Sizes)
    dry: bool = False
    lines: list[str] = field(default_factory=list)
    not_measured: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.end = time.monotonic() + self.budget

    def say(self, line: str = "") -> None:
        """Print a line, and keep it for the file."""
        print(line, flush=True)
        self.lines.append(line)

    def formats(self, of: dict[str, Any]) -> dict[str, Any]:
        """The entries of `of` to go through: in a dry run, the last of each method."""
        if not self.dry:
            return of
        last = {name.split()[0]: name for name in of if "65536" not in name}
        return {name: of[name] for name in last.values()}

    def has(self, seconds: float, what: str) -> bool:
        """Whether so many seconds are left; otherwise `what` is noted as not measured."""
        if self.dry:
            seconds = 0.0
        if time.monotonic() + seconds <= self.end:
            return True
        self.not_measured.append(f"{what}: no time left")
        return False

    def run(self, name: str, section: Callable[[Report], Any]) -> Any:
        """`section(self)`; if it fails or the budget ends, that is noted and None returned.

        One section must not cost the others.
        """

        def ring(*_: Any) -> None:
            raise OutOfTime

        left = self.end - time.monotonic()
        if left <= 0:
            self.not_measured.append(f"{name}: no time left")
            return None
        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, left)
        try:
            return section(self)
        except OutOfTime:
            self.not_measured.append(f"{name}: cut off in the middle, the budget was spent")
        except Exception as error:
            text = str(error).splitlines()
            self.not_measured.append(f"{name}: {type(error).__name__}: {text[0] if text else ''}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            if GPU:
                torch.cuda.empty_cache()
        self.say()
        return None

    def seconds(self, run: Callable[[], Any]) -> float:
        """Median seconds of `run` replayed as a CUDA graph; it is tuned and compiled before."""
        run()
        if not GPU:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return _median(graph.replay, self.sizes.repeats)

    def eager_seconds(self, run: Callable[[], Any]) -> float:
        """Median seconds of `run` as it is called, for what no graph can hold."""
        run()
        if not GPU:
            return self.seconds(run)
        return _median(run, self.sizes.repeats)

    def rotating(self, functions: list[Callable[[torch.Tensor], Any]], n: int, width: int) -> float:
        """Seconds per call of functions of n tokens each, over weights that no cache holds."""
        xs = [torch.randn(n, width, device=DEVICE).bfloat16() for _ in functions]

        def run() -> None:
            for function, x in zip(functions, xs, strict=True):
                function(x)

        return self.seconds(run) / len(functions)

    def copies(self, nbytes: int) -> int:
        """How many matrices of so many bytes a measurement goes through."""
        return max(2, min(64, self.sizes.rotated // nbytes))


def _median(run: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times[2:])


def peak_memory(run: Callable[[], Any]) -> tuple[float, Any]:
    """Bytes that `run()` allocates at its peak beyond what was there, and what it returns."""
    if not GPU:
        return 0.0, run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, result
