"""Quality, size and CPU time beside the official implementations: one table.

    python benchmarks/quality.py [--rows 'gptvq_1d*'] [--model DIR] [--data DIR] [--out FILE.md]

Rows: those of rows.py, each beside the official one it names, and what each improvement is worth;
GPTQ and RTN; the theory checks (`theory`); whether two runs write the same files (`determinism_*`).
README.md beside this says how. Exits with 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_VQ_PROGRESS", "0")

import theory
import torch
from protocol import SHARED, Protocol, Result, environment, official, warm_up
from rows import ASYMMETRIC_GPTQ, DETERMINISM, ROWS, WHOLE, Row
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import hf_vq
from hf_vq.evaluation.baselines import quantize_baseline
from hf_vq.registry import get_method


def targets(row: Row, reference: dict[str, Any], ours: Result) -> dict[str, bool]:
    """Name of the target -> whether it is met."""
    out = {"perplexity lower": ours.perplexity < reference["perplexity"]}
    if row.kl is not None:
        out[f"KL <= {row.kl:.2f}x"] = ours.kl <= row.kl * reference["kl"]
    if row.cpu is not None:
        out[f"CPU <= {row.cpu:.2f}x"] = ours.cpu <= row.cpu * cpu_of(reference)
    return out


def cpu_of(reference: dict[str, Any]) -> float:
    """All CPU seconds of an official row, its Hessian pass included where it was timed apart."""
    return reference["cpu_seconds"] + reference.get("hessian_cpu_seconds", 0)


def run_row(protocol: Protocol, name: str) -> Result:
    """Ours for a row of the table, measured."""
    if name in ROWS:
        return protocol.quantize(ROWS[name].method, **ROWS[name].settings)
    method, size = name.split("_")[:2]
    bits = int(size.removesuffix("b"))
    samples = None if method == "rtn" else protocol.calibration
    config = hf_vq.GPTVQConfig(asymmetric_calibration=name == ASYMMETRIC_GPTQ)

    def walk(model: Any, layers: dict) -> float:
        return quantize_baseline(model, method, bits, samples, config=config)

    return protocol.scalar(walk)


def _settings(name: str) -> str:
    """What was asked for, in few words; defaults left out."""
    if name not in ROWS:
        return "asymmetric calibration" if name == ASYMMETRIC_GPTQ else "groups of 64"
    short = {"vector_dim": "d", "index_bits": "b", "group_size": "gs", "group_columns": "columns"}
    parts = []
    for key, value in ROWS[name].settings.items():
        if (key, value) != ("bits", None):
            shown = "stripe" if (key, value) == ("group_size", WHOLE) else value
            parts.append(f"{short.get(key, key)}={shown}")
    return ", ".join(parts)


def _pair(theirs: float | None, ours: float, digits: int) -> list[str]:
    return ["" if theirs is None else f"{theirs:.{digits}f}", f"**{ours:.{digits}f}**"]


def table(results: dict[str, Result], references: dict[str, dict[str, Any]]) -> str:
    """Markdown: official and ours side by side."""
    pairs = ("bits", "perplexity", "KL", "CPU s")
    head = ["row", *(f"{p} {who}" for p in pairs for who in ("official", "ours"))]
    head += ["KL ratio", "CPU ratio", "targets", "our settings"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, ours in results.items():
        row = ROWS.get(name)
        ref = references.get(row.official or "" if row else name, {})
        cells = [f"`{name}`", *_pair(ref.get("bits"), ours.bits, 3)]
        cells += _pair(ref.get("perplexity"), ours.perplexity, 3)
        cells += _pair(ref.get("kl"), ours.kl, 4)
        seconds = cpu_of(ref) if ref else None
        cells += _pair(seconds, ours.cpu, 1)
        cells.append(f"{ours.kl / ref['kl']:.2f}" if ref else "")
        cells.append(f"{ours.cpu / seconds:.2f}" if seconds else "")
        missed = None
        if row and ref:
            missed = [t for t, met in targets(row, ref, ours).items() if not met]
        cells.append("" if missed is None else "MISS: " + "; ".join(missed) if missed else "PASS")
        lines.append("| " + " | ".join([*cells, _settings(name)]) + " |")
    return "\n".join(lines)


def _quantize_and_hash(
    model: str, data: str, method: str, settings: dict[str, Any], queue: Any
) -> None:
    torch.set_num_threads(1)
    tokens = str(Path(data) / "docs_calibration_1024x512.npy")
    config = get_method(method).config(dataset=tokens, nsamples=16, seqlen=512, seed=1, **settings)
    packed = AutoModelForCausalLM.from_pretrained(model, quantization_config=config)
    with tempfile.TemporaryDirectory() as out:
        packed.save_pretrained(out)
        files = ("model.safetensors", "config.json")
        queue.put({f: hashlib.sha256((Path(out) / f).read_bytes()).hexdigest() for f in files})


def determinism(model: Path, data: Path, method: str, settings: dict[str, Any]) -> tuple[bool, str]:
    """Quantize and save with the same seed in two fresh processes: are the files the same?"""
    context = multiprocessing.get_context("spawn")
    hashes = []
    for _ in range(2):
        queue = context.Queue()
        given = (str(model), str(data), method, settings, queue)
        process = context.Process(target=_quantize_and_hash, args=given)
        process.start()
        hashes.append(queue.get(timeout=600))
        process.join()
    same = hashes[0] == hashes[1]
    shown = ", ".join(f"{name} sha256 {value[:16]}" for name, value in hashes[0].items())
    return same, f"{'PASS' if same else 'MISS'}: {shown}" + ("" if same else f" / {hashes[1]}")


def _say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", default="*", help="glob, or several with commas")
    parser.add_argument("--model", type=Path, default=SHARED / "models/docs-llama-4m")
    parser.add_argument("--data", type=Path, default=SHARED / "data")
    parser.add_argument("--out", type=Path, help="write the table here, and a .json beside it")
    args = parser.parse_args()
    for path in (args.model, args.data):
        if not path.is_dir():
            print(f"skipped: there is no {path}; name the folder with --model and --data")
            return 0
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    reference = official()
    references = {row["setting"]: row for row in reference["rows"]}
    scalar = [n for n in references if n.startswith(("rtn", "gptq_"))]
    names = [*scalar, ASYMMETRIC_GPTQ, *ROWS, "theory", *DETERMINISM]
    chosen = [n for n in names if any(fnmatch.fnmatch(n, p) for p in args.rows.split(","))]
    if not chosen:
        parser.error(f"--rows {args.rows!r} matches none of {', '.join(names)}")

    warm_up()
    protocol = Protocol(args.model, args.data)
    failed = False
    results: dict[str, Result] = {}
    for name in [n for n in chosen if n != "theory" and n not in DETERMINISM]:
        ours = results[name] = run_row(protocol, name)
        _say(f"{name}: {ours}")
        if name in ROWS and (theirs := ROWS[name].official):
            budget = references[theirs]["bits"]
            assert ours.bits <= budget, f"{name}: {ours.bits} bits, more than {budget}"
            failed |= not all(targets(ROWS[name], references[theirs], ours).values())
    parts = [f"# Quality beside the official implementations\n\n{environment()}."]
    record: dict[str, Any] = {"environment": environment(), "rows": {}}
    if results:
        parts += [table(results, references), f"Official: {reference['source']}"]
        for name, ours in results.items():
            record["rows"][name] = {**asdict(ours), "settings": _settings(name)}
    if "theory" in chosen:
        found = [theory.check(*known) for known in theory.KNOWN]
        failed |= not all(c.passed for c in found)
        record["theory"] = [c._asdict() for c in found]
        parts += ["## Mean squared error on Gaussian weights, H = I", theory.table(found)]
    for name in [n for n in chosen if n in DETERMINISM]:
        method, settings = DETERMINISM[name]
        same, text = determinism(args.model, args.data, method, settings)
        failed |= not same
        record[name] = text
        parts += [f"## {name}: same seed, same files (two fresh processes)", text]
    document = "\n\n".join(parts) + "\n"
    _say(document)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(document)
        args.out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
