"""How a `quantization_config` lists its packed layers, unless a format has a way of its own.

`"layers": [{"modules": [names], **fields}, ...]`: layers with equal specs share an entry, which
keeps the config of a large model small.
"""

from __future__ import annotations

import dataclasses
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


def read_entry(
    spec_class: type[LayerSpec],
    out_features: int,
    in_features: int,
    fields: Mapping[str, Any],
    where: str,
) -> LayerSpec:
    """The spec of one layer, of the shape that the model says, from the fields of its entry.

    Raises `FormatError` naming layer `where` for fields that are unknown, missing or impossible.
    """
    known = {f.name: f for f in dataclasses.fields(spec_class)}
    del known["out_features"], known["in_features"]
    problems = [f"unknown field {name!r}" for name in fields if name not in known]
    problems += [
        f"missing field {name!r}"
        for name, field in known.items()
        if name not in fields and field.default is dataclasses.MISSING
    ]
    if not problems:
        try:
            return spec_class(out_features=out_features, in_features=in_features, **fields)
        except (ValueError, TypeError) as error:
            problems.append(str(error))
    raise FormatError(
        f"{where}: config.json does not describe a {spec_class.method} layer: "
        f"{'; '.join(problems)}."
    )
