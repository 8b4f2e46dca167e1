"""The original weights of a packed model, read one matrix at a time from its safetensors files."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from hf_vq.tuning.teacher import base_model_name


class BaseWeights:
    """Looks up the dense weight of a layer by the layer's name in the packed model.

    source: the original model, its folder, or its id on the Hub (of which only the files are
    fetched); None: the one that the config of `packed` names. Raises ValueError where there is
    none, or it has no safetensors files.
    """

    def __init__(self, source: Any, packed: nn.Module):
        self._prefix = f"{getattr(packed, 'base_model_prefix', '')}."
        self._dense: dict[str, Tensor] = {}
        self._files: dict[str, str] = {}
        if isinstance(source, nn.Module):
            self._where = type(source).__name__
            self._dense = dict(source.state_dict())
            return
        source = source or base_model_name(packed)
        if source is None:
            raise ValueError(
                "the model's config does not name its original (it was quantized from a local "
                "folder): pass base_model=, a folder, an id or a model"
            )
        self._where = str(source)
        folder = source if os.path.isdir(source) else _download(source)
        self._files = _index(folder)
        if not self._files:
            raise ValueError(f"{source} has no *.safetensors files to read the weights from")

    def __call__(self, name: str) -> Tensor:
        """Weight (out_features, in_features) of layer `name`, float32 on the CPU.

        Raises ValueError if the original has no such matrix.
        """
        found = self.find(f"{name}.weight")
        if found is None:
            raise ValueError(
                f"{name}: {self._where} has no {name}.weight; pass base_model=, the very model "
                "that this one was quantized from"
            )
        return found.to("cpu", torch.float32)

    def find(self, name: str) -> Tensor | None:
        """The tensor that the packed model would call `name`, as it is stored, if there is one."""
        for key in (name, self._prefix + name, name.removeprefix(self._prefix)):
            if key in self._dense:
                return self._dense[key].detach()
            if key in self._files:
                with safe_open(self._files[key], framework="pt") as file:
                    return file.get_tensor(key)
        return None


def _download(source: str) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(source, allow_patterns=["*.safetensors", "*.safetensors.index.json"])


def _index(folder: str) -> dict[str, str]:
    """Name of a tensor -> the file it is in."""
    listed = os.path.join(folder, "model.safetensors.index.json")
    if os.path.isfile(listed):
        with open(listed, encoding="utf-8") as file:
            names = json.load(file)["weight_map"]
        return {key: os.path.join(folder, name) for key, name in names.items()}
    found = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors"):
            path = os.path.join(folder, name)
            with safe_open(path, framework="pt") as file:
                found.update(dict.fromkeys(file.keys(), path))
    return found
