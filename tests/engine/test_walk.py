"""Statistics of a walk are those of the slow way, and it keeps no more than it needs."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_vq.configs import GPTVQConfig
from hf_vq.engine import run, walk
from hf_vq.layers import PackedLinear
from hf_vq.methods import gptvq
from hf_vq.methods.feedback import factorize
from hf_vq.methods.statistics import HessianAccumulator
from tests import fakes
from tests.engine.walking import GROUPS, PREFIX, QUICK, inputs_of, plan_for, work
from tests.models import tiny, tokens

pytestmark = pytest.mark.usefixtures("quiet")


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


# -- memory -----------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"true_sequential": False}])
def test_nothing_of_a_finished_block_waits_for_the_garbage_collector(monkeypatch, options):
    alive: dict[str, list[weakref.ref]] = {}
    left = []

    class Watched(walk.BlockWalk):
        def quantize(self, *args):
            gone = [r for name, refs in alive.items() if name != self.name for r in refs]
            left.extend(r() for r in gone if r() is not None)
            assert self.dense_path is not None
            parts = [self, self.path, self.dense_path, self.dense_path.block]
            parts += [t for n in self.linears.values() for t in (n, n.weight)]
            alive[self.name] = [weakref.ref(p) for p in parts]
            super().quantize(*args)

    monkeypatch.setattr(run, "BlockWalk", Watched)
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
    real = walk.Streams.__init__

    def init(self, *args):
        real(self, *args)
        kept.append(self)

    monkeypatch.setattr(walk.Streams, "__init__", init)
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
        walk.BlockWalk,
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
    real = walk.BlockPath.replay
    monkeypatch.setattr(
        walk.BlockPath, "replay", lambda self, names: (kept.append(set(names)), real(self, names))
    )
    work(tiny("llama"), tokens(3, 24))
    assert all("input_layernorm" in names for names in kept)
    kept.clear()
    monkeypatch.setattr(walk, "_NARROW", 1)
    work(tiny("llama"), tokens(3, 24))
    assert kept and all(names == {"self_attn", "mlp"} for names in kept)
