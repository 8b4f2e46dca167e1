"""Transformers' own entry points: quantize on load, save, load, dequantize."""

from __future__ import annotations

import copy
import json
import logging
import pickle

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModel, LlamaForCausalLM

from hf_vq.configs import GPTVQConfig
from hf_vq.layers.linear import PackedLinear
from hf_vq.loading import packed_layers
from hf_vq.plan import PlanError, make_plan
from tests.models import DISK, PROMPT, QUICK, load, logits, packed, tiny, tokens

pytestmark = pytest.mark.smoke

KINDS = ["llama", "llama-tied", "llama-bias", "qwen2", "opt", "mixtral"]
# -- the main walk --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_quantize_save_reload(kind, dense, quantized):
    model, path = quantized(kind)
    planned = make_plan(tiny(kind), GPTVQConfig(2.6)).layers
    found = {n: m.spec for n, m in packed_layers(model).items()}
    assert found.keys() == planned.keys()
    weights = sum(s.num_weights for s in found.values())
    assert 2.4 * weights < 8 * sum(s.nbytes for s in found.values()) <= 2.6 * weights
    again, info = load(path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(again), logits(model))
    original = logits(load(dense(kind)))
    assert not torch.equal(original, logits(model))
    assert (logits(model) - original).norm() < original.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_holds_what_the_plan_says(kind, quantized):
    path = quantized(kind)[1]
    report = json.loads((path / "quantization_report.json").read_text())
    plan = make_plan(tiny(kind), GPTVQConfig(2.6), report["gains"])
    with safe_open(path / "model.safetensors", "pt") as file:
        keys = set(file.keys())
        size = {k: file.get_tensor(k).nbytes for k in keys}
        assert file.metadata() == {"format": "pt"}  # a second entry would make the bytes random
    for name, spec in plan.layers.items():
        assert f"{name}.weight" not in keys
        stored = sum(size[f"{name}.{t}"] for t in spec.layout())
        assert stored == spec.nbytes
    assert sum(size.values()) == plan.ledger().model_bytes
    # that plan was made while tied weights still stood apart
    assert report["ledger"] == plan.ledger().to_dict()
    on_disk = (path / "model.safetensors").stat().st_size
    header = int.from_bytes((path / "model.safetensors").read_bytes()[:8], "little") + 8
    assert on_disk - header == plan.ledger().model_bytes


def test_config_json(quantized):
    _, path = quantized("llama")
    stored = json.loads((path / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "gptvq"
    assert stored["format_version"] == "1.0"
    assert stored["bits"] == 2.6
    assert stored["base_model"] is None  # a local path means nothing elsewhere
    assert stored["calibration"] == {
        "dataset": "token ids of shape [8, 64]",
        "nsamples": 8,
        "seqlen": 64,
        "seed": 0,
    }
    assert "dataset" not in stored
    assert str(path.parent) not in (path / "config.json").read_text()
    report = json.loads((path / "quantization_report.json").read_text())
    assert len(report["matrices"]) == 14
    assert report["dense"]["lm_head"] == "the output head"


# -- configs on their way through Transformers -----------------------------------------------


def test_generators_survive_automodel(dense):
    """AutoModel deep-copies its arguments; a generator can be neither copied nor read twice."""
    rows = tokens(8)
    config = GPTVQConfig(2.6, dataset=({"input_ids": r} for r in rows), seqlen=64, **QUICK)
    model = load(dense("llama"), quantization_config=config)
    assert model.hf_quantizer.quantization_config.recorded["calibration"]["nsamples"] == 8
    assert len(packed_layers(model)) == 14


def test_a_config_can_be_used_twice(dense):
    """Without AutoModel's copy the quantizer gets the user's own object."""
    config = GPTVQConfig(2.6, dataset=tokens(8), **QUICK)
    before = config.to_dict()
    models = [load(dense("llama"), LlamaForCausalLM, quantization_config=config) for _ in range(2)]
    assert torch.equal(logits(models[0]), logits(models[1]))
    assert config.to_dict() == before
    assert config.dataset is not None


def test_a_quantized_model_holds_no_data_and_can_be_copied(dense):
    rows = ({"input_ids": r} for r in tokens(8))
    config = GPTVQConfig(2.6, dataset=rows, tokenizer=lambda text: text, seqlen=64, **QUICK)
    model = load(dense("llama"), quantization_config=config)
    assert model.config.quantization_config.dataset is None
    assert pickle.loads(pickle.dumps(model.config)).quantization_config.is_quantized
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_config_as_a_dict(dense):
    config = {"quant_method": "gptvq", "bits": 2.6, "dataset": tokens(4), **QUICK}
    assert len(packed_layers(load(dense("llama"), quantization_config=config))) == 14


def test_overrides_and_exceptions_reach_the_file(dense, tmp_path):
    config = GPTVQConfig(
        2.6,
        dataset=tokens(4),
        modules_to_not_convert=["layers.1"],
        overrides={"re:.*down_proj": {"bits": 4.2, "vector_dim": 2}, "k_proj": False},
        **QUICK,
    )
    model = load(dense("llama"), quantization_config=config)
    assert len(packed_layers(model)) == 6
    down = model.model.layers[0].mlp.down_proj
    assert 3.5 < down.spec.bits_per_weight <= 4.2
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert type(again.model.layers[0].self_attn.k_proj) is nn.Linear
    assert again.model.layers[0].mlp.down_proj.spec == down.spec
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(("kind", "said"), [("mixtral", True), ("llama", False)])
def test_experts_that_stay_dense_are_a_warning(kind, said, dense, caplog):
    with caplog.at_level(logging.WARNING):
        load(dense(kind), quantization_config=GPTVQConfig(2.6, dataset=tokens(8), **QUICK))
    warned = "of the weights of this MixtralForCausalLM stay dense, first of all" in caplog.text
    assert warned is said
    assert ("4 experts' matrices fused into one parameter" in caplog.text) is said


def test_data_free_mode_warns(dense, caplog):
    with caplog.at_level(logging.WARNING):
        model = load(dense("llama"), quantization_config=GPTVQConfig(2.6, **QUICK))
    assert "no calibration data" in caplog.text
    assert len(packed_layers(model)) == 14
    assert model.hf_quantizer.quantization_config.recorded["calibration"]["dataset"] is None


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"dataset": tokens(1, 100)}, ValueError, "100 calibration tokens.*172 inputs"),
        ({"dataset": "missing.txt"}, ValueError, "missing.txt cannot be read"),
        ({"dataset": tokens(4) + 300}, ValueError, "vocabulary of 300"),
        ({"dataset": ["text"]}, ValueError, "no tokenizer found"),
        ({"overrides": {"up_prj": False}}, PlanError, "matches no linear layer"),
        ({"bits": 1.0, "vector_dim": 1}, PlanError, "out of reach"),
        ({"dequantize": True}, ValueError, "not packed"),
    ],
)
def test_bad_requests_stop_before_the_weights_are_read(fields, error, message, dense, monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr("transformers.PreTrainedModel._load_pretrained_model", read)
    with pytest.raises(error, match=message):
        load(dense("llama"), quantization_config=GPTVQConfig(**{"bits": 2.6, **fields}))


def test_sharded_loading_is_refused(dense, monkeypatch):
    monkeypatch.setattr("transformers.integrations.fsdp.is_fsdp_enabled", lambda: True)
    with pytest.raises(ValueError, match="FSDP"):
        load(dense("llama"), quantization_config=GPTVQConfig(2.6, dataset=tokens(4)))


@pytest.mark.parametrize("fields", [{"bits": 3.0}, {}, {"dataset": ["text"]}])
def test_quantizing_a_quantized_model_is_refused(fields, quantized):
    """Transformers would take the file's config and ignore the one given, with a warning."""
    with pytest.raises(ValueError, match="already quantized"):
        load(quantized("llama")[1], quantization_config=GPTVQConfig(**fields))


def test_another_methods_config_is_refused(quantized):
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ValueError, match="GPTVQConfig"):
        load(quantized("llama")[1], quantization_config=config)


# -- loading ---------------------------------------------------------------------------------


def test_base_class_has_no_prefix(quantized, tmp_path):
    model, path = quantized("llama")
    bare, info = load(path, AutoModel, output_loading_info=True)
    assert not info["missing_keys"]
    assert isinstance(bare.layers[0].mlp.up_proj, PackedLinear)
    with torch.no_grad():
        hidden = model.model(PROMPT).last_hidden_state
        assert torch.equal(bare(PROMPT).last_hidden_state, hidden)
    bare.save_pretrained(tmp_path)
    back, info = load(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    with torch.no_grad():
        assert torch.equal(back.model(PROMPT).last_hidden_state, hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_packed_tensors_keep_their_dtype_and_are_frozen(dtype, quantized):
    model, path = quantized("llama-bias")
    again = load(path, dtype=dtype)
    for layer in packed_layers(again).values():
        for name, (_, stored) in layer.spec.layout().items():
            tensor = getattr(layer, name)
            assert tensor.dtype == stored
            assert not tensor.requires_grad  # Transformers makes loaded floats trainable
        assert layer.bias.dtype == dtype
        assert layer.compute_dtype == dtype
    # both compute from the same codes; bfloat16 has 8 bits of mantissa
    difference = (logits(again).float() - logits(model).float()).norm()
    assert difference < 0.05 * logits(model).float().norm()


def test_what_the_quantizer_says_about_itself(quantized):
    model = load(quantized("llama")[1])
    assert model.is_quantized
    assert model.quantization_method == "gptvq"
    assert model.hf_quantizer.is_serializable()
    assert model.hf_quantizer.is_trainable
    assert model.hf_quantizer.is_compileable
    assert not model.hf_quantizer.is_qat_trainable
    assert model.config.quantization_config.is_quantized


def test_generate(quantized):
    model, path = quantized("llama-tied")
    fields = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(load(path).generate(PROMPT, **fields), model.generate(PROMPT, **fields))


def test_sharded_checkpoints(quantized, tmp_path):
    model, _ = quantized("llama")
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path)), logits(model))


# -- dequantizing ----------------------------------------------------------------------------


def assert_dense(model, reference):
    assert not packed_layers(model)
    assert not hasattr(model.config, "quantization_config")
    assert not getattr(model, "is_quantized", False)
    with torch.no_grad():
        difference = (logits(model).float() - logits(reference).float()).abs().max()
    assert difference <= 0.02 * logits(reference).float().abs().max()


@pytest.mark.parametrize("how", ["on load", "method", "offloaded"])
def test_dequantize(how, quantized, tmp_path):
    reference, path = quantized("llama-bias")
    if how == "on load":
        model = load(path, quantization_config=GPTVQConfig(dequantize=True))
    else:
        place = {"device_map": DISK, "offload_folder": str(tmp_path / "o")}
        model = load(path, **(place if how == "offloaded" else {}))
        model.dequantize()
    assert_dense(model, reference)
    if how == "offloaded":
        return
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    assert_dense(load(tmp_path / "dense"), reference)


def to_dense(model, names):
    for name, layer in packed_layers(model).items():
        if names in name:
            model.set_submodule(name, layer.to_linear())


def test_partly_dequantized_models_round_trip(quantized, tmp_path):
    """A config that still lists merged layers would reload as garbage."""
    model = load(quantized("llama")[1])
    to_dense(model, "layers.0")
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert len(packed_layers(again)) == 7
    assert torch.equal(logits(again), expected)


def test_layer_by_layer_dequantized_model_is_saved_as_dense(quantized, tmp_path):
    model = load(quantized("llama")[1])
    to_dense(model, "")
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = load(tmp_path)
    assert not getattr(again, "is_quantized", False)
    assert torch.equal(logits(again), expected)


def test_dequantized_weights_are_the_layers_own(quantized):
    model = packed("llama-bias")
    before = {n: m.dequantize() for n, m in packed_layers(model).items()}
    model.dequantize()
    for name, weight in before.items():
        assert torch.equal(model.get_submodule(name).weight, weight)
