"""LoRA from the quantization error, and merging that quantizes again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="needs peft")

from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

import hf_vq
from hf_vq.layers import PackedLinear
from hf_vq.loading import packed_layers
from tests.models import load, tiny, tokens
from tests.tuning.packing import METHODS, decoded, logits, packed, train

pytestmark = pytest.mark.filterwarnings("ignore")

DATA = tokens(12, 32, seed=5)


def with_lora(method: str = "gptvq", **options: Any) -> PeftModel:
    settings = {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    torch.manual_seed(0)
    return get_peft_model(packed(method), LoraConfig(**settings))


def near(model: PeftModel, method: str, scale: float = 0.05) -> Any:
    """A dense model near to the packed one, as if that had been made from it; low-rank errors."""
    dense = decoded(packed(method))
    generator = torch.Generator().manual_seed(2)
    base = model.get_base_model()
    for name, layer in list(base.named_modules()):
        if isinstance(layer, PackedLinear):
            error = torch.randn(layer.out_features, 5, generator=generator)
            error = error @ torch.randn(5, layer.in_features, generator=generator)
            weight = layer.dequantize(torch.float32)
            target = dense.get_submodule(name.removesuffix(".base_layer"))
            target.weight.data = weight + scale * error * weight.std() / error.std()
    return dense


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
@pytest.mark.parametrize("method", METHODS)
def test_an_error_of_low_rank_is_corrected(method: str, options: dict, tmp_path: Path) -> None:
    model = with_lora(method, **options)
    dense = near(model, method)
    before = (logits(model) - logits(dense)).norm()
    left = hf_vq.init_adapter_from_quantization_error(model, DATA, base_model=dense)
    assert len(left) == 14
    assert max(left.values()) < 1e-3
    assert (logits(model) - logits(dense)).norm() < 0.02 * before
    # saved and loaded like any other adapter
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(packed(method), tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_weighting_by_activations_is_better_where_it_counts(tmp_path: Path) -> None:
    dense = tiny("llama", torch.float32)
    dense.save_pretrained(tmp_path, max_shard_size="100KB")  # several files
    config = hf_vq.GPTVQConfig(2, dataset=tokens(16, 32), kmeans_iterations=2, refine_iterations=0)
    load(tmp_path, quantization_config=config, dtype=torch.float32).save_pretrained(
        tmp_path / "packed"
    )
    errors = {}
    for kind in ("none", "weights", "activations"):
        base = load(tmp_path / "packed", dtype=torch.float32)
        model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
        if kind != "none":
            data = DATA if kind == "activations" else None
            left = hf_vq.init_adapter_from_quantization_error(model, data, base_model=tmp_path)
            assert all(0 < value < 1 for value in left.values())
        errors[kind] = float((logits(model) - logits(dense)).norm())
    assert errors["activations"] < errors["weights"] < errors["none"]


def test_what_cannot_be_initialized() -> None:
    ia3 = get_peft_model(
        packed("gptvq"), IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    )
    with pytest.raises(ValueError, match="no LoRA adapter"):
        hf_vq.init_adapter_from_quantization_error(ia3, DATA, base_model=tiny("llama"))
    model = with_lora()
    with pytest.raises(ValueError, match="called 'other'"):
        hf_vq.init_adapter_from_quantization_error(model, DATA, adapter_name="other")
    with pytest.raises(ValueError, match="does not name its original"):
        hf_vq.init_adapter_from_quantization_error(model, DATA)
    with pytest.raises(ValueError, match=r"q_proj: OPTForCausalLM has no"):
        hf_vq.init_adapter_from_quantization_error(model, base_model=tiny("opt"))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
@pytest.mark.parametrize("method", METHODS)
def test_merged_layers_are_quantized_again(method: str, targets: Any, tmp_path: Path) -> None:
    model = with_lora(method, target_modules=targets)
    train(model, 2)
    base = model.get_base_model()
    specs = {
        name.removesuffix(".base_layer"): layer.spec for name, layer in packed_layers(base).items()
    }
    untouched = {
        name: layer.qweight.clone()
        for name, layer in packed_layers(base).items()
        if not name.endswith(".base_layer")
    }
    merged = hf_vq.merge_and_requantize(model, tokens(16, 32))
    found = packed_layers(merged)
    assert found.keys() == specs.keys()
    for name, layer in found.items():
        assert layer.spec.nbytes <= specs[name].nbytes
        assert type(layer.spec) is type(specs[name])
    assert all(torch.equal(found[name].qweight, codes) for name, codes in untouched.items())
    report = merged.hf_quantizer.report["requantized"]
    assert report["layers"] == 14 - len(untouched)
    assert 0 < report["loss_before"] < 20
    assert 0 < report["loss"] < 20
    assert merged.is_quantized
    merged.save_pretrained(tmp_path)
    again = load(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(again), logits(merged))


def test_merging_without_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match="no adapters to merge"):
        hf_vq.merge_and_requantize(packed("gptvq"), DATA)
    model = get_peft_model(packed("gptvq"), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="no packed layer"):
        hf_vq.merge_and_requantize(model, DATA)
