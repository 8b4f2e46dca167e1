"""config + model shapes -> what every matrix becomes, to the byte, before anything runs.

Needs shapes only, so it works on a model on the meta device. A matrix is a parameter with two or
more dimensions; the plan accounts for every one of them, the packed and the dense.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_vq.budget import UnreachableError, Wanted, choose_specs
from hf_vq.configs import VQConfig
from hf_vq.engine.blocks import find_blocks
from hf_vq.footprint import SavedSize
from hf_vq.formats.base import LayerSpec
from hf_vq.origin import provenance
from hf_vq.patterns import matches
from hf_vq.registry import get_method
from hf_vq.sizing import SizeError, fit_size
from hf_vq.tying import tied_modules

_MIN_WEIGHTS = 1024
"""Smaller matrices stay dense: a codebook would cost as much as they do."""


class PlanError(ValueError):
    """The model cannot be quantized as asked; says which matrix, why, and what to do."""


class LedgerRow(NamedTuple):
    """One matrix: its size now and what it will cost. bits: per weight, all-in."""

    name: str
    shape: tuple[int, ...]
    params: int
    dense_bytes: int
    bytes: int
    bits: float
    reason: str  # why it stays dense; "" for a packed matrix


_EXPECTED = ("an embedding", "the output head", "tied to", "listed in", "left dense", "too small")
"""How the reasons begin that nobody is surprised by."""


@dataclass(frozen=True)
class Ledger:
    """Rows for every matrix, and totals; sizes in bytes, vectors (norms, biases) in the totals."""

    rows: list[LedgerRow]
    packed_params: int
    packed_bytes: int
    model_params: int
    model_bytes: int
    model_dense_bytes: int

    @property
    def decoder_bits(self) -> float:
        """All-in bits per weight over the quantized matrices."""
        return 8 * self.packed_bytes / max(self.packed_params, 1)

    @property
    def model_bits(self) -> float:
        """Bits per parameter over the whole model, tied weights counted once."""
        return 8 * self.model_bytes / max(self.model_params, 1)

    def to_dict(self) -> dict[str, Any]:
        """Totals, as plain JSON values."""
        return {
            "decoder_bits": self.decoder_bits,
            "model_bits": self.model_bits,
            "packed_params": self.packed_params,
            "packed_bytes": self.packed_bytes,
            "model_params": self.model_params,
            "model_bytes": self.model_bytes,
            "model_dense_bytes": self.model_dense_bytes,
        }


@dataclass(frozen=True)
class Plan:
    """What every matrix becomes.

    layers: module name -> spec, in execution order of the model's definition.
    dense: parameter or module name -> why it is left as it is.
    checked: whether shapes were compared with those of the weight files (`plan_model`).
    rows: matrix -> what an error in each of its rows costs, where that was measured (see
        `hf_vq.engine.sensitivity.Sensitivities`).
    """

    layers: dict[str, LayerSpec]
    dense: dict[str, str]
    gains: Mapping[str, float] | None  # what `make_plan` was given
    _rows: list[LedgerRow] = field(repr=False)
    _other: tuple[int, int] = field(repr=False)  # parameters and bytes outside of the rows
    checked: bool = False
    rows: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)
    size: SavedSize | None = None  # of the files, where a size was asked for

    def as_packed(self, sizes: Mapping[str, int], layers: Mapping[str, LayerSpec]) -> Plan:
        """The plan with what every matrix has become, and its bytes: some methods leave a few."""
        rows = [
            row._replace(bytes=(size := sizes.get(row.name, row.bytes)), bits=8 * size / row.params)
            for row in self._rows
        ]
        return replace(
            self, _rows=rows, layers={n: layers.get(n, s) for n, s in self.layers.items()}
        )

    def surprises(self) -> list[LedgerRow]:
        """Matrices that cannot be packed although nobody asked for them to stay dense."""
        rows = self.ledger().rows
        return [row for row in rows if row.reason and not row.reason.startswith(_EXPECTED)]

    def ledger(self) -> Ledger:
        """The exact size of every matrix and of the model."""
        packed = [row for row in self._rows if not row.reason]
        params, size = self._other
        return Ledger(
            rows=self._rows,
            packed_params=sum(row.params for row in packed),
            packed_bytes=sum(row.bytes for row in packed),
            model_params=params + sum(row.params for row in self._rows),
            model_bytes=size + sum(row.bytes for row in self._rows),
            model_dense_bytes=size + sum(row.dense_bytes for row in self._rows),
        )


def make_plan(
    model: nn.Module,
    config: VQConfig,
    gains: Mapping[str, float] | None = None,
    recorded: Mapping[str, Any] | None = None,
) -> Plan:
    """Choose a spec for every matrix that `config` asks to quantize.

    gains: as `hf_vq.engine.sensitivity.measure` finds them; None: all weights count the same.
    recorded: what `config.json` will say beside the layers (`hf_vq.origin.provenance`), which
    counts towards `config.size`; None: what it says without calibration data. Raises `PlanError` if
    a pattern matches nothing, a target is out of reach, or nothing would be quantized.
    """
    _check_model(model)
    method = get_method(config.method)
    reasons = _reasons(model, config)
    _check_patterns(model, config)
    wanted: dict[str, Wanted] = {}
    added: dict[str, int] = {}
    dense: dict[str, str] = {}
    matrices: list[tuple[str, torch.Tensor]] = []
    other = [0, 0]
    twins = _tied_targets(model)
    for name, param in model.named_parameters():
        if name in twins:
            continue
        owner, _, leaf = name.rpartition(".")
        size = param.numel() * param.element_size()
        if param.ndim < 2:
            other[0] += param.numel()
            other[1] += size
            continue
        label = owner if leaf == "weight" else name
        reason = reasons.get(owner) if leaf == "weight" else None
        if reason is None:
            reason = _unsupported(name, param)
        if reason == "" and param.numel() < _MIN_WEIGHTS:
            reason = f"too small ({param.numel()} weights)"
        layer = config.for_layer(owner) if reason == "" else None
        if reason == "" and layer is None:
            reason = "left dense by overrides"
        matrices.append((label, param))
        if layer is not None:
            wanted[label] = Wanted(tuple(param.shape), layer)
            if layer.bias_correction and getattr(model.get_submodule(owner), "bias", param) is None:
                added[label] = param.shape[0] * param.element_size()
        else:
            dense[label] = reason
    stored = model.state_dict(keep_vars=True).keys()  # some buffers are, most are not
    other[1] += sum(b.numel() * b.element_size() for n, b in model.named_buffers() if n in stored)
    if not wanted:
        why = "; ".join(f"{n}: {r}" for n, r in list(dense.items())[:5]) or "it has no matrices"
        raise PlanError(f"nothing to quantize in {type(model).__name__} ({why})")
    files: SavedSize | None = None
    try:
        if config.size is None:
            layers = choose_specs(method, wanted, gains, added)
        else:
            if recorded is None:
                recorded = provenance(config, getattr(model, "name_or_path", ""))
            layers, files, _ = fit_size(model, config, method, wanted, gains, recorded)
    except (UnreachableError, SizeError) as error:
        raise PlanError(str(error)) from None
    rows = [
        _row(name, param, layers.get(name), dense.get(name, ""), added.get(name, 0))
        for name, param in matrices
    ]
    return Plan(layers, dense, gains, rows, (other[0], other[1]), size=files)


def measured_plan(
    model: nn.Module,
    config: VQConfig,
    samples: torch.Tensor | None,
    plan: Plan,
    recorded: Mapping[str, Any] | None = None,
) -> Plan:
    """`plan` once more, with bits where they matter most; as it is, if config does not ask for it.

    A measurement that `config` names is used if there is one, and otherwise written. model: with
    its weights, if it comes to measuring. samples: int64 (n, seqlen) tokens; without them nothing
    is measured. recorded: as for `make_plan`. Raises `SensitivityError` and `MeasurementError` (in
    hf_vq.engine).
    """
    targets = [config.for_layer(name) for name in plan.layers]
    shared = sum(
        layer is not None and (layer.bits is not None or layer.size is not None)
        for layer in targets
    )
    if config.allocation != "measured" or shared < 2:
        return plan
    from hf_vq.engine.measurement import measured, stored
    from hf_vq.engine.worker import calibration_device

    if recorded is None:
        recorded = provenance(config, getattr(model, "name_or_path", ""), samples)
    asked = (config.sensitivity, config.weight_energies)
    found = stored(config.measurement, plan.layers, recorded["base_model"], asked)
    if found is None:
        if samples is None:
            return plan
        device = calibration_device(config.calibration_device)
        found = measured(
            config.measurement,
            model,
            plan.layers,
            samples,
            device,
            config.seed,
            recorded,
            config.sensitivity,
            config.weight_energies,
        )
    new = make_plan(model, config, found.gains, recorded)
    return replace(new, rows=found.rows, checked=plan.checked)


def _row(
    name: str, param: torch.Tensor, spec: LayerSpec | None, reason: str, added: int
) -> LedgerRow:
    size = param.numel() * param.element_size()
    cost = size if spec is None else spec.nbytes + added
    shape = tuple(param.shape)
    return LedgerRow(name, shape, param.numel(), size, cost, 8 * cost / param.numel(), reason)


def _check_model(model: nn.Module) -> None:
    name = type(model).__name__
    if any(isinstance(getattr(m, "spec", None), LayerSpec) for m in model.modules()):
        raise PlanError(f"this {name} is already quantized; start from the original model")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise PlanError(f"{name} is an encoder-decoder; hf_vq quantizes decoder-only models")


def _reasons(model: nn.Module, config: VQConfig) -> dict[str, str]:
    """Module name -> why its weight stays dense, "" if it is to be quantized."""
    blocks = tuple(f"{name}." for name in find_blocks(model))
    tied = _tied_modules(model)
    head, embedding = _output_embeddings(model), _input_embeddings(model)
    skip = config.modules_to_not_convert or []
    # Transformers would load the scales of a packed layer there in float32
    wide = [
        key
        for field in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
        for key in getattr(model, field, None) or ()
    ]
    out: dict[str, str] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter):
            continue
        listed = next((p for p in skip if matches(p, name)), None)
        end = module is head or module is embedding
        if isinstance(module, nn.Embedding) and module is not embedding:
            out[name] = "an embedding of something else than tokens"
        elif end and not (_asked_for(config, module is head, name in tied)):
            out[name] = "the output head" if module is head else "an embedding"
        elif name in tied and not (end and _ends_tied(model)):
            out[name] = "tied to another weight"
        elif type(module) not in (nn.Linear, nn.Embedding):
            out[name] = f"a {type(module).__name__}, not a plain nn.Linear or nn.Embedding"
        elif any(matches(key, name) for key in wide):
            out[name] = "kept in float32 by the model"
        elif not (end or name.startswith(blocks or ("\0",))):
            out[name] = "outside the decoder blocks"
        elif listed is not None:
            out[name] = f"listed in modules_to_not_convert ({listed!r})"
        else:
            out[name] = ""
    return out


def _unsupported(name: str, param: torch.Tensor) -> str:
    if param.ndim == 3:
        return f"{param.shape[0]} experts' matrices fused into one parameter"
    return f"a {param.ndim}-dimensional parameter that is no linear layer's weight"


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return get() if get is not None else None


def _input_embeddings(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_input_embeddings", None)
    return get() if get is not None else None


def _asked_for(config: VQConfig, is_head: bool, tied: bool) -> bool:
    """Whether `config` wants this end of the model packed; tied ends are one matrix."""
    if tied:
        return config.quantize_embeddings or config.quantize_lm_head
    return config.quantize_lm_head if is_head else config.quantize_embeddings


def _ends_tied(model: nn.Module) -> bool:
    """Whether the head is tied to the embedding, and nothing else to either."""
    ends = {id(_output_embeddings(model)), id(_input_embeddings(model))}
    pairs = tied_modules(model).items()
    return all({id(model.get_submodule(n)) for n in pair} == ends for pair in pairs)


def _tied_targets(model: nn.Module) -> set[str]:
    """Parameters that are, or will be once `tie_weights` has run, another one under a second name.

    While Transformers loads a model they still stand apart.
    """
    keys: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    names = {name for name, _ in model.named_parameters()}
    return {target for target, source in keys.items() if source in names}


def _tied_modules(model: nn.Module) -> set[str]:
    """Modules whose weights are shared, whether or not `tie_weights` has run yet."""
    keys: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {k.removesuffix(".weight") for pair in keys.items() for k in pair}


def _check_patterns(model: nn.Module, config: VQConfig) -> None:
    """Refuse a pattern that picks no module: it is a typing error, or it is for another model."""
    names = [name for name, _ in model.named_modules() if name]
    kinds = (nn.Linear, nn.Embedding) if config.quantize_embeddings else nn.Linear
    linears = [n for n, m in model.named_modules() if isinstance(m, kinds)]
    for where, patterns in (
        ("overrides", list(config.overrides)),
        ("modules_to_not_convert", config.modules_to_not_convert or []),
    ):
        pool = linears if where == "overrides" else names
        for pattern in patterns:
            if any(matches(pattern, name) for name in pool):
                continue
            what = "linear layer" if pool is linears else "module"
            near = ", ".join(_near(pattern, pool))
            raise PlanError(
                f"{where}: {pattern!r} matches no {what} of {type(model).__name__}"
                f"{f'; near: {near}' * bool(near)}; `hf-vq plan` without it lists them"
            )


def _near(pattern: str, names: list[str]) -> list[str]:
    plain = pattern.removeprefix("re:").replace(".*", "").replace("\\", "").strip("*^$")
    tails: dict[str, str] = {}
    for name in names:
        parts = name.split(".")
        for i in range(len(parts)):
            tails.setdefault(".".join(parts[i:]), name)
    close = difflib.get_close_matches(plain.strip("."), list(tails), n=3, cutoff=0.5)
    return list(dict.fromkeys(tails[c] for c in close))
