"""What the configs of all methods share: three kinds of fields, copies, JSON, overrides.

A config has three kinds of fields. *Stored* fields are settings and go to `config.json`; *recorded*
fields are what quantization found out (the layers, the base model, the calibration data) and go
there too; *runtime* fields (a dataset, a tokenizer, devices) belong to this process only: they are
never serialised, and shared instead of copied, because Transformers deep-copies configs several
times on the way to the quantizer and neither generators nor large datasets survive that.
"""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from hf_vq_kernels.dispatch import check_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_vq.formats import FORMATS, check_version
from hf_vq.patterns import check_pattern, matches
from hf_vq.rules import Choice, Flag, Number, Rule

RUNTIME_FIELDS = (
    "dataset",
    "tokenizer",
    "calibration_device",
    "max_memory",
    "offload_folder",
    "dequantize",
    "backend",
    "measurement",
)
RECORDED_FIELDS = (
    "format_version",
    "hf_vq_version",
    "base_model",
    "base_model_revision",
    "calibration",
)
"""Recorded by all methods; where the layers are depends on the format."""


SHARED_RULES: dict[str, Rule] = {
    "sensitivity": Choice(("loss", "hidden", "pca")),
    "reestimations": Number(0, 10, integer=True),
    "quantize_embeddings": Flag(),
    "quantize_lm_head": Flag(),
}
"""Rules of stored fields that mean the same for all methods."""


class DefaultBits(float):
    """The target in bits that holds if neither `bits` nor `size` is given."""


class VQConfig(QuantizationConfigMixin):
    """What the configs of all methods share: the target, the calibration data, the exceptions.

    Subclasses name their method, their format version and one `Rule` per stored field.
    """

    quant_method: Any
    bits: float | None
    size: str | int | None = None
    seed: int
    nsamples: int
    seqlen: int | None
    allocation: str = "uniform"
    sensitivity: str = "loss"
    reestimations: int = 0
    quantize_embeddings: bool = False
    quantize_lm_head: bool = False
    calibration_inputs: str = "quantized"
    """"original": statistics of the unquantized model's activations, block by block."""
    finetune_steps: int = 0
    """Of layer-wise fine-tuning, for methods whose codebooks can be trained."""
    finetune_lr: float | None = None
    weight_energies: bool = False
    """Whether gradients are squared weight by weight, for methods that can make use of it."""
    bias_correction: bool = False
    """Whether biases take up the mean error, for methods whose format can add them to a layer."""
    method: ClassVar[str] = ""
    rules: ClassVar[dict[str, Rule]] = {}
    layer_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields that `overrides` may set for single layers."""

    def __init__(
        self,
        *,
        modules_to_not_convert: list[str] | None,
        overrides: dict[str, Any] | None,
        dataset: Any,
        tokenizer: Any,
        calibration_device: Any,
        max_memory: dict | None,
        offload_folder: str | None,
        dequantize: bool,
        backend: str | None = None,
        measurement: Any = None,
        **fields: Any,
    ) -> None:
        self.quant_method = self.method
        if fields.get("size") is not None:
            if not isinstance(fields["bits"], (DefaultBits, type(None))):
                raise ValueError(
                    f"size={fields['size']!r} and bits={fields['bits']!r} both say how large the "
                    "model becomes; give one of them"
                )
            fields["bits"] = None
        for name, value in fields.items():
            setattr(self, name, value)
        self.modules_to_not_convert = _check_names(modules_to_not_convert)
        self.overrides = self._check_overrides(overrides)
        self.dataset = _check_dataset(dataset)
        self.tokenizer = tokenizer
        self.calibration_device = _check_device(calibration_device)
        self.max_memory = max_memory
        self.offload_folder = offload_folder
        self.dequantize = bool(dequantize)
        self.backend = _check_backend(backend)
        self.measurement = _check_path("measurement", measurement)
        self.recorded: dict[str, Any] = {}
        self.unknown: dict[str, Any] = {}
        self.unstated: frozenset[str] = frozenset()
        if self.reestimations and self.finetune_steps:
            raise ValueError(
                f"reestimations={self.reestimations} quantizes again from the original weights, "
                f"which finetune_steps={self.finetune_steps} changes in part; set one of them to 0"
            )
        self.check()

    def __setattr__(self, name: str, value: Any) -> None:
        rule = self.rules.get(name)
        object.__setattr__(self, name, rule.check(name, value) if rule else value)

    def check(self) -> None:
        """Refuse combinations of fields that cannot work together; raises ValueError."""

    # -- layers -------------------------------------------------------------------------

    def for_layer(self, name: str) -> VQConfig | None:
        """This config with the overrides for the module `name` applied; None if it stays dense.

        Patterns apply in the order written and later ones win.
        """
        changes: dict[str, Any] | None = {}
        for pattern, value in self.overrides.items():
            if matches(pattern, name):
                changes = {**(changes or {}), **value} if isinstance(value, dict) else None
        if changes is None:
            return None
        if not changes:
            return self
        layer = object.__new__(type(self))
        layer.__dict__.update(self.__dict__)
        for field, value in changes.items():
            setattr(layer, field, value)
        try:
            layer.check()
        except ValueError as error:
            raise ValueError(f"overrides for {name}: {error}") from None
        return layer

    def _check_overrides(self, overrides: dict[str, Any] | None) -> dict[str, Any]:
        if overrides is None:
            return {}
        if not isinstance(overrides, dict):
            raise ValueError(
                "overrides must be a dict of {pattern: {field: value}} or {pattern: False}, "
                f"not {type(overrides).__name__}"
            )
        for pattern, value in overrides.items():
            check_pattern(pattern, "overrides")
            if value is False:
                continue
            if not isinstance(value, dict):
                raise ValueError(
                    f"overrides[{pattern!r}] must be a dict of fields, or False to leave "
                    f"the layers dense; got {value!r}"
                )
            for field, wanted in value.items():
                if field not in self.layer_fields:
                    raise ValueError(
                        f"overrides[{pattern!r}] sets {field!r}, which cannot differ between layers"
                        f"{_suggest(field, self.layer_fields)}; possible fields: "
                        f"{', '.join(sorted(self.layer_fields))}"
                    )
                self.rules[field].check(f"overrides[{pattern!r}].{field}", wanted)
        return overrides

    @property
    def format_version(self) -> str:
        """Version of the on-disk format that this package writes."""
        return FORMATS[self.method].version

    # -- what quantization recorded -----------------------------------------------------

    @classmethod
    def recorded_fields(cls) -> tuple[str, ...]:
        """Keys of `config.json` that say what was done, not what was asked for."""
        return (*RECORDED_FIELDS, *FORMATS[cls.method].layer_keys)

    @property
    def layers(self) -> Any:
        """The packed layers in the words of the format; empty before quantization."""
        return self.recorded.get(FORMATS[self.method].layer_keys[0], [])

    @layers.setter
    def layers(self, value: Any) -> None:
        first, *others = FORMATS[self.method].layer_keys
        self.recorded[first] = value
        for key in others:  # they would add layers to those
            self.recorded.pop(key, None)

    @property
    def is_quantized(self) -> bool:
        """Whether this config describes a packed checkpoint, not a wish."""
        return FORMATS[self.method].lists_layers(self.recorded)

    # -- copies and JSON ----------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> VQConfig:
        new = object.__new__(type(self))
        memo[id(self)] = new
        for key, value in self.__dict__.items():
            new.__dict__[key] = value if key in RUNTIME_FIELDS else copy.deepcopy(value, memo)
        return new

    def __copy__(self) -> VQConfig:
        return self.__deepcopy__({})

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.to_dict() == self.to_dict()  # type: ignore[attr-defined]

    __hash__ = None  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the runtime fields, as plain JSON values."""
        out: dict[str, Any] = {"quant_method": self.method}
        if self.is_quantized:
            out["format_version"] = self.format_version
        for name in (*self.rules, "modules_to_not_convert", "overrides"):
            if name not in self.unstated:
                out[name] = copy.deepcopy(getattr(self, name))
        out.update(copy.deepcopy(self.recorded))
        for name, value in self.unknown.items():
            out.setdefault(name, copy.deepcopy(value))
        return out

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Build a config from its JSON form.

        Keys that this version does not know are kept, and written back, if the dict describes a
        packed checkpoint (a newer writer may have added them); in a dict written by hand they are
        typing errors and refused. Settings that the config of a packed checkpoint does not have
        stay unknown: they are not written back, and `bits` is None. Raises ValueError for a format
        version with a newer major number.
        """
        given = {**config_dict, **kwargs}
        method = given.pop("quant_method", cls.method)
        if getattr(method, "value", method) != cls.method:
            raise ValueError(f"{cls.__name__} reads quant_method {cls.method!r}, not {method!r}")
        recorded = {name: given.pop(name) for name in cls.recorded_fields() if name in given}
        version = recorded.pop("format_version", None)
        if version is not None:
            check_version(version, FORMATS[cls.method].version, cls.method)
        unknown = {}
        unstated: frozenset[str] = frozenset()
        if version is not None or FORMATS[cls.method].lists_layers(recorded):
            settings = {*cls.rules, "modules_to_not_convert", "overrides"}
            known = {*settings, *RUNTIME_FIELDS}
            unknown = {name: given.pop(name) for name in list(given) if name not in known}
            unstated = frozenset(settings - given.keys())
        try:
            config = cls(**given)
        except ValueError as error:
            if version is None:
                raise
            raise ValueError(f"the checkpoint's config.json: {error}") from None
        config.recorded, config.unknown, config.unstated = recorded, unknown, unstated
        if "bits" in unstated:
            config.bits = None
        return (config, {}) if return_unused_kwargs else config

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a config passed for an already packed checkpoint may change about loading it.

        Transformers ignores all other fields, with a warning. `asked_to_quantize` lets the
        quantizer notice that they were meant to do something.
        """
        return {
            "dequantize": self.dequantize,
            "backend": self.backend,
            "asked_to_quantize": not (self.dequantize or self.backend or self.is_quantized),
        }


def _suggest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _check_backend(name: Any) -> str | None:
    if name is None or name == "auto":
        return None
    try:
        check_name(name)
    except ValueError as error:
        raise ValueError(f"backend: {error}") from None
    return str(name)


def given(arguments: dict[str, Any]) -> dict[str, Any]:
    """What the `__init__` of a config was called with, from the `locals()` of its first line.

    Raises ValueError for a field that the config does not have.
    """
    fields = {k: v for k, v in arguments.items() if k not in ("self", "unknown", "__class__")}
    for name in arguments["unknown"]:
        cls = type(arguments["self"])
        known = (*cls.rules, "modules_to_not_convert", "overrides", *RUNTIME_FIELDS)
        raise ValueError(
            f"{cls.__name__} has no field {name!r}{_suggest(name, known)}; its fields are "
            f"{', '.join(known)}"
        )
    return fields


def _check_names(names: Any) -> list[str] | None:
    if names is None:
        return None
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, (list, tuple)):
        raise ValueError(f"modules_to_not_convert must be a list of names, not {names!r}")
    for name in names:
        check_pattern(name, "modules_to_not_convert")
    return list(names)


def _check_dataset(dataset: Any) -> Any:
    if isinstance(dataset, (bool, int, float)):
        raise ValueError(
            f"dataset={dataset!r}: pass a list of strings, a .txt, .jsonl or .npy file, a datasets "
            "id such as 'wikitext:wikitext-2-raw-v1:train', a Dataset, token ids, or None "
            "(data-free)"
        )
    if isinstance(dataset, (str, list, tuple)) and len(dataset) == 0:
        raise ValueError("dataset is empty; pass texts or tokens, or None to quantize without data")
    return dataset


def _check_path(name: str, path: Any) -> str | None:
    if path is not None and not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"{name} must be the name of a file, not {path!r}")
    return None if path is None else os.fspath(path)


def _check_device(device: Any) -> Any:
    if device is not None:
        try:
            torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"calibration_device={device!r} is no torch device, such as 'cpu' or 'cuda:0' "
                f"({error})"
            ) from None
    return device
