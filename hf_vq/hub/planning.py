"""The plan of a model that still lies in its folder or on the Hub: no weight is read.

The architecture is built from `config.json` on the meta device. Where there are safetensors files,
their headers (a few kilobytes) must agree with it.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_vq.config_base import VQConfig
from hf_vq.formats.base import LayerSpec
from hf_vq.hub.checkpoint import StoredTensor, read_headers
from hf_vq.patterns import matches
from hf_vq.plan import LedgerRow, Plan, PlanError, make_plan, measured_plan

logger = logging.getLogger(__name__)

_FLOATS = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""What safetensors calls the dtypes that a model not yet quantized may be stored in."""


def plan_model(
    model: Any, config: VQConfig, *, dtype: Any = "auto", revision: str | None = None
) -> Plan:
    """What `config` would make of every matrix of `model`, without loading it.

    Args:
        model: a folder, a Hub id, a Transformers config, or a model (on any device).
        config: what is wanted, as for `from_pretrained(quantization_config=...)`.
        dtype: of everything that stays dense, as in `from_pretrained`.
        revision: of a Hub id.

    Raises:
        PlanError: as `make_plan`; and if the model is quantized already, or its weight files do not
            belong to its config.
        OSError: there is no such model.
    """
    if isinstance(model, nn.Module):
        return _with_measurement(model, config, make_plan(model, config))
    headers: dict[str, StoredTensor] = {}
    if isinstance(model, (str, Path)):
        from transformers import AutoConfig

        name = str(model)
        architecture = AutoConfig.from_pretrained(
            name, **({} if revision is None else {"revision": revision})
        )
        headers = _headers(name, revision)
    else:
        architecture, name = model, type(model).__name__
    quantized = getattr(architecture, "quantization_config", None)
    if quantized is not None:
        kind = dict(quantized).get("quant_method", "another method")
        raise PlanError(
            f"{name} is already quantized ({getattr(kind, 'value', kind)}); start from the "
            "original model"
        )
    outline = _outline(architecture, _dtype(dtype, architecture, headers))
    checked = _check_headers(outline, headers, name)
    plan = make_plan(outline, config)
    return _with_measurement(outline, config, dataclasses.replace(plan, checked=checked))


def _with_measurement(model: Any, config: VQConfig, plan: Plan) -> Plan:
    """`plan` with bits where the measurement that `config` names says; weights are not needed."""
    if config.measurement is None:
        return plan
    if not Path(config.measurement).exists():
        raise PlanError(
            f"there is no measurement {config.measurement}; quantizing with calibration data and "
            "the same name writes it"
        )
    return measured_plan(model, config, None, plan)


def _headers(name: str, revision: str | None) -> dict[str, StoredTensor]:
    """Name -> dtype and shape of the stored tensors; empty where that cannot be found out."""
    if Path(name).is_dir():
        return read_headers(Path(name))
    from huggingface_hub import get_safetensors_metadata

    try:
        found = get_safetensors_metadata(name, revision=revision)
    except Exception as error:
        # no safetensors, no network (the config may come from the cache), and whatever class the
        # Hub's HTTP library raises: the plan does not depend on it
        logger.warning("the plan of %s rests on its config alone: %s", name, error)
        return {}
    return {
        tensor: StoredTensor(
            info.dtype, tuple(info.shape), info.data_offsets[1] - info.data_offsets[0]
        )
        for file in found.files_metadata.values()
        for tensor, info in file.tensors.items()
    }


def _dtype(asked: Any, architecture: Any, headers: dict[str, StoredTensor]) -> torch.dtype:
    """The dtype that `from_pretrained` would load the model in."""
    if asked is None or asked == "auto":
        asked = getattr(architecture, "dtype", None)
    if asked is None:
        stored = (_FLOATS[t.dtype] for t in headers.values() if t.dtype in _FLOATS)
        asked = next(stored, torch.get_default_dtype())
    found = getattr(torch, asked, None) if isinstance(asked, str) else asked
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype={asked!r} is neither 'auto' nor the name of a torch dtype")
    return found


def _outline(architecture: Any, dtype: torch.dtype) -> Any:
    """The model on the meta device, in the dtypes it would be loaded in."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture, dtype=dtype)
    wide = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        wide |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if dtype in (torch.float16, torch.bfloat16):
        for name, parameter in model.named_parameters():
            if any(matches(key, name) for key in wide):
                parameter.data = parameter.data.float()
    return model


def _check_headers(model: nn.Module, headers: dict[str, StoredTensor], name: str) -> bool:
    """Compare shapes; True if there was anything to compare with.

    Tensors under other names (Transformers renames some while loading) are left alone.
    """
    compared = False
    for parameter, value in model.named_parameters():
        stored = headers.get(parameter)
        if stored is None:
            continue
        compared = True
        if stored.shape != tuple(value.shape) or stored.dtype not in _FLOATS:
            raise PlanError(
                f"{name}: {parameter} is {stored.dtype} {list(stored.shape)} in the weight files, "
                f"and {list(value.shape)} by config.json; is it quantized already, or a file of "
                "another model?"
            )
    return compared


# -- what a reader wants to see ---------------------------------------------------------


class PlanGroup(NamedTuple):
    """Matrices of one shape that become the same. spec: None if they stay dense."""

    rows: list[LedgerRow]
    spec: LayerSpec | None

    @property
    def patterns(self) -> list[str]:
        """The names, with the numbers of layers and siblings drawn together."""
        return name_patterns([row.name for row in self.rows])

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        first = self.rows[0]
        return {
            "names": [row.name for row in self.rows],
            "shape": list(first.shape),
            "params": sum(row.params for row in self.rows),
            "dense_bytes": sum(row.dense_bytes for row in self.rows),
            "bytes": sum(row.bytes for row in self.rows),
            "bits_per_weight": first.bits,
            **({"reason": first.reason} if self.spec is None else {"spec": self.spec.to_dict()}),
        }


def group_rows(plan: Plan) -> list[PlanGroup]:
    """The plan's matrices, those together that become the same; packed ones first."""
    groups: dict[Any, PlanGroup] = {}
    for row in plan.ledger().rows:
        spec = None if row.reason else plan.layers[row.name]
        group = groups.setdefault((row.shape, spec, row.reason), PlanGroup([], spec))
        group.rows.append(row)
    return sorted(groups.values(), key=lambda group: group.spec is None)


def name_patterns(names: list[str]) -> list[str]:
    """["a.0.q", "a.0.k", "a.1.q", "a.1.k"] -> ["a.[0-1].{q,k}"]; every name is in one pattern."""
    numbers: dict[str, list[int]] = {}  # name with its first number taken out -> the numbers
    for name in names:
        found = re.search(r"(?<=\.)\d+(?=\.|$)", name)
        key = name if found is None else f"{name[: found.start()]}[]{name[found.end() :]}"
        numbers.setdefault(key, []).extend([] if found is None else [int(found[0])])
    leaves: dict[tuple[str, str], list[str]] = {}
    for key, values in numbers.items():
        parent, _, leaf = key.replace("[]", _ranges(values)).rpartition(".")
        own = leaf if "[" in leaf else ""  # commas within commas would be hard to read
        leaves.setdefault((parent, own), []).append(leaf)
    return [
        ".".join(filter(None, (parent, same[0] if len(same) == 1 else "{" + ",".join(same) + "}")))
        for (parent, _), same in leaves.items()
    ]


def _ranges(values: list[int]) -> str:
    """[0, 1, 2, 5] -> "[0-2,5]"; [4] -> "4"."""
    spans: list[list[int]] = []
    for value in sorted(values):
        if spans and value == spans[-1][1] + 1:
            spans[-1][1] = value
        else:
            spans.append([value, value])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return text if len(values) == 1 else f"[{text}]"
