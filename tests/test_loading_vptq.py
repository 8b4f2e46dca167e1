"""Published VPTQ checkpoints of every age load, compute what their tensors say, and save again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from hf_vq.config_vptq import VPTQConfig
from hf_vq.formats import FormatError
from hf_vq.hub.checkpoint import read_checkpoint
from hf_vq.layers.linear import PackedLinear
from hf_vq.loading import packed_layers
from tests.formats.test_vptq_config import OFFICIAL
from tests.models import DISK, load, logits
from tests.published import VARIETY, edit_config, publish, stored

pytestmark = pytest.mark.smoke

ROOT = Path(__file__).resolve().parents[1]
UP = "model.layers.1.mlp.up_proj"


def listed(entries, **more):
    return {"quantization_config": {"quant_method": "vptq", "config_for_layers": entries, **more}}


def shared(entries):
    """Entries of their own for the first block, one for all other layers of a name."""
    own = {n: e for n, e in entries.items() if "layers.0." in n}
    by_leaf = {n.rpartition(".")[2]: e for n, e in entries.items()}
    return listed(own, shared_layer_config=by_leaf, modules_to_not_convert=["lm_head"])


GENERATIONS = {
    "oldest": ({}, lambda entries: {"quant_config": entries}),
    "per-layer": ({}, listed),
    "shared": ({}, shared),
    "absorbed": ({"enable_perm": False}, listed),
    "unpacked": ({"is_indice_packed": False}, listed),
    "unpacked-float": ({"is_indice_packed": False, "indices_as_float": True}, listed),
    "unpacked-oldest": ({"is_indice_packed": False}, lambda entries: {"quant_config": entries}),
}


def assert_weights(model, dense):
    layers = packed_layers(model)
    assert layers.keys() == dense.keys()
    for name, weight in dense.items():
        assert torch.equal(layers[name].dequantize(torch.float32), weight), name


@pytest.mark.parametrize("kind", ["llama-bias", "qwen2"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_generation(generation, kind, tmp_path):
    changes, place = GENERATIONS[generation]
    entries, dense = publish(tmp_path / "old", kind, **changes)
    assert len(dense) == 2 * len(VARIETY)
    edit_config(tmp_path / "old", **place(entries))
    model = load(tmp_path / "old", dtype=torch.float32)
    assert_weights(model, dense)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "centroids" in n)
    expected = logits(model)
    for name, weight in dense.items():  # a bias or a permutation lost would show
        linear = model.get_submodule(name).to_linear()
        assert torch.equal(linear.weight, weight)
        model.set_submodule(name, linear)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)

    again = load(tmp_path / "old")
    again.save_pretrained(tmp_path / "new")
    model = load(tmp_path / "new", dtype=torch.float32)
    assert_weights(model, dense)
    assert torch.equal(logits(model), expected)
    written = stored(tmp_path / "new")
    assert written.keys() - {"modules_to_not_convert"} == {
        "quant_method",
        "format_version",
        "config_for_layers",
    }
    for name, entry in written["config_for_layers"].items():
        assert entry.keys() - {"norm_dim"} == OFFICIAL
        assert ("norm_dim" in entry) == ("o_proj" in name)
        assert entry["is_indice_packed"]
    ledger = read_checkpoint(tmp_path / "new")
    assert [m.name for m in ledger.matrices] == list(packed_layers(model))
    assert "quant_config" not in json.loads((tmp_path / "new" / "config.json").read_text())


@pytest.mark.parametrize("generation", GENERATIONS)
def test_ledger_of_what_others_packed(generation, tmp_path):
    changes, place = GENERATIONS[generation]
    entries, _ = publish(tmp_path, **changes)
    edit_config(tmp_path, **place(entries))
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.method == "vptq" and checkpoint.report is None
    assert {m.name for m in checkpoint.matrices} == set(entries)
    file = tmp_path / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert checkpoint.packed_bytes + checkpoint.dense_bytes == file.stat().st_size - header


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_codebooks_keep_the_dtype_of_the_file(dtype, tmp_path):
    entries, dense = publish(tmp_path / "a", codebook_dtype=dtype)
    edit_config(tmp_path / "a", **listed(entries))
    written = load_file(tmp_path / "a" / "model.safetensors")
    load(tmp_path / "a", dtype=torch.float32).save_pretrained(tmp_path / "b")
    model = load(tmp_path / "b", dtype=torch.float16)
    for name, layer in packed_layers(model).items():
        assert layer.spec.codebook_dtype == dtype
        for part, tensor in layer.packed().items():
            assert tensor.dtype == written[f"{name}.{part}"].dtype
            assert torch.equal(tensor, written[f"{name}.{part}"])
    assert_weights(model, dense)


@pytest.mark.parametrize("device_map", ["auto", "cpu", DISK])
def test_device_maps(device_map, tmp_path):
    entries, _ = publish(tmp_path / "a")
    edit_config(tmp_path / "a", **listed(entries))
    expected = logits(load(tmp_path / "a"))
    model = load(tmp_path / "a", device_map=device_map, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(load(tmp_path / "b")), expected)
    model.dequantize()  # after saving, which leaves the dtype's name in the config
    assert not packed_layers(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-2, atol=1e-2)


def test_an_unpacked_layer_cannot_be_offloaded(tmp_path):
    entries, dense = publish(tmp_path, is_indice_packed=False)
    edit_config(tmp_path, **listed(entries))
    assert_weights(load(tmp_path, device_map="auto", dtype=torch.float32), dense)
    with pytest.raises(FormatError, match=r"layers\.1\..* load the model without device_map"):
        load(tmp_path, device_map=DISK, offload_folder=tmp_path / "offload")


def test_without_the_language_models_head(tmp_path):
    entries, dense = publish(tmp_path)
    edit_config(tmp_path, **listed(entries))
    model = load(tmp_path, cls=AutoModel, dtype=torch.float32)
    assert_weights(model, {name.removeprefix("model."): w for name, w in dense.items()})


def test_unknown_keys_are_kept_and_no_settings_made_up(tmp_path):
    entries, _ = publish(tmp_path / "a")
    edit_config(tmp_path / "a", **listed(entries, enable_proxy_error=False, notes={"by": "us"}))
    model = load(tmp_path / "a")
    assert model.config.quantization_config.bits is None
    model.save_pretrained(tmp_path / "b")
    written = stored(tmp_path / "b")
    assert written["notes"] == {"by": "us"} and written["enable_proxy_error"] is False
    assert not set(VPTQConfig.rules) & set(written)
    card = (tmp_path / "b" / "README.md").read_text()
    assert "bits per compressed weight" in card and "`{'by': 'us'}`" in card
    assert "config_for_layers" not in card


def test_shared_entries_leave_out_what_is_not_to_be_converted(tmp_path):
    entries, _ = publish(tmp_path)
    by_leaf = {n.rpartition(".")[2]: e for n, e in entries.items()}
    edit_config(
        tmp_path, **listed({}, shared_layer_config=by_leaf, modules_to_not_convert=["layers.1"])
    )
    # what is packed there after all is found out
    with pytest.raises(FormatError, match=r"layers\.1\..*does not list it as packed"):
        load(tmp_path)


def vision_model():
    text = LlamaConfig(
        hidden_size=64,
        intermediate_size=60,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        max_position_embeddings=128,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=299)
    return LlavaForConditionalGeneration(config).half().eval()


@pytest.mark.parametrize("names", ["new", "old"])
def test_settings_inside_of_the_text_models_config(names, tmp_path):
    entries, dense = publish(tmp_path / "a", model=vision_model())
    if names == "old":  # as Transformers 4 named the modules, in the file and in the config
        file = tmp_path / "a" / "model.safetensors"

        def old(name):
            name = name.replace("model.language_model.", "language_model.model.")
            return name.removeprefix("model.").replace("lm_head", "language_model.lm_head")

        save_file({old(k): v for k, v in load_file(file).items()}, file, {"format": "pt"})
        entries = {old(name): entry for name, entry in entries.items()}
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["text_config"] |= listed(entries)
    edit_config(tmp_path / "a", **config)
    model = load(tmp_path / "a", cls=LlavaForConditionalGeneration, dtype=torch.float32)
    assert_weights(model, dense)
    assert len(read_checkpoint(tmp_path / "a").matrices) == len(dense)
    model.save_pretrained(tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert "quantization_config" not in config["text_config"]
    model = load(tmp_path / "b", cls=LlavaForConditionalGeneration, dtype=torch.float32)
    assert_weights(model, dense)
    assert (tmp_path / "b" / "README.md").exists()
    model.dequantize().save_pretrained(tmp_path / "c")
    assert "quantization_config" not in (tmp_path / "c" / "config.json").read_text()


def test_configs_alone(tmp_path):
    entries, _ = publish(tmp_path)
    edit_config(tmp_path, quant_config=entries)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.quantization_config["config_for_layers"].keys() == entries.keys()
    assert not hasattr(config, "quant_config")
    edit_config(tmp_path, quant_config={"mode": "fast"})  # somebody else's
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.quant_config == {"mode": "fast"} and not hasattr(config, "quantization_config")


def test_packed_experts_are_refused_where_the_model_fuses_them(tmp_path):
    entries, dense = publish(tmp_path, "mixtral")
    edit_config(tmp_path, **listed(entries))
    assert_weights(load(tmp_path, dtype=torch.float32), dense)
    expert = "model.layers.0.block_sparse_moe.experts.0.w1"
    entries[expert] = entries["model.layers.0.self_attn.q_proj"]
    edit_config(tmp_path, **listed(entries))
    with pytest.raises(FormatError, match=f"{expert}: it is packed, but .*experts.gate_up_proj"):
        load(tmp_path)


def test_before_safetensors(tmp_path):
    """Without headers the codebooks take the model's dtype."""
    entries, dense = publish(tmp_path, "llama-bias")
    edit_config(tmp_path, quant_config=entries)
    file = tmp_path / "model.safetensors"
    torch.save(load_file(file), tmp_path / "pytorch_model.bin")
    file.unlink()
    model = load(tmp_path)
    assert packed_layers(model)[UP].spec.codebook_dtype == "float16"
    assert_weights(model, dense)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    entries, _ = publish(folder, "llama-bias")
    edit_config(folder, **listed(entries))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_features": 100}, "in_features is 100, but the model's layer has 172"),
        ({"group_num": 7, "group_size": -1}, "group_num=7"),
        ({"outlier_size": 172, "vector_lens": [4, 6], "num_centroids": [4, 4]}, "outlier_size"),
        ({"num_centroids": [-1, 48]}, "power of two"),
        ({"num_centroids": [-1, 32]}, "'centroids.weight' in .* has shape"),
        ({"num_res_centroids": [-1, -1]}, "'indices' in .* has shape"),
        ({"enable_perm": True}, "'perm' is missing"),
        ({"enable_norm": True}, "'weight_scale' is missing"),
        ({"bias": False}, "extra tensor 'bias'"),
        ({"is_indice_packed": False}, "'indices' in .* has shape"),
        ({"vector_lens": None}, "vector_lens is None"),
    ],
)
def test_config_that_does_not_fit_the_files(checkpoint, tmp_path, changes, message):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    settings = stored(folder)
    settings["config_for_layers"][UP] |= changes
    edit_config(folder, quantization_config=settings)
    with pytest.raises(FormatError, match=f"{UP}: .*{message}"):
        load(folder)


def no_permutation(tensors):
    tensors["model.layers.1.self_attn.q_proj.perm"][3] = 0


def beyond(tensors):
    tensors["model.layers.1.self_attn.k_proj.outlier_indices"][0, 0, 0] = 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_permutation, r"layers\.1\.self_attn\.q_proj: 'perm' is no permutation"),
        (beyond, r"layers\.1\.self_attn\.k_proj: .* beyond the codebook of 32"),
        (lambda t: t.pop(f"{UP}.centroids.weight"), f"{UP}: 'centroids.weight' is missing"),
        (
            lambda t: t.update({f"{UP}.centroids.weight": t[f"{UP}.centroids.weight"].float()}),
            f"{UP}: 'res_centroids.weight' in .* dtype F16, but .* F32",
        ),
        (
            lambda t: t.update({"lm_head.centroids.weight": torch.ones(1, 8)}),
            "lm_head: .* 'centroids.weight' .* does not list it as packed",
        ),
    ],
)
def test_damaged_tensors(checkpoint, tmp_path, change, message):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=message):
        load(folder)


def test_layer_listed_under_two_names(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    settings = stored(folder)
    settings["config_for_layers"]["layers.1.mlp.up_proj"] = settings["config_for_layers"][UP]
    edit_config(folder, quantization_config=settings)
    with pytest.raises(FormatError, match=f"layers.1.mlp.up_proj: .* lists it twice, also as {UP}"):
        load(folder)


# -- written by the official package ------------------------------------------------------


@pytest.fixture(scope="module")
def official():
    folder = ROOT.parent / "shared" / "fixtures" / "vptq" / "model"
    if not folder.is_dir():
        pytest.skip("needs the checkpoint in ../shared/fixtures/vptq, not in this checkout")
    return folder


def test_official_checkpoint_is_decoded_exactly(official, tmp_path):
    expected = load_file(official / "expected.safetensors")
    dense = {k.removeprefix("dense."): v for k, v in expected.items() if k.startswith("dense.")}

    def logits_of(model):
        with torch.no_grad():
            return model(expected["input_ids"]).logits

    model = load(official, dtype=torch.float32)
    assert_weights(model, dense)
    logits = logits_of(model)
    # the weights are the same bit for bit; products of another version of torch are not
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-5, atol=1e-5)

    def check(folder, **kwargs):
        model = load(folder, dtype=torch.float32, **kwargs)
        assert torch.equal(logits_of(model), logits)
        return model

    model.save_pretrained(tmp_path / "again")
    assert_weights(check(tmp_path / "again"), dense)
    check(official, device_map="auto")
    disk = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu"}
    disk |= {"model.rotary_emb": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    check(official, device_map=disk, offload_folder=tmp_path / "offload")
    model = load(official, quantization_config=VPTQConfig(dequantize=True), dtype=torch.float32)
    assert not any(isinstance(m, PackedLinear) for m in model.modules())
    # the same weights in torch's product, which sums in another order than that of packed layers
    torch.testing.assert_close(logits_of(model), logits, rtol=1e-5, atol=1e-5)


def test_official_checkpoint_in_a_process_of_its_own(official):
    script = f"""
import hf_vq, sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
expected = load_file({str(official / "expected.safetensors")!r})
model = AutoModelForCausalLM.from_pretrained({str(official)!r}, dtype=torch.float32)
logits = model(expected["input_ids"]).logits
torch.testing.assert_close(logits, expected["logits"], rtol=1e-5, atol=1e-5)
assert "vptq" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, capture_output=True)
