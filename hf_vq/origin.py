"""Where a model came from, in terms that mean something on another machine."""

from __future__ import annotations

import os
import re
from typing import Any

_CACHED = re.compile(r"models--((?:[\w.-]+--)?[\w.-]+)[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]")
_HUB_ID = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*")


def base_model_of(name_or_path: str, files: list[str]) -> tuple[str | None, str | None]:
    """(Hub id, commit) of a model loaded from `name_or_path`, whose weights are in `files`.

    (None, None) for a local folder: its path says nothing elsewhere, and may say too much. A
    snapshot in the Hub's cache is traced back to its repository.
    """
    for file in files:
        cached = _CACHED.search(file)
        if cached:
            return cached[1].replace("--", "/", 1), cached[2]
    if not os.path.exists(name_or_path) and _HUB_ID.fullmatch(name_or_path):
        return name_or_path, None
    return None, None


def provenance(
    config: Any, name_or_path: str, samples: Any = None, files: list[str] | None = None
) -> dict[str, Any]:
    """What the `quantization_config` of a packed model says about where it comes from.

    config: with its `dataset` still in it. samples: int64 (n, seqlen) calibration tokens, if any.
    files: the dense weights.
    """
    from hf_vq import __version__
    from hf_vq.engine.calibration import describe_dataset

    base, revision = base_model_of(name_or_path, files or [])
    calibration: dict[str, Any] = {"dataset": describe_dataset(config.dataset), "seed": config.seed}
    if samples is not None:
        calibration.update(nsamples=samples.shape[0], seqlen=samples.shape[1])
    return {
        "hf_vq_version": __version__,
        "base_model": base,
        "base_model_revision": revision,
        "calibration": calibration,
    }
