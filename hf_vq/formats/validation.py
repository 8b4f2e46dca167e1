"""Refusing packed tensors that do not fit what the config says about them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from hf_vq.formats.base import LayerSpec


class FormatError(ValueError):
    """Packed data that cannot be decoded: says which layer, what is wrong and what to do."""


def check_version(found: object, supported: str, method: str) -> None:
    """Refuse a format this package cannot read.

    Versions are "major.minor". Every minor of the supported major can be read (minors only add
    what a reader may ignore); another major cannot. Raises `FormatError`.
    """
    match = re.fullmatch(r"(\d+)\.(\d+)", found) if isinstance(found, str) else None
    if match is None:
        raise FormatError(
            f"{method}: format_version is {found!r}, expected a string like {supported!r}; "
            "the checkpoint's config.json is damaged or was not written by hf_vq."
        )
    major, ours = int(match[1]), int(supported.split(".")[0])
    if major > ours:
        raise FormatError(
            f"{method}: the checkpoint has format version {found}, newer than the {supported} that "
            "this hf_vq reads. Upgrade with `pip install -U hf-vq`."
        )
    if major < ours:
        raise FormatError(
            f"{method}: the checkpoint has format version {found}; this hf_vq reads {ours}.x only. "
            "Quantize the model again, or load it with the hf_vq release that wrote it."
        )


def check_layout(tensors: Mapping[str, Tensor], spec: LayerSpec, where: str) -> None:
    """Refuse tensors that are missing, unexpected, of another shape or of another dtype.

    All that is wrong with layer `where` is reported in one `FormatError`. Looks at no value, so
    meta tensors are fine.
    """
    layout = spec.layout()
    problems = [f"missing tensor {name!r}" for name in layout if name not in tensors]
    problems += [f"unexpected tensor {name!r}" for name in tensors if name not in layout]
    for name, (shape, dtype) in layout.items():
        if name not in tensors:
            continue
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            problems.append(f"{name!r} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype != dtype:
            problems.append(f"{name!r} has dtype {tensor.dtype}, expected {dtype}")
    if problems:
        raise FormatError(
            f"{where}: {'; '.join(problems)}. The file does not match its config.json "
            f"({spec.method}, {spec.out_features}x{spec.in_features}): it is incomplete, damaged "
            "or belongs to another model; download or quantize it again."
        )
