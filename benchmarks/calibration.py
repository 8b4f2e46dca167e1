"""What the calibration text is worth: its kind, and how much of it.

    python benchmarks/calibration.py --corpus german=FILE.txt [--corpus ...] [--out FILE.md]

Quantizes the test model with one setting, calibrated on as many windows of each corpus, and on
fewer and more windows of the model's own kind of text; compares all with the original on held-out
text of that kind. Corpora that are always there: `docs` (the model's own kind, from the shared
token files), `reference` (CPython's language reference, `pydoc_data.topics`) and `code` (sources of
CPython's standard library). Others are text files, named on the command line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import sysconfig
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

os.environ.setdefault("HF_VQ_PROGRESS", "0")

import numpy as np
import torch
from protocol import SHARED, environment
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hf_vq.evaluation import Teacher, compare, windows
from hf_vq.registry import get_method

SEQLEN, SAMPLES = 512, 128


def library_sources() -> str:
    """Python source, some modules of the standard library in the order of their names."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py"))[:60]
    return "\n\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)


def load_tokens(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.load(path).astype(np.int64))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--corpus", action="append", default=[], help="NAME=FILE.txt; repeatable")
    parser.add_argument("--only", help="these rows, with commas; unset: all")
    parser.add_argument("--samples", default="2,4,8,16,32,64,256", help="sizes of docs beside 128")
    parser.add_argument("--method", default="vptq")
    parser.add_argument("--bits", type=float, default=2.25)
    parser.add_argument("--max-windows", type=int, default=60)
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
    tokenizer = AutoTokenizer.from_pretrained(args.model, model_max_length=10**9)
    held_out = windows(load_tokens(args.data / "docs_test.npy"), SEQLEN)[: args.max_windows]
    texts = {"reference": "\n\n".join(topics[k] for k in sorted(topics)), "code": library_sources()}
    for entry in args.corpus:
        name, _, file = entry.partition("=")
        texts[name] = Path(file).read_text(encoding="utf-8", errors="replace")
    docs = load_tokens(args.data / "docs_calibration_1024x512.npy")
    rows: dict[str, Any] = {"none": None, "docs": docs[:SAMPLES]}
    for name, text in texts.items():
        # no more than is needed: a token has some 4 characters, of unfamiliar text fewer
        ids = torch.tensor(tokenizer(text[: 10 * SAMPLES * SEQLEN])["input_ids"])
        rows[name] = windows(ids, SEQLEN)[:SAMPLES]
    rows |= {f"docs x {n}": docs[: int(n)] for n in args.samples.split(",") if n}
    if args.only:
        rows = {name: rows[name] for name in args.only.split(",")}

    def load(model: Path, **options: Any) -> Any:
        # float32: many CPUs compute bfloat16 several times slower
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **options)

    original = load(args.model)
    teacher = Teacher.measure(original, held_out)
    dense = compare(teacher, original, held_out).perplexity_dense
    path = args.out.with_suffix(".json") if args.out else None
    measured: dict[str, Any] = {}
    setting = (
        f"{args.method} at {args.bits:g} bits, in float32, {len(held_out)} windows of {SEQLEN}"
    )
    if path is not None and path.exists():  # rows of an earlier call with the same setting stay
        earlier = json.loads(path.read_text())
        measured = earlier["rows"] if earlier["setting"] == setting else {}
    for name, samples in rows.items():
        count = SAMPLES if samples is None else len(samples)
        config = get_method(args.method).config(
            bits=args.bits, dataset=samples, nsamples=count, seqlen=SEQLEN
        )
        began = time.process_time()
        packed = load(args.model, quantization_config=config)
        cpu = time.process_time() - began
        found = compare(teacher, packed, held_out)
        tokens = 0 if samples is None else samples.numel()
        measured[name] = {
            "tokens": tokens,
            "kl": found.kl,
            "kl_p99": found.kl_p99,
            "perplexity": found.perplexity_quantized,
            "top1": found.top1,
            "cpu": cpu,
        }
        print(name, measured[name], flush=True)
        document = render(measured, setting, dense)
        if args.out and path:  # after every row, so that a later call can go on
            args.out.write_text(document)
            record = {"setting": setting, "environment": environment(), "rows": measured}
            path.write_text(json.dumps(record, indent=2) + "\n")
    print(render(measured, setting, dense))
    return 0


def render(rows: dict[str, Any], setting: str, dense: float) -> str:
    """Markdown; KL beside that of the model's own kind of text."""
    lines = [
        f"# What calibration text is worth\n\n{environment()}; {setting} tokens of held-out "
        f"`docs`, where the original has perplexity {dense:.3f}.\n",
        "| calibration | tokens | KL | to `docs` | KL, 99th percentile | perplexity | "
        "same most likely token | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    own = rows.get("docs", {}).get("kl")
    # what it is first, then how much of it
    for name, r in sorted(rows.items(), key=lambda row: (" x " in row[0], row[1]["tokens"])):
        ratio = f"{r['kl'] / own:.2f}" if own else ""
        lines.append(
            f"| {name} | {r['tokens']:,} | {r['kl']:.4f} | {ratio} | {r['kl_p99']:.3f} | "
            f"{r['perplexity']:.3f} | {100 * r['top1']:.1f} % | {r['cpu']:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
