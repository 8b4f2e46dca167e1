"""The walk through a model: same statistics as the slow way, and nothing done silently."""

from __future__ import annotations

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_vq.configs import GPTVQConfig
from hf_vq.engine import run
from hf_vq.engine.blocks import BlockError
from hf_vq.engine.report import Reporter
from hf_vq.engine.run import NonFiniteError, quantize_model
from hf_vq.formats.gptvq import GPTVQSpec
from hf_vq.layers import PackedLinear
from hf_vq.methods import gptvq
from hf_vq.methods.feedback import factorize
from hf_vq.methods.statistics import HessianAccumulator
from hf_vq.plan import make_plan
from tests import fakes
from tests.models import tiny, tokens

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


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("HF_VQ_PROGRESS", "0")


@pytest.fixture
def small_batches(monkeypatch):
    """Two windows of 24 tokens at a time."""
    monkeypatch.setattr(run, "_batch_size", lambda specs, seqlen: 2)


@pytest.fixture
def collected(monkeypatch):
    """All statistics, in the order in which they were asked for: (hessian, shift, tokens)."""
    found = []

    class Spy(HessianAccumulator):
        def statistics(self):
            out = super().statistics()
            shift = None if out.shift is None else out.shift.clone()
            found.append((out.hessian.clone(), shift, out.tokens))
            return out

    monkeypatch.setattr(run, "HessianAccumulator", Spy)
    return found


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


def slowly(dense, packed, samples, prefix, groups, true_sequential):
    """Statistics by running whole models for every single one, (hessian, shift) in order."""
    half, out = copy.deepcopy(dense), []
    for block in range(2):
        stages = [[g] for g in groups] if true_sequential else [groups]
        for stage in stages:
            for group in stage:
                name = f"{prefix}.{block}.{group[0]}"
                x, aim = inputs_of(half, name, samples), inputs_of(dense, name, samples)
                out.append((x.T @ x / len(x), (aim - x).T @ x / len(x)))
            for name in (f"{prefix}.{block}.{n}" for g in stage for n in g):
                weight = packed.get_submodule(name).dequantize(torch.float32)
                half.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    return out


# -- statistics -------------------------------------------------------------


@pytest.mark.parametrize("asymmetric", [True, False])
@pytest.mark.parametrize("true_sequential", [True, False])
@pytest.mark.parametrize("kind", ["llama", "opt", "plain"])
def test_statistics_are_those_of_the_slow_way(
    small_batches, collected, kind, true_sequential, asymmetric
):
    if kind == "plain":
        dense, samples = fakes.model(layers=2), fakes.ids(5, 24)
        plan = plan_for(dense)
    else:
        dense, samples, plan = tiny(kind, torch.float32), tokens(5, 24), None
    config = GPTVQConfig(
        3.0, true_sequential=true_sequential, asymmetric_calibration=asymmetric, **QUICK
    )
    model = copy.deepcopy(dense)
    work(model, samples, config, plan)
    expected = slowly(dense, model, samples, PREFIX[kind], GROUPS[kind], true_sequential)
    assert len(collected) == len(expected) == 2 * len(GROUPS[kind])
    moved = 0
    for (h, shift, count), (slow_h, slow_shift) in zip(collected, expected, strict=True):
        assert count == 5 * 24
        size = slow_h.abs().max()
        assert float((h - slow_h).abs().max() / size) < 1e-4
        assert (shift is not None) == asymmetric
        if asymmetric:
            assert float((shift - slow_shift).abs().max() / size) < 1e-4
            moved += float(shift.abs().max() / size) > 1e-5
    # of the first block's inputs q/k/v see no difference yet, and without sequence none does
    assert moved == (0 if not asymmetric else 7 if true_sequential else 4)


def test_layers_that_share_an_input_share_its_hessian(collected):
    report = work(tiny("llama"), tokens(3, 24))
    assert len(report["matrices"]) == 14
    assert len(collected) == 8


@pytest.mark.parametrize("asymmetric", [True, False])
def test_what_every_layer_aims_at(monkeypatch, collected, asymmetric):
    # with W x_dense in mind: W + W S (H + damping)^-1, less of it the fewer tokens there are;
    # otherwise its own weight
    aims = []
    real = gptvq.quantize

    def spy(weight, statistics, spec, options):
        aims.append((weight.clone(), statistics.shift))
        return real(weight, statistics, spec, options)

    monkeypatch.setattr(gptvq, "quantize", spy)
    dense = tiny("llama", torch.float32)
    config = GPTVQConfig(3.0, asymmetric_calibration=asymmetric, **QUICK)
    report = work(copy.deepcopy(dense), tokens(16, 24), config)
    groups = [g for _ in range(2) for g in GROUPS["llama"]]
    which = [i for i, g in enumerate(groups) for _ in g]
    for (aim, left), i, row in zip(aims, which, report["matrices"], strict=True):
        weight = dense.get_submodule(row["name"]).weight.detach()
        h, shift, count = collected[i]
        expected = weight.double()
        if asymmetric:
            shift = shift * (count / (count + 8 * len(shift)))
            assert left is None  # it is in the weight already
            damped = factorize(h, config.damping).hessian.double()
            expected = expected + expected @ shift.double() @ torch.linalg.inv(damped)
        torch.testing.assert_close(aim.double(), expected, rtol=1e-3, atol=1e-4)


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


# -- experts ----------------------------------------------------------------


@pytest.mark.parametrize("true_sequential", [True, False])
def test_experts_are_calibrated_on_their_own_tokens(small_batches, collected, true_sequential):
    dense = fakes.model("sparse", layers=1)
    model, samples = copy.deepcopy(dense), fakes.ids(5, 24)
    config = GPTVQConfig(3.0, true_sequential=true_sequential, **QUICK)
    plan = plan_for(model)
    report = work(model, samples, config, plan)
    notes = {row["name"]: row["notes"] for row in report["matrices"]}
    assert sorted(notes) == sorted(plan.layers)
    for name, said in notes.items():
        assert isinstance(model.get_submodule(name), PackedLinear)
        unreached = "experts.3." in name
        assert ("no calibration token reached it: quantized without data" in said) == unreached
    # the original's router may send other tokens to an expert, so there is nothing to compare with
    assert [shift is None for _, shift, count in collected if 0 < count < 120] == [True] * 6
    # every token goes to one of the first three, in whatever batch
    counts = [count for _, _, count in collected]
    assert sum(counts) == 120 * 2 + 120 * 2
    assert counts.count(0) == 3


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


# -- memory -----------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"true_sequential": False}])
def test_nothing_of_a_finished_block_waits_for_the_garbage_collector(monkeypatch, options):
    alive: dict[str, list[weakref.ref]] = {}
    left = []

    class Watched(run._Block):
        def quantize(self, *args):
            gone = [r for name, refs in alive.items() if name != self.name for r in refs]
            left.extend(r() for r in gone if r() is not None)
            assert self.dense_path is not None
            parts = [self, self.path, self.dense_path, self.dense_path.block]
            parts += [t for n in self.linears.values() for t in (n, n.weight)]
            alive[self.name] = [weakref.ref(p) for p in parts]
            super().quantize(*args)

    monkeypatch.setattr(run, "_Block", Watched)
    gc.collect()
    gc.disable()
    try:
        work(tiny("llama"), tokens(3, 24), GPTVQConfig(3.0, **QUICK, **options))
    finally:
        gc.enable()
    assert len(alive) == 2
    assert left == []


def test_states_between_blocks_are_those_of_both_models(small_batches, monkeypatch):
    kept = []
    real = run._Streams.__init__

    def init(self, *args):
        real(self, *args)
        kept.append(self)

    monkeypatch.setattr(run._Streams, "__init__", init)
    dense, samples = tiny("llama", torch.float32), tokens(5, 24)
    packed = copy.deepcopy(dense)
    work(packed, samples)
    first = f"{PREFIX['llama']}.1.input_layernorm"
    (streams,) = kept
    for model, states in ((packed, streams.quantized), (dense, streams.dense)):
        found = torch.cat([s.reshape(-1, s.shape[-1]) for s in states]).double()
        torch.testing.assert_close(found, inputs_of(model, first, samples), rtol=1e-4, atol=1e-4)


def test_a_wide_layer_aims_at_the_same_by_less(monkeypatch):
    # the only reader of a wide input gets W S without S: the same weights come out
    def packed():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                vocab_size=64,
            )
        )
        shapes.clear()
        return work(model, tokens(8, 24) % 64)["matrices"]

    shapes = []
    real = HessianAccumulator.statistics

    def spy(self):
        shapes.append(None if self.cross is None else tuple(self.cross.shape))
        return real(self)

    monkeypatch.setattr(HessianAccumulator, "statistics", spy)
    less = packed()
    assert shapes[3] == (32, 96)
    monkeypatch.setattr(
        run._Block,
        "_accumulator",
        lambda self, group: HessianAccumulator(
            self.linears[group[0]].in_features, "cpu", self.asymmetric
        ),
    )
    whole = packed()
    assert shapes[3] == (96, 96)
    for a, b in zip(less, whole, strict=True):
        assert a["relative_error"] == pytest.approx(b["relative_error"], rel=0.02)


def test_only_narrow_models_keep_the_outputs_of_norms(monkeypatch):
    kept = []
    real = run.BlockPath.replay
    monkeypatch.setattr(
        run.BlockPath, "replay", lambda self, names: (kept.append(set(names)), real(self, names))
    )
    work(tiny("llama"), tokens(3, 24))
    assert all("input_layernorm" in names for names in kept)
    kept.clear()
    monkeypatch.setattr(run, "_NARROW", 1)
    work(tiny("llama"), tokens(3, 24))
    assert kept and all(names == {"self_attn", "mlp"} for names in kept)
