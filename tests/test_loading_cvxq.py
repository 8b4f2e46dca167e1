"""CVXQ layers from a config and files: word counts per layer, and biases that the model has not."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_vq.formats import FormatError
from hf_vq.formats.cvxq import check, pack
from hf_vq.layers.linear import PackedLinear
from hf_vq.loading import (
    describe,
    find_layers,
    finish,
    packed_layers,
    swap_in_empty,
    verify_files,
)
from tests.helpers_cvxq import random_cvxq, with_depths
from tests.models import logits, on_meta, tiny

LEAVES = {"q_proj": True, "v_proj": True, "down_proj": False}
"""Which layers are packed, and whether quantization gave them a bias."""


def publish(folder, **changes):
    """A Llama without biases, some of whose layers were packed; returns what its config says."""
    model = tiny("llama", torch.float32)
    for seed, name in enumerate(n for n, _ in list(model.named_modules())):
        leaf = name.rpartition(".")[2]
        if leaf not in LEAVES:
            continue
        linear = model.get_submodule(name)
        shape = linear.out_features, linear.in_features
        assert linear.bias is None
        spec = with_depths(*shape, 16, "log8", "int8", permuted=True, seed=seed)
        codes = random_cvxq(spec, seed)
        codes.scale_grid[0] -= 5  # or the attention saturates
        bias = torch.randn(shape[0]) / 10 if LEAVES[leaf] else None
        tensors = pack(codes, spec)
        packed = PackedLinear.from_packed(spec, tensors, bias, torch.float32, name)
        model.set_submodule(name, packed)
    recorded = {"quant_method": "cvxq", "layers": describe(model, "cvxq")}
    state = {name: t.contiguous() for name, t in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return model, json.loads(json.dumps(recorded))


def config(recorded):
    return SimpleNamespace(method="cvxq", recorded=recorded, modules_to_not_convert=None)


def load(folder, recorded):
    """What Transformers' hooks do, in their order."""
    model = on_meta("llama")
    swap_in_empty(model, config(recorded), torch.float32)
    path = str(folder / "model.safetensors")
    verify_files(model, [path])
    model.load_state_dict(load_file(path), strict=True, assign=True)
    finish(model)
    rotary = tiny("llama", torch.float32).model.rotary_emb  # not in files
    model.model.rotary_emb = rotary
    return model.eval()


def test_layers_with_added_biases_are_loaded_and_described_again(tmp_path):
    original, recorded = publish(tmp_path)
    assert [len(entry["modules"]) for entry in recorded["layers"]] == [4, 2]
    found = find_layers(tiny("llama"), config(recorded)).found
    assert {n: bias for n, (_, bias) in found.items()} == {
        n: layer.bias is not None for n, layer in packed_layers(original).items()
    }
    model = load(tmp_path, recorded)
    layers = packed_layers(model)
    assert layers.keys() == packed_layers(original).keys()
    for name, layer in layers.items():
        assert layer.spec == original.get_submodule(name).spec
        assert (layer.bias is not None) == LEAVES[name.rpartition(".")[2]]
        assert not any(t.requires_grad for t in layer.packed().values())
    assert torch.equal(logits(model), logits(original))
    assert describe(model, "cvxq") == recorded["layers"]
    for layer in layers.values():  # they do something
        if layer.bias is not None:
            layer.bias.data.zero_()
    assert not torch.allclose(logits(model), logits(original))


def test_without_a_word_on_biases_the_model_decides(tmp_path):
    _, recorded = publish(tmp_path)
    for entry in recorded["layers"]:
        del entry["bias"]
    assert not any(bias for _, bias in find_layers(tiny("llama"), config(recorded)).found.values())
    with pytest.raises(FormatError, match=r"q_proj: .* holds an extra tensor 'bias'"):
        load(tmp_path, recorded)


def test_a_bias_that_the_file_lacks(tmp_path):
    _, recorded = publish(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.self_attn.q_proj.bias"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(FormatError, match=r"layers\.1\.self_attn\.q_proj: 'bias' is missing from"):
        load(tmp_path, recorded)


def test_another_number_of_words(tmp_path):
    _, recorded = publish(tmp_path)
    name = "model.layers.0.mlp.down_proj"
    entry = next(e for e in recorded["layers"] if name in e["modules"])
    entry["modules"][name] -= 1
    with pytest.raises(
        FormatError, match=r"down_proj: 'words' in .* has shape .* but config\.json"
    ):
        load(tmp_path, recorded)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{name}.words"] = tensors[f"{name}.words"][:-1].clone()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(FormatError, match=r"down_proj: 'depths' ask for \d+ words of codes"):
        load(tmp_path, recorded)


def test_checking_parameters_that_are_being_loaded_warns_of_nothing():
    """Transformers hands over float tensors that ask for gradients."""
    spec = with_depths(30, 20, 16, "log8", "int8", permuted=True, seed=0)
    tensors = pack(random_cvxq(spec, 0), spec)
    loaded = {n: torch.nn.Parameter(t, t.is_floating_point()) for n, t in tensors.items()}
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # or a test before this one may have used the only warning up
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check(loaded, spec, "a")
    finally:
        torch.set_warn_always(before)
