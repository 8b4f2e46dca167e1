"""Greedy generation: does a quantized model loop, when does it leave the original, how fast is it.

Perplexity and KL look at one token after true text; errors that build up over a continuation, loops
above all, show here.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from hf_vq.engine.report import MemoryMeter
from hf_vq.evaluation.metrics import evaluation_mode, input_device

PROMPTS, PROMPT_TOKENS, NEW_TOKENS, NGRAM = 8, 32, 64, 4
"""Of the check, unless told: the beginnings of so many windows are continued."""


def prompts_of(windows: Tensor, count: int = PROMPTS, length: int = PROMPT_TOKENS) -> Tensor:
    """The first tokens of the first windows: int64 (at most count, at most half a window)."""
    return windows[:count, : min(length, max(1, windows.shape[1] // 2))].long()


@torch.no_grad()
def continuations(model: Any, prompts: Tensor, new_tokens: int = NEW_TOKENS) -> Tensor:
    """Greedy continuations (n, new_tokens) of prompts (n, p), int64, past any end of text."""
    ids = prompts.to(input_device(model))
    with evaluation_mode(model):
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return out[:, prompts.shape[1] :].cpu()


def repetition(tokens: Tensor, n: int = NGRAM) -> float:
    """Share (0..1) of n-grams of the rows of tokens (rows, length) that occur earlier in the row.

    Welleck et al., arXiv 1908.04319, section 3 (seq-rep-n), mean over rows.
    """
    shares = []
    for row in tokens.tolist():
        grams = list(zip(*(row[i:] for i in range(n)), strict=False))
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return sum(shares) / len(shares)


def divergence(one: Tensor, other: Tensor) -> float:
    """Mean number of tokens that two continuations (n, length) share before they first differ."""
    same = (one == other).long().cumprod(1)
    return same.sum(1).double().mean().item()


def check(
    model: Any, windows: Tensor, dense: Tensor | None = None, new_tokens: int = NEW_TOKENS
) -> dict[str, Any]:
    """What greedy generation shows, for `Evaluation.generation`.

    windows: int64 (n, seqlen). dense: the original's `continuations` of `prompts_of(windows)`.
    """
    prompts = prompts_of(windows)
    own = continuations(model, prompts, new_tokens)
    found: dict[str, Any] = {
        "prompts": prompts.shape[0],
        "prompt_tokens": prompts.shape[1],
        "new_tokens": new_tokens,
        "repetition": repetition(own),
    }
    if dense is not None:
        found["repetition_dense"] = repetition(dense)
        found["divergence"] = divergence(own, dense)
    return found


def speed(model: Any, windows: Tensor, new_tokens: int = NEW_TOKENS, runs: int = 3) -> dict:
    """Tokens per second and peak memory of greedy decoding with batch 1, for `Evaluation.speed`.

    The median of `runs` after one that is not counted; reading the prompt is in it. Memory is this
    process's, everything else that it holds included, so load nothing but the model before.
    """
    prompt = prompts_of(windows, count=1)
    continuations(model, prompt, new_tokens)
    meter = MemoryMeter()
    meter.start()
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        continuations(model, prompt, new_tokens)
        seconds.append(time.perf_counter() - began)
    meter.stop()
    devices = {k: v for k, v in meter.peaks.items() if ":" in k}
    return {
        "tokens_per_second": new_tokens / statistics.median(seconds),
        "prompt_tokens": prompt.shape[1],
        "new_tokens": new_tokens,
        "peak_memory_bytes": devices or {"process": meter.peaks["process"]},
    }
