"""Perplexity, KL divergence and top-1 agreement of causal language models.

The protocol is fixed so that rows of different tables can stand beside each other: tokens are cut
into non-overlapping windows of `seqlen`, each window is run on its own, logits are converted to
float32 before the softmax, and sums run in float64. Perplexity uses the `seqlen - 1` predictions
inside each window; KL and agreement compare the next-token distributions at all `seqlen` positions.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# One batch's logits stay below this many elements (64 MiB per float32 copy); a single window of
# a large vocabulary may exceed it, and is then converted to float32 in slices of positions.
_MAX_LOGITS = 2**24


@dataclass(frozen=True)
class Comparison:
    """How far a quantized model is from the original, over the same tokens.

    Attributes:
        kl: mean of KL(dense || quantized) per position, in nats.
        kl_median, kl_p99: median and 99th percentile of the same over the positions.
        top1: share of positions (0..1) where both models rank the same token first.
        positions: number of positions compared.
        perplexity_dense, perplexity_quantized: as `perplexity` gives them, for the same windows.
    """

    kl: float
    top1: float
    positions: int
    perplexity_dense: float
    perplexity_quantized: float
    kl_median: float
    kl_p99: float


class Reference(Protocol):
    """Logits of the original that are there already (`hf_vq.evaluation.teacher.Teacher`)."""

    tokens: Tensor
    logits: Tensor


def windows(tokens: Tensor, seqlen: int) -> Tensor:
    """Cut tokens into non-overlapping windows; the incomplete last one is dropped.

    Args:
        tokens: integers, shape (N,) or (n, seqlen). A 2-D input is returned as it is.
        seqlen: window length in tokens, at least 2.

    Returns:
        int64 tensor of shape (n, seqlen), n >= 1.

    Raises:
        ValueError: fewer than `seqlen` tokens, a 2-D input of another width, or a bad shape.
    """
    if seqlen < 2:
        raise ValueError(f"seqlen={seqlen}: a window needs at least 2 tokens to predict anything")
    tokens = tokens.long()
    if tokens.ndim == 2:
        if tokens.shape[1] != seqlen:
            raise ValueError(
                f"tokens are windows of {tokens.shape[1]}, but seqlen={seqlen}; "
                "pass them flattened to cut them again"
            )
        if tokens.shape[0] == 0:
            raise ValueError("there are no windows to evaluate on")
        return tokens
    if tokens.ndim != 1:
        raise ValueError(f"tokens must have shape (N,) or (n, seqlen), not {tuple(tokens.shape)}")
    count = tokens.numel() // seqlen
    if count == 0:
        raise ValueError(
            f"{tokens.numel()} tokens do not fill one window of {seqlen}; "
            "give more text or a smaller seqlen"
        )
    return tokens[: count * seqlen].view(count, seqlen)


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor, seqlen: int) -> float:
    """Perplexity of a causal language model: exp of the mean negative log-likelihood.

    Args:
        model: returns an object with `.logits` of shape (batch, seqlen, vocabulary).
        tokens: integers, shape (N,) or (n, seqlen); see `windows`.
        seqlen: window length in tokens; each window gives `seqlen - 1` predictions.

    Returns:
        The perplexity; `inf` where the mean loss exceeds what exp can represent.

    Raises:
        ValueError: no full window, token ids outside the vocabulary, or logits with NaN/Inf.
    """
    batch = windows(tokens, seqlen)
    loss, count = 0.0, 0
    with evaluation_mode(model):
        for start, chunk in batches(model, batch):
            logits = model_logits(model, chunk, start)
            targets = chunk[:, 1:].reshape(-1).to(logits.device)
            for rows, part in _float32_slices(logits[:, :-1]):
                nll = F.cross_entropy(part, targets[rows], reduction="none")
                loss += nll.double().sum().item()
            count += targets.numel()
    if not math.isfinite(loss):
        raise ValueError("the model's loss is not finite: its weights are broken or untrained")
    return _exp(loss / count)


@torch.no_grad()
def compare(dense: nn.Module | Reference, quantized: nn.Module, tokens: Tensor) -> Comparison:
    """Compare next-token distributions of two models at every position.

    Args:
        dense, quantized: models over the same vocabulary, on any devices; for the first a
            `hf_vq.evaluation.teacher.Teacher` of the same tokens does as well.
        tokens: integers, shape (n, seqlen), seqlen >= 2.

    Returns:
        A `Comparison` over n * seqlen positions.

    Raises:
        ValueError: tokens are not 2-D, vocabularies differ, or logits with NaN/Inf.
    """
    if tokens.ndim != 2 or tokens.shape[0] == 0 or tokens.shape[1] < 2:
        raise ValueError(
            f"compare needs windows of shape (n, seqlen), not {tuple(tokens.shape)}; "
            "cut them with hf_vq.evaluation.windows"
        )
    kept = None if isinstance(dense, nn.Module) else dense.logits
    if not isinstance(dense, nn.Module) and not torch.equal(dense.tokens, tokens.long()):
        raise ValueError("these logits of the original are of other windows; measure them again")
    divergences: list[Tensor] = []
    agree, count = 0, 0
    losses = [0.0, 0.0]
    with evaluation_mode(dense), evaluation_mode(quantized):
        for start, chunk in batches(quantized, tokens.long()):
            if isinstance(dense, nn.Module):
                _check_vocabulary(dense, chunk)
                reference = model_logits(dense, chunk, start)
            else:
                reference = kept[start : start + chunk.shape[0]]  # type: ignore[index]
            other = model_logits(quantized, chunk, start).to(reference.device)
            if reference.shape[-1] != other.shape[-1]:
                raise ValueError(
                    f"the models' vocabularies differ: {reference.shape[-1]} and {other.shape[-1]} "
                    "entries; compare a quantized model with its own original"
                )
            # the last position of a window predicts a token outside of it: compared, not scored
            targets = F.pad(chunk[:, 1:], (0, 1), value=-100).flatten().to(reference.device)
            slices = zip(_float32_slices(reference), _float32_slices(other), strict=True)
            for (rows, p_logits), (_, q_logits) in slices:
                p, q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
                found = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
                divergences.append(found.double().cpu())
                for i, log_p in enumerate((p, q)):
                    losses[i] += _negative_log_likelihood(log_p, targets[rows])
                agree += int((p_logits.argmax(-1) == q_logits.argmax(-1)).sum())
            count += chunk.numel()
    positions = torch.cat(divergences).numpy()
    kl = float(positions.sum())
    if not math.isfinite(kl):
        raise ValueError("the KL divergence is not finite: one of the models gives NaN or Inf")
    predictions = count - tokens.shape[0]
    return Comparison(
        kl=kl / count,
        top1=agree / count,
        positions=count,
        perplexity_dense=_exp(losses[0] / predictions),
        perplexity_quantized=_exp(losses[1] / predictions),
        kl_median=float(np.median(positions)),
        kl_p99=float(np.percentile(positions, 99)),
    )


@torch.no_grad()
def generate_sample(
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 40, device: Any = None
) -> str:
    """Continue a prompt greedily and return the continuation alone (without the prompt).

    Args:
        model: a Transformers model with `generate`.
        tokenizer: its tokenizer.
        prompt: text of at least one token.
        max_new_tokens: number of tokens to add at most.
        device: where the input goes; None takes the model's own device.
    """
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=True)
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("the prompt has no tokens; give at least one word")
    target = device if device is not None else input_device(model)
    ids = inputs["input_ids"].to(target)
    mask = inputs["attention_mask"].to(target) if "attention_mask" in inputs else None
    with evaluation_mode(model):
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=_pad_token(model, tokenizer),
        )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the tensors a checkpoint of this model holds; tied parameters count once."""
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _negative_log_likelihood(log_p: Tensor, targets: Tensor) -> float:
    """Sum over rows of log_p (rows, vocabulary); targets of -100 do not count."""
    chosen = log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return -chosen[targets >= 0].double().sum().item()


def _exp(mean_loss: float) -> float:
    return math.exp(mean_loss) if mean_loss < 700 else math.inf


def _pad_token(model: Any, tokenizer: Any) -> int | None:
    """generate() warns when nothing is named as padding, although one prompt has none."""
    for owner in (tokenizer, getattr(model, "generation_config", None)):
        for name in ("pad_token_id", "eos_token_id"):
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    return None


@contextlib.contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Dropout off inside, every module's own mode back afterwards; nothing for kept logits."""
    if not isinstance(model, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def input_device(model: nn.Module) -> torch.device:
    """Where token ids go. Offloaded models have meta parameters; their hooks move inputs."""
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.device.type == "meta":
        return torch.device("cpu")
    return parameter.device


def _vocabulary(model: nn.Module) -> int | None:
    """Entries of the output distribution, or None for a model without a Transformers config."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return getattr(config, "vocab_size", None)


def _check_vocabulary(model: nn.Module, tokens: Tensor) -> int | None:
    vocabulary = _vocabulary(model)
    if vocabulary is not None and int(tokens.max()) >= vocabulary:
        raise ValueError(
            f"token id {int(tokens.max())} is outside the model's vocabulary of {vocabulary}; "
            "the tokens were made with another tokenizer"
        )
    return vocabulary


def batches(model: nn.Module, tokens: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(index of the first window, windows) with as many windows as fit the budget of logits."""
    vocabulary = _check_vocabulary(model, tokens)
    size = 1 if vocabulary is None else max(1, _MAX_LOGITS // (tokens.shape[1] * vocabulary))
    size = min(size, 16)
    for start in range(0, tokens.shape[0], size):
        yield start, tokens[start : start + size]


def model_logits(model: nn.Module, batch: Tensor, start: int) -> Tensor:
    """Of windows (n, seqlen), the first of which is number `start`; ValueError for NaN or Inf."""
    logits = model(input_ids=batch.to(input_device(model)), use_cache=False).logits
    # the sum is NaN or Inf as soon as one entry is; unlike isfinite it makes no copy of the logits
    if not torch.isfinite(logits.sum(dtype=torch.float32)) and not torch.isfinite(logits).all():
        raise ValueError(
            f"the model's logits contain NaN or Inf in windows {start} to "
            f"{start + batch.shape[0] - 1}: its weights are broken"
        )
    return logits


def _float32_slices(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """float32 copies of (batch, positions, vocabulary) logits, some flattened rows at a time."""
    flat = logits.reshape(-1, logits.shape[-1])
    step = max(1, _MAX_LOGITS // flat.shape[-1])
    for start in range(0, flat.shape[0], step):
        rows = slice(start, min(start + step, flat.shape[0]))
        yield rows, flat[rows].float()
