"""Quality, size and CPU time beside the official implementations: one table.

    python benchmarks/quality.py [--rows 'gptvq_1d*'] [--model DIR] [--data DIR] [--out FILE.md]

Rows: every GPTVQ, GPTQ and RTN row of official.json, with ours beside it; what each improvement
is worth (`ablation_*`); the theory checks (`theory`); whether two runs write the same files
(`determinism`). README.md beside this says how. Exits with 1 if a target is missed.
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
from baselines import bits_per_weight, quantize_model_scalar
from protocol import SHARED, Protocol, Result, environment, official, warm_up
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import hf_vq

KL_TARGET, KL_TARGET_HIGH, CPU_TARGET = 0.90, 0.85, 0.20
"""At most this share of the official KL (below 3.1 bits, from 3.1 bits on) and CPU time."""

WHOLE = 2**31
"""group_size of one codebook per stripe."""


def _ours(dim: int, index_bits: int, group_size: int, columns: int, **more: Any) -> dict[str, Any]:
    return {
        "bits": None,
        "vector_dim": dim,
        "index_bits": index_bits,
        "group_size": group_size,
        "group_columns": columns,
        **more,
    }


QUICK = {"kmeans_iterations": 3, "refine_iterations": 0}
SHORT = {"kmeans_iterations": 10, "refine_iterations": 2}
"""Less effort than the defaults, where a fifth of the official CPU time asks for it."""

GPTVQ: dict[str, dict[str, Any]] = {
    "gptvq_2d_2b_tensor": _ours(2, 4, WHOLE, 1024, **SHORT),
    "gptvq_4d_2b_tensor": _ours(4, 8, WHOLE, 1024),
    "gptvq_2d_2b_gs2048": _ours(2, 4, 2048, 64, **SHORT),
    "gptvq_1d_2b_gs256": _ours(1, 2, 1024, 64, scale_block=32, **QUICK),
    "gptvq_2d_2b_gs1024": _ours(2, 4, WHOLE, 1024, scale_block=16, kmeans_iterations=10),
    "gptvq_1d_3b_gs512": _ours(1, 3, 4096, 64, scale_block=32, **QUICK),
    "gptvq_2d_3b_gs4096": _ours(2, 6, 4096, 64),
}
"""Official row -> our `GPTVQConfig` for it; effort is at its default unless named."""

ABLATED = "gptvq_2d_2b_gs1024"
ABLATIONS: dict[str, dict[str, Any]] = {
    "ablation_symmetric": {"asymmetric_calibration": False},
    "ablation_one_pass_per_block": {"true_sequential": False},
    "ablation_no_refinement": {"refine_iterations": 0, "codebook_update": False},
    "ablation_none_of_the_three": {
        "asymmetric_calibration": False,
        "true_sequential": False,
        "refine_iterations": 0,
        "codebook_update": False,
    },
}
"""What is taken away from our `ABLATED` row."""

ASYMMETRIC_GPTQ = "gptq_2b_g64_asymmetric"
"""GPTQ with our calibration instead of its own; has no official counterpart."""


def targets(reference: dict[str, Any], ours: Result) -> dict[str, bool]:
    """Name of the target -> whether it is met."""
    limit = KL_TARGET_HIGH if reference["bits"] >= 3.1 else KL_TARGET
    return {
        f"KL <= {limit:.2f}x": ours.kl <= limit * reference["kl"],
        "perplexity lower": ours.perplexity < reference["perplexity"],
        f"CPU <= {CPU_TARGET:.2f}x": ours.cpu <= CPU_TARGET * reference["cpu_seconds"],
    }


def run_row(protocol: Protocol, name: str) -> Result:
    """Ours for a row of the table, measured."""
    if name in GPTVQ:
        return protocol.quantize(**GPTVQ[name])
    if name in ABLATIONS:
        return protocol.quantize(**{**GPTVQ[ABLATED], **ABLATIONS[name]})
    method, size = name.split("_")[:2]
    bits = int(size.removesuffix("b"))
    samples = None if method == "rtn" else protocol.calibration
    config = hf_vq.GPTVQConfig(asymmetric_calibration=name == ASYMMETRIC_GPTQ)

    def walk(model: Any, layers: dict) -> float:
        quantize_model_scalar(model, layers, samples, config, bits)
        return bits_per_weight(bits)

    return protocol.scalar(walk)


def _settings(name: str) -> str:
    """What was asked for, in few words; defaults left out."""
    if name in ABLATIONS:
        return f"{ABLATED} with " + ", ".join(f"{k}={v}" for k, v in ABLATIONS[name].items())
    if name not in GPTVQ:
        return "asymmetric calibration" if name == ASYMMETRIC_GPTQ else "groups of 64"
    short = {"vector_dim": "d", "index_bits": "b", "group_size": "gs", "group_columns": "columns"}
    parts = []
    for key, value in GPTVQ[name].items():
        if key != "bits":
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
        ref = references.get(name, {})
        cells = [f"`{name}`", *_pair(ref.get("bits"), ours.bits, 3)]
        cells += _pair(ref.get("perplexity"), ours.perplexity, 3)
        cells += _pair(ref.get("kl"), ours.kl, 4)
        cells += _pair(ref.get("cpu_seconds"), ours.cpu, 1)
        seconds = ref.get("cpu_seconds")
        cells.append(f"{ours.kl / ref['kl']:.2f}" if ref else "")
        cells.append(f"{ours.cpu / seconds:.2f}" if seconds else "")
        missed = [t for t, met in targets(ref, ours).items() if not met] if name in GPTVQ else None
        cells.append("" if missed is None else "MISS: " + "; ".join(missed) if missed else "PASS")
        lines.append("| " + " | ".join([*cells, _settings(name)]) + " |")
    return "\n".join(lines)


def _quantize_and_hash(model: str, data: str, queue: Any) -> None:
    torch.set_num_threads(1)
    config = hf_vq.GPTVQConfig(
        dataset=str(Path(data) / "docs_calibration_1024x512.npy"), nsamples=16, seqlen=512, seed=1
    )
    packed = AutoModelForCausalLM.from_pretrained(model, quantization_config=config)
    with tempfile.TemporaryDirectory() as out:
        packed.save_pretrained(out)
        files = ("model.safetensors", "config.json")
        queue.put({f: hashlib.sha256((Path(out) / f).read_bytes()).hexdigest() for f in files})


def determinism(model: Path, data: Path) -> tuple[bool, str]:
    """Quantize and save with the same seed in two fresh processes: are the files the same?"""
    context = multiprocessing.get_context("spawn")
    hashes = []
    for _ in range(2):
        queue = context.Queue()
        process = context.Process(target=_quantize_and_hash, args=(str(model), str(data), queue))
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
    names = [*references, ASYMMETRIC_GPTQ, *ABLATIONS, "theory", "determinism"]
    chosen = [n for n in names if any(fnmatch.fnmatch(n, p) for p in args.rows.split(","))]
    if not chosen:
        parser.error(f"--rows {args.rows!r} matches none of {', '.join(names)}")

    warm_up()
    protocol = Protocol(args.model, args.data)
    failed = False
    results: dict[str, Result] = {}
    for name in [n for n in chosen if n not in ("theory", "determinism")]:
        ours = results[name] = run_row(protocol, name)
        _say(f"{name}: {ours}")
        if name in GPTVQ:
            budget = references[name]["bits"]
            assert ours.bits <= budget, f"{name}: {ours.bits} bits, more than {budget}"
            failed |= not all(targets(references[name], ours).values())
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
    if "determinism" in chosen:
        same, text = determinism(args.model, args.data)
        failed |= not same
        record["determinism"] = text
        parts += ["## Same seed, same files (two fresh processes)", text]
    document = "\n\n".join(parts) + "\n"
    _say(document)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(document)
        args.out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
