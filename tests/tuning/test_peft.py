"""Merging, unmerging, several adapters, and refusals, over packed layers."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="needs peft")

import peft
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers.integrations.peft import MIN_PEFT_VERSION

from hf_vq.layers import PackedLinear
from hf_vq.loading import packed_layers
from hf_vq.tuning.peft import install
from tests.models import load
from tests.tuning.packing import METHODS, TOKENS, adapters, logits, packed, train

pytestmark = pytest.mark.filterwarnings("ignore")


def trained(method: str = "gptvq", name: str = "lora", dtype: Any = torch.float32) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(packed(method, dtype), adapters()[name])
    train(model, 2)
    return model


def stored(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": tensor.clone()
        for name, layer in packed_layers(model).items()
        for key, tensor in layer.packed().items()
    }


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "vera", "oft"])
@pytest.mark.parametrize("method", METHODS)
def test_merging_gives_the_exact_dense_model(method: str, name: str, tmp_path: Path) -> None:
    model = trained(method, name)
    wanted, before = logits(model), stored(model)
    model.merge_adapter()
    assert torch.allclose(logits(model), wanted, atol=2e-4)
    model.unmerge_adapter()
    after = stored(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(logits(model), wanted)

    targeted = {type(m).__name__ for m in model.modules()} & {"PackedLinear"}
    assert targeted
    merged = model.merge_and_unload(safe_merge=True)
    assert torch.allclose(logits(merged), wanted, atol=2e-4)
    merged.save_pretrained(tmp_path)
    again = load(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(again), logits(merged))
    everything = name in ("lora", "dora", "oft")
    assert bool(packed_layers(again)) is not everything
    assert bool(packed_layers(merged)) is not everything
    config = json.loads((tmp_path / "config.json").read_text())
    assert ("quantization_config" in config) is not everything
    assert getattr(merged, "is_quantized", False) is not everything
    assert hasattr(merged.config, "quantization_config") is not everything


def test_weights_of_a_bf16_merge_are_rounded_once() -> None:
    model = trained("vptq", dtype=torch.bfloat16)
    name = "model.layers.0.mlp.up_proj"
    layer = model.get_base_model().get_submodule(name)
    delta = layer.get_delta_weight("default").float()
    wanted = (layer.base_layer.dequantize(torch.float32) + delta).bfloat16()
    merged = model.merge_and_unload()
    linear = merged.get_submodule(name)
    assert type(linear) is nn.Linear
    assert torch.equal(linear.weight, wanted)
    assert not linear.weight.requires_grad


def test_several_adapters_are_switched_merged_and_unmerged() -> None:
    model = get_peft_model(packed("cvxq"), LoraConfig(r=2, target_modules=["q_proj"]))
    base = logits(model)
    model.add_adapter("other", LoraConfig(r=3, target_modules="all-linear", use_rslora=True))
    model.set_adapter("other")
    train(model, 2)
    other = logits(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), base)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.merge_adapter(["other"])
    assert torch.allclose(logits(model), other, atol=2e-4)
    model.merge_adapter(["default"])  # untrained: adds nothing, over what is dense already
    assert torch.allclose(logits(model), other, atol=2e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), base)
    unloaded = model.unload()
    assert len(packed_layers(unloaded)) == 14
    assert torch.equal(logits(unloaded), base)


def test_merging_nothing_leaves_the_layers_packed() -> None:
    model = get_peft_model(packed("gptvq"), LoraConfig(r=2, target_modules=["q_proj"]))
    model.merge_adapter([])
    assert len(packed_layers(model)) == 14
    model.merge_adapter(["default"])
    assert len(packed_layers(model)) == 12
    model.merge_adapter(["default"])  # again: a warning, and nothing happens
    assert len(packed_layers(model)) == 12


def test_a_failed_safe_merge_leaves_the_layer_packed() -> None:
    model = trained()
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        layer.merge(safe_merge=True)
    assert isinstance(layer.base_layer, PackedLinear)


def test_copies_and_pickles_of_merged_layers() -> None:
    model = trained()
    wanted = stored(model)
    model.merge_adapter()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.unmerge_adapter()
        again = stored(twin)
        assert all(torch.equal(wanted[key], again[key]) for key in wanted)


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"this Transformers' own adapters need PEFT {MIN_PEFT_VERSION}: pip install -U peft",
)
def test_transformers_own_adapters(tmp_path: Path) -> None:
    model = packed("vptq")
    model.add_adapter(LoraConfig(r=2, target_modules="all-linear"))
    assert sum(p.requires_grad for p in model.parameters()) == 28
    train(model, 2)
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    again = packed("vptq")
    again.load_adapter(str(tmp_path))
    assert torch.equal(logits(again), wanted)


@pytest.mark.parametrize("method", METHODS)
def test_kbit_preparation_keeps_codebooks(method: str) -> None:
    model = packed(method, torch.bfloat16)
    before = {key: tensor.dtype for key, tensor in stored(model).items()}
    prepared = prepare_model_for_kbit_training(model)
    assert {key: tensor.dtype for key, tensor in stored(prepared).items()} == before
    assert prepared.is_gradient_checkpointing
    model = get_peft_model(prepared, adapters()["lora"]).train()
    losses = train(model)
    assert losses[-1] < losses[0]


def test_gradient_checkpointing_changes_no_gradient() -> None:
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(packed("gptvq"), adapters()["lora"]).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*found, strict=True))


def test_nothing_dense_is_kept_for_the_backward_pass() -> None:
    model = get_peft_model(packed("gptvq"), adapters()["lora"])
    shapes = {(layer.out_features, layer.in_features) for layer in packed_layers(model).values()}
    kept: list[tuple[int, ...]] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert kept
    assert not shapes & set(kept)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.LoHaConfig(target_modules=["q_proj"]), r"LOHA.*use LoRA"),
        (peft.LoKrConfig(target_modules=["q_proj"]), r"LOKR.*use LoRA"),
        (peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9), r"ADALORA.*use LoRA"),
        (
            LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"),
            "init_adapter_from_quantization_error",
        ),
        (
            LoraConfig(target_modules="all-linear", init_lora_weights="olora"),
            "init_adapter_from_quantization_error",
        ),
        (
            LoraConfig(target_modules="all-linear", init_lora_weights="corda"),
            "init_adapter_from_quantization_error",
        ),
    ],
)
def test_what_needs_the_weight_is_refused(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_peft_model(packed("gptvq"), config)


def test_loftq_is_refused() -> None:
    pytest.importorskip("scipy", reason="needs scipy, as PEFT's LoftQ does: pip install scipy")
    config = LoraConfig(
        target_modules=["q_proj"], init_lora_weights="loftq", loftq_config=peft.LoftQConfig()
    )
    with pytest.raises(ValueError, match="init_adapter_from_quantization_error"):
        get_peft_model(packed("gptvq"), config)


@pytest.mark.parametrize("method", METHODS)
def test_eva_finds_directions_in_the_inputs(method: str, tmp_path: Path) -> None:
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=1.0),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(packed(method), config)
    base, rows = logits(packed(method)), TOKENS.repeat(4, 1)
    batches = [{"input_ids": r, "attention_mask": torch.ones_like(r)} for r in rows.split(4)]
    peft.initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    assert torch.equal(logits(model), base)
    for block in model.get_base_model().model.layers:
        directions = block.self_attn.q_proj.lora_A["default"].weight
        assert torch.allclose(directions @ directions.T, torch.eye(4), atol=1e-4)
    losses = train(model)
    assert losses[-1] < losses[0] - 1e-3
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(packed(method), tmp_path)), logits(model))


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "PagedAdamW"])
def test_optimizers_of_bitsandbytes(name: str) -> None:
    """Paged ones page on a GPU only; here they have to be accepted and to train."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    torch.manual_seed(0)
    model = get_peft_model(packed("gptvq"), adapters()["lora"])
    kept = stored(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = getattr(bitsandbytes.optim, name)(trained, lr=0.02)
    losses = []
    for _ in range(4):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(kept[key], value) for key, value in stored(model).items())


def test_dense_models_are_left_alone() -> None:
    install()
    install()
    linear = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model = get_peft_model(linear, peft.LoKrConfig(target_modules=["0"]))
    assert isinstance(model.merge_and_unload(), nn.Sequential)
    linear = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model = get_peft_model(linear, LoraConfig(target_modules=["0"], init_lora_weights="pissa"))
    model.merge_adapter()
    model.unmerge_adapter()
    assert type(model.base_model.model[0].base_layer) is nn.Linear
