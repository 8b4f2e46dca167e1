"""Peak extra memory of quantizing a model, in blocks.

    python benchmarks/memory.py [--dtype float32|bfloat16] [--blocks N] [--phases] [--out FILE.md]

A random Llama of 12 blocks, 1024 wide, is saved, loaded memory-mapped and quantized in a fresh
process. A thread samples the anonymous resident memory (RssAnon: what the process owns, without
the mapped weights) every 2 ms. From the peak are taken off: what there was before the engine
started; the calibration activations, that is hidden states of both streams and, in a row of their
own, the outputs of a block's attention and MLP that are kept for every calibration token at that
moment (as large as the hidden states again, each), so that they need not be computed twice; and the
result, the layers packed by then.

Before, a forward pass, a tiny model and a matrix product, factorization and triangular solve of the
model's width are run: the workspace of the matrix library, and compiled code, are set up once and
do not grow with the blocks (the workspace grows with the width, a block with its square).
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
import weakref
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_VQ_PROGRESS", "0")

import torch
from protocol import environment
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_vq
from hf_vq.engine import walk
from hf_vq.engine.blocks import BlockPath
from hf_vq.engine.run import quantize_model
from hf_vq.memory import release

BLOCKS, WIDTH, INTERMEDIATE, VOCABULARY = 12, 1024, 2816, 1024
NSAMPLES, SEQLEN = 8, 512
TARGET = 2.0
"""Blocks."""


class Meter:
    """Samples RssAnon in a thread, with what the engine was doing; bytes.

    highest: of all samples. peak, kept, packed: RssAnon, kept outputs and finished layers when what
    is left of the first was largest; by_phase: that difference. finished: packed bytes so far.
    """

    def __init__(self, interval: float = 0.002):
        self.highest = self.peak = self.kept = self.packed = self.finished = 0
        self.where, self.phase = "", "start"
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
            now, kept, packed, phase = anonymous(), kept_outputs(), self.finished, self.phase
            extra = now - kept - packed
            self.highest = max(self.highest, now)
            self.by_phase[phase] = max(self.by_phase.get(phase, 0), extra)
            if extra > self.peak - self.kept - self.packed:
                self.peak, self.kept, self.packed, self.where = now, kept, packed, phase
            time.sleep(self._interval)


def anonymous() -> int:
    """Resident bytes of this process that are no file's."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024


PATHS: weakref.WeakSet[BlockPath] = weakref.WeakSet()


class WatchedPath(BlockPath):
    """A path through a block that can be asked what it keeps."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        PATHS.add(self)


def kept_outputs() -> int:
    """Bytes of the outputs of attention and MLP that the engine keeps right now."""
    try:
        outputs = [o for p in PATHS for kept in p._kept.values() for o in kept.values()]
    except RuntimeError:  # one of the dicts was being written to
        return kept_outputs()
    storages: dict[int, int] = {}
    for output in outputs:
        for part in output if isinstance(output, tuple) else (output,):
            if isinstance(part, torch.Tensor):
                storage = part.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class PhaseReporter:
    """A reporter for the engine that tells the meter which matrix was finished last."""

    def __init__(self, meter: Meter):
        self.meter = meter

    def start(self, *_: Any) -> None:
        self.meter.phase = "capture and first statistics"

    def matrix(self, name: str, spec: Any, *_: Any) -> None:
        self.meter.finished += spec.nbytes
        self.meter.phase = f"after {name}"

    def finish(self) -> None:
        self.meter.phase = "end"


def make_model(folder: str, dtype: torch.dtype, blocks: int) -> None:
    """Save the random model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=VOCABULARY,
        max_position_embeddings=SEQLEN,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)


def warm_up(settings: dict[str, Any]) -> None:
    """Quantize a tiny model, and let the matrix library set up its workspace."""
    square, other = torch.eye(INTERMEDIATE), torch.ones(WIDTH, INTERMEDIATE)
    torch.linalg.cholesky_ex(square.addmm_(other.T, other))
    torch.linalg.solve_triangular(square, other, upper=True, left=False, out=other)
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
    walk.BlockPath = WatchedPath  # type: ignore[misc]
    with Meter() as meter:
        quantize_model(model, plan, samples, config, PhaseReporter(meter))
    return {
        "block": block,
        "before": before,
        "highest": meter.highest,
        "peak": meter.peak,
        "kept": meter.kept,
        "where": meter.where,
        "activations": activations,
        "packed": meter.packed,
        "by_phase": meter.by_phase,
    }


def report(found: dict[str, Any], dtype: str) -> tuple[bool, str]:
    """Markdown, and whether the target is met."""
    mib, block = 2**20, found["block"]
    extra = found["peak"] - found["before"] - found["activations"] - found["kept"] - found["packed"]
    met = extra < TARGET * block
    rows = [
        ("one block's weights", block),
        ("anonymous memory before", found["before"]),
        ("highest anonymous memory at any moment", found["highest"]),
        (f"anonymous memory at the peak ({found['where']})", found["peak"]),
        (
            f"calibration activations: hidden states ({NSAMPLES} x {SEQLEN} tokens)",
            found["activations"],
        ),
        ("calibration activations: kept outputs", found["kept"]),
        ("the result: layers packed by then", found["packed"]),
        ("extra: peak - before - activations - result", extra),
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
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="fewer are a quicker look")
    parser.add_argument("--threads", type=int, default=2)
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
        [f"# Peak extra memory while quantizing\n\n{environment(f'{args.threads} thread(s)')}."],
        False,
    )
    for dtype in args.dtype or ["float32"]:
        with tempfile.TemporaryDirectory() as folder:
            make_model(folder, getattr(torch, dtype), args.blocks)
            command = [sys.executable, __file__, "--child", folder]
            command += ["--settings", json.dumps(settings)]
            done = subprocess.run(
                command,
                env={**os.environ, "OMP_NUM_THREADS": str(args.threads)},
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
