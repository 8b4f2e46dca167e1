"""The plan accounts for every matrix, to the byte, on models without weights."""

from __future__ import annotations

import pytest
import torch

from hf_vq.configs import GPTVQConfig
from hf_vq.plan import PlanError, make_plan
from hf_vq.registry import METHODS, get_method
from tests.models import on_meta, packed, tiny

KINDS = ["llama", "llama-tied", "llama-bias", "qwen2", "opt", "mixtral"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_matrix_is_accounted_for(kind):
    model = on_meta(kind)
    plan = make_plan(model, GPTVQConfig(2.75))
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    rows = plan.ledger().rows
    assert len(rows) == len(matrices)
    assert sum(r.params for r in rows) == sum(p.numel() for p in matrices)
    assert {r.name for r in rows if r.reason} == set(plan.dense)
    assert {r.name for r in rows if not r.reason} == set(plan.layers)
    assert all(plan.dense.values())
    for spec in plan.layers.values():
        assert 1 < spec.bits_per_weight <= 2.75 + 2  # the target is that of all together


@pytest.mark.parametrize("kind", KINDS)
def test_ledger_is_the_size_of_the_packed_model(kind):
    plan = make_plan(tiny(kind), GPTVQConfig(2.6))
    ledger = plan.ledger()
    model = packed(kind, GPTVQConfig(2.6))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert ledger.model_bytes == size
    assert ledger.model_dense_bytes == 2 * sum(p.numel() for p in tiny(kind).parameters())
    assert ledger.model_params == sum(p.numel() for p in tiny(kind).parameters())
    assert ledger.decoder_bits <= 2.6
    assert ledger.to_dict()["packed_bytes"] == sum(s.nbytes for s in plan.layers.values())


def test_reasons():
    mixtral = make_plan(on_meta("mixtral"), GPTVQConfig(2.75)).dense
    assert "4 experts" in mixtral["model.layers.0.mlp.experts.gate_up_proj"]
    surprises = {row.name for row in make_plan(on_meta("mixtral"), GPTVQConfig(2.75)).surprises()}
    assert {name.rpartition(".")[2] for name in surprises} == {"gate_up_proj", "down_proj", "gate"}
    assert not make_plan(on_meta("llama"), GPTVQConfig(2.75)).surprises()
    assert mixtral["lm_head"] == "the output head"
    assert mixtral["model.embed_tokens"] == "an embedding"
    opt = make_plan(on_meta("opt"), GPTVQConfig(2.75)).dense
    assert opt["model.decoder.project_in"] == "outside the decoder blocks"
    config = GPTVQConfig(
        2.75, modules_to_not_convert=["layers.0"], overrides={"re:.*1.*k_proj": False}
    )
    llama = make_plan(on_meta("llama"), config)
    assert "modules_to_not_convert" in llama.dense["model.layers.0.mlp.up_proj"]
    assert "overrides" in llama.dense["model.layers.1.self_attn.k_proj"]
    assert len(llama.layers) == 6


def test_matrices_too_small_for_a_codebook_stay_dense():
    model = on_meta("qwen2")  # one key head of 14 columns
    plan = make_plan(model, GPTVQConfig(2.75))
    assert "model.layers.0.self_attn.k_proj" in plan.dense
    assert "too small (784 weights)" in plan.dense["model.layers.0.self_attn.k_proj"]


def test_modules_kept_in_float32_stay_dense():
    model = on_meta("llama")
    model._keep_in_fp32_modules = {"down_proj"}
    dense = make_plan(model, GPTVQConfig(2.75)).dense
    assert "float32" in dense["model.layers.0.mlp.down_proj"]


def test_tied_head_is_counted_once():
    ledger = make_plan(on_meta("llama-tied"), GPTVQConfig(2.75)).ledger()
    assert ledger.model_params == sum(p.numel() for p in tiny("llama-tied").parameters())


def test_overrides_reach_the_spec():
    config = GPTVQConfig(2.5, overrides={"down_proj": {"bits": 4, "vector_dim": 1}})
    plan = make_plan(on_meta(), config)
    assert plan.layers["model.layers.0.mlp.down_proj"].vector_dim == 1
    assert plan.layers["model.layers.0.mlp.down_proj"].bits_per_weight > 2.5
    others = [s for n, s in plan.layers.items() if not n.endswith("down_proj")]
    assert 8 * sum(s.nbytes for s in others) <= 2.5 * sum(s.num_weights for s in others)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"overrides": {"dwn_proj": {"bits": 3}}}, "near: model.layers.0.mlp.down_proj"),
        ({"overrides": {"re:.*dwn_proj": False}}, "near: model.layers.0.mlp.down_proj"),
        ({"modules_to_not_convert": ["layers.7"]}, "matches no module"),
        ({"bits": 1.0, "vector_dim": 1}, "model.layers.0.self_attn.q_proj: bits=1 is out of reach"),
        ({"modules_to_not_convert": ["model"]}, "nothing to quantize"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(PlanError, match=message.replace(".", r"\.")):
        make_plan(on_meta(), GPTVQConfig(**fields))


def test_models_without_linear_blocks_are_refused_with_reasons():
    with pytest.raises(PlanError, match=r"nothing to quantize.*Conv1D"):
        make_plan(on_meta("gpt2"), GPTVQConfig(2.5))


def test_a_packed_model_is_refused():
    with pytest.raises(PlanError, match="already quantized"):
        make_plan(packed(), GPTVQConfig(2.5))


def test_encoder_decoders_are_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    with torch.device("meta"):
        config = T5Config(d_model=32, d_ff=48, num_layers=1, num_heads=2, d_kv=16, vocab_size=50)
        model = T5ForConditionalGeneration(config)
    with pytest.raises(PlanError, match="encoder"):
        make_plan(model, GPTVQConfig(3))


def test_registry_names_what_it_has():
    method = get_method("gptvq")
    assert method.config is GPTVQConfig
    assert method.spec.method == method.name
    assert callable(method.quantize)
    assert callable(method.choose_spec)
    with pytest.raises(ValueError, match=", ".join(METHODS)):
        get_method("vqtp")
