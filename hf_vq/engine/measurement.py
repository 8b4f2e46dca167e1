"""Sensitivities in a file, so that the next size or method costs no backward pass.

A safetensors file: under a matrix's name what an error in each of its rows costs (float32), and in
the metadata, under "hf_vq_measurement", JSON with the gains, the shapes, and what was measured on.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hf_vq.engine.sensitivity import Sensitivities, measure
from hf_vq.formats.base import LayerSpec

_KEY = "hf_vq_measurement"


class MeasurementError(ValueError):
    """The file is no measurement, or one of another model."""


def stored(
    path: str | None,
    layers: Mapping[str, LayerSpec],
    model: str | None = None,
    asked: tuple[str, bool] | None = None,
) -> Sensitivities | None:
    """What the file says about `layers`; None where there is no such file (or no path).

    model: the Hub id of the original, where known. asked: `sensitivity` and `weight_energies` of
    the config. Raises `MeasurementError` if the file cannot be read, is of another model (by its
    id, or by the names and shapes of matrices), lacks one, or says something else than `asked`.
    """
    if path is None or not os.path.exists(path):
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[_KEY])
            rows = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        gains, shapes = dict(about["gains"]), dict(about["shapes"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise MeasurementError(
            f"{path} is no measurement of hf_vq ({error}); delete it to measure again, or name "
            "another file"
        ) from None
    known = about.get("base_model")
    if model is not None and known is not None and model != known:
        raise MeasurementError(f"{path} was measured on {known}, not on {model}; name another file")
    has = (about.get("sensitivity", "hidden"), bool(about.get("weight_energies")))
    if asked is not None and asked != has:
        raise MeasurementError(
            f"{path} was measured with sensitivity={has[0]!r} and weight_energies={has[1]}, not "
            f"{asked[0]!r} and {asked[1]}; name another file, or ask for the same"
        )
    for name, spec in layers.items():
        shape = [spec.out_features, spec.in_features]
        if shapes.get(name) != shape:
            what = f"is {shapes[name]} there" if name in shapes else "is not in it"
            raise MeasurementError(
                f"{path} belongs to another model, or to one with other layers left dense: {name} "
                f"{shape} {what}; name another file"
            )
    return Sensitivities(
        {name: float(gains[name]) for name in layers},
        {name: rows[name] for name in layers if name in rows},
    )


def measured(
    path: str | None,
    model: Any,
    layers: Mapping[str, LayerSpec],
    samples: torch.Tensor,
    device: torch.device,
    seed: int,
    recorded: Mapping[str, Any],
    objective: str = "loss",
    by_weight: bool = False,
) -> Sensitivities:
    """Measure, and write the file if a `path` is given; nothing is left of one half written.

    recorded: what the file says about where it comes from (`hf_vq.origin.provenance`). The rest as
    in `hf_vq.engine.sensitivity.measure`.
    """
    found = measure(model, list(layers), samples, device, seed, objective, by_weight)
    if path is None:
        return found
    about = {
        **recorded,
        "sensitivity": objective,
        "weight_energies": by_weight,
        "gains": found.gains,
        "shapes": {n: [s.out_features, s.in_features] for n, s in layers.items()},
    }
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".measuring-", dir=folder) as staging:
        new = os.path.join(staging, "new")
        rows = {n: r.float().cpu().contiguous() for n, r in found.rows.items()}
        save_file(rows, new, {_KEY: json.dumps(about)})
        os.replace(new, path)
    return found
