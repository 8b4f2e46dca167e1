"""What training over packed layers brings, and what it costs.

    python benchmarks/training.py [--rows PATTERN,...] [--out FILE.md] [--model DIR] [--data DIR]

Rows (see README.md beside this):
    tune_METHOD_BITS  KL to the original before and after `hf_vq.tune` of codebooks, norms, codes
                      and embeddings, as the files have it
    codebooks_METHOD_BITS  the same of codebooks and norms alone
    lora_METHOD_START perplexity after LoRA from `zero`, or from the quantization `error`, trained
                      by `hf_vq.tune` to say what the original says
    sft_METHOD_START  the same with the next-token loss, on the same tokens
    requantize        merge_and_requantize beside quantizing the merged dense model
    memory            peak memory and time of a LoRA step over packed and over dense layers
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import gc
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from typing import Any

os.environ.setdefault("HF_VQ_PROGRESS", "0")

import torch
from memory import BLOCKS, INTERMEDIATE, VOCABULARY, WIDTH, Meter, anonymous
from peft import LoraConfig, get_peft_model
from protocol import HERE, SEQLEN, SHARED, _tokens, environment
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    get_cosine_schedule_with_warmup,
)
from transformers.utils import logging

import hf_vq
from hf_vq.evaluation import compare, perplexity, windows
from hf_vq.layers import PackedLinear
from hf_vq.quantizer import VQHfQuantizer, record
from hf_vq.registry import METHODS, get_method

CALIBRATION_ROWS, TEST_WINDOWS, OTHER_WINDOWS = 128, 32, 16
PERPLEXITY_WINDOWS = 128  # a share of a difference needs more of them than a KL
TUNE_STEPS = {2: 1000, 3: 500, 4: 500}
TUNE_TOKENS, TUNE_SEQLEN, TUNE_REASSIGN = 1024, 256, 0.002
# The rank of QLoRA's paper, and twice as large an alpha
LORA = {"r": 64, "lora_alpha": 128, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
LORA_STEPS, LORA_TOKENS, LORA_SEQLEN, LORA_RATE, LORA_HELD_OUT = 300, 1024, 256, 1e-4, 16
REQUANTIZE_STEPS = 60
MEMORY_STEPS, MEMORY_TOKENS = 3, 256
TUNE_TARGET = {2: 0.70, 3: 0.85, 4: 1.0}


class Bench:
    """The model, its tokens, and the packed models, which are made once."""

    def __init__(self, model: Path, data: Path, cache: Path):
        self.path, self.cache = model, cache
        self.calibration = _tokens(data / "docs_calibration_1024x512.npy")[:CALIBRATION_ROWS]
        self.tuning = _tokens(data / "docs_tuning_4M.npy")
        self.long_test = windows(_tokens(data / "docs_test.npy"), SEQLEN)[:PERPLEXITY_WINDOWS]
        self.test = self.long_test[:TEST_WINDOWS]
        tokenizer = AutoTokenizer.from_pretrained(model, model_max_length=10**9)
        text = "\n\n".join(topics[name] for name in sorted(topics))
        other = torch.tensor(tokenizer(text)["input_ids"])
        self.other = windows(other, SEQLEN)[:OTHER_WINDOWS]
        self.dense = self.load(model)

    def load(self, path: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def packed(self, method: str, bits: float) -> Any:
        folder = self.cache / f"{method}-{bits:g}"
        if not (folder / "config.json").exists():
            config = get_method(method).config(bits=bits, dataset=self.calibration, seqlen=SEQLEN)
            model = AutoModelForCausalLM.from_pretrained(
                self.path, quantization_config=config, dtype=torch.float32
            )
            model.save_pretrained(folder)
        return self.load(folder)

    def kl(self, model: Any) -> tuple[float, float]:
        """On held-out text of the tuning data's kind, and on text of another kind."""
        return compare(self.dense, model, self.test).kl, compare(self.dense, model, self.other).kl


def tune_row(bench: Bench, name: str) -> tuple[list[str], bool]:
    """`tune_METHOD_BITS`, `codebooks_METHOD_BITS`: after the model has been saved and loaded."""
    kind, method, bits = name.split("_")
    model, steps = bench.packed(method, float(bits)), TUNE_STEPS[int(bits)]
    before = bench.kl(model)
    began = time.process_time()
    hf_vq.tune(
        model,
        bench.dense,
        bench.tuning[:, :TUNE_SEQLEN],  # parts of many documents
        steps=steps,
        tokens_per_step=TUNE_TOKENS,
        nsamples=steps * TUNE_TOKENS // TUNE_SEQLEN + 32,
        seqlen=TUNE_SEQLEN,
        reassign=TUNE_REASSIGN if kind == "tune" else 0,
        train_unquantized=kind == "tune",
    )
    seconds = time.process_time() - began
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        sizes = [
            sum(t.nbytes for layer in _layers(m) for t in layer.packed().values())
            for m in (model, bench.packed(method, float(bits)))
        ]
        after = bench.kl(bench.load(Path(folder)))
    ratios = [a / b for a, b in zip(after, before, strict=True)]
    met = ratios[0] <= TUNE_TARGET[int(bits)] and ratios[1] <= 1 and sizes[0] == sizes[1]
    cells = [name, f"{before[0]:.4f}", f"{after[0]:.4f}", f"**{ratios[0]:.2f}**"]
    cells += [f"{before[1]:.4f}", f"{after[1]:.4f}", f"**{ratios[1]:.2f}**", f"{seconds:.0f}"]
    return [*cells, _verdict(met, f"<= {TUNE_TARGET[int(bits)]:.2f}, other <= 1")], met


def _layers(model: Any) -> list[Any]:
    from hf_vq.loading import packed_layers

    return list(packed_layers(model).values())


def _train(model: Any, tokens: torch.Tensor, steps: int, seed: int = 0) -> None:
    """AdamW, warmed up and then along a cosine, on the next-token loss; rows in a random order."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, LORA_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed)).repeat(2)
    size = LORA_TOKENS // tokens.shape[1]
    for step in range(steps):
        batch = tokens[order[step * size : (step + 1) * size]]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def lora_row(bench: Bench, name: str) -> tuple[list[str], bool]:
    """`lora_METHOD_START`, `sft_METHOD_START`: the share of the perplexity gap recovered."""
    loss, method, start = name.split("_")
    dense = perplexity(bench.dense, bench.long_test, SEQLEN)
    packed = perplexity(bench.packed(method, 2), bench.long_test, SEQLEN)
    count = LORA_STEPS * LORA_TOKENS // LORA_SEQLEN + LORA_HELD_OUT
    # from everywhere: neighbouring rows are of one document
    chosen = torch.randperm(len(bench.tuning), generator=torch.Generator().manual_seed(0))[:count]
    rows = bench.tuning[chosen, :LORA_SEQLEN]
    torch.manual_seed(0)
    model = get_peft_model(bench.packed(method, 2), LoraConfig(**LORA))
    if start == "error":
        hf_vq.init_adapter_from_quantization_error(
            model, bench.calibration[:64], base_model=bench.path, seqlen=SEQLEN
        )
    found, kl = [perplexity(model, bench.long_test, SEQLEN)], [bench.kl(model)[0]]
    if loss == "lora":
        hf_vq.tune(
            model,
            bench.dense,
            rows,
            steps=LORA_STEPS,
            tokens_per_step=LORA_TOKENS,
            nsamples=len(rows),
            seqlen=LORA_SEQLEN,
            learning_rate=LORA_RATE,
        )
    else:
        _train(model, rows[LORA_HELD_OUT:], LORA_STEPS)
    found.append(perplexity(model, bench.long_test, SEQLEN))
    kl.append(bench.kl(model)[0])
    shares = [(packed - value) / (packed - dense) for value in found]
    cells = [name, f"{dense:.3f}", f"{packed:.3f}"]
    cells += [f"{value:.3f} ({100 * s:.0f} %)" for value, s in zip(found, shares, strict=True)]
    cells += [f"{value:.4f}" for value in kl]
    if start == "zero":
        return [*cells, "to compare with"], True
    return [*cells, _verdict(shares[1] >= 0.5, ">= 50 %, and more than from zero")], shares[
        1
    ] >= 0.5


def requantize_row(bench: Bench, name: str) -> tuple[list[str], bool]:
    """KL to the merged dense model: ours keeps the specs, the other chooses them anew."""
    torch.manual_seed(0)
    model = get_peft_model(bench.packed("gptvq", 2), LoraConfig(**LORA))
    _train(model, bench.tuning[:, :LORA_SEQLEN], REQUANTIZE_STEPS)
    merged = copy.deepcopy(model).merge_and_unload().eval()
    ours = hf_vq.merge_and_requantize(model, bench.calibration, seqlen=SEQLEN).eval()
    with tempfile.TemporaryDirectory() as folder:
        merged.save_pretrained(folder)
        config = hf_vq.GPTVQConfig(bits=2, dataset=bench.calibration, seqlen=SEQLEN)
        direct = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=torch.float32
        ).eval()
    kl = [compare(merged, m, bench.test).kl for m in (ours, direct)]
    met = kl[0] <= 1.1 * kl[1]
    report = ours.hf_quantizer.report["requantized"]
    cells = [name, f"{kl[0]:.4f}", f"{kl[1]:.4f}", f"**{kl[0] / kl[1]:.2f}**"]
    cells += [f"{report['loss_before']:.4f}", f"{report['loss']:.4f}"]
    return [*cells, _verdict(met, "<= 1.10")], met


def _random_llama(dtype: torch.dtype) -> Any:
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=BLOCKS,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
        max_position_embeddings=SEQLEN,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype)


def _pack_randomly(model: Any) -> None:
    """Codes that nobody searched for, which compute as fast and take as much as good ones."""
    config = hf_vq.GPTVQConfig(bits=2.25)
    quantizer = VQHfQuantizer(config, pre_quantized=False)
    for name, spec in hf_vq.make_plan(model, config).layers.items():
        tensors = {}
        for key, (shape, dtype) in spec.layout().items():
            if dtype.is_floating_point:
                tensors[key] = torch.full(shape, 1e-3, dtype=dtype)
            else:
                low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
                tensors[key] = torch.randint(low, high, shape, dtype=dtype)
        model.set_submodule(name, PackedLinear.from_packed(spec, tensors, None, model.dtype, name))
    record(config, model, None, [])
    quantizer.pre_quantized = True
    model.hf_quantizer, model.is_quantized = quantizer, True
    model.quantization_method, model.config.quantization_config = config.method, config


def _measure_step(folder: str, queue: Any) -> None:
    """Resident memory of a LoRA step over the model in `folder`, and its median CPU seconds."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():  # out of the mapped files, into this process
        parameter.data = parameter.data.clone()
    model = get_peft_model(model, LoraConfig(**{**LORA, "r": 16, "lora_alpha": 32})).train()
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    tokens = torch.randint(0, VOCABULARY, (1, MEMORY_TOKENS))
    gc.collect()
    weights = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    seconds = []
    with Meter() as meter:
        resident = anonymous()
        for _ in range(MEMORY_STEPS):
            began = time.process_time()  # one thread's; others may run beside it
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.process_time() - began)
    queue.put((max(meter.highest, resident), weights, median(seconds)))


def memory_row(bench: Bench, name: str) -> tuple[list[str], bool]:
    """GPTVQ at 2.25 bits, with random codes."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        model = _random_llama(torch.bfloat16)
        model.save_pretrained(f"{folder}/dense")
        _pack_randomly(model)
        model.save_pretrained(f"{folder}/packed")
        del model
        context = multiprocessing.get_context("spawn")
        for kind in ("dense", "packed"):
            queue = context.Queue()
            process = context.Process(target=_measure_step, args=(f"{folder}/{kind}", queue))
            process.start()
            found[kind] = queue.get(timeout=1800)
            process.join()
    dense, packed = found["dense"], found["packed"]
    saved, weights = dense[0] - packed[0], dense[1] - packed[1]
    met = saved >= 0.8 * weights
    cells = [name, *(f"{found[k][0] / 2**20:.0f}" for k in ("dense", "packed"))]
    cells += [f"{saved / 2**20:.0f}", f"{weights / 2**20:.0f}"]
    cells += [*(f"{found[k][2]:.2f}" for k in ("dense", "packed")), f"{packed[2] / dense[2]:.2f}"]
    return [*cells, _verdict(met, "saves >= 80 % of the weights' difference")], met


def _verdict(met: bool, target: str) -> str:
    return f"{'PASS' if met else 'MISS'}: {target}"


Row = Callable[[Bench, str], tuple[list[str], bool]]
TUNE_HEAD = [
    "row",
    "KL",
    "KL, tuned",
    "ratio",
    "KL, other text",
    "tuned",
    "ratio",
    "CPU s",
    "target",
]
LORA_HEAD = [
    "row",
    "perplexity, original",
    "packed",
    "LoRA, untrained (recovered)",
    "trained",
    "KL, untrained",
    "trained",
    "target",
]
KINDS: dict[str, tuple[Row, list[str]]] = {
    "tune": (tune_row, TUNE_HEAD),
    "codebooks": (tune_row, TUNE_HEAD),
    "lora": (lora_row, LORA_HEAD),
    "sft": (lora_row, LORA_HEAD),
    "requantize": (
        requantize_row,
        [
            "row",
            "KL to the merged model",
            "quantized directly",
            "ratio",
            "loss with the adapter",
            "loss after",
            "target",
        ],
    ),
    "memory": (
        memory_row,
        [
            "row",
            "MiB, dense",
            "MiB, packed",
            "saved",
            "weights' difference",
            "CPU s per step, dense",
            "packed",
            "ratio",
            "target",
        ],
    ),
}
ROWS = [f"tune_{method}_{bits}" for method in METHODS for bits in (2, 3, 4)]
ROWS += [f"codebooks_{method}_2" for method in METHODS]
ROWS += [
    f"{loss}_{method}_{start}"
    for loss in ("lora", "sft")
    for method in METHODS
    for start in ("zero", "error")
]
ROWS += ["requantize", "memory"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", default="*", help="names or patterns, separated by commas")
    parser.add_argument("--model", type=Path, default=HERE.parent / "examples" / "docs-llama-4m")
    parser.add_argument("--data", type=Path, default=SHARED / "data")
    parser.add_argument("--packed", type=Path, help="keep the packed models here, and use them")
    parser.add_argument("--out", type=Path, help="Markdown; rows of earlier runs are kept beside")
    arguments = parser.parse_args()
    if not arguments.data.is_dir():
        sys.exit(f"{arguments.data} has no tokens; pass --data (see benchmarks/README.md)")
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    patterns = arguments.rows.split(",")
    missed = []
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(arguments.model, arguments.data, arguments.packed or Path(scratch))
        for name in (row for row in ROWS if any(fnmatch.fnmatch(row, p) for p in patterns)):
            run, head = KINDS[name.split("_")[0]]
            cells, met = run(bench, name)
            missed += [] if met else [name]
            print(
                f"{name}: "
                + "; ".join(f"{h} {c}" for h, c in zip(head[1:], cells[1:], strict=True)),
                flush=True,
            )
            if arguments.out:
                _write(arguments.out, name, cells)
    sys.exit(1 if missed else 0)


def _write(out: Path, name: str, cells: list[str]) -> None:
    store = out.with_suffix(".json")
    rows = json.loads(store.read_text()) if store.exists() else {}
    rows[name] = {"cells": cells, "environment": environment()}
    store.write_text(json.dumps(rows, indent=1) + "\n")
    lines = []
    for kind, (_, head) in KINDS.items():
        table = [rows[n]["cells"] for n in ROWS if n in rows and n.split("_")[0] == kind]
        if table:
            lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
            lines += ["| " + " | ".join([f"`{row[0]}`", *row[1:]]) + " |" for row in table] + [""]
    lines += sorted({row["environment"] for row in rows.values()})
    out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
