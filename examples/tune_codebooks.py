"""Codebook tuning: the same format and the same size, trained to say what the original says.

Quantizes the bundled model, tunes its codebooks, norms and a few of its codes to the original's
next-token distributions, and compares both on text that neither has seen. Some minutes on one CPU
core.

    python examples/tune_codebooks.py [--bits 2] [--steps 100] [--out tuned-output]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import hf_vq
from hf_vq.evaluation import compare, windows

MODEL = Path(__file__).resolve().parent / "docs-llama-4m"
SEQLEN = 256


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--bits", type=float, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--reassign", type=float, default=0.002, help="0: the codes stay")
    parser.add_argument("--out", type=Path, default=Path("tuned-output"))
    parser.add_argument("--windows", type=int, default=64, help="to quantize and to evaluate with")
    parser.add_argument("--model", type=Path, default=MODEL)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # the model is so small that threads would mostly wait

    tokenizer = AutoTokenizer.from_pretrained(arguments.model, model_max_length=10**9)
    names = sorted(topics)
    texts = ["\n\n".join(topics[name] for name in names[part::2]) for part in (0, 1)]
    train, test = (windows(torch.tensor(tokenizer(t)["input_ids"]), SEQLEN) for t in texts)

    test = test[: arguments.windows]
    config = hf_vq.GPTVQConfig(
        bits=arguments.bits, dataset=train, nsamples=arguments.windows, seqlen=SEQLEN
    )
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, quantization_config=config, dtype=torch.float32
    )
    dense = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    before = compare(dense, model, test)

    options = {"steps": arguments.steps, "tokens_per_step": 1024, "seqlen": SEQLEN}
    tuned = hf_vq.tune(model, dense, train, reassign=arguments.reassign, **options)
    after = compare(dense, model, test)
    print(f"{tuned.trained:,} numbers trained in {tuned.steps} steps")
    print(f"{tuned.reassigned:,} codes chosen again")
    print(f"KL {before.kl:.4f} -> {after.kl:.4f}")
    print(f"perplexity {before.perplexity_quantized:.2f} -> {after.perplexity_quantized:.2f}")
    model.save_pretrained(arguments.out)  # the same format, and as large as before


if __name__ == "__main__":
    main()
