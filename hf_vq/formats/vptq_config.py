"""What published VPTQ checkpoints say about their layers in `config.json`.

`quantization_config` has `config_for_layers`, {module name: entry}, and some have
`shared_layer_config`, {last component of the name: entry}, for modules without an entry of their
own. The oldest have a flat {module name: entry} under the top-level key `quant_config` instead. An
entry holds the arguments of the official package's layer class; pairs are [outliers, others], -1
stands for "none". Keys that are not needed to decode a layer are ignored, as later versions of the
official quantizer add such.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hf_vq.formats.base import LayerSpec
from hf_vq.formats.validation import FormatError
from hf_vq.formats.vptq import VPTQSpec

LEGACY_KEY = "quant_config"
_SIGNATURE = ("vector_lens", "num_centroids", "group_num")
"""Keys that every entry has, and no other library's config."""
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


def adopt(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A whole `config.json` with the oldest layout turned into today's; any other as it is."""
    legacy = config.get(LEGACY_KEY)
    if config.get("quantization_config") or not isinstance(legacy, dict) or not legacy:
        return config
    if not all(isinstance(e, dict) and all(k in e for k in _SIGNATURE) for e in legacy.values()):
        return config
    rest = {k: v for k, v in config.items() if k != LEGACY_KEY}
    return {**rest, "quantization_config": {"quant_method": "vptq", "config_for_layers": legacy}}


def read_layers(stored: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Module name -> its entry."""
    return _entries(stored, "config_for_layers")


def read_shared(stored: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Last component of a module's name -> the entry of such modules without one of their own."""
    return _entries(stored, "shared_layer_config")


def _entries(stored: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]]:
    entries = stored.get(key) or {}
    if not isinstance(entries, dict):
        raise FormatError(f"config.json: {key} must be a dict of layers, not {entries!r:.60}")
    for name, entry in entries.items():
        if not isinstance(entry, dict):
            raise FormatError(f"{name}: its entry in {key} must be a dict, not {entry!r:.60}")
    return dict(entries)


def write_layers(layers: Mapping[str, tuple[LayerSpec, bool]]) -> dict[str, dict[str, Any]]:
    """module name -> (spec, whether it has a bias), to `config_for_layers`."""
    return {name: write_entry(spec, bias) for name, (spec, bias) in layers.items()}  # type: ignore[arg-type]


def write_entry(spec: VPTQSpec, bias: bool) -> dict[str, Any]:
    """The entry of one layer, with exactly the keys of the official package's.

    Its loader takes every key for an argument and fails on those it does not know, so `norm_dim`
    is written only for the norm that no official loader decodes without it.
    """
    outliers = spec.outlier_vector_dim > 0
    entry: dict[str, Any] = {
        "in_features": spec.in_features,
        "out_features": spec.out_features,
        "vector_lens": [spec.outlier_vector_dim if outliers else -1, spec.vector_dim],
        "num_centroids": [spec.outlier_centroids if outliers else -1, spec.num_centroids],
        "num_res_centroids": [-1, spec.num_res_centroids or -1],
        "group_num": spec.num_groups,
        "group_size": spec.group_columns,
        "outlier_size": spec.outlier_columns,
        "enable_norm": spec.norm != "none",
        "enable_perm": spec.permuted,
        "bias": bias,
        "is_indice_packed": spec.storage == "packed",
        "indices_as_float": spec.storage == "float16",
    }
    if spec.norm == "rows":
        entry["norm_dim"] = 1
    return entry


def read_entry(
    out_features: int,
    in_features: int,
    entry: Mapping[str, Any],
    where: str,
    codebook_dtype: str = "float16",
) -> VPTQSpec:
    """The spec of one layer, of the shape that the model says, from its entry.

    codebook_dtype: entries do not have it; see `as_stored`. Raises `FormatError` naming layer
    `where` for a missing key and for values that describe no matrix of this shape.
    """
    reader = _Reader(entry, where)
    for key, shape in (("in_features", in_features), ("out_features", out_features)):
        if reader.integer(key, shape) != shape:
            raise reader.error(f"{key} is {entry[key]}, but the model's layer has {shape}")
    if entry.get("vector_quant_dim", "out") != "out":
        raise reader.error(f"vector_quant_dim is {entry['vector_quant_dim']!r}, only 'out' exists")
    (outlier_dim, dim), (outlier_centroids, centroids), (outlier_res, res) = (
        reader.pair(key) for key in ("vector_lens", "num_centroids", "num_res_centroids")
    )
    if outlier_res > 0:
        raise reader.error(f"num_res_centroids is {[outlier_res, res]}, outliers have no residual")
    # as the official package decides whether there are outliers
    outliers = outlier_dim > 1 and outlier_centroids > 0
    outlier_size = max(reader.integer("outlier_size", 0), 0)
    if outlier_size and not outliers:
        raise reader.error(
            f"outlier_size is {outlier_size}, but vector_lens and num_centroids describe no "
            "outlier codebook"
        )
    if outlier_size >= in_features:
        raise reader.error(f"outlier_size is {outlier_size} of the layer's {in_features} columns")
    groups, width = reader.integer("group_num", 1), reader.integer("group_size", -1)
    if groups < 1:
        raise reader.error(f"group_num is {groups}, but there is at least one group")
    rest = in_features - outlier_size
    if rest % groups or (width > 0 and width * groups != rest):
        raise reader.error(
            f"group_num={groups} groups of group_size={width} are not the {rest} columns that "
            f"outlier_size={outlier_size} leaves of {in_features}"
        )
    storage = "packed"
    if not reader.flag("is_indice_packed", True):
        storage = "float16" if reader.flag("indices_as_float") else "int16"
    try:
        return VPTQSpec(
            out_features=out_features,
            in_features=in_features,
            vector_dim=dim,
            num_centroids=centroids,
            num_res_centroids=max(res, 0),
            num_groups=groups,
            outlier_columns=outlier_size,
            outlier_vector_dim=outlier_dim if outliers else 0,
            outlier_centroids=outlier_centroids if outliers else 0,
            norm=reader.norm(),
            permuted=reader.flag("enable_perm"),
            codebook_dtype=codebook_dtype,
            storage=storage,
        )
    except ValueError as error:
        raise reader.error(str(error)) from None


def has_bias(entry: Mapping[str, Any], model_has: bool) -> bool:
    """Whether a layer has a bias: the entry decides, then the model."""
    return bool(entry.get("bias", model_has))


def as_stored(spec: LayerSpec, dtypes: Mapping[str, str]) -> LayerSpec:
    """`spec` with the codebook dtype of the file: tensor name -> dtype in safetensors' words."""
    found = _DTYPES.get(dtypes.get("centroids.weight", ""))
    return spec if found is None else dataclasses.replace(spec, codebook_dtype=found)  # type: ignore[call-arg]


class _Reader:
    """Values of one entry, refused in the layer's name."""

    def __init__(self, entry: Mapping[str, Any], where: str) -> None:
        self.entry = entry
        self.where = where

    def error(self, problem: str) -> FormatError:
        return FormatError(
            f"{self.where}: config.json does not describe a vptq layer: {problem}; the config is "
            "damaged or belongs to another model"
        )

    def integer(self, key: str, default: int) -> int:
        value = self.entry.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(f"{key} is {value!r}, expected an integer")
        return value

    def pair(self, key: str) -> tuple[int, int]:
        if key not in self.entry:
            raise self.error(f"missing key {key!r}")
        value = self.entry[key]
        if (
            not isinstance(value, (list, tuple))
            or len(value) != 2
            or any(isinstance(v, bool) or not isinstance(v, int) for v in value)
        ):
            raise self.error(f"{key} is {value!r}, expected two integers (outliers, others)")
        return value[0], value[1]

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.entry.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(f"{key} is {value!r}, expected true or false")
        return value

    def norm(self) -> str:
        if not self.flag("enable_norm"):
            return "none"
        dim = self.integer("norm_dim", 0)
        if dim not in (0, 1):
            raise self.error(f"norm_dim is {dim}, expected 0 (columns) or 1 (rows)")
        return "rows" if dim else "columns"
