"""What a user may ask for, refused where it is written.

A config has three kinds of fields. *Stored* fields are settings and go to `config.json`; *recorded*
fields are what quantization found out (the layers, the base model, the calibration data) and go
there too; *runtime* fields (a dataset, a tokenizer, devices) belong to this process only: they are
never serialised, and shared instead of copied, because Transformers deep-copies configs several
times on the way to the quantizer and neither generators nor large datasets survive that.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
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
)
RECORDED_FIELDS = (
    "format_version",
    "hf_vq_version",
    "base_model",
    "base_model_revision",
    "calibration",
    "layers",
)


class VQConfig(QuantizationConfigMixin):
    """What the configs of all methods share: the target, the calibration data, the exceptions.

    Subclasses name their method, their format version and one `Rule` per stored field.
    """

    quant_method: Any
    bits: float | None
    seed: int
    nsamples: int
    seqlen: int | None
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
        **fields: Any,
    ) -> None:
        self.quant_method = self.method
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
        self.recorded: dict[str, Any] = {}
        self.unknown: dict[str, Any] = {}
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

    @property
    def layers(self) -> list[dict[str, Any]]:
        """[{"modules": [names], **fields of their spec}, ...]; empty before quantization."""
        return self.recorded.get("layers", [])

    @layers.setter
    def layers(self, value: list[dict[str, Any]]) -> None:
        self.recorded["layers"] = value

    @property
    def is_quantized(self) -> bool:
        """Whether this config describes a packed checkpoint, not a wish."""
        return bool(self.recorded.get("layers"))

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
        typing errors and refused. Raises ValueError for a format version with a newer major number.
        """
        given = {**config_dict, **kwargs}
        method = given.pop("quant_method", cls.method)
        if getattr(method, "value", method) != cls.method:
            raise ValueError(f"{cls.__name__} reads quant_method {cls.method!r}, not {method!r}")
        recorded = {name: given.pop(name) for name in RECORDED_FIELDS if name in given}
        version = recorded.pop("format_version", None)
        if version is not None:
            check_version(version, FORMATS[cls.method].version, cls.method)
        unknown = {}
        if version is not None or recorded.get("layers"):
            known = {*cls.rules, *RUNTIME_FIELDS, "modules_to_not_convert", "overrides"}
            unknown = {name: given.pop(name) for name in list(given) if name not in known}
        config = cls(**given)
        config.recorded, config.unknown = recorded, unknown
        return (config, {}) if return_unused_kwargs else config

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a config passed for an already packed checkpoint may change about loading it.

        Transformers ignores all other fields, with a warning. `asked_to_quantize` lets the
        quantizer notice that they were meant to do something.
        """
        return {
            "dequantize": self.dequantize,
            "asked_to_quantize": not self.dequantize and not self.is_quantized,
        }


class GPTVQConfig(VQConfig):
    """GPTVQ (arXiv 2402.15319): codebooks of vectors of consecutive input columns, error feedback.

    Args:
        bits: all-in target over the quantized weights (codes, codebooks and scales together), 1 to
            8. None: whatever `vector_dim`, `index_bits` and `group_size`, then all required, cost.
        vector_dim: weights per vector, 1, 2, 4 or 8. None: chosen per matrix.
        index_bits: bits per vector's index, 1 to 16; a codebook has 2**index_bits vectors.
        group_size: weights that share one codebook, 8 to 2**31.
        group_columns: width of a stripe of columns, 1 to 65536; a multiple of vector_dim.
        codebook_dtype: "int8", "int4" or "float16".
        scale_block: columns that share one 4-bit scale in a row, 0 (no scales) or 8 to 256.
        scale_domain: "log" or "linear" spacing of those scales.
        svd_rank: rank of the factors that 1-D codebooks are stored as, 1 to 256; 0 or None: none.
        kmeans_init: "mahalanobis" or "kmeans++".
        kmeans_iterations: 0 to 1000 Lloyd iterations per codebook.
        damping: 0 to 1, share of the Hessian's mean diagonal that is added to its diagonal.
        refine_iterations: 0 to 100 rounds of refining codes and codebooks after the sweep.
        codebook_update: solve for the codebooks once the codes are fixed.
        true_sequential: q/k/v, o, gate/up and down one after another, each on inputs from already
            quantized layers; False: one pass per block.
        seed: 0 to 2**63-1, for the calibration windows and k-means++.
        nsamples: 1 to 1,000,000 calibration windows.
        seqlen: 8 to 1,048,576 tokens per window. None: the model's context, at most 2048.
        modules_to_not_convert: names or patterns of modules to leave dense.
        overrides: {pattern: {field: value}} or {pattern: False} (leave dense). A pattern is
            "re:<regular expression>" for the whole name, a glob, or a run of name components
            ("down_proj", "layers.0"). Later patterns win.
        dataset: calibration data (see `hf_vq.engine.calibration`). None: data-free. Runtime only.
        tokenizer: tokenizer, or the name of one. None: the model's own. Runtime only.
        calibration_device: where blocks are calibrated. None: a GPU if there is one. Runtime only.
        max_memory, offload_folder: for dispatching the packed model, as in `from_pretrained`,
            which does not hand its own on. Runtime only.
        dequantize: load a packed checkpoint as a dense model. Runtime only.

    Raises:
        ValueError: a field is outside its range, or fields contradict each other.
    """

    method: ClassVar[str] = "gptvq"
    rules: ClassVar[dict[str, Rule]] = {
        "bits": Number(1, 8, optional=True),
        "vector_dim": Choice((1, 2, 4, 8), optional=True),
        "index_bits": Number(1, 16, integer=True, optional=True),
        "group_size": Number(8, 2**31, integer=True, optional=True),
        "group_columns": Number(1, 65536, integer=True, optional=True),
        "codebook_dtype": Choice(("int8", "int4", "float16")),
        "scale_block": Number(8, 256, integer=True, optional=True, also=(0,)),
        "scale_domain": Choice(("log", "linear")),
        "svd_rank": Number(1, 256, integer=True, optional=True, also=(0,)),
        "kmeans_init": Choice(("mahalanobis", "kmeans++")),
        "kmeans_iterations": Number(0, 1000, integer=True),
        "damping": Number(0, 1),
        "refine_iterations": Number(0, 100, integer=True),
        "codebook_update": Flag(),
        "true_sequential": Flag(),
        "seed": Number(0, 2**63 - 1, integer=True),
        "nsamples": Number(1, 1_000_000, integer=True),
        "seqlen": Number(8, 1_048_576, integer=True, optional=True),
    }
    spec_fields: ClassVar[tuple[str, ...]] = (
        "vector_dim",
        "index_bits",
        "group_size",
        "group_columns",
        "codebook_dtype",
        "scale_block",
        "scale_domain",
        "svd_rank",
    )
    layer_fields: ClassVar[frozenset[str]] = frozenset(rules) - {
        "true_sequential",
        "seed",
        "nsamples",
        "seqlen",
    }

    def __init__(
        self,
        bits: float | None = 2.25,
        *,
        vector_dim: int | None = None,
        index_bits: int | None = None,
        group_size: int | None = None,
        group_columns: int | None = None,
        codebook_dtype: str = "int8",
        scale_block: int | None = None,
        scale_domain: str = "log",
        svd_rank: int | None = None,
        kmeans_init: str = "mahalanobis",
        kmeans_iterations: int = 30,
        damping: float = 0.01,
        refine_iterations: int = 4,
        codebook_update: bool = True,
        true_sequential: bool = True,
        seed: int = 0,
        nsamples: int = 128,
        seqlen: int | None = None,
        modules_to_not_convert: list[str] | None = None,
        overrides: dict[str, Any] | None = None,
        dataset: Any = None,
        tokenizer: Any = None,
        calibration_device: Any = None,
        max_memory: dict | None = None,
        offload_folder: str | None = None,
        dequantize: bool = False,
        **unknown: Any,
    ) -> None:
        _refuse_unknown(type(self), unknown)
        super().__init__(
            modules_to_not_convert=modules_to_not_convert,
            overrides=overrides,
            dataset=dataset,
            tokenizer=tokenizer,
            calibration_device=calibration_device,
            max_memory=max_memory,
            offload_folder=offload_folder,
            dequantize=dequantize,
            bits=bits,
            vector_dim=vector_dim,
            index_bits=index_bits,
            group_size=group_size,
            group_columns=group_columns,
            codebook_dtype=codebook_dtype,
            scale_block=scale_block,
            scale_domain=scale_domain,
            svd_rank=svd_rank,
            kmeans_init=kmeans_init,
            kmeans_iterations=kmeans_iterations,
            damping=damping,
            refine_iterations=refine_iterations,
            codebook_update=codebook_update,
            true_sequential=true_sequential,
            seed=seed,
            nsamples=nsamples,
            seqlen=seqlen,
        )

    vector_dim: int | None
    index_bits: int | None
    group_size: int | None
    group_columns: int | None
    codebook_dtype: str
    scale_block: int | None
    scale_domain: str
    svd_rank: int | None
    kmeans_init: str
    kmeans_iterations: int
    damping: float
    refine_iterations: int
    codebook_update: bool
    true_sequential: bool

    def check(self) -> None:
        dim, index_bits = self.vector_dim, self.index_bits
        if self.bits is None and not (dim and index_bits and self.group_size):
            raise ValueError(
                "bits=None leaves the size to the geometry: give vector_dim, index_bits and "
                "group_size, or a target in bits from 1 to 8"
            )
        if dim and index_bits and self.bits is not None and index_bits / dim >= self.bits:
            raise ValueError(
                f"vector_dim={dim} with index_bits={index_bits} takes {index_bits / dim:g} bits "
                f"per weight for the indices alone, which leaves nothing of "
                f"bits={self.bits:g} for the codebooks; raise bits, lower index_bits, or pass bits=None"
            )
        if dim:
            for name in ("group_columns", "scale_block", "group_size"):
                value = getattr(self, name)
                if value and value % dim:
                    raise ValueError(
                        f"{name}={value} must be a multiple of vector_dim={dim}, because a vector "
                        "cannot lie in two groups"
                    )
        if self.svd_rank:
            if dim not in (None, 1):
                raise ValueError(f"svd_rank needs vector_dim=1, not {dim}")
            if self.codebook_dtype == "int4":
                raise ValueError('svd_rank needs codebook_dtype "int8" or "float16", not "int4"')
            if index_bits and self.svd_rank >= 2**index_bits:
                raise ValueError(
                    f"svd_rank={self.svd_rank} saves nothing with {2**index_bits} centroids; the "
                    f"range is 1 to {2**index_bits - 1}"
                )


def _suggest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _refuse_unknown(cls: type[VQConfig], unknown: dict[str, Any]) -> None:
    if unknown:
        known = (*cls.rules, "modules_to_not_convert", "overrides", *RUNTIME_FIELDS)
        name = next(iter(unknown))
        raise ValueError(
            f"{cls.__name__} has no field {name!r}{_suggest(name, known)}; its fields are "
            f"{', '.join(known)}"
        )


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
