"""What happened while a model was quantized: shown as it happens, and kept as JSON.

HF_VQ_PROGRESS=0 silences it, and so does `transformers.logging.set_verbosity_error()`.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from hf_vq.formats.base import LayerSpec


class Reporter:
    """Progress of one quantization run. `start`, then `matrix` for each, then `finish`.

    `to_dict()` is what is saved beside the model: per-matrix shapes, bits, relative errors
    (tr(E H E^T) / tr(W H W^T)) and seconds, the total time by the clock and of the CPU (all threads
    of this process together), and peak memory in bytes.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, soft_wrap=True)
        self._quiet = _silenced()
        self._progress: Progress | None = None
        self._task: Any = None
        self._memory = MemoryMeter()
        self._began = 0.0
        self._seconds = 0.0
        self._began_cpu = self._cpu_seconds = 0.0
        self._total_weights = 0
        self._matrices: list[dict[str, Any]] = []
        self._tuned: list[dict[str, Any]] = []
        self._notes: list[str] = []

    def start(self, total_matrices: int, total_weights: int) -> None:
        """Begin: so many matrices, with so many weights in all (for the estimate of time left)."""
        self._began, self._began_cpu = time.perf_counter(), time.process_time()
        self._total_weights = total_weights
        self._memory.start()
        if self._quiet:
            return
        self._progress = Progress(
            TextColumn("quantizing"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[done]}/" + str(total_matrices) + " matrices"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=max(total_weights, 1), done=0)
        self._progress.start()

    def matrix(
        self,
        name: str,
        spec: LayerSpec,
        relative_error: float,
        seconds: float,
        notes: list[str] | tuple[str, ...] = (),
        added: int = 0,
    ) -> None:
        """One matrix is done, in so many seconds; added: bytes of a bias that it had not before."""
        shape = (spec.out_features, spec.in_features)
        size, bits = spec.nbytes + added, 8 * (spec.nbytes + added) / spec.num_weights
        self._matrices.append(
            {
                "name": name,
                "shape": list(shape),
                "bits": bits,
                "bytes": size,
                "relative_error": float(relative_error),
                "seconds": round(seconds, 4),
                "notes": list(notes),
            }
        )
        text = f"{shape[0]}x{shape[1]}"
        line = f"{name:<40} {text:>12} {bits:6.3f} bits"
        line += f"  rel. error {relative_error:8.5f} {seconds:7.2f} s"
        self._say("  ".join([line, *notes]))
        if self._progress is not None:
            done = len(self._matrices)
            self._progress.update(self._task, advance=spec.num_weights, done=done)

    def tuned(self, name: str, ratio: float, seconds: float) -> None:
        """A block was fine-tuned: its held-out loss, relative to that before."""
        self._tuned.append({"name": name, "loss_ratio": ratio, "seconds": round(seconds, 4)})
        self._say(f"{name:<40} fine-tuned: held-out loss x{ratio:.3f} {seconds:18.2f} s")

    def note(self, text: str) -> None:
        """Something unusual that concerns no single matrix."""
        self._notes.append(text)
        self._say(f"note: {text}")

    def finish(self) -> None:
        """The end, also of a run that failed; safe to call twice."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._memory.stop():
            self._seconds = time.perf_counter() - self._began
            self._cpu_seconds = time.process_time() - self._began_cpu
            peak = ", ".join(f"{k} {v / 2**20:.0f} MiB" for k, v in self._memory.peaks.items())
            self._say(
                f"{len(self._matrices)} matrices at {self._bits():.3f} bits per weight in "
                f"{self._seconds:.1f} s; peak memory: {peak}"
            )

    def to_dict(self) -> dict[str, Any]:
        """All of it, as plain JSON values."""
        from hf_vq import __version__
        from hf_vq.environment import environment

        tuned = {"fine_tuned": [dict(t) for t in self._tuned]} if self._tuned else {}
        return {
            "hf_vq_version": __version__,
            "torch_version": torch.__version__,
            "environment": environment(),
            "bits": self._bits(),
            "seconds": round(self._seconds, 3),
            "cpu_seconds": round(self._cpu_seconds, 3),
            "peak_memory_bytes": dict(self._memory.peaks),
            "notes": list(self._notes),
            "matrices": [dict(m) for m in self._matrices],
            **tuned,
        }

    def _bits(self) -> float:
        weights = sum(m["shape"][0] * m["shape"][1] for m in self._matrices)
        return 8 * sum(m["bytes"] for m in self._matrices) / max(weights, 1)

    def _say(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text, highlight=False, markup=False)


class MemoryMeter:
    """Peak memory of this process between `start` and `stop`, sampled every 20 ms.

    `peaks` in bytes: "process" (resident), "anonymous" (resident without memory-mapped files;
    Linux) and one entry per CUDA device that was used.
    """

    def __init__(self, interval: float = 0.02) -> None:
        self.peaks: dict[str, int] = {}
        self._interval = interval
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self.peaks.clear()
        self._stop.clear()
        if torch.cuda.is_initialized():
            for device in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(device)
        self._thread = threading.Thread(target=self._run, daemon=True, name="hf_vq memory meter")
        self._thread.start()

    def stop(self) -> bool:
        """Whether it was running."""
        if self._thread is None:
            return False
        self._stop.set()
        self._thread.join()
        self._thread = None
        self._sample()
        if torch.cuda.is_initialized():
            for device in range(torch.cuda.device_count()):
                peak = torch.cuda.max_memory_allocated(device)
                if peak:
                    self.peaks[f"cuda:{device}"] = peak
        return True

    def _run(self) -> None:
        while not self._stop.is_set():
            self._sample()
            self._stop.wait(self._interval)

    def _sample(self) -> None:
        for name, size in _resident().items():
            self.peaks[name] = max(self.peaks.get(name, 0), size)


def _resident() -> dict[str, int]:
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file if ":" in line)
        sizes = {"process": fields["VmRSS"], "anonymous": fields["RssAnon"]}
        return {name: int(size.split()[0]) * 1024 for name, size in sizes.items()}  # "123 kB"
    except (OSError, KeyError, ValueError):
        pass
    import psutil  # comes with accelerate

    return {"process": psutil.Process().memory_info().rss}


def _silenced() -> bool:
    if os.environ.get("HF_VQ_PROGRESS", "1") == "0":
        return True
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return False
    return transformers.logging.get_verbosity() >= transformers.logging.ERROR
