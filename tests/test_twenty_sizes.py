"""Twenty sizes from 1.2 to 8 bits, on every kind of model: never more, and next to nothing less."""

from __future__ import annotations

import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_vq.configs import CVXQConfig, GPTVQConfig, VPTQConfig
from hf_vq.footprint import Footprint
from hf_vq.hub.planning import plan_model
from hf_vq.plan import PlanError, make_plan
from tests.models import QUICK, load, tiny, tokens
from tests.test_sizing import saved_bytes

CONFIGS = {"gptvq": GPTVQConfig, "vptq": VPTQConfig, "cvxq": CVXQConfig}
SPARE = {"gptvq": 0.005, "vptq": 0.005, "cvxq": 0.001}
BITS = torch.linspace(1.2, 8, 20).tolist()
# Every so many of them where choosing specs takes long; HF_VQ_ALL_SIZES=1 takes all (7 minutes)
STEP = {"gptvq": 9, "vptq": 3, "cvxq": 1}


def sizes_of(model, config) -> list[int]:
    """Files with so many bits per weight of the matrices; headers and config roughly."""
    dense = Footprint(model, config, {}).dense().total
    weights = sum(s.num_weights for s in make_plan(model, type(config)(4.0)).layers.values())
    return [int(dense + 5000 - weights * (16 - bits) / 8) for bits in BITS]


def some(sizes, method) -> list[int]:
    return sizes if os.environ.get("HF_VQ_ALL_SIZES") else sizes[:: STEP[method]]


def check(plan, size, method) -> None:
    assert plan.size.total <= size
    # the method may have reached its end: every matrix as large as it is of use
    full = min(s.bits_per_weight for s in plan.layers.values()) > 7
    assert plan.size.total >= size * (1 - SPARE[method]) or full


def planned(model, config_class, size):
    """The plan, or that of the smallest size if this one is refused, and which of them."""
    try:
        return plan_model(model, config_class(size=size)), size
    except PlanError as error:
        assert "out of reach" in str(error)
        least = int(str(error).rpartition("(")[2].split()[0])
        assert size < least
        return plan_model(model, config_class(size=least)), least


@pytest.mark.parametrize("method", list(CONFIGS))
@pytest.mark.parametrize("kind", ["opt"])
def test_sizes_of_tiny_models(kind, method):
    model, config_class = tiny(kind), CONFIGS[method]
    for size in some(sizes_of(model, config_class()), method):
        check(*planned(model, config_class, size), method)


@pytest.mark.parametrize("method", list(CONFIGS))
def test_sizes_of_a_trained_model(docs_llama, method):
    if not docs_llama.is_dir():
        pytest.skip(f"needs the bundled model, which is not in this checkout ({docs_llama})")
    model = AutoModelForCausalLM.from_pretrained(docs_llama, dtype="auto")
    for size in some(sizes_of(model, CONFIGS[method]()), method):
        check(*planned(model, CONFIGS[method], size), method)


@pytest.mark.parametrize("method", list(CONFIGS))
@pytest.mark.parametrize("bits", [1.6, 3.3, 5.2])
def test_the_files_are_what_was_planned(dense, tmp_path, method, bits):
    """With biases too, which CVXQ may add."""
    config_class, kind = CONFIGS[method], "llama"
    size = sizes_of(tiny(kind), config_class())[BITS.index(min(BITS, key=lambda b: abs(b - bits)))]
    fields = {k: v for k, v in QUICK.items() if k in config_class.rules}
    if "bias_correction" in config_class.rules:
        fields |= {"bias_correction": True, "reallocations": 0}
    config = config_class(size=size, dataset=tokens(8), allocation="uniform", **fields)
    model = load(dense(kind), quantization_config=config, dtype="auto")
    model.save_pretrained(tmp_path)
    assert size * (1 - SPARE[method]) <= saved_bytes(tmp_path) <= size
