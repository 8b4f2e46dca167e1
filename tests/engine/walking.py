"""What tests of the walk through a model share: shapes of models, and a run of the engine."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from hf_vq.configs import GPTVQConfig
from hf_vq.engine.report import Reporter
from hf_vq.engine.run import quantize_model
from hf_vq.formats.gptvq import GPTVQSpec
from hf_vq.plan import make_plan

QUICK = {"kmeans_iterations": 2, "refine_iterations": 0, "codebook_update": False}
GROUPS = {
    "llama": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ],
    "opt": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.out_proj"],
        ["fc1"],
        ["fc2"],
    ],
    "plain": [["mixer.k", "mixer.q"], ["mixer.o"], ["mlp.gate", "mlp.up"], ["mlp.down"]],
}
PREFIX = {"llama": "model.layers", "opt": "model.decoder.layers", "plain": "layers"}


def plan_for(model):
    """Every linear inside the blocks of a fake model."""
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear and "layers." in n]
    layers = {}
    for name in names:
        rows, columns = model.get_submodule(name).weight.shape
        layers[name] = GPTVQSpec(rows, columns, 2, 16, 32, 32)
    return SimpleNamespace(layers=layers, rows={})


def work(model, samples, config=None, plan=None):
    """Quantize in place; what the reporter knows."""
    config = config or GPTVQConfig(3.0, **QUICK)
    reporter = Reporter()
    quantize_model(model, plan or make_plan(model, config), samples, config, reporter)
    return reporter.to_dict()


def inputs_of(model, name, samples):
    """What a linear reads when the whole model runs, (tokens, in_features) float64."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=samples, use_cache=False)
    hook.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).double()
