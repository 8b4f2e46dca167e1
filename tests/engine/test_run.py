"""A walk through a model packs what is planned and nothing else, and nothing silently."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_vq.configs import GPTVQConfig
from hf_vq.engine import run
from hf_vq.engine.blocks import BlockError
from hf_vq.engine.report import Reporter
from hf_vq.engine.run import quantize_model
from hf_vq.engine.worker import NonFiniteError
from hf_vq.formats.gptvq import GPTVQSpec
from hf_vq.layers import PackedLinear
from hf_vq.plan import make_plan
from tests import fakes
from tests.engine.walking import QUICK, plan_for, work
from tests.models import tiny, tokens

pytestmark = pytest.mark.usefixtures("quiet")

# -- what it is good for ----------------------------------------------------


def test_corrected_layers_come_closer_to_the_dense_models_outputs():
    # on the calibration data, at the output of the last linear: what everything before it lost
    # included
    dense, samples = fakes.model(layers=3, seed=1), fakes.ids(60, 30)
    missed = {}
    for asymmetric in (False, True):
        model = copy.deepcopy(dense)
        config = GPTVQConfig(3.0, asymmetric_calibration=asymmetric, **QUICK)
        work(model, samples, config, plan_for(model))
        with torch.no_grad():
            gap = dense(samples) - model(samples)
        missed[asymmetric] = float(gap.square().mean())
    assert missed[True] < 0.9 * missed[False]


def test_calibration_beats_no_calibration_on_the_bundled_model(docs_llama):
    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(docs_llama, dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = torch.randint(0, dense.config.vocab_size, (16, 1))
        text = dense.generate(start, max_length=64, do_sample=True, pad_token_id=0)
    calibration, held_out = text[:12], text[12:]
    # two blocks will do, and the second is quantized on what the first has become
    others = {f"layers.{i}": False for i in range(2, dense.config.num_hidden_layers)}
    config = GPTVQConfig(3.0, overrides=others, **QUICK)
    divergence = []
    for samples in (None, calibration):
        model = copy.deepcopy(dense)
        work(model, samples, config)
        with torch.no_grad():
            p, q = (m(held_out).logits.log_softmax(-1) for m in (dense, model))
        divergence.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert divergence[1] < 0.7 * divergence[0], divergence


# -- what becomes of the model ----------------------------------------------


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("kind", ["llama-bias", "qwen2", "opt", "mixtral"])
def test_planned_layers_are_packed_and_no_others(kind, data):
    dense = tiny(kind)
    model = copy.deepcopy(dense)
    config = GPTVQConfig(3.0, overrides={"layers.1.self_attn": False}, **QUICK)
    plan = make_plan(model, config)
    report = work(model, tokens(3, 24) if data else None, config, plan)
    packed = {n for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert packed == set(plan.layers)
    assert not any("layers.1.self_attn" in name for name in packed)
    assert sorted(row["name"] for row in report["matrices"]) == sorted(plan.layers)
    before = dense.state_dict()
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] not in packed:
            assert torch.equal(tensor, before[name]), name
    for name in packed:
        layer, linear = model.get_submodule(name), dense.get_submodule(name)
        assert layer.spec == plan.layers[name]
        assert layer.compute_dtype == torch.bfloat16
        assert (layer.bias is None) == (linear.bias is None)
        assert layer.bias is None or torch.equal(layer.bias, linear.bias)
        weight = linear.weight.detach()
        error = (layer.dequantize() - weight).square().mean() / weight.var()
        # what a layer aims at is not quite its own weight when the layers before it are quantized
        assert float(error) < (0.2 if not data else 0.8)
    # nothing is left behind that would make the model behave differently
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks and not module._forward_pre_hooks
    with torch.no_grad():
        assert bool(torch.isfinite(model(tokens(2, 10)).logits).all())
    assert not model.training


def test_packed_model_computes_what_was_calibrated():
    # the model that is handed back, and the one with the dequantized weights, agree
    dense = tiny("llama", torch.float32)
    model = copy.deepcopy(dense)
    work(model, tokens(4, 24))
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLinear):
            weight = layer.dequantize(torch.float32)
            dense.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens(2, 20)).logits, dense(tokens(2, 20)).logits, rtol=1e-3, atol=1e-4
        )


def test_training_flag_is_kept():
    model = tiny("llama").train()
    work(model, tokens(2, 24))
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("kind", ["plain", "tuple"])
@pytest.mark.parametrize("layers", [1, 2])
def test_any_stack_of_blocks(kind, layers):
    model = fakes.model(kind, layers)
    plan = plan_for(model)
    report = work(model, fakes.ids(), plan=plan)
    assert len(report["matrices"]) == 6 * layers
    assert all(isinstance(model.get_submodule(n), PackedLinear) for n in plan.layers)
    assert all(row["relative_error"] < 0.3 for row in report["matrices"])


@pytest.mark.parametrize("options", [{}, {"true_sequential": False}, {"kmeans_init": "kmeans++"}])
def test_same_seed_same_tensors(options):
    found = []
    for _ in range(2):
        model = tiny("llama")
        config = GPTVQConfig(2.6, kmeans_iterations=3, refine_iterations=1, **options)
        work(model, tokens(3, 24), config)
        found.append(model.state_dict())
        torch.rand(7)  # nobody else's random numbers matter
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_batches_do_not_show(monkeypatch):
    found = []
    for size in (24, 120):
        monkeypatch.setattr(run, "_batch_size", lambda specs, seqlen, n=size // 24: max(1, n))
        model = tiny("llama", torch.float32)
        found.append(work(model, tokens(5, 24))["matrices"])
    for one, other in zip(*found, strict=True):
        assert one["name"] == other["name"]
        # a sum in another order may tip a choice of the sweep
        assert one["relative_error"] == pytest.approx(other["relative_error"], rel=0.2)


# -- errors -----------------------------------------------------------------


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weights_are_named(value, data):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4:6] = value
    says = r"model\.layers\.1\.mlp\.up_proj.*2 of 17200 weights"
    if data:  # the activations behind it are bad too, but they are not the cause
        with pytest.raises(NonFiniteError, match=says):
            work(model, tokens(3, 24))
    else:
        with pytest.raises(NonFiniteError, match=says):
            work(model, None)


@pytest.mark.parametrize("sample", [0, 3, 4])
def test_bad_inputs_are_named_with_their_sample(small_batches, sample):
    model = fakes.model()
    samples = fakes.ids(5, 24).clamp(max=fakes.VOCAB - 2)
    samples[sample, 7] = fakes.VOCAB - 1
    with torch.no_grad():
        model.embed.weight[fakes.VOCAB - 1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match=rf"layers\.0\.mixer\.k: .*sample {sample};"):
        work(model, samples, plan=plan_for(model))
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_inputs_that_overflow_are_named():
    model = tiny("llama", torch.float16)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight *= 1e4
        model.model.layers[0].mlp.gate_proj.weight *= 1e4
    with pytest.raises(NonFiniteError, match=r"model\.layers\.0\.mlp\.down_proj: .*sample 0;"):
        work(model, tokens(3, 24))


def test_the_report_is_finished_when_things_go_wrong():
    class Watch(Reporter):
        finished = 0

        def finish(self):
            self.finished += 1
            super().finish()

    reporter, model = Watch(), fakes.model()
    model.layers[1].mlp.down.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        quantize_model(model, plan_for(model), None, GPTVQConfig(3.0, **QUICK), reporter)
    assert reporter.finished == 1


def test_models_without_blocks_are_refused():
    model = nn.Sequential(nn.Linear(64, 64))
    plan = SimpleNamespace(layers={"0": GPTVQSpec(64, 64, 2, 16, 32, 32)}, rows={})
    with pytest.raises(BlockError, match="Sequential has no list of decoder blocks"):
        work(model, fakes.ids(), plan=plan)


@pytest.mark.parametrize("kind", ["plain", "halving"])
def test_models_that_are_no_plain_stack_are_refused(kind):
    model = fakes.model(kind, between="add" if kind == "plain" else "nothing")
    with pytest.raises(BlockError, match="plain stacks of decoder blocks"):
        work(model, fakes.ids(), plan=plan_for(model))
