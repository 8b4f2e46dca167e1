"""How a `quantization_config` lists CVXQ layers: as others, with the words of codes of each.

`"layers": [{"modules": {name: num_words, ...}, "bias": whether they have one, **fields}, ...]`:
only the number of words differs between layers of equal geometry, so they still share an entry.
Whether a layer has a bias is recorded because quantization gives one to layers that had none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_vq.formats import layer_list
from hf_vq.formats.base import LayerSpec
from hf_vq.formats.cvxq import CVXQSpec
from hf_vq.formats.validation import FormatError


def read_layers(stored: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Module name -> the fields of its spec, and "bias".

    Raises `FormatError` for a module listed twice, and for a list of another kind.
    """
    out: dict[str, dict[str, Any]] = {}
    described = "a dict of name: number of words"
    for fields, modules in layer_list.entries(stored, dict, described):
        for name, num_words in modules.items():
            if name in out:
                raise FormatError(f"{name}: config.json lists it twice under quantization_config")
            out[name] = {**fields, "num_words": num_words}
    return out


def write_layers(layers: Mapping[str, tuple[LayerSpec, bool]]) -> list[dict[str, Any]]:
    """module name -> (spec, whether it has a bias) to the list."""
    entries: dict[str, dict[str, Any]] = {}
    for name, (spec, bias) in layers.items():
        fields = {**spec.to_dict(), "bias": bias}
        num_words = fields.pop("num_words")
        entry = entries.setdefault(repr(sorted(fields.items())), {"modules": {}, **fields})
        entry["modules"][name] = num_words
    return list(entries.values())


def read_entry(
    out_features: int, in_features: int, entry: Mapping[str, Any], where: str, dtype: str = ""
) -> LayerSpec:
    """The spec of one layer, of the shape that the model says, from its entry.

    dtype: of no matter, entries have those of all floats. Raises `FormatError` naming layer `where`
    for fields that are unknown, missing or impossible.
    """
    bias = entry.get("bias", False)
    if not isinstance(bias, bool):
        raise FormatError(
            f"{where}: config.json does not describe a cvxq layer: bias must be true or false, got "
            f"{bias!r}."
        )
    fields = {k: v for k, v in entry.items() if k != "bias"}
    return layer_list.read_entry(CVXQSpec, out_features, in_features, fields, where)


def has_bias(entry: Mapping[str, Any], model_has: bool) -> bool:
    """Whether a layer has a bias: the entry decides, then the model."""
    return bool(entry.get("bias", model_has))
