"""Layer-wise fine-tuning: it pays, keeps what it does not train, and never makes a block worse."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_vq.configs import VPTQConfig
from hf_vq.engine import finetune, run, worker
from hf_vq.engine.report import Reporter
from hf_vq.engine.run import quantize_model
from hf_vq.layers import PackedLinear
from hf_vq.plan import make_plan
from tests.models import tiny, tokens

GEOMETRY = {"bits": None, "vector_dim": 2, "num_centroids": 4, "kmeans_iterations": 3}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("HF_VQ_PROGRESS", "0")
    monkeypatch.setattr(run, "_batch_size", lambda specs, seqlen: 2)


@pytest.fixture(scope="module")
def trained(docs_llama):
    """The bundled model, and windows of its own text: (dense, calibration, held out)."""
    dense = AutoModelForCausalLM.from_pretrained(docs_llama, dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = torch.randint(0, dense.config.vocab_size, (40, 1))
        text = dense.generate(start, max_length=48, do_sample=True, pad_token_id=0)
    return dense, text[:32], text[32:]


def quantize(model, samples, **settings):
    config = VPTQConfig(**{**GEOMETRY, **settings})
    reporter = Reporter()
    quantize_model(model, make_plan(model, config), samples, config, reporter)
    return model, reporter.to_dict()


def packed(model) -> dict[str, PackedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}


def ratios(report) -> list[float]:
    return [t["loss_ratio"] for t in report["fine_tuned"]]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"norm": "mean-std", "num_res_centroids": 2},
        {"calibration_inputs": "original", "asymmetric_calibration": False},
        {"asymmetric_calibration": False, "true_sequential": False},
    ],
    ids=["plain", "norm-residual", "independent", "symmetric"],
)
def test_tuning_brings_the_bundled_model_closer_to_the_original(trained, settings, monkeypatch):
    dense, samples, held_out = trained
    # four batches, of which one decides: a step that goes through fourteen takes four times as long
    monkeypatch.setattr(run, "_batch_size", lambda specs, seqlen: 8)
    others = {f"layers.{i}": False for i in range(2, dense.config.num_hidden_layers)}
    settings = {"overrides": others, **settings}
    found = []
    for more in ({}, {"finetune_steps": 30, "finetune_lr": 0.01}):
        model, report = quantize(copy.deepcopy(dense), samples, **settings, **more)
        with torch.no_grad():
            p, q = (m(held_out).logits.log_softmax(-1) for m in (dense, model))
        found.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert found[1] < 0.97 * found[0]
    assert len(ratios(report)) == 2 and max(ratios(report)) < 1


def test_only_codebooks_and_norms_move():
    dense, samples = tiny("llama"), tokens(16)
    plain, _ = quantize(copy.deepcopy(dense), samples)
    # the first block alone sees the same inputs in both
    tuned, _ = quantize(copy.deepcopy(dense), samples, finetune_steps=8)
    prefix = "model.layers.0."
    moved = set()
    for (name, before), (_, after) in zip(
        plain.named_parameters(), tuned.named_parameters(), strict=True
    ):
        assert before.dtype == after.dtype and before.requires_grad == after.requires_grad
        if name.startswith(prefix) and not torch.equal(before, after):
            moved.add(name.rpartition(".")[0].rpartition(".")[2])
    assert {"centroids", "input_layernorm", "post_attention_layernorm"} <= moved
    assert moved <= {"centroids", "input_layernorm", "post_attention_layernorm"}


def test_a_step_that_makes_things_worse_is_not_kept():
    dense, samples = tiny("llama"), tokens(16)
    plain, _ = quantize(copy.deepcopy(dense), samples)
    wild, report = quantize(copy.deepcopy(dense), samples, finetune_steps=4, finetune_lr=1.0)
    assert ratios(report) == [1.0] * len(dense.model.layers)
    for (name, before), (_, after) in zip(
        plain.named_parameters(), wild.named_parameters(), strict=True
    ):
        assert torch.equal(before, after), name


def test_the_same_seed_gives_the_same_tensors():
    dense, samples = tiny("llama"), tokens(16)
    first, second = (
        quantize(copy.deepcopy(dense), samples, finetune_steps=6)[0].state_dict() for _ in "ab"
    )
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_other_seeds_train_on_other_batches():
    dense, samples = tiny("llama"), tokens(16)
    found = [
        quantize(copy.deepcopy(dense), samples, finetune_steps=6, seed=s)[0].state_dict()
        for s in (0, 1)
    ]
    assert not all(torch.equal(found[0][k], found[1][k]) for k in found[0])


def test_too_few_batches_to_hold_one_out_leave_the_block_as_it_is():
    dense, samples = tiny("llama"), tokens(2)
    _, report = quantize(copy.deepcopy(dense), samples, finetune_steps=4)
    assert ratios(report) == [1.0] * len(dense.model.layers)


def test_held_out_batches_are_not_trained_on(monkeypatch):
    seen = []
    error = finetune._Runner.squared_error

    def spy(self, hidden, target):
        seen.append((torch.is_grad_enabled(), hidden.data_ptr()))
        return error(self, hidden, target)

    monkeypatch.setattr(finetune._Runner, "squared_error", spy)
    quantize(tiny("llama"), tokens(32), finetune_steps=5)
    trained = {where for grad, where in seen if grad}
    judged = {where for grad, where in seen if not grad}
    assert trained and judged and not trained & judged


# -- the paper's independent mode ----------------------------------------------------------------


def test_independent_statistics_are_those_of_the_original_model(monkeypatch):
    dense, samples = tiny("llama"), tokens(8)
    found = {}
    method = worker.Worker._quantize

    def spy(self, name, statistics, pull):
        statistics.factor(0.01)  # in the order of the channels
        found[name] = (statistics.hessian.clone(), pull)
        return method(self, name, statistics, pull)

    monkeypatch.setattr(worker.Worker, "_quantize", spy)
    quantize(copy.deepcopy(dense), samples, calibration_inputs="original")
    for name, (hessian, pull) in found.items():
        inputs = []
        handle = dense.get_submodule(name).register_forward_pre_hook(
            lambda _, args, inputs=inputs: inputs.append(args[0].flatten(0, -2))
        )
        with torch.no_grad():
            dense(samples, use_cache=False)
        handle.remove()
        x = torch.cat(inputs).float()
        assert pull is None
        damped = hessian - torch.diag(hessian.diagonal() - (x.T @ x / len(x)).diagonal())
        torch.testing.assert_close(damped, x.T @ x / len(x), rtol=1e-3, atol=1e-5)
