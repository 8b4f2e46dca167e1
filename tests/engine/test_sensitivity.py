"""Sensitivities: equal to the Jacobian's, and good for predicting what quantizing does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hf_vq.configs import CVXQConfig, VPTQConfig
from hf_vq.engine import sensitivity
from hf_vq.engine.report import Reporter
from hf_vq.engine.run import quantize_model
from hf_vq.engine.sensitivity import SensitivityError, measure
from hf_vq.methods.feedback import factorize
from hf_vq.plan import make_plan, measured_plan
from hf_vq.registry import get_method
from tests.models import tiny, tokens

CPU = torch.device("cpu")
QUICK = {"kmeans_iterations": 3, "refine_iterations": 1}


def linears(model) -> list[str]:
    return [n for n, m in model.named_modules() if type(m) is nn.Linear and "layers." in n]


def jacobian_of(model, linear, window) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the final states by the outputs of one linear; and that linear's inputs (tokens, in)."""
    seen: list[torch.Tensor] = []

    def states(shift):
        def hook(_, args, output):
            seen.append(args[0])
            return output + shift

        handle = linear.register_forward_hook(hook)
        out = model.base_model(window[None], use_cache=False).last_hidden_state
        handle.remove()
        return out

    shift = torch.zeros(len(window), linear.out_features)
    found = torch.autograd.functional.jacobian(states, shift)
    return found, seen[0].reshape(-1, linear.in_features).detach()


def slowly(model, names, samples) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Gains and rows from whole Jacobians, one window at a time."""
    out, rows = {}, {}
    for name in names:
        linear = model.get_submodule(name)
        pairs = [jacobian_of(model, linear, window) for window in samples]
        # the signed sum is divided by the root of the tokens
        per_row = (
            sum(j.detach().double().square().sum((0, 1, 2, 3)) for j, _ in pairs) / samples.shape[1]
        )
        rows[name] = per_row / samples.numel()
        energy = float(per_row.sum())
        x = torch.cat([x for _, x in pairs]).double()
        upper = factorize((x.T @ x / len(x)).float()).upper
        weight = float(linear.weight.double().square().mean())
        out[name] = weight * float(upper.diagonal().square().sum()) * energy / len(x)
    return out, rows


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_many_draws_average_to_the_jacobian(kind):
    model, samples = tiny(kind).float().eval(), tokens(2)[:, :5]
    names = linears(model)[-3:] + linears(model)[:1]
    expected, rows = slowly(model, names, samples)
    draws = [measure(model, names, samples, CPU, seed, "hidden") for seed in range(40)]
    for name in names:
        mean = sum(d.gains[name] for d in draws) / len(draws)
        assert mean == pytest.approx(expected[name], rel=0.2), name
        by_row = sum(d.rows[name] for d in draws) / len(draws)
        assert by_row.dtype == torch.float32 and by_row.shape == rows[name].shape
        assert float((by_row - rows[name]).abs().sum() / rows[name].sum()) < 0.2, name


def test_the_model_is_left_as_it_was():
    model, samples = tiny("llama"), tokens(4)
    before = copy.deepcopy(model.state_dict())
    measure(model, linears(model), samples, CPU)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any("forward" in vars(m) for m in model.modules())


def test_one_draw_is_repeatable_and_close_to_another():
    model, samples = tiny("llama").float(), tokens(16)
    names = linears(model)
    first, again = (measure(model, names, samples, CPU, 0).gains for _ in "ab")
    other = measure(model, names, samples, CPU, 1).gains
    assert first == again
    assert all(0.5 < other[n] / first[n] < 2 for n in names)


def test_experts_that_no_token_reached_have_none():
    model = tiny("mixtral").float()
    found = measure(model, [*linears(model)], tokens(2), CPU).gains
    assert all(v >= 0 for v in found.values()) and any(v > 0 for v in found.values())


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_gradients_that_are_no_use_are_refused(value):
    model = tiny("llama").float()
    with torch.no_grad():
        model.base_model.norm.weight.fill_(value)
    with pytest.raises(SensitivityError, match='use allocation="uniform"'):
        measure(model, linears(model), tokens(2), CPU)


@pytest.fixture(scope="module")
def text(docs_llama):
    dense = AutoModelForCausalLM.from_pretrained(docs_llama, dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = torch.randint(0, dense.config.vocab_size, (40, 1))
        found = dense.generate(start, max_length=40, do_sample=True, pad_token_id=0)
    return dense, found[:32], found[32:]


def test_bits_where_they_matter_beat_equal_bits(monkeypatch, text):
    monkeypatch.setenv("HF_VQ_PROGRESS", "0")
    dense, samples, held_out = text
    found = {}
    for allocation in ("uniform", "measured"):
        model = copy.deepcopy(dense)
        settings = VPTQConfig(2.2, allocation=allocation, **QUICK)
        plan = measured_plan(model, settings, samples, make_plan(model, settings))
        assert (plan.gains is None) == (allocation == "uniform")
        assert plan.ledger().decoder_bits <= 2.2
        quantize_model(model, plan, samples, settings, Reporter())
        with torch.no_grad():
            p, q = (m(held_out).logits.log_softmax(-1) for m in (dense, model))
        found[allocation] = float((p.exp() * (p - q)).sum(-1).mean())
    assert found["measured"] < 0.97 * found["uniform"], found


@pytest.mark.parametrize("objective", ["hidden", "loss"])
def test_the_prediction_is_what_happens_at_three_bits(monkeypatch, text, objective):
    """To a factor of two: the change of the final states, or of the predictions, from curves and
    gradients alone."""
    monkeypatch.setenv("HF_VQ_PROGRESS", "0")
    dense, samples, _ = text
    monkeypatch.setattr(sensitivity, "_TOKENS", samples.numel())
    model = copy.deepcopy(dense)
    config = VPTQConfig(3.5, asymmetric_calibration=False, sensitivity=objective, **QUICK)
    plan = measured_plan(model, config, samples, make_plan(model, config))
    error = get_method("vptq").expected_error
    predicted = sum(plan.gains[n] * error(s) for n, s in plan.layers.items())
    quantize_model(model, plan, samples, config, Reporter())
    with torch.no_grad():
        if objective == "hidden":
            p, q = (m.base_model(samples).last_hidden_state for m in (dense, model))
            measured = float((p - q).square().sum(-1).mean())
        else:  # the divergence is half of the error in Fisher's metric
            p, q = (m(samples).logits.log_softmax(-1) for m in (dense, model))
            measured = 2 * float((p.exp() * (p - q)).sum(-1).mean())
    assert 0.5 < measured / (predicted * samples.shape[1]) < 2, (measured, predicted)


def test_a_bit_more_quarters_the_error(monkeypatch, text):
    """CVXQ section 14, 10: of the final states, and as predicted to a factor of two."""
    monkeypatch.setenv("HF_VQ_PROGRESS", "0")
    dense, samples, _ = text
    monkeypatch.setattr(sensitivity, "_TOKENS", samples.numel())
    found = {}
    with torch.no_grad():
        before = dense.base_model(samples).last_hidden_state
    for bits in (4, 5):
        model = copy.deepcopy(dense)
        config = CVXQConfig(
            bits, sensitivity="hidden", asymmetric_calibration=False, refine_iterations=0
        )
        plan = measured_plan(model, config, samples, make_plan(model, config))
        quantize_model(model, plan, samples, config, Reporter())
        with torch.no_grad():
            after = model.base_model(samples).last_hidden_state
        found[bits] = float((before - after).square().sum(-1).mean())
    assert 3 < found[4] / found[5] < 5.5, found
