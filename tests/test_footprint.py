"""The size of the files, known before they are written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hf_vq.configs import GPTVQConfig, VPTQConfig
from hf_vq.footprint import Footprint, header_bytes
from hf_vq.origin import provenance
from hf_vq.plan import make_plan
from tests.models import QUICK, load, tiny, tokens

CONFIGS = {"gptvq": GPTVQConfig, "vptq": VPTQConfig}
KINDS = ["llama", "llama-tied", "llama-bias", "qwen2", "opt", "mixtral"]


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of the files that count, by kind."""
    index = folder / "model.safetensors.index.json"
    return {
        "weights": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
        "index": index.stat().st_size if index.exists() else 0,
        "config": (folder / "config.json").stat().st_size,
    }


def predicted(size) -> dict[str, int]:
    weights = size.tensors + size.headers
    return {"weights": weights, "index": size.index_file, "config": size.config}


@pytest.mark.parametrize("method", list(CONFIGS))
@pytest.mark.parametrize("kind", KINDS)
def test_saved_files_are_as_predicted(dense, tmp_path, kind, method):
    data = tokens(8)
    fields = {k: v for k, v in QUICK.items() if k in CONFIGS[method].rules}
    fields |= {"kmeans_iterations": 0, "allocation": "uniform", "asymmetric_calibration": False}
    config = CONFIGS[method](3.0, dataset=data, **fields)
    model = load(dense(kind), dtype="auto")
    plan = make_plan(model, config)
    footprint = Footprint(model, config, provenance(config, "", data))
    before = dict(model.named_parameters())
    packed = load(dense(kind), quantization_config=config, dtype="auto")
    for shard in ("5GB", "30KB"):
        packed.save_pretrained(tmp_path / shard, max_shard_size=shard)
        assert sizes(tmp_path / shard) == predicted(footprint.packed(plan.layers, shard))
    assert (tmp_path / "30KB" / "model.safetensors.index.json").exists()
    assert all(p is before[n] and not p.is_meta for n, p in model.named_parameters())


@pytest.mark.parametrize("kind", [*KINDS, "gpt2"])
@pytest.mark.parametrize("shard", ["5GB", "30KB"])
def test_dense_files_too(tmp_path, kind, shard):
    model = tiny(kind)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert sizes(tmp_path) == predicted(Footprint(model, GPTVQConfig(), {}).dense(shard))


DTYPES = st.sampled_from(
    [
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    ]
)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
SHAPES = st.lists(st.integers(0, 12), max_size=3)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(NAMES, st.tuples(SHAPES, DTYPES), max_size=8))
def test_headers(tmp_path_factory, tensors):
    made = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in tensors.items()}
    made.pop("__metadata__", None)
    path = tmp_path_factory.mktemp("header") / "x.safetensors"
    save_file(made, path, metadata={"format": "pt"})
    content = sum(t.numel() * t.element_size() for t in made.values())
    assert path.stat().st_size == header_bytes(made) + content
