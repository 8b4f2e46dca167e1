"""Codes <-> tensors on disk: pure functions, one file per format, one table of them all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from hf_vq.formats import (
    cvxq,
    cvxq_config,
    gptvq,
    layer_list,
    nearest,
    trainable,
    vptq,
    vptq_config,
)
from hf_vq.formats.base import LayerSpec, TensorLayout
from hf_vq.formats.validation import FormatError, check_layout, check_version

__all__ = [
    "FORMATS",
    "Format",
    "FormatError",
    "LayerSpec",
    "TensorLayout",
    "adopt",
    "check_layout",
    "check_version",
    "packed_settings",
]


def _as_it_is(value: Any, *_: Any) -> Any:
    return value


@dataclasses.dataclass(frozen=True)
class Format:
    """How one method's matrices are stored, and how `config.json` lists them.

    pack(codes, spec) -> the tensors of spec.layout(); unpack(tensors, spec) -> codes;
    check(tensors, spec, where) raises `FormatError` naming layer `where`.
    widen(tensors, spec) -> the same matrix, with all that can be trained as float32: tensors, spec;
    narrow(trained tensors, stored tensors, stored spec) -> the trained matrix as it is stored.

    What has a default is for formats that others write too. Below, an *entry* is what a
    `quantization_config` says about one layer.

    layer_keys: where the entries are; the first is the one that is written.
    read_layers(quantization_config) -> {module name: entry}; raises `FormatError`.
    read_shared(quantization_config) -> {last component of the name: entry}, of modules without an
        entry of their own; raises `FormatError`.
    read_entry(out_features, in_features, entry, where, dtype name) -> spec; raises `FormatError`.
    has_bias(entry, whether the model's layer has one) -> whether the stored layer has one.
    as_stored(spec, {tensor name: dtype in safetensors' words}) -> the spec with what a file says
        that its config does not.
    write_layers({module name: (spec, has a bias)}) -> what goes under the first of `layer_keys`.
    is_current(spec) -> False for an old layout, which is read but not computed with;
    modernize(tensors, spec) -> then, the tensors and the spec of the same matrix stored today.
    adopt(config.json) -> one with a `quantization_config`, for layouts without.
    nearest(weights to come near to, wide tensors, wide spec, most) -> the tensors that have changed
        when at most this share of the codes is chosen again, and how many were; None: cannot be.
    """

    spec_class: type[LayerSpec]
    version: str
    pack: Callable[[Any, Any], dict[str, Tensor]]
    unpack: Callable[[Mapping[str, Tensor], Any], Any]
    check: Callable[[Mapping[str, Tensor], Any, str], None]
    widen: Callable[[Mapping[str, Tensor], Any], tuple[dict[str, Tensor], Any]]
    narrow: Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Any], dict[str, Tensor]]
    layer_keys: tuple[str, ...] = ("layers",)
    read_layers: Callable[[Mapping[str, Any]], dict[str, dict[str, Any]]] = layer_list.read_layers
    read_shared: Callable[[Mapping[str, Any]], dict[str, dict[str, Any]]] = lambda _: {}
    read_entry: Callable[[int, int, Mapping[str, Any], str, str], LayerSpec] | None = None
    has_bias: Callable[[Mapping[str, Any], bool], bool] = lambda _, model_has: model_has
    as_stored: Callable[[LayerSpec, Mapping[str, str]], LayerSpec] = _as_it_is
    write_layers: Callable[[Mapping[str, tuple[LayerSpec, bool]]], Any] = layer_list.write_layers
    is_current: Callable[[Any], bool] = lambda _: True
    modernize: Callable[[Mapping[str, Tensor], Any], tuple[Mapping[str, Tensor], Any]] = (
        lambda tensors, spec: (tensors, spec)
    )
    adopt: Callable[[Mapping[str, Any]], Mapping[str, Any]] = _as_it_is
    nearest: (
        Callable[[Tensor, Mapping[str, Tensor], Any, float], tuple[dict[str, Tensor], int]] | None
    ) = None

    def lists_layers(self, stored: Mapping[str, Any]) -> bool:
        """Whether a `quantization_config` describes a packed model, not a wish."""
        return any(stored.get(key) for key in self.layer_keys)

    def make_spec(
        self,
        out_features: int,
        in_features: int,
        fields: Mapping[str, Any],
        where: str,
        dtype: str = "float16",
    ) -> LayerSpec:
        """The spec of one layer from its `config.json` entry (without "modules").

        dtype: that of the model, for formats whose entries do not have the codebooks'.
        A field this version does not know would change how the layer is decoded, so it is refused
        like a missing or impossible one: `FormatError` naming layer `where`.
        """
        if self.read_entry is not None:
            return self.read_entry(out_features, in_features, fields, where, dtype)
        return layer_list.read_entry(self.spec_class, out_features, in_features, fields, where)


FORMATS: dict[str, Format] = {
    "gptvq": Format(
        gptvq.GPTVQSpec,
        gptvq.FORMAT_VERSION,
        gptvq.pack,
        gptvq.unpack,
        gptvq.check,
        trainable.widen_gptvq,
        trainable.narrow_gptvq,
        nearest=nearest.nearest_gptvq,
    ),
    "vptq": Format(
        vptq.VPTQSpec,
        vptq.FORMAT_VERSION,
        vptq.pack,
        vptq.unpack,
        vptq.check,
        trainable.widen_vptq,
        trainable.narrow_vptq,
        layer_keys=("config_for_layers", "shared_layer_config"),
        read_layers=vptq_config.read_layers,
        read_shared=vptq_config.read_shared,
        read_entry=vptq_config.read_entry,
        has_bias=vptq_config.has_bias,
        as_stored=vptq_config.as_stored,
        write_layers=vptq_config.write_layers,
        is_current=lambda spec: spec.storage == "packed",
        modernize=vptq.modernize,
        adopt=vptq_config.adopt,
        nearest=nearest.nearest_vptq,
    ),
    "cvxq": Format(
        cvxq.CVXQSpec,
        cvxq.FORMAT_VERSION,
        cvxq.pack,
        cvxq.unpack,
        cvxq.check,
        cvxq.widen,
        trainable.narrow_cvxq,
        read_layers=cvxq_config.read_layers,
        read_entry=cvxq_config.read_entry,
        has_bias=cvxq_config.has_bias,
        write_layers=cvxq_config.write_layers,
        nearest=nearest.nearest_cvxq,
    ),
}


def adopt(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A whole `config.json` as it would be written today; the same object if it already is.

    Raises `FormatError` for a `quantization_config` that is none.
    """
    found = config.get("quantization_config")
    if isinstance(found, (bool, int, float, str, list)):
        raise FormatError(f"config.json: quantization_config is {found!r:.60}, not an object")
    for known in FORMATS.values():
        config = known.adopt(config)
    return config


def packed_settings(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `quantization_config` in a whole `config.json` of any age, if one of these formats'.

    That of a multimodal model may be in its text model's config. None: the model is not packed, or
    not by these methods.
    """
    config = adopt(config)
    text = config.get("text_config")
    for place in (config, text if isinstance(text, dict) else {}):
        stored = place.get("quantization_config")
        if isinstance(stored, dict):
            known = FORMATS.get(str(stored.get("quant_method")))
            if known is not None and known.lists_layers(stored):
                return dict(stored)
    return None
