"""Merging an adapter and quantizing what comes out, with calibration and with the loss it costs.

Rounding a merged weight to the codebooks of the old one loses most of what the adapter learned. So
the merged matrices are quantized like a new model's: error feedback from a Hessian of calibration
data, new codebooks, the same spec, so that the files have the same size and format.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_vq.engine.run import quantize_model
from hf_vq.formats import LayerSpec
from hf_vq.layers import PackedLinear
from hf_vq.loading import packed_layers
from hf_vq.tuning.peft import adapter_layers, merged_layers
from hf_vq.tuning.teacher import tuning_windows

logger = logging.getLogger(__name__)

# Windows that are kept from calibration, to measure the loss on.
_HELD_OUT, _MOST_HELD_OUT = 1 / 8, 16


def merge_and_requantize(
    model: nn.Module,
    dataset: Any = None,
    *,
    tokenizer: Any = None,
    nsamples: int = 128,
    seqlen: int | None = None,
    safe_merge: bool = False,
) -> Any:
    """Merge the active adapters, quantize the merged layers again, and return the packed model.

    Layers without an adapter keep their codes. The loss (mean negative log-likelihood, nats per
    token, on windows that do not calibrate) with the adapter and after quantization is logged and
    kept as `model.hf_quantizer.report["requantized"]`.

    Args:
        model: a PeftModel over packed layers; it is taken apart, as by `merge_and_unload`.
        dataset: calibration data, as in the configs, best what the adapter was trained on.
        tokenizer: for texts. None: the model's own.
        nsamples, seqlen: windows and their tokens (None: the context, at most 2048).
        safe_merge: as for PEFT's `merge_and_unload`.

    Raises:
        ValueError: no PeftModel over packed layers, or no dataset.
    """
    if not hasattr(model, "merge_and_unload"):
        raise ValueError(f"{type(model).__name__} has no adapters to merge; pass the PeftModel")
    base: Any = model.get_base_model()  # type: ignore[operator]
    specs: dict[str, LayerSpec] = {name: packed.spec for name, _, packed in adapter_layers(base)}
    specs.update({name: packed.spec for name, packed in merged_layers(base)})
    if not specs:
        raise ValueError("the adapters are on no packed layer; merge_and_unload() is enough")
    windows = tuning_windows(base, dataset, tokenizer, nsamples, seqlen, 0)
    held = min(_MOST_HELD_OUT, max(1, round(len(windows) * _HELD_OUT)))
    judges, samples = windows[:held], windows[held:] if len(windows) > held else windows
    before = mean_loss(base, judges)
    kept = {
        key: getattr(base, key)
        for key in ("hf_quantizer", "is_quantized", "quantization_method", "hqq_quantized")
        if hasattr(base, key)
    }
    quantizer = kept["hf_quantizer"]
    config = quantizer.quantization_config
    merged = model.merge_and_unload(safe_merge=safe_merge)  # type: ignore[operator]
    dense = [n for n in specs if not isinstance(merged.get_submodule(n), PackedLinear)]
    wanted = {name: specs[name] for name in dense}
    _requantize(merged, wanted, samples, config)
    for key, value in kept.items():
        setattr(merged, key, value)
    merged.config.quantization_config = config
    after = mean_loss(merged, judges)
    report = {"loss_before": before, "loss": after, "tokens": judges.numel(), "layers": len(wanted)}
    quantizer.report = {**(quantizer.report or {}), "requantized": report}
    logger.info(
        "%d merged layers quantized again: loss %.4f with the adapter, %.4f packed",
        len(wanted),
        before,
        after,
    )
    return merged


def _requantize(
    model: nn.Module, specs: Mapping[str, LayerSpec], samples: Tensor, config: Any
) -> None:
    """Pack the dense layers called in `specs`, each as its spec says."""
    from hf_vq.engine.report import Reporter
    from hf_vq.plan import make_plan, measured_plan

    config = copy.deepcopy(config)
    config.measurement = None
    rows: Mapping[str, Tensor] = {}
    known = config.bits is not None or config.size is not None
    if known and not packed_layers(model):
        # sizes are settled; which rows of a matrix matter most may have changed
        rows = measured_plan(model, config, samples, make_plan(model, config)).rows
    plan = SimpleNamespace(layers=dict(specs), rows=rows)
    quantize_model(model, plan, samples, config, Reporter())


@torch.no_grad()
def mean_loss(model: nn.Module, windows: Tensor) -> float:
    """Mean negative log-likelihood of the next token, in nats, over windows (n, seqlen)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    device = next(model.parameters()).device
    total = 0.0
    try:
        for window in windows.split(1):
            logits = model(input_ids=window.to(device), use_cache=False).logits[:, :-1].float()
            target = window[:, 1:].to(device)
            total += float(F.cross_entropy(logits.flatten(0, 1), target.flatten()))
    finally:
        for module, training in modes:
            module.training = training
    return total / len(windows)
