"""Peak extra memory of quantizing a model, in blocks.

    python benchmarks/memory.py [--dtype float32|bfloat16] [--out FILE.md]

A random Llama of 12 blocks, 1024 wide, is saved, loaded memory-mapped and quantized in a fresh
process. A thread samples the anonymous resident memory (RssAnon: what the process owns, without
the mapped weights) every 2 ms. From the peak are taken off: what there was before the engine
started, the calibration activations (hidden states of both streams), and, in a line of its own,
the packed layers, which are the result. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_VQ_PROGRESS", "0")

import torch
from protocol import environment
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_vq
from hf_vq.engine.memory import release
from hf_vq.engine.run import quantize_model

BLOCKS, WIDTH, INTERMEDIATE, VOCABULARY = 12, 1024, 2816, 1024
NSAMPLES, SEQLEN = 8, 512
TARGET = 2.0
"""Blocks."""


class Meter:
    """Samples RssAnon in a thread, with what the engine was doing; bytes."""

    def __init__(self, interval: float = 0.002):
        self.peak, self.where, self.phase = 0, "", "start"
        self.by_phase: dict[str, int] = {}
        self._interval, self._stop = interval, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            now, phase = anonymous(), self.phase
            self.by_phase[phase] = max(self.by_phase.get(phase, 0), now)
            if now > self.peak:
                self.peak, self.where = now, phase
            time.sleep(self._interval)


def anonymous() -> int:
    """Resident bytes of this process that are no file's."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024


class PhaseReporter:
    """A reporter for the engine that tells the meter which matrix was finished last."""

    def __init__(self, meter: Meter):
        self.meter = meter

    def start(self, *_: Any) -> None:
        self.meter.phase = "capture and first statistics"

    def matrix(self, name: str, *_: Any) -> None:
        self.meter.phase = f"after {name}"

    def finish(self) -> None:
        self.meter.phase = "end"


def make_model(folder: str, dtype: torch.dtype) -> None:
    """Save the random model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=BLOCKS,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=VOCABULARY,
        max_position_embeddings=SEQLEN,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)


def warm_up(settings: dict[str, Any]) -> None:
    """Quantize a tiny model: compiled code is loaded once and is the same for any model."""
    config = hf_vq.GPTVQConfig(seqlen=16, **settings)
    tiny = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=64,
        )
    )
    samples = torch.arange(64).reshape(4, 16)
    quantize_model(tiny, hf_vq.make_plan(tiny, config), samples, config, PhaseReporter(Meter()))


def measure(folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Quantize the model in `folder`; run in a process of its own."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    config = hf_vq.GPTVQConfig(seqlen=SEQLEN, **settings)
    samples = torch.randint(
        0, VOCABULARY, (NSAMPLES, SEQLEN), generator=torch.Generator().manual_seed(0)
    )
    plan = hf_vq.make_plan(model, config)
    block = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    streams = 2 if config.asymmetric_calibration else 1
    activations = streams * samples.numel() * WIDTH * model.dtype.itemsize
    with torch.no_grad():  # what torch itself sets up on first use: threads, matrix products
        model(input_ids=samples[:1], use_cache=False)
    warm_up(settings)
    gc.collect()
    release()
    before = anonymous()
    with Meter() as meter:
        quantize_model(model, plan, samples, config, PhaseReporter(meter))
    return {
        "block": block,
        "before": before,
        "peak": meter.peak,
        "where": meter.where,
        "activations": activations,
        "packed": sum(s.nbytes for s in plan.layers.values()),
        "by_phase": meter.by_phase,
    }


def report(found: dict[str, Any], dtype: str) -> tuple[bool, str]:
    """Markdown, and whether the target is met."""
    mib, block = 2**20, found["block"]
    extra = found["peak"] - found["before"] - found["activations"]
    met = extra < TARGET * block
    rows = [
        ("one block's weights", block),
        ("anonymous memory before", found["before"]),
        (f"peak ({found['where']})", found["peak"]),
        (f"calibration activations ({NSAMPLES} x {SEQLEN} tokens)", found["activations"]),
        ("extra: peak - before - activations", extra),
        ("of that, packed layers of finished blocks (at most)", found["packed"]),
    ]
    lines = [f"## {dtype} weights", "", "| | MiB | blocks |", "|---|---|---|"]
    lines += [f"| {what} | {size / mib:.1f} | {size / block:.2f} |" for what, size in rows]
    verdict = "PASS" if met else "MISS"
    lines += ["", f"{verdict}: {extra / block:.2f} blocks, target below {TARGET:g}."]
    return met, "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], action="append")
    parser.add_argument("--out", type=Path, help="write the tables here")
    parser.add_argument("--settings", type=json.loads, default={}, help="GPTVQConfig fields, JSON")
    parser.add_argument("--phases", action="store_true", help="also the peak after every matrix")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    # small codebooks and few iterations: the others take time, not memory
    quick = {"vector_dim": 2, "kmeans_iterations": 2, "refine_iterations": 1}
    settings = {"bits": 2.25, **quick, **args.settings}
    if args.child:
        print(json.dumps(measure(args.child, settings)))
        return 0
    parts, failed = (
        [f"# Peak extra memory while quantizing\n\n{environment('two threads')}."],
        False,
    )
    for dtype in args.dtype or ["float32"]:
        with tempfile.TemporaryDirectory() as folder:
            make_model(folder, getattr(torch, dtype))
            command = [sys.executable, __file__, "--child", folder]
            command += ["--settings", json.dumps(settings)]
            done = subprocess.run(
                command,
                env={**os.environ, "OMP_NUM_THREADS": "2"},
                capture_output=True,
                text=True,
            )
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return 1
        found = json.loads(done.stdout.splitlines()[-1])
        met, text = report(found, dtype)
        failed |= not met
        parts.append(text)
        if args.phases:
            for phase, size in found["by_phase"].items():
                extra = size - found["before"] - found["activations"]
                print(f"{extra / found['block']:6.2f} blocks {phase}")
    document = "\n\n".join(parts) + "\n"
    print(document)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(document)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
