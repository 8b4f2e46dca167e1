"""Generation with packed layers beside dense ones on a CPU: tokens per second.

    python benchmarks/decode.py [--tokens N] [--repeat N] [--threads N] [--cpu-time] [--out FILE.md]

Two models: the bundled one, and a random Llama of 2 blocks, 1024 wide. Each is quantized hastily,
without calibration data (speed does not depend on it), and generates greedily, batch 1, from a
prompt of 8 tokens, packed and dense alternately; both in bfloat16. Medians. --cpu-time: with one
thread, its CPU time instead, where other programs use the machine too. The last columns are one
packed layer beside its dense one, a call of the MLP's up_proj with one token, in microseconds.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import pathlib
import platform
import statistics
import tempfile
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_vq

BUNDLED = pathlib.Path(__file__).parent.parent / "examples" / "docs-llama-4m"


def random_model(folder: pathlib.Path) -> None:
    """A Llama of 2 blocks, 1024 wide."""
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=2, num_attention_heads=16,
        num_key_value_heads=16, vocab_size=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


clock = time.perf_counter
HASTY = {"kmeans_iterations": 2, "refine_iterations": 0}


def call_time(model: Any) -> float:
    """Median microseconds of a call of the first MLP's up_proj."""
    layer = model.model.layers[0].mlp.up_proj
    x, taken = torch.randn(1, 1, layer.in_features).to(torch.bfloat16), []
    with torch.inference_mode():
        for _ in range(200):
            start = clock()
            layer(x)
            taken.append(clock() - start)
    return 1e6 * statistics.median(taken)


def speed(model: Any, tokens: int) -> float:
    """Tokens per second of one generation."""
    prompt = torch.arange(8)[None] + 10
    start = clock()
    with torch.inference_mode():
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
            min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0,
        )  # fmt: skip
    return tokens / (clock() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    if options.cpu_time:
        global clock
        clock, options.threads = time.thread_time, 1
    torch.set_num_threads(options.threads)
    lines = [
        f"Generation of {options.tokens} tokens, bfloat16; {platform.machine()}, "
        f"{options.threads} threads{', CPU time of it' if options.cpu_time else ''}, torch "
        f"{torch.__version__}, {datetime.date.today()}. Medians of {options.repeat}.",
        "",
        "| model | layers | dense tokens/s | packed tokens/s | times faster | dense call, us | "
        "packed call, us |",
        "|---|---|---|---|---|---|---|",
    ]
    configs = {
        "GPTVQ, 2.25 bits": hf_vq.GPTVQConfig(bits=2.25, dataset=None, **HASTY),
        "VPTQ, 3 bits": hf_vq.VPTQConfig(bits=3, dataset=None, **HASTY),
        "CVXQ, 3 bits": hf_vq.CVXQConfig(bits=3, dataset=None),
    }
    with tempfile.TemporaryDirectory() as folder:
        random_model(pathlib.Path(folder))
        for title, path in (("bundled, 4M", BUNDLED), ("random, 1024 wide", folder)):
            dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
            for name, config in configs.items():
                packed = AutoModelForCausalLM.from_pretrained(
                    path, dtype=torch.bfloat16, quantization_config=copy.deepcopy(config)
                )
                pairs = [
                    (speed(dense, options.tokens), speed(packed, options.tokens))
                    for _ in range(options.repeat + 1)
                ][1:]
                theirs, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
                lines.append(
                    f"| {title} | {name} | {theirs:.1f} | {ours:.1f} | {ours / theirs:.2f} | "
                    f"{call_time(dense):.0f} | {call_time(packed):.0f} |"
                )
                print(lines[-1], flush=True)
    print("\n".join(lines[:4]))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
