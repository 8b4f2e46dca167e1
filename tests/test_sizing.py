"""A size for the whole model: the files are never larger, hardly smaller, and as predicted."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_vq.configs import GPTVQConfig, VPTQConfig
from hf_vq.footprint import Footprint
from hf_vq.hub.planning import plan_model
from hf_vq.plan import PlanError, make_plan
from hf_vq.sizing import TOLERANCE
from tests.models import QUICK, load, on_meta, tiny

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
@settings(max_examples=6, deadline=None)
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
