"""A whole model: measured, planned, quantized; and again, if asked, with what that has shown.

Gradients on the original model say what small errors cost. CVXQ (section 8) measures them on the
quantized one over and over and quantizes anew from the original weights; `reestimations` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_vq.engine.report import Reporter
from hf_vq.engine.run import quantize_model
from hf_vq.engine.sensitivity import measure
from hf_vq.engine.worker import calibration_device
from hf_vq.loading import packed_layers
from hf_vq.plan import Plan, make_plan, measured_plan
from hf_vq.tying import tied_modules


def quantize_whole(
    model: Any,
    config: Any,
    samples: torch.Tensor | None,
    plan: Plan,
    recorded: Mapping[str, Any] | None = None,
) -> tuple[Plan, Reporter]:
    """Quantize `model` in place, by `plan` or one that puts bits where they matter more.

    recorded: as for `make_plan`. Returns the plan of what was packed, and what was reported about
    the last pass. With `config.reestimations` the original weights are kept until the end.
    """
    plan = measured_plan(model, config, samples, plan, recorded)
    rounds = config.reestimations if plan.gains is not None and samples is not None else 0
    originals = _Originals(model, list(plan.layers)) if rounds else None
    reporter = Reporter()
    sizes = quantize_model(model, plan, samples, config, reporter)
    for _ in range(rounds):
        assert originals is not None and samples is not None
        found = measure(
            model,
            list(plan.layers),
            samples,
            calibration_device(config.calibration_device),
            config.seed,
            config.sensitivity,
            config.weight_energies,
            originals.energies,
        )
        originals.put_back(model)
        plan = replace(
            make_plan(model, config, found.gains, recorded), rows=found.rows, checked=plan.checked
        )
        reporter = Reporter()
        sizes = quantize_model(model, plan, samples, config, reporter)
    specs = {name: layer.spec for name, layer in packed_layers(model).items()}
    return plan.as_packed(sizes, specs), reporter


class _Originals:
    """The dense layers that are going to be packed, and how they were tied."""

    def __init__(self, model: Any, names: list[str]) -> None:
        twins = [target for target, source in tied_modules(model).items() if source in names]
        self.modules: dict[str, nn.Module] = {
            name: model.get_submodule(name) for name in [*names, *twins]
        }
        self.keys = dict(getattr(model, "all_tied_weights_keys", None) or {})
        self.energies = {
            name: float(model.get_parameter(f"{name}.weight").detach().float().square().mean())
            for name in names
        }

    def put_back(self, model: Any) -> None:
        for name, module in self.modules.items():
            model.set_submodule(name, module)
        model.all_tied_weights_keys = dict(self.keys)
        model.__dict__.pop("_tied_weights_keys", None)
