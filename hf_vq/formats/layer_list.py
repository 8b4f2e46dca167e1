"""How a `quantization_config` lists its packed layers, unless a format has a way of its own.

`"layers": [{"modules": [names], **fields}, ...]`: layers with equal specs share an entry, which
keeps the config of a large model small.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from hf_vq.formats.base import LayerSpec
from hf_vq.formats.validation import FormatError


def read_layers(stored: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Module name -> the fields of its spec.

    Raises `FormatError` for a module listed twice, and for a list of another kind.
    """
    out: dict[str, dict[str, Any]] = {}
    for fields, modules in entries(stored, list, "a list of names"):
        for name in modules:
            if name in out:
                raise FormatError(f"{name}: config.json lists it twice under quantization_config")
            out[name] = fields
    return out


def entries(
    stored: Mapping[str, Any], kind: type, described: str
) -> Iterator[tuple[dict[str, Any], Any]]:
    """The fields and the "modules" of every entry of "layers".

    kind: of "modules", in words: described. Raises `FormatError` for anything else.
    """
    found = stored.get("layers") or []
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise FormatError(f"config.json: layers must be a list of entries, not {found!r:.60}")
    for entry in found:
        modules = entry.get("modules")
        if not isinstance(modules, kind):
            raise FormatError(
                f"config.json: modules of an entry of layers must be {described}, not "
                f"{modules!r:.60}"
            )
        yield {k: v for k, v in entry.items() if k != "modules"}, modules


def write_layers(layers: Mapping[str, tuple[LayerSpec, bool]]) -> list[dict[str, Any]]:
    """module name -> (spec, whether it has a bias) to the list; the model knows about biases."""
    listed: dict[str, dict[str, Any]] = {}
    for name, (spec, _) in layers.items():
        fields = spec.to_dict()
        entry = listed.setdefault(repr(sorted(fields.items())), {"modules": [], **fields})
        entry["modules"].append(name)
    return list(listed.values())


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
