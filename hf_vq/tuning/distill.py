"""Tuning a packed model to its original, end to end: KL to the original's next-token distributions.

What is trained is the adapter, where there is one, over packed layers that stay as they are; else
the codebooks.

Quantizing makes every matrix right for itself, and a few thousand numbers, the codebooks, decide
what all codes mean. `tune` trains them by Adam on KL(original || packed), with the codes fixed, as
AQLM (arXiv 2401.06118, section 3.4) and VPTQ (arXiv 2409.17066, section 4.2) do, or with codes that
move as well, after PV-Tuning (`hf_vq.tuning.codes`). Of every codebook
there is a float32 master copy; the model runs with what would be stored of it, and the gradient
found there moves the master (straight-through). So the loss that is minimised, judged and reported
is that of the model that is saved. Windows held out of the training decide which state is kept.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_vq.tuning.codebooks import make_trainable, store_trained
from hf_vq.tuning.codes import CodeMover
from hf_vq.tuning.masters import Masters
from hf_vq.tuning.peft import adapter_layers, has_adapters, merged_layers
from hf_vq.tuning.teacher import Teacher, open_teacher, tuning_windows

logger = logging.getLogger(__name__)

# Root mean squares of a tensor per step, at the peak of the schedule.
_LEARNING_RATE = 2e-3
# Of an adapter, half of which may begin at zero: as it is.
_ADAPTER_RATE = 1e-4
_TOKENS_PER_STEP = 4096
# Values of one micro-batch's logits.
_MAX_LOGITS = 1 << 24
_WARMUP = 0.05
# Windows that are not trained on but decide: a share of all, and at most so many.
_HELD_OUT, _MOST_HELD_OUT = 1 / 16, 16
# Times during training that the held-out windows are looked at.
_CHECKS = 4


@dataclass(frozen=True)
class Tuning:
    """What `tune` has done. kl_before, kl: nats per position on the held-out windows, as stored.

    trained: numbers that were trained. reassigned: changes of codes on the way.
    """

    kl_before: float
    kl: float
    steps: int
    trained: int
    reassigned: int = 0


def tune(
    model: nn.Module,
    teacher: Any = None,
    dataset: Any = None,
    *,
    steps: int | None = None,
    nsamples: int = 512,
    seqlen: int | None = None,
    tokens_per_step: int = _TOKENS_PER_STEP,
    learning_rate: float | None = None,
    reassign: float = 0.0,
    train_unquantized: bool = False,
    tokenizer: Any = None,
    teacher_logits: str | None = None,
    seed: int = 0,
) -> Tuning:
    """Train a packed model, or an adapter over it, to say what the original says; in place.

    Of a packed model: codebooks, scales and norms. The codes stay unless `reassign` is given, and
    the model saves in the same format as before. Of a PeftModel: whatever requires grad, which is
    the active adapter, and nothing else. On the CPU everything runs in float32, elsewhere in the
    model's dtype.

    Args:
        model: a packed causal language model, or a PeftModel over one.
        teacher: the original: a model, a folder or an id. None: the one the config names.
        dataset: as in the configs (`hf_vq.engine.calibration.load_calibration`); text like that
            which the model is for. More helps: the default is 512 windows.
        steps: optimizer steps. None: as many as go through the data once, at least 100.
        nsamples, seqlen: windows and their tokens. seqlen None: the model's context, at most 2048.
        tokens_per_step: tokens of one optimizer step, rounded to whole windows.
        learning_rate: peak, in root mean squares of each tensor (None: 2e-3); of an adapter Adam's
            own (None: 1e-4).
        reassign: share of all codes that a step may change, 0 to 1; say 0.002. Takes five
            float32 values per weight (`hf_vq.tuning.codes`). 0: the codes stay.
        train_unquantized: train dense embeddings and linear layers too, such as an output head that
            was not packed. Takes four float32 values per weight.
        tokenizer: for texts. None: the model's own.
        teacher_logits: file for the teacher's most likely tokens: read instead of running the
            teacher if it is there, else written. None: the teacher runs beside the model.
        seed: of the choice and the order of windows.

    Returns:
        A `Tuning`; where nothing was gained the model is as it was.

    Raises:
        ValueError: no packed layers, a wrong `steps`, fewer than two windows, or an adapter that is
            frozen, merged, or given options of codebooks.
        CalibrationError: the dataset cannot be used.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"steps={steps}: at least 1 is needed")
    if not 0 <= reassign <= 1:
        raise ValueError(f"reassign={reassign}: a share of all codes is needed, 0 to 1")
    adapted = has_adapters(model)
    if adapted:
        _check_adapter(model, reassign or train_unquantized)
    windows = tuning_windows(model, dataset, tokenizer, nsamples, seqlen, seed)
    if len(windows) < 2:
        raise ValueError(
            "tuning needs two windows at least, one to judge by; give more text or a smaller seqlen"
        )
    source = open_teacher(teacher, model, windows, teacher_logits)
    held = min(_MOST_HELD_OUT, max(1, round(len(windows) * _HELD_OUT)))
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed)).tolist()
    judges, pool = order[:held], order[held:]
    per_step = max(1, min(len(pool), round(tokens_per_step / windows.shape[1])))
    steps = max(100, math.ceil(len(pool) / per_step)) if steps is None else steps
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    mover = None
    rate = _ADAPTER_RATE if adapted else _LEARNING_RATE
    try:
        if not adapted:
            make_trainable(model, train_unquantized)
        with _wide(model):
            masters = Masters(model)
            mover = CodeMover(model, reassign) if reassign else None
            run = _Runner(model, source, windows)
            before = best = run.kl(judges)
            state = masters.state(), mover.state() if mover else []
            optimizer = masters.optimizer(learning_rate or rate, relative=not adapted)
            factor = _schedule(steps)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
            batches = _batches(pool, per_step, seed)
            for step in range(1, steps + 1):
                run.backward(next(batches))
                if mover is not None:
                    mover.spread()
                masters.step(optimizer)
                if mover is not None:
                    mover.step(factor(step - 1))
                schedule.step()
                if step == steps or step % max(1, steps // _CHECKS) == 0:
                    kl = run.kl(judges)
                    logger.info("step %d of %d: KL %.5f, %.5f before", step, steps, kl, before)
                    if kl < best:
                        best, state = kl, (masters.state(), mover.state() if mover else [])
            masters.load(state[0])
            if mover is not None:
                mover.load(state[1])
            count = sum(master.numel() for master in masters.masters)
    finally:
        if mover is not None:
            mover.restore()
        if not adapted:
            store_trained(model)
        for module, training in modes:
            module.training = training
    return Tuning(before, best, steps, count, 0 if mover is None else mover.changed)


def _check_adapter(model: nn.Module, of_codebooks: object) -> None:
    if of_codebooks:
        raise ValueError(
            "reassign and train_unquantized are of codebooks, and this model has an adapter, which "
            "is what tune trains then: leave them out, or unload the adapter"
        )
    if any(merged_layers(model)):
        raise ValueError("the adapter is merged: call model.unmerge_adapter() before tuning")
    if not any(adapter_layers(model)):
        raise ValueError(
            "the adapter is on no packed layer; give its config target_modules that are"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "the adapter is frozen: load it with is_trainable=True, or call model.set_adapter(name)"
        )


def _schedule(steps: int) -> Any:
    warmup = max(1, round(_WARMUP * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor


def _batches(pool: list[int], per_step: int, seed: int) -> Iterator[list[int]]:
    generator = torch.Generator().manual_seed(seed + 1)
    queue: list[int] = []
    while True:
        if len(queue) < per_step:
            queue += [pool[i] for i in torch.randperm(len(pool), generator=generator).tolist()]
        yield queue[:per_step]
        queue = queue[per_step:]


@contextmanager
def _wide(model: nn.Module) -> Iterator[None]:
    """On the CPU, run in float32; norms that were changed are rounded at the end."""
    if next(model.parameters()).device.type != "cpu":
        yield
        return
    packed = {
        id(tensor)
        for module in model.modules()
        if hasattr(module, "packed")
        for tensor in module.packed().values()  # type: ignore[operator]
    }
    # by identity, as tied weights are one parameter
    narrow = {id(p): p for p in model.parameters() if p.is_floating_point() and id(p) not in packed}
    before = [(p, p.data) for p in narrow.values() if p.dtype != torch.float32]
    for parameter, data in before:
        parameter.data = data.float()
    try:
        yield
    finally:
        for parameter, data in before:
            # what was not trained is put back, not rounded again
            parameter.data = parameter.data.to(data.dtype) if parameter.requires_grad else data


class _Runner:
    """KL(teacher || model) over windows (n, seqlen)."""

    def __init__(self, model: nn.Module, teacher: Teacher, windows: Tensor):
        self.model, self.teacher, self.windows = model, teacher, windows
        self.device = next(model.parameters()).device
        config: Any = model.config
        vocabulary = config.get_text_config().vocab_size
        self.size = max(1, _MAX_LOGITS // (windows.shape[1] * vocabulary))

    def _divergence(self, some: list[int]) -> Tensor:
        """Mean over positions."""
        tokens = self.windows[some].to(self.device)
        logits = self.model(input_ids=tokens, use_cache=False).logits.float()
        return self.teacher.divergence(some, logits.log_softmax(-1))

    def backward(self, batch: list[int]) -> None:
        for some in self._micro(batch):
            (self._divergence(some) * (len(some) / len(batch))).backward()

    @torch.no_grad()
    def kl(self, which: list[int]) -> float:
        parts = [float(self._divergence(some)) * len(some) for some in self._micro(which)]
        return sum(parts) / len(which)

    def _micro(self, batch: list[int]) -> list[list[int]]:
        return [batch[i : i + self.size] for i in range(0, len(batch), self.size)]
