"""How a `quantization_config` lists its packed layers, unless a format has a way of its own.

`"layers": [{"modules": [names], **fields}, ...]`: layers with equal specs share an entry, which
keeps the config of a large model small.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_vq.formats.base import LayerSpec
from hf_vq.formats.validation import FormatError


def read_layers(stored: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Module name -> the fields of its spec. Raises `FormatError` for a module listed twice."""
    out: dict[str, dict[str, Any]] = {}
    for entry in stored.get("layers") or ():
        fields = {k: v for k, v in entry.items() if k != "modules"}
        for name in entry.get("modules", ()):
            if name in out:
                raise FormatError(f"{name}: config.json lists it twice under quantization_config")
            out[name] = fields
    return out


def write_layers(layers: Mapping[str, tuple[LayerSpec, bool]]) -> list[dict[str, Any]]:
    """module name -> (spec, whether it has a bias) to the list; the model knows about biases."""
    entries: dict[str, dict[str, Any]] = {}
    for name, (spec, _) in layers.items():
        fields = spec.to_dict()
        entry = entries.setdefault(repr(sorted(fields.items())), {"modules": [], **fields})
        entry["modules"].append(name)
    return list(entries.values())
