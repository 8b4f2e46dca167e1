"""With what, and on what, something was measured."""

from __future__ import annotations

import importlib.metadata
import platform
from functools import lru_cache
from typing import Any

import torch

_PACKAGES = ("transformers", "numba", "triton")


def environment() -> dict[str, Any]:
    """Versions and devices, as plain JSON values; nothing that names the machine or its user.

    Keys: hf_vq, torch, python, those of the packages that matter and are installed, device (of a
    CPU: its model; of GPUs that were used: theirs) and threads (of torch).
    """
    from hf_vq import __version__

    versions = {"hf_vq": __version__, "torch": torch.__version__}
    versions["python"] = platform.python_version()
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**versions, "device": _device(), "threads": torch.get_num_threads()}


def _device() -> str:
    if torch.cuda.is_initialized():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return ", ".join(dict.fromkeys(names))
    return _processor()


@lru_cache(maxsize=1)
def _processor() -> str:
    """The CPU's own name where Linux tells it, its architecture elsewhere."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() == "model name" and value.strip():
                    return f"CPU ({value.strip()})"
    except OSError:
        pass
    return f"CPU ({platform.machine()})"
