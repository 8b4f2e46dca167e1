"""Where a tuned model's targets come from: the original beside it, or a file of what it said."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_KEPT = 64
"""Tokens per position that are kept in a file; the rest of the distribution is one more."""


class Teacher(Protocol):
    """Gives KL(original || model) for windows that are known by number."""

    def divergence(self, which: list[int], log_q: Tensor) -> Tensor:
        """Mean over positions, in nats, given the model's log-probabilities (n, seqlen, V)."""
        ...


class LiveTeacher:
    """The original model, run beside the packed one."""

    def __init__(self, model: nn.Module, windows: Tensor):
        self.model, self.windows = model.eval(), windows
        self.device = next(model.parameters()).device

    @torch.no_grad()
    def log_p(self, which: list[int]) -> Tensor:
        """Log-probabilities (n, seqlen, V), float32."""
        tokens = self.windows[which].to(self.device)
        return self.model(input_ids=tokens, use_cache=False).logits.float().log_softmax(-1)

    def divergence(self, which: list[int], log_q: Tensor) -> Tensor:
        log_p = self.log_p(which).to(log_q.device)
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()


class StoredTeacher:
    """The most likely tokens of every position, and the sum of all others as one more.

    indices int32 and log_p float16, both (windows, seqlen, k). KL over this coarser distribution is
    a lower bound of the whole one.
    """

    def __init__(self, indices: Tensor, log_p: Tensor):
        self.indices, self.log_p = indices, log_p

    def divergence(self, which: list[int], log_q: Tensor) -> Tensor:
        indices = self.indices[which].to(log_q.device, torch.int64)
        log_p = self.log_p[which].to(log_q.device).float()
        log_q = log_q.gather(-1, indices)
        total = (log_p.exp() * (log_p - log_q)).sum(-1)
        rest_p = _rest(log_p)
        return (total + rest_p.exp() * (rest_p - _rest(log_q))).mean()


def _rest(log_p: Tensor) -> Tensor:
    """Log of the probability that is not in (..., k)."""
    return torch.log1p(-log_p.exp().sum(-1).clamp_max(1 - 1e-6))


def open_teacher(
    teacher: Any, student: nn.Module, windows: Tensor, file: str | None
) -> LiveTeacher | StoredTeacher:
    """The original of `student` as a `Teacher` over `windows` (n, seqlen).

    teacher: a model, a folder or an id; None: the base model that the student's config names.
    file: see `hf_vq.tune`. Raises ValueError for a file about other windows, or without a teacher.
    """
    if file is not None and os.path.exists(file):
        stored = load_file(file)
        same = {"windows", "indices", "log_p"} <= stored.keys()
        if not same or not torch.equal(stored["windows"].long(), windows):
            raise ValueError(
                f"{file} holds a teacher's answers to other windows than these (dataset, nsamples, "
                "seqlen and seed choose them); name another file, or delete it"
            )
        return StoredTeacher(stored["indices"], stored["log_p"])
    live = LiveTeacher(load_teacher(teacher, student), windows)
    if file is None:
        return live
    indices, log_p = [], []
    for number in range(len(windows)):
        values, at = live.log_p([number]).topk(min(_KEPT, _vocabulary(student)), -1)
        log_p.append(values.cpu().half())
        indices.append(at.cpu().to(torch.int32))
    stored = {"indices": torch.cat(indices), "log_p": torch.cat(log_p)}
    save_file({**stored, "windows": windows.to(torch.int32).contiguous()}, file)
    return StoredTeacher(**stored)


def load_teacher(teacher: Any, student: nn.Module) -> nn.Module:
    """The original of `student`: see `open_teacher`."""
    if isinstance(teacher, nn.Module):
        return teacher
    if teacher is None:
        teacher = base_model_name(student)
        if teacher is None:
            raise ValueError(
                "the model's config does not name its original (it was quantized from a local "
                "folder): pass teacher=, a model, a folder or an id"
            )
    from transformers import AutoModelForCausalLM

    device = next(student.parameters()).device
    # on the CPU bfloat16 is slow, and the student runs in float32
    dtype = torch.float32 if device.type == "cpu" else "auto"
    model: Any = AutoModelForCausalLM.from_pretrained(teacher, dtype=dtype)
    return model.to(device)


def base_model_name(model: nn.Module) -> str | None:
    """Id of the model that `model` was quantized from, if its config says."""
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    return (getattr(config, "recorded", None) or {}).get("base_model")


def tuning_windows(
    model: nn.Module,
    dataset: Any,
    tokenizer: Any,
    nsamples: int,
    seqlen: int | None,
    seed: int,
) -> Tensor:
    """Token windows, int64 (n, seqlen), of anything that calibrates. ValueError without data."""
    from hf_vq.engine.calibration import load_calibration

    if dataset is None:
        raise ValueError("dataset is missing: pass texts, a file, a datasets id or tokens")
    wanted = SimpleNamespace(
        dataset=dataset, tokenizer=tokenizer, nsamples=nsamples, seqlen=seqlen, seed=seed
    )
    config: Any = model.config
    text = config.get_text_config()
    name = getattr(model, "name_or_path", "") or getattr(config, "_name_or_path", "")
    length = getattr(text, "max_position_embeddings", None)
    windows = load_calibration(wanted, name, length, getattr(text, "vocab_size", None))
    assert windows is not None
    return windows


def _vocabulary(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.get_text_config().vocab_size)
