"""LoRA from the quantization error, and merging that quantizes again."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="needs peft")

from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer

import hf_vq
from hf_vq.evaluation import compare
from hf_vq.layers import PackedLinear
from hf_vq.loading import packed_layers
from hf_vq.tuning.base_weights import BaseWeights
from hf_vq.tuning.originals import original_block, original_embeddings
from tests.models import load, tiny, tokens
from tests.tuning.packing import METHODS, decoded, logits, packed, train

pytestmark = pytest.mark.filterwarnings("ignore")

DATA = tokens(12, 32, seed=5)


def words(folder: Path, count: int, seqlen: int = 128) -> torch.Tensor:
    """Windows (count, seqlen) of Python's reference, as the bundled model reads it."""
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=10**9)
    text = "\n\n".join(topics[name] for name in sorted(topics))
    rows = torch.tensor(tokenizer(text[: 8 * count * seqlen])["input_ids"])
    return rows[: count * seqlen].view(count, seqlen)


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


def test_the_start_undoes_what_a_trained_model_has_lost(docs_llama: Path) -> None:
    """Quantization aims at the original's outputs on the packed model's inputs, not at W."""
    data = words(docs_llama, 32)
    config = hf_vq.GPTVQConfig(2, dataset=data[:24], kmeans_iterations=2, refine_iterations=0)
    packed_model = load(docs_llama, quantization_config=config, dtype=torch.float32)
    dense = load(docs_llama, dtype=torch.float32)
    divergence = {0: compare(dense, packed_model, data[24:]).kl}
    for rank in (8, 32):
        lora = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(packed_model, lora)
        left = hf_vq.init_adapter_from_quantization_error(model, data[:24], base_model=docs_llama)
        assert len(left) == 28
        for name, parameter in model.named_parameters():
            if "lora_A" in name:  # one learning rate suits both
                other = model.get_parameter(name.replace("lora_A", "lora_B"))
                sizes = parameter.square().mean(1), other.square().mean(0)
                assert torch.allclose(*sizes, rtol=1e-3)
        divergence[rank] = compare(dense, model, data[24:]).kl
        packed_model = model.unload()
    assert divergence[8] < 0.95 * divergence[0]
    assert divergence[32] < 0.85 * divergence[8]


def test_the_start_makes_up_for_earlier_layers() -> None:
    """One layer has an adapter and nothing is wrong with it, but with what it is given."""
    name, data = "model.layers.1.self_attn.q_proj", tokens(64, 32, seed=5)
    dense, base = decoded(packed("gptvq")), packed("gptvq")
    with torch.no_grad():
        base.model.layers[0].self_attn.v_proj.codebooks.mul_(30)
        base.model.layers[0].self_attn.o_proj.codebooks.mul_(30)

    def run(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        found = []
        layer = model.get_submodule(name)
        handle = layer.register_forward_hook(lambda _, args, out: found.extend((args[0], out)))
        with torch.no_grad():
            model(input_ids=data)
        handle.remove()
        return found[0].flatten(0, 1), found[1].flatten(0, 1)

    (inputs, before), (_, wanted) = run(base), run(dense)
    lora = LoraConfig(r=172, target_modules=[name])  # as good as a matrix of full rank
    model = get_peft_model(base, lora)
    left = hf_vq.init_adapter_from_quantization_error(model, data, base_model=dense)
    assert left == {name: pytest.approx(0, abs=1e-5)}
    after = run(model.base_model.model)[1]
    best = inputs @ torch.linalg.lstsq(inputs, wanted, driver="gelsd").solution
    errors = [float((out - wanted).square().sum()) for out in (before, after, best)]
    assert errors[2] < 0.5 * errors[0]  # or there would be nothing to make up for
    # on so few tokens only 60 % of what the regression says is believed
    assert errors[1] < errors[2] + 0.3 * (errors[0] - errors[2])


def test_originals_are_read_where_the_packed_model_differs(tmp_path: Path) -> None:
    """Norms and embeddings that were trained or packed since are not the original's."""
    dense = decoded(packed("gptvq"))
    dense.save_pretrained(tmp_path)
    changed = packed("gptvq")
    with torch.no_grad():
        changed.model.layers[0].input_layernorm.weight.mul_(1.5)
        changed.model.embed_tokens.weight.mul_(0.5)
    model = get_peft_model(changed, LoraConfig(r=4, target_modules="all-linear"))
    weights = BaseWeights(tmp_path, changed)
    table = changed.model.embed_tokens.weight
    before = {name: p.clone() for name, p in changed.named_parameters()}
    with original_embeddings(changed, weights) as differ:
        assert differ
        found = changed.model.embed_tokens.weight
        assert torch.equal(found, dense.model.embed_tokens.weight)
    assert changed.model.embed_tokens.weight is table
    block = original_block("model.layers.0", changed.model.layers[0], weights)
    assert not [m for m in block.modules() if isinstance(m, PackedLinear) or hasattr(m, "lora_A")]
    wanted = dict(dense.model.layers[0].named_parameters())
    assert wanted.keys() == dict(block.named_parameters()).keys()
    for name, parameter in block.named_parameters():
        assert torch.equal(parameter, wanted[name]), name
    assert all(
        torch.equal(before[name], p) for name, p in model.base_model.model.named_parameters()
    )


def test_packed_embeddings_are_looked_up_in_the_original(tmp_path: Path) -> None:
    dense = tiny("llama-tied", torch.float32)
    dense.save_pretrained(tmp_path)
    config = hf_vq.GPTVQConfig(2, quantize_embeddings=True, kmeans_iterations=2)
    model = load(tmp_path, quantization_config=config, dtype=torch.float32)
    assert "model.embed_tokens" in packed_layers(model)
    weights = BaseWeights(tmp_path, model)
    with original_embeddings(model, weights) as differ:
        assert differ
        found = model.get_input_embeddings()(DATA)
    assert torch.equal(found, dense.model.embed_tokens(DATA))
    assert "model.embed_tokens" in packed_layers(model)


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
