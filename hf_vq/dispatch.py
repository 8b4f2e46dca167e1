"""Placing a packed model on devices after it was quantized on the CPU."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import weakref
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential", "disk")
"""What a device map may say instead of a device."""


def needs_offload_folder(device_map: Any) -> bool:
    """Whether a device map names the disk."""
    return isinstance(device_map, dict) and "disk" in device_map.values()


def check_devices(name: str, devices: Any) -> None:
    """Raise ValueError, naming the argument, if nothing can be put on a device asked for.

    devices: a device, a {module: device} dict, the name of a strategy, or None.
    """
    for device in devices.values() if isinstance(devices, dict) else [devices]:
        if device is None or device in _STRATEGIES:
            continue
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{name}: {device} cannot be used here ({reason})") from None


def dispatch(
    model: nn.Module, device_map: Any, max_memory: dict | None, offload_folder: str | None
) -> None:
    """Do what `from_pretrained(device_map=...)` does, with the sizes of the packed model.

    device_map: None (leave it on the CPU), a {module: device} dict, or one of "auto", "balanced",
    "balanced_low_0" and "sequential".
    """
    if device_map is None:
        return
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory, get_max_memory

    model.tie_weights()  # type: ignore[operator]
    no_split = list(getattr(model, "_no_split_modules", None) or ())
    if isinstance(device_map, str):
        if device_map == "sequential":
            memory = get_max_memory(max_memory)
        else:
            memory = get_balanced_memory(
                model,
                max_memory=max_memory,
                no_split_module_classes=no_split,
                low_zero=device_map == "balanced_low_0",
            )
        device_map = infer_auto_device_map(
            model, max_memory=memory, no_split_module_classes=no_split
        )
    devices = set(device_map.values())
    if len(devices) == 1 and "disk" not in devices:
        model.to(devices.pop())
        return
    if device_map == {"": "disk"}:  # Accelerate finds nothing to write under an empty name
        device_map = {name: "disk" for name, _ in model.named_children()}
    folder = _offload_folder(model, offload_folder) if "disk" in devices else None
    dispatch_model(
        model,
        device_map,
        offload_dir=folder,
        skip_keys=getattr(model, "_skip_keys_device_placement", None),
    )


def _offload_folder(model: nn.Module, wanted: str | None) -> str:
    """A new folder, inside of `wanted`: Accelerate takes an old one's weights for the model's."""
    if wanted is not None:
        os.makedirs(wanted, exist_ok=True)
        return tempfile.mkdtemp(prefix="hf_vq_offload_", dir=wanted)
    folder = tempfile.mkdtemp(prefix="hf_vq_offload_")
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    logger.warning(
        "the packed model does not fit in memory; what is left over is kept in %s as long as the "
        "model exists (offload_folder=... in the config chooses another place)",
        folder,
    )
    return folder
