"""RTN, GPTQ and AWQ of our own: what they store, and that each is better than the one before."""

from __future__ import annotations

import pytest
import torch

from hf_vq.configs import GPTVQConfig
from hf_vq.evaluation.baselines import (
    bits_per_weight,
    quantize_awq,
    quantize_baseline,
    quantize_scalar,
    uniform_grid,
)
from hf_vq.methods.statistics import Statistics
from tests.models import tiny, tokens


def problem(rows=24, columns=128, seed=0):
    """A weight, and the Hessian of inputs with a few large channels."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(512, columns, generator=g) @ torch.randn(columns, columns, generator=g)
    x *= torch.where(torch.arange(columns) % 17 == 0, 12.0, 1.0)
    return torch.randn(rows, columns, generator=g), x.T @ x / 512


def damage(weight, decoded, hessian):
    e = weight - decoded
    return float(((e @ hessian) * e).sum())


def test_the_grid_spans_the_row_and_zero():
    weight = torch.tensor([[0.0, 3.0], [-1.0, 1.0], [0.0, 0.0]])
    grid = uniform_grid(weight, 2)[..., 0]
    assert grid[0].tolist() == [0, 1, 2, 3]
    assert grid[1].min() <= -0.66 and grid[1].max() >= 0.66 and 0 in grid[1].tolist()
    assert grid[2].tolist() == [0, 1, 2, 3] or grid[2].abs().min() == 0


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_feedback_and_scales_lower_the_damage(bits):
    weight, hessian = problem()
    upper = Statistics(hessian.clone(), 512).factor(0.01).upper
    nearest = quantize_scalar(weight, None, bits)
    found = {
        "rtn": damage(weight, nearest, hessian),
        "gptq": damage(weight, quantize_scalar(weight, upper, bits), hessian),
        "awq": damage(weight, quantize_awq(weight, hessian, bits), hessian),
    }
    assert found["gptq"] < 0.85 * found["rtn"] and found["awq"] < 0.9 * found["rtn"], found


def test_nearest_is_nearest():
    weight, _ = problem()
    decoded = quantize_scalar(weight, None, 3)
    for start in (0, 64):
        part = weight[:, start : start + 64]
        grid = uniform_grid(part, 3)[..., 0]
        best = (part[..., None] - grid[:, None]).abs().min(-1).values
        assert torch.allclose((part - decoded[:, start : start + 64]).abs(), best, atol=1e-6)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_a_model(method):
    model, dense = tiny("llama"), tiny("llama")
    stored = quantize_baseline(model, method, 4, tokens(8))
    assert bits_per_weight(4) == 4 + 20 / 64
    assert 4.3 < stored < 5, "odd sizes take smaller groups, and AWQ has its scales"
    changed = [
        name
        for name, weight in dense.state_dict().items()
        if not torch.equal(weight.float(), model.state_dict()[name].float())
    ]
    assert len(changed) == 14 and all("proj" in name for name in changed)
    config = GPTVQConfig(modules_to_not_convert=["layers.0"], asymmetric_calibration=False)
    half = tiny("llama")
    quantize_baseline(half, method, 4, tokens(8), config=config)
    assert torch.equal(
        half.model.layers[0].mlp.up_proj.weight, dense.model.layers[0].mlp.up_proj.weight
    )


def test_refusals():
    with pytest.raises(ValueError, match="no baseline"):
        quantize_baseline(tiny("llama"), "magic", 4)
    with pytest.raises(ValueError, match="needs calibration data"):
        quantize_baseline(tiny("llama"), "gptq", 4)
