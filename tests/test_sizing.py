"""A size for the whole model: the files are never larger, hardly smaller, and as predicted."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_vq.configs import CVXQConfig, GPTVQConfig, VPTQConfig
from hf_vq.footprint import Footprint
from hf_vq.hub.planning import plan_model
from hf_vq.plan import PlanError, make_plan
from hf_vq.sizes import beside_the_model
from hf_vq.sizing import TOLERANCE
from tests.models import QUICK, load, on_meta, tiny, tokens

CONFIGS = {"gptvq": GPTVQConfig, "vptq": VPTQConfig}


def saved_bytes(folder: Path) -> int:
    """What a size is about, as a file listing shows it."""
    names = ["config.json", "model.safetensors.index.json"]
    names += [file.name for file in folder.glob("*.safetensors")]
    return sum((folder / n).stat().st_size for n in names if (folder / n).exists())


def quantize(dense: Path, config, out: Path, **save) -> int:
    load(dense, quantization_config=config, dtype="auto").save_pretrained(out, **save)
    return saved_bytes(out)


def bits_to_bytes(kind: str, config, bits: float) -> int:
    """Files of a model whose matrices take so many bits per weight; roughly."""
    model = tiny(kind)
    footprint = Footprint(model, config, {})
    weights = sum(
        s.num_weights for s in make_plan(on_meta(kind), type(config)(4.0)).layers.values()
    )
    return int(footprint.dense().total + 5000 - weights * (16 - bits) / 8)


@pytest.mark.parametrize("method", list(CONFIGS))
@settings(max_examples=4, deadline=None)
@given(
    kind=st.sampled_from(["llama", "llama-tied", "llama-bias", "qwen2", "opt"]),
    bits=st.floats(1.2, 8),
)
@example("llama", 1.2)
@example("opt", 8.0)
def test_the_files_are_as_large_as_planned_and_as_asked(tmp_path_factory, method, kind, bits):
    folder = tmp_path_factory.mktemp("sized")
    tiny(kind).save_pretrained(folder / "dense")
    size = bits_to_bytes(kind, CONFIGS[method](), bits)
    fields = {k: v for k, v in QUICK.items() if k in CONFIGS[method].rules}
    fields["kmeans_iterations"] = 0
    try:
        plan = plan_model(folder / "dense", CONFIGS[method](size=size))
    except PlanError as error:
        assert "out of reach" in str(error)
        smallest = int(str(error).rpartition("(")[2].split()[0])
        assert size < smallest
        size = smallest
        plan = plan_model(folder / "dense", CONFIGS[method](size=size))
    assert plan.size.total <= size
    found = quantize(folder / "dense", CONFIGS[method](size=size, **fields), folder / "packed")
    assert found == plan.size.total
    most = max(s.bits_per_weight for s in plan.layers.values())
    assert found >= size * (1 - TOLERANCE) or most > 7


def test_calibrated_and_measured_files_too(dense, tmp_path):
    """And a second size takes no second backward pass."""
    fields = {**QUICK, "dataset": tokens(8), "measurement": tmp_path / "m.safetensors"}
    sizes = [bits_to_bytes("llama", GPTVQConfig(), bits) for bits in (2.6, 3.7)]
    for size in sizes:
        config = GPTVQConfig(size=size, **fields)
        found = quantize(dense("llama"), config, tmp_path / str(size))
        assert size * (1 - TOLERANCE) <= found <= size
        stored = json.loads((tmp_path / str(size) / "config.json").read_text())
        assert stored["quantization_config"]["size"] == size
        assert stored["quantization_config"]["bits"] is None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hf_vq.engine.measurement.measure", None)
            again = quantize(dense("llama"), config, tmp_path / "again")
        assert again == found
    # the plan needs the file alone
    plan = plan_model(dense("llama"), GPTVQConfig(size=sizes[0], measurement=fields["measurement"]))
    uniform = plan_model(dense("llama"), GPTVQConfig(size=sizes[0]))
    assert plan.gains is not None and plan.layers != uniform.layers
    assert plan.size.total <= sizes[0]


def test_layers_with_bits_of_their_own_keep_them(dense, tmp_path):
    size = bits_to_bytes("llama", GPTVQConfig(), 4.0)
    overrides = {"layers.0.mlp.down_proj": {"bits": 6}, "layers.1.self_attn.k_proj": False}
    plan = plan_model(dense("llama"), GPTVQConfig(size=size, overrides=overrides))
    assert 5.5 < plan.layers["model.layers.0.mlp.down_proj"].bits_per_weight <= 6
    assert "model.layers.1.self_attn.k_proj" in plan.dense
    assert size * (1 - TOLERANCE) <= plan.size.total <= size


def test_room_for_a_context(dense):
    model = tiny("llama")
    beside = beside_the_model(model.config, 2, 100)
    limit = bits_to_bytes("llama", GPTVQConfig(), 4.0)
    memory = limit + beside.cache + beside.activations
    fits = plan_model(dense("llama"), GPTVQConfig(size=f"fits:{memory}@100"))
    assert limit * (1 - TOLERANCE) <= fits.size.total <= limit


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("1kB", r"'1kB' is out of reach: the smallest files that gptvq .* \(\d+ bytes\)"),
        ("1GB", "no less than the .* that the model takes as it is"),
        ("fits:50kB@128", "leaves nothing for the model"),
        ("fits:1MB@129", "exceeds the model's 128"),
    ],
)
def test_sizes_that_cannot_be(dense, size, message):
    with pytest.raises(PlanError, match=message):
        plan_model(dense("llama"), GPTVQConfig(size=size))


def test_more_than_the_method_can_use_is_said(dense, caplog):
    dense_bytes = Footprint(tiny("llama"), GPTVQConfig(), {}).dense().total
    with caplog.at_level(logging.WARNING, logger="hf_vq.sizing"):
        plan = plan_model(dense("llama"), GPTVQConfig(size=dense_bytes - 1))
    assert "the most that gptvq makes use of" in caplog.text
    assert str(plan.size.total) in caplog.text


@pytest.mark.parametrize("config", list(CONFIGS.values()))
def test_a_size_or_bits(config):
    with pytest.raises(ValueError, match="size='1MB' and bits=3 both say"):
        config(3, size="1MB")
    with pytest.raises(ValueError, match="size: '1XB' is no size"):
        config(size="1XB")
    with pytest.raises(ValueError, match="cannot differ between layers"):
        config(overrides={"q_proj": {"size": "1MB"}})
    sized = config(size=" 1MB ")
    assert sized.bits is None and sized.size == "1MB"
    assert config.from_dict(sized.to_dict()) == sized
    assert config().bits == 2.25 and type(config().bits) is float


@pytest.mark.parametrize("bits", [2.2, 4.1])
def test_scalar_codes_come_within_a_thousandth(dense, tmp_path, bits):
    """They may leave words unused, so the files can be a little smaller than planned."""
    size = bits_to_bytes("llama", CVXQConfig(), bits)
    plan = plan_model(dense("llama"), CVXQConfig(size=size))
    config = CVXQConfig(size=size, dataset=tokens(8), refine_iterations=0, reallocations=0)
    assert size * 0.999 <= quantize(dense("llama"), config, tmp_path) <= size
    assert size * 0.999 <= plan.size.total <= size
