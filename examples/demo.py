"""The main job on the bundled model: quantize, save, reload in a new process, compare, generate.

Calibrates on one half of the reference text that comes with every CPython (`pydoc_data.topics`) and
evaluates on the other half. Needs no network. Run it with `make demo`, or

    python examples/demo.py [--bits 2.25] [--out demo-output]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import hf_vq
from hf_vq.cli.common import stdout
from hf_vq.cli.inspect import print_checkpoint
from hf_vq.evaluation import evaluate, print_evaluation
from hf_vq.hub.checkpoint import read_checkpoint

MODEL = Path(__file__).resolve().parent / "docs-llama-4m"
SEQLEN = 256
WINDOWS = 64
PROMPT = "The purpose of this document is"

# What the new process runs: nothing of this script's state can reach it but the two files.
RELOAD = """
import sys
import torch
import hf_vq
from transformers import AutoModelForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
saved = torch.load(sys.argv[2])
with torch.no_grad():
    logits = model(saved["tokens"]).logits
difference = (logits.float() - saved["logits"].float()).abs().max().item()
sys.exit(0 if torch.equal(logits, saved["logits"]) else f"logits differ by up to {difference}")
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--bits", type=float, default=2.25, help="all-in bits per weight")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="where files go")
    arguments = parser.parse_args()
    console = stdout()
    logging.disable_progress_bar()
    # the model is so small that threads would mostly wait for each other
    torch.set_num_threads(1)
    began = time.perf_counter()

    # two disjoint halves of the same reference
    names = sorted(topics)
    calibration = [topics[name] for name in names[0::2]]
    held_out = "\n\n".join(topics[name] for name in names[1::2])
    tokenizer = AutoTokenizer.from_pretrained(MODEL, model_max_length=10**9)
    tokens = torch.tensor(tokenizer(held_out)["input_ids"])[: WINDOWS * SEQLEN]

    console.rule(f"1. quantize to {arguments.bits:g} bits per weight")
    config = hf_vq.GPTVQConfig(bits=arguments.bits, dataset=calibration, nsamples=64, seqlen=SEQLEN)
    model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config)

    console.rule("2. save, and reload in a new process")
    folder = arguments.out / f"docs-llama-4m-gptvq-{arguments.bits:g}"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    probe = tokens[:SEQLEN].view(1, -1)
    with torch.no_grad():
        logits = model(probe).logits
    file = arguments.out / "logits.pt"
    torch.save({"tokens": probe, "logits": logits}, file)
    command = [sys.executable, "-c", RELOAD, str(folder), str(file)]
    if subprocess.run(command).returncode:
        sys.exit("the reloaded model does not compute what the quantized one did")
    console.print(f"{logits.numel():,} logits of the reloaded model are identical, bit for bit")

    console.rule("3. where the bytes are")
    print_checkpoint(read_checkpoint(folder), console, layers=False)

    console.rule("4. before and after, on text that calibration has not seen")
    original = AutoModelForCausalLM.from_pretrained(MODEL)
    result = evaluate(model, tokens, SEQLEN, dense=original, tokenizer=tokenizer, prompt=PROMPT)
    print_evaluation(result, console)

    console.rule(f"done in {time.perf_counter() - began:.0f} s")
    console.print(f"the packed model: {folder}", soft_wrap=True, highlight=False)
    console.print(
        f"each layer's error and time: {folder / 'quantization_report.json'}", soft_wrap=True
    )
    console.print(f"next: hf-vq inspect {folder}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
