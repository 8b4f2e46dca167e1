"""Packed embeddings and output heads: sizes, files, ties, devices, and what the plan says."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModel

from hf_vq.configs import CVXQConfig, GPTVQConfig, VPTQConfig
from hf_vq.engine.ends import find_ends
from hf_vq.engine.sensitivity import measure
from hf_vq.layers import PackedEmbedding, PackedLinear
from hf_vq.loading import packed_layers
from hf_vq.plan import PlanError, make_plan
from tests.models import DISK, QUICK, load, logits, on_meta, tiny, tokens
from tests.test_sizing import saved_bytes

CONFIGS = {"gptvq": GPTVQConfig, "vptq": VPTQConfig, "cvxq": CVXQConfig}
BOTH = {"quantize_embeddings": True, "quantize_lm_head": True}


def config_for(method, **fields):
    quick = {k: v for k, v in QUICK.items() if k in CONFIGS[method].rules}
    return CONFIGS[method](**{**quick, "dataset": tokens(8), **BOTH, **fields})


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("llama-tied", "cvxq"),
        ("llama-tied", "vptq"),
        ("llama", "gptvq"),
        ("opt", "cvxq"),
        ("qwen2", "gptvq"),
        ("llama", "vptq"),
    ],
)
def test_packed_saved_and_loaded(dense, tmp_path, kind, method):
    size = int(saved_bytes(dense(kind)) * 0.45)
    model = load(dense(kind), quantization_config=config_for(method, size=size), dtype="auto")
    model.save_pretrained(tmp_path / "packed")
    assert 0.995 * size <= saved_bytes(tmp_path / "packed") <= size
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, PackedEmbedding) and isinstance(head, PackedLinear)
    assert model.dtype == torch.bfloat16
    expected = logits(model)
    report = json.loads((tmp_path / "packed" / "quantization_report.json").read_text())
    assert report["ledger"]["packed_params"] == sum(
        layer.spec.num_weights for layer in packed_layers(model).values()
    )
    for device_map in (None, "auto"):
        again = load(tmp_path / "packed", device_map=device_map)
        assert torch.equal(logits(again), expected)
        tied = again.get_output_embeddings().qweight is again.get_input_embeddings().qweight
        assert tied == model.config.tie_word_embeddings == bool(head.tied_to)
        again.tie_weights()  # from anew, as some programs do
        assert torch.equal(logits(again), expected)
    again.save_pretrained(tmp_path / "again")
    assert saved_bytes(tmp_path / "again") == saved_bytes(tmp_path / "packed")
    plain = again.dequantize()
    assert (plain.get_input_embeddings().weight is plain.get_output_embeddings().weight) == tied
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(load(tmp_path / "plain")), logits(plain))


@pytest.mark.parametrize("kind", ["llama-tied", "llama"])
def test_with_a_block_on_disk(dense, tmp_path, kind):
    model = load(dense(kind), quantization_config=config_for("cvxq", bits=4.0), dtype="auto")
    model.save_pretrained(tmp_path / "packed")
    away = load(tmp_path / "packed", device_map=DISK, offload_folder=tmp_path / "disk")
    assert any(p.is_meta for p in away.parameters())
    assert torch.equal(logits(away), logits(model))
    base = load(tmp_path / "packed", cls=AutoModel)
    assert isinstance(base.get_input_embeddings(), PackedEmbedding)


def test_moving_keeps_ties(dense):
    model = load(
        dense("llama-tied"), quantization_config=config_for("gptvq", bits=4.0), dtype="auto"
    )
    model = model.to(torch.float32).to("cpu")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head.qweight is embedding.qweight
    assert embedding(tokens()).dtype == torch.float32 == model.dtype


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_which_ends_are_planned(kind):
    ends = {"model.embed_tokens", "lm_head"}

    def planned(**flags):
        plan = make_plan(on_meta(kind), GPTVQConfig(3, **flags))
        rows = [row for row in plan.ledger().rows if row.name in ends]
        assert len(rows) == (1 if kind == "llama-tied" else 2)  # counted once
        return ends & plan.layers.keys()

    tied = kind == "llama-tied"
    assert not planned()
    assert planned(quantize_embeddings=True) == {"model.embed_tokens"}
    assert planned(quantize_lm_head=True) == {"model.embed_tokens" if tied else "lm_head"}
    assert planned(**BOTH) == ({"model.embed_tokens"} if tied else ends)
    assert not planned(**BOTH, modules_to_not_convert=["embed_tokens", "lm_head"])


def test_overrides_reach_the_embedding():
    config = GPTVQConfig(3, **BOTH, overrides={"embed_tokens": {"bits": 6}})
    plan = make_plan(on_meta("llama"), config)
    assert 5 < plan.layers["model.embed_tokens"].bits_per_weight <= 6
    with pytest.raises(PlanError, match="matches no linear layer"):
        make_plan(on_meta("llama"), GPTVQConfig(3, overrides={"embed_tokens": {"bits": 6}}))


def test_positions_stay_dense():
    plan = make_plan(on_meta("opt"), GPTVQConfig(3, **BOTH))
    assert "model.decoder.embed_tokens" in plan.layers
    assert "something else than tokens" in plan.dense["model.decoder.embed_positions"]


@pytest.mark.parametrize("objective", ["loss", "hidden", "pca"])
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "opt"])
def test_ends_have_gains(kind, objective):
    """Those of tied ends add up; both cost what an error in them really moves."""
    model = tiny(kind, torch.float32)
    names = list(make_plan(model, GPTVQConfig(3, **BOTH)).layers)
    ends = find_ends(model, names)
    found = measure(model, names, tokens(8), torch.device("cpu"), objective=objective)
    for name in filter(None, (ends.embedding, ends.head)):
        assert found.gains[name] > 0 and name not in found.rows


def test_without_data(dense):
    config = config_for("cvxq", bits=4.0, dataset=None)
    model = load(dense("llama-tied"), quantization_config=config, dtype="auto")
    assert isinstance(model.get_input_embeddings(), PackedEmbedding)
    assert bool(torch.isfinite(logits(model)).all())


def test_biases_are_not_given_to_embeddings(dense, tmp_path):
    config = config_for("cvxq", bits=4.5, bias_correction=True)
    model = load(dense("llama"), quantization_config=config, dtype="auto")
    assert model.get_output_embeddings().bias is not None
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))
