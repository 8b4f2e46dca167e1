"""A damaged or foreign checkpoint is one error that names the layer and the file."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_vq.configs import GPTVQConfig
from hf_vq.formats import FORMATS, FormatError
from hf_vq.formats.gptvq import GPTVQSpec
from hf_vq.formats.layer_list import write_layers
from hf_vq.layers.linear import PackedLinear
from tests.helpers import random_gptvq
from tests.models import logits, packed

pytestmark = pytest.mark.smoke

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    packed("llama-bias").save_pretrained(folder)
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def load(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder)


def test_none_for_a_config_loads_what_is_packed(checkpoint):
    expected = logits(load(checkpoint))
    for classes in (AutoModelForCausalLM, LlamaForCausalLM):
        model = classes.from_pretrained(checkpoint, quantization_config=None)
        assert isinstance(model.get_submodule(LAYER), PackedLinear)
        assert torch.equal(logits(model), expected)


def edit(folder, change):
    """Apply `change` to the tensors of a checkpoint."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def wider(tensors):
    tensors[f"{LAYER}.indices"] = torch.zeros(100, 99, dtype=torch.int32)


def narrower_type(tensors):
    tensors[f"{LAYER}.codebook_scales"] = tensors[f"{LAYER}.codebook_scales"].half()


def short_bias(tensors):
    tensors[f"{LAYER}.bias"] = tensors[f"{LAYER}.bias"][:-1].clone()


def not_finite(tensors):
    tensors[f"{LAYER}.codebook_scales"][0, 0] = torch.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.codebooks"), "'codebooks' is missing from model.safetensors"),
        (lambda t: t.pop(f"{LAYER}.bias"), "'bias' is missing from model.safetensors"),
        (lambda t: t.update({f"{LAYER}.weight": torch.zeros(2, 2)}), "extra tensor 'weight'"),
        (wider, r"'indices' in model.safetensors has shape \[100, 99\]"),
        (narrower_type, "'codebook_scales' in model.safetensors .* F16.* BF16"),
        (short_bias, r"'bias' in model.safetensors has shape \[99\]"),
        (not_finite, "not finite"),
    ],
)
def test_damaged_tensors(copy, change, message):
    edit(copy, change)
    with pytest.raises(FormatError, match=f"{LAYER}: .*{message}"):
        load(copy)


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000])
def test_truncated_file(copy, keep):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FormatError, match=r"model\.safetensors is no complete safetensors file"):
        load(copy)


def test_missing_shard(checkpoint, tmp_path):
    load(checkpoint).save_pretrained(tmp_path, max_shard_size="50KB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(FormatError, match=r"model-00002-of-.* cannot be read \(No such file"):
        load(tmp_path)


def test_layer_that_the_config_forgot(copy):
    def forget(config):
        for entry in config["layers"]:
            entry["modules"] = [m for m in entry["modules"] if m != LAYER]

    edit_config(copy, forget)
    with pytest.raises(FormatError, match=f"{LAYER}: .*does not list it"):
        load(copy)


def listed(*names, **fields):
    def change(config):
        config["layers"][0]["modules"].extend(names)
        config["layers"][0].update(fields)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (listed(LAYER), f"{LAYER}: config.json lists it twice"),
        (listed("lm_head.nothing", "model.norm"), "model.norm: .*LlamaRMSNorm"),
        (listed(rotation="new"), "unknown field 'rotation'"),
        (listed(group_rows="many"), "group_rows"),
        (lambda c: c["layers"][0].pop("vector_dim"), "missing field 'vector_dim'"),
        (lambda c: c.pop("layers"), "lists no packed layers"),
        (lambda c: c.update(format_version="2.0"), "pip install -U hf-vq"),
        (lambda c: c.update(format_version="old"), "format_version is 'old'"),
    ],
)
def test_damaged_config(copy, change, message):
    edit_config(copy, change)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        load(copy)


def test_newer_minor_version_with_new_keys_loads_and_keeps_them(copy, tmp_path):
    edit_config(copy, lambda c: c.update(format_version="1.9", rotations={"seed": 1}))
    model = load(copy)
    model.save_pretrained(tmp_path / "again")
    stored = json.loads((tmp_path / "again" / "config.json").read_text())
    assert stored["quantization_config"]["rotations"] == {"seed": 1}


def test_model_without_any_of_the_layers(copy):
    def rename(config):
        for entry in config["layers"]:
            entry["modules"] = [m.replace("model.", "decoder.") for m in entry["modules"]]

    edit_config(copy, rename)
    with pytest.raises(FormatError, match="has none of them"):
        load(copy)


def test_fewer_layers_than_listed_is_said(checkpoint, caplog):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, num_hidden_layers=1)
    assert "model.layers.1" in caplog.text
    assert len([m for m in model.modules() if isinstance(m, PackedLinear)]) == 7


def test_index_beyond_its_codebook(tmp_path):
    """Only codebooks whose size is no power of two have indices that mean nothing."""
    model = packed("llama")
    old = model.get_submodule(LAYER).spec
    spec = GPTVQSpec(old.out_features, old.in_features, 2, 11, 50, 86)
    codes = random_gptvq(spec)
    tensors = FORMATS["gptvq"].pack(codes, spec)
    model.set_submodule(LAYER, PackedLinear.from_packed(spec, tensors, compute_dtype=model.dtype))
    model.save_pretrained(tmp_path)
    load(tmp_path)
    edit(tmp_path, lambda t: t[f"{LAYER}.indices"].fill_(-1))
    with pytest.raises(FormatError, match=f"{LAYER}: .*beyond the codebook of 11"):
        load(tmp_path)


def test_layer_entries_share_specs():
    small, large = GPTVQSpec(4, 8, 2, 4, 4, 8), GPTVQSpec(40, 8, 2, 4, 4, 8)
    other = GPTVQSpec(4, 8, 2, 4, 2, 8)
    entries = write_layers({"a": (small, False), "b": (other, True), "c": (large, True)})
    assert [e["modules"] for e in entries] == [["a", "c"], ["b"]]
    assert entries[1]["group_rows"] == 2
    config = GPTVQConfig()
    config.layers = entries
    assert GPTVQConfig.from_dict(json.loads(config.to_json_string())).layers == entries
