"""`evaluation.json`: what was measured of a packed model, tied to the weights it was measured of.

The record names the SHA-256 of the model's tensors. Where a folder's weights have another one (the
model was quantized again, or trained), the figures are not that model's and count as none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from hf_vq.files import read_json, write_text
from hf_vq.hub.checkpoint import weight_files
from hf_vq.quantizer import EVALUATION_NAME

_CHUNK = 1 << 24


def weights_digest(folder: str | Path) -> str:
    """SHA-256 (hexadecimal) of all tensors in a folder's safetensors files.

    Hashed are name, dtype, shape and bytes of every tensor, in the order of their names, so that
    it does not matter how the tensors are spread over files. Raises OSError for missing files.
    """
    files = [file.resolve() for file in weight_files(Path(folder))]
    return _digest(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=8)  # pushing asks several times, and a large model takes seconds
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    places: dict[str, tuple[Path, int, int, str]] = {}
    for file, _, _ in files:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                places[name] = (file, begin, end, f"{entry['dtype']}{entry['shape']}")
    digest = hashlib.sha256()
    for name in sorted(places):
        file, begin, end, kind = places[name]
        digest.update(f"{name} {kind}\n".encode())
        with open(file, "rb") as stream:
            stream.seek(begin)
            while begin < end:
                part = stream.read(min(_CHUNK, end - begin))
                if not part:
                    raise OSError(f"{file} ends inside of {name}: it is damaged")
                digest.update(part)
                begin += len(part)
    return digest.hexdigest()


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """The record in `folder`; None without one, or if it is of other weights (see `is_stale`)."""
    record = _load(Path(folder))
    if record is None or record.get("weights_sha256") != weights_digest(folder):
        return None
    return record


def is_stale(folder: str | Path) -> bool:
    """Whether `folder` has a record that is not of its weights."""
    return (Path(folder) / EVALUATION_NAME).exists() and read_record(folder) is None


def drop_stale(folder: str | Path) -> None:
    """Delete the record in `folder` if it is of other weights."""
    if is_stale(folder):
        (Path(folder) / EVALUATION_NAME).unlink()


def add_to_record(
    folder: str | Path,
    evaluation: dict[str, Any] | None = None,
    tasks: Iterable[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Write what was measured into the record of `folder`; returns all of it.

    evaluation: `hf_vq.evaluation.Evaluation.to_dict()` with "dataset"; takes the place of an
    earlier one on the same data under the same protocol. tasks: `hf_vq.evaluation.harness` rows;
    one takes the place of an earlier one of the same task, metric and limit. What was measured of
    other weights is dropped.
    """
    record = read_record(folder) or {"format": 1, "weights_sha256": weights_digest(folder)}
    if evaluation is not None:
        old = record.get("evaluations", [])
        record["evaluations"] = _replace(old, [evaluation], ("dataset", "seqlen", "windows"))
    tasks = list(tasks)
    if tasks:
        record["tasks"] = _replace(
            record.get("tasks", []), tasks, ("task", "metric", "filter", "limit")
        )
    text = json.dumps(record, indent=2) + "\n"
    write_text(Path(folder) / EVALUATION_NAME, text)
    return record


def _replace(
    old: list[dict[str, Any]], new: list[dict[str, Any]], key: tuple[str, ...]
) -> list[dict[str, Any]]:
    def identity(row: dict[str, Any]) -> tuple:
        return tuple(row.get(name) for name in key)

    fresh = {identity(row) for row in new}
    return [*(row for row in old if identity(row) not in fresh), *new]


def _load(folder: Path) -> dict[str, Any] | None:
    try:
        return read_json(folder / EVALUATION_NAME)
    except FileNotFoundError:
        return None
