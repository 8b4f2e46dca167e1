"""What an error is measured by: exact where all random numbers are gone through, or nearly so."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_vq.engine import objective
from hf_vq.engine.sensitivity import measure
from tests.models import tiny, tokens

CPU = torch.device("cpu")
NAMES = ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"]


@pytest.fixture
def small():
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=50,
    )
    return LlamaForCausalLM(config).eval()


def jacobian(model, name, window, head: bool) -> torch.Tensor:
    """Of the final states, or log probabilities, by a weight: (tokens, numbers, out, in)."""
    weight = model.get_parameter(f"{name}.weight").detach()

    def output(value):
        swapped = {f"{name}.weight": value}
        run = model if head else model.base_model
        if not head:
            swapped = {k.removeprefix("model."): v for k, v in swapped.items()}
        out = torch.func.functional_call(
            run, swapped, (), {"input_ids": window, "use_cache": False}
        )
        return out.logits[0].log_softmax(-1) if head else out.last_hidden_state[0]

    return torch.autograd.functional.jacobian(output, weight).detach().double()


def test_squares_are_taken_before_sums(small, monkeypatch):
    """CVXQ section 14, 2: G^2 of every weight, from one backward pass per token and state."""
    window = torch.tensor([[3, 7, 7, 41]])
    expected = {n: jacobian(small, n, window, False).square().sum((0, 1)) for n in NAMES}
    found = {n: torch.zeros_like(e) for n, e in expected.items()}
    for number in range(window.numel() * 16):

        def one(self, states, number=number):
            return (
                torch.zeros(states.numel()).index_fill_(0, torch.tensor(number), 1).view_as(states)
            )

        monkeypatch.setattr(objective.Objective, "_signs", one)
        draw = measure(small, NAMES, window, CPU, objective="hidden", by_weight=True)
        for name, rows in draw.rows.items():
            found[name] += rows.double() * window.numel() ** 2  # means over tokens, scaled by root
    for name in NAMES:
        assert torch.allclose(found[name], expected[name], rtol=1e-4, atol=0), name


def test_the_loss_is_that_of_the_models_own_predictions(small):
    """Fisher's information, exactly, is the mean over many draws."""
    window = torch.tensor([[3, 7, 7, 41]])
    draws = [
        measure(small, NAMES, window, CPU, seed, "loss", by_weight=True) for seed in range(300)
    ]
    with torch.no_grad():
        chances = small(window).logits[0].double().softmax(-1)[..., None, None]
    for name in NAMES:
        expected = (chances * jacobian(small, name, window, True).square()).sum((0, 1))
        found = sum(d.rows[name].double() for d in draws) / len(draws) * window.numel() ** 2
        assert float((found - expected).abs().sum() / expected.sum()) < 0.25, name
        assert float(found.sum() / expected.sum()) == pytest.approx(1, abs=0.1), name


def test_principal_components():
    """CVXQ section 14, 4: orthonormal, by falling variance, centred; all of them are everything."""
    states = torch.randn(500, 9) * torch.linspace(0.1, 3, 9) + 5 * torch.ones(9)
    basis = objective.principal_components(states, 9)
    assert torch.allclose(basis @ basis.T, torch.eye(9), atol=1e-5)
    variance = (states @ basis.T).var(0)
    assert bool((variance.diff() <= 0).all())
    assert float(variance[0] / states.var(0).max()) == pytest.approx(1, rel=0.1)
    assert torch.equal(objective.principal_components(states, 4), basis[:4])


def test_all_components_are_all_states(small, monkeypatch):
    monkeypatch.setattr(objective, "PCA_SHARE", 1)
    window = torch.tensor([[3, 7, 7, 41, 20, 11]])

    def mean(kind):
        draws = [measure(small, NAMES, window, CPU, seed, kind).gains for seed in range(60)]
        return {n: sum(d[n] for d in draws) / len(draws) for n in NAMES}

    every, states = mean("pca"), mean("hidden")
    assert all(every[n] == pytest.approx(states[n], rel=0.25) for n in NAMES)


@pytest.mark.parametrize("kind", ["llama", "opt", "mixtral"])
@pytest.mark.parametrize("kind_of", ["loss", "hidden", "pca"])
def test_every_objective_on_other_models(kind, kind_of):
    model = tiny(kind).float()
    names = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear and "layers." in n]
    found = measure(model, names, tokens(2), CPU, objective=kind_of)
    assert any(v > 0 for v in found.gains.values())
    assert all(bool(torch.isfinite(r).all()) for r in found.rows.values())


def test_no_energy_is_lost_to_small_numbers(small):
    """CVXQ section 14, 3: gradients of 1e-5 have squares that 16-bit floats have not."""
    with torch.no_grad():
        small.base_model.norm.weight.fill_(1e-5)
    draw = measure(small, NAMES, torch.arange(32)[None], CPU, objective="hidden", by_weight=True)
    assert all(bool((r > 0).all()) and r.dtype == torch.float32 for r in draw.rows.values())
    assert all(float(r.max()) < 6e-8 for r in draw.rows.values())


def test_without_a_head_the_states_count(small):
    base, names = small.base_model, [n.removeprefix("model.") for n in NAMES]
    loss, hidden = (measure(base, names, tokens(2) % 50, CPU, 0, k) for k in ("loss", "hidden"))
    assert loss.gains == hidden.gains
