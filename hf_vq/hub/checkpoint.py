"""What is in a packed checkpoint, read from its config, its report and the files' headers alone.

No weight is read: a safetensors file begins with the length of its header (8 bytes, little endian)
and the header, JSON that gives every tensor's dtype, shape and place.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hf_vq import loading
from hf_vq.files import read_json
from hf_vq.formats import FORMATS, packed_settings
from hf_vq.quantizer import REPORT_NAME
from hf_vq.registry import get_method


class StoredTensor(NamedTuple):
    """One entry of a safetensors header."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class PackedMatrix:
    """One packed matrix: what it was, what it takes, and how well it is represented."""

    name: str
    out_features: int
    in_features: int
    nbytes: int
    relative_error: float | None = None
    seconds: float | None = None

    @property
    def num_weights(self) -> int:
        return self.out_features * self.in_features

    @property
    def bits_per_weight(self) -> float:
        """All-in: everything the matrix is rebuilt from, over its weights."""
        return 8 * self.nbytes / self.num_weights


@dataclass(frozen=True)
class Checkpoint:
    """The size ledger of a packed checkpoint.

    Attributes:
        method: name of the method.
        settings: the stored config, without the list of layers.
        matrices: the packed matrices, in the order of the model.
        dense: every other stored tensor, name -> `StoredTensor`.
        file_bytes: size of all weight files, headers included.
        report: the JSON written while quantizing, or None where it is missing.
    """

    method: str
    settings: dict[str, Any]
    matrices: list[PackedMatrix]
    dense: dict[str, StoredTensor]
    file_bytes: int
    report: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def packed_bytes(self) -> int:
        return sum(m.nbytes for m in self.matrices)

    @property
    def packed_weights(self) -> int:
        return sum(m.num_weights for m in self.matrices)

    @property
    def dense_bytes(self) -> int:
        return sum(t.nbytes for t in self.dense.values())

    @property
    def dense_weights(self) -> int:
        return sum(math.prod(t.shape) for t in self.dense.values())

    @property
    def packed_bits(self) -> float:
        """Bits per weight over the packed matrices, all-in."""
        return 8 * self.packed_bytes / self.packed_weights

    @property
    def model_bits(self) -> float:
        """Bits per weight over everything stored, dense tensors included."""
        total = self.packed_bytes + self.dense_bytes
        return 8 * total / (self.packed_weights + self.dense_weights)


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Read the ledger of the packed model in `folder`.

    Raises:
        ValueError: the folder holds no packed model, or its files and its config disagree.
        OSError: a file is missing or cannot be read.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    folder = Path(folder)
    settings = packed_settings(read_json(folder / "config.json"))
    if settings is None:
        raise ValueError(
            f"{folder} holds no model packed by hf_vq: its config lists no packed layers"
        )
    method = get_method(settings["quant_method"])
    files = weight_files(folder)
    stored: dict[str, StoredTensor] = {}
    for file in files:
        stored.update(read_header(file))
    report_file = folder / REPORT_NAME
    report = read_json(report_file) if report_file.is_file() else None
    measured = _measured(report, report_file)
    model = _architecture(folder)
    layers = loading.find_layers(model, method.config.from_dict(copy.deepcopy(settings)))  # type: ignore[attr-defined]
    if layers.absent:
        raise ValueError(
            f"{layers.absent[0]} is listed as packed, but the architecture has no such layer"
        )
    rename = loading.renames(model, get_model_conversion_mapping(model))
    keys = {rename(key): key for key in stored}  # the model's names -> the files' names
    matrices, dense = [], dict(stored)
    for name, (spec, has_bias) in layers.found.items():
        parts = {part: keys.get(f"{name}.{part}", "") for part in spec.layout()}
        dtypes = {part: stored[key].dtype for part, key in parts.items() if key}
        spec = FORMATS[method.name].as_stored(spec, dtypes)
        nbytes = 0
        for part, layout in spec.layout().items():
            tensor = dense.pop(parts[part], None)
            if tensor is None or tensor.shape != layout.shape:
                found = "is missing" if tensor is None else f"has shape {tensor.shape}"
                raise ValueError(
                    f"{name}.{part} {found}, its config asks for {layout.shape}: the files of "
                    f"{folder} are incomplete or damaged; quantize or download it again"
                )
            nbytes += tensor.nbytes
        if has_bias and model.get_submodule(name).bias is None:  # quantization added it
            bias = dense.pop(keys.get(f"{name}.bias", ""), None)
            nbytes += 0 if bias is None else bias.nbytes
        row = measured.get(name, {})
        shape = (spec.out_features, spec.in_features)
        matrices.append(
            PackedMatrix(name, *shape, nbytes, row.get("relative_error"), row.get("seconds"))
        )
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    matrices.sort(key=lambda m: order[m.name])
    for key in FORMATS[method.name].layer_keys:
        settings.pop(key, None)
    return Checkpoint(
        method=method.name,
        settings=settings,
        matrices=matrices,
        dense=dense,
        file_bytes=sum(file.stat().st_size for file in files),
        report=report,
    )


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Name -> dtype, shape and bytes of a safetensors file; raises ValueError if it is cut off."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise ValueError(f"{file} is truncated: its header is incomplete")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ValueError(f"{file} is no safetensors file: {error}") from None
    header.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != size:
        raise ValueError(f"{file} has {size:,} bytes, its header describes {end:,}: it is damaged")
    return {
        name: StoredTensor(
            entry["dtype"],
            tuple(entry["shape"]),
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """All tensors in the safetensors files of `folder`; empty where there are no such files."""
    stored: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        if file.is_file():
            stored.update(read_header(file))
    return stored


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, whether they exist or not."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict):
            raise ValueError(f"{index} names no weight files; download or quantize the model again")
        return [folder / name for name in sorted(set(places.values()))]
    return [folder / "model.safetensors"]


def _measured(report: dict[str, Any] | None, file: Path) -> dict[str, dict[str, Any]]:
    """Name of a matrix -> its row in the report."""
    rows = [] if report is None else report.get("matrices", [])
    try:
        return {row["name"]: row for row in rows}
    except (TypeError, KeyError):
        raise ValueError(f"{file} lists no matrices as hf_vq does; repair or delete it") from None


def _architecture(folder: Path) -> Any:
    """The dense model that was packed, on the meta device."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    for place in (config, config.get_text_config(decoder=True)):
        place.__dict__.pop("quantization_config", None)  # only the original is wanted
    saved_from = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        if saved_from is not None:
            return saved_from(config)
        return transformers.AutoModelForCausalLM.from_config(config)
