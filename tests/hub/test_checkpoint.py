"""The ledger of a checkpoint that was written here by hand, tensor by tensor."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from helpers import random_gptvq
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from hf_vq.formats import FORMATS
from hf_vq.formats.gptvq import GPTVQSpec
from hf_vq.hub.checkpoint import read_checkpoint, read_header

DOWN = "model.layers.0.mlp.down_proj"
GATE = "model.layers.1.mlp.gate_proj"


@pytest.fixture
def folder(tmp_path):
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=43,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=50,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    tensors = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    specs = {
        DOWN: GPTVQSpec(24, 43, 2, 16, 5, 22),
        GATE: GPTVQSpec(43, 24, 4, 16, 43, 24, "float16", scale_block=8),
    }
    groups = []
    for name, spec in specs.items():
        del tensors[f"{name}.weight"]
        packed = FORMATS["gptvq"].pack(random_gptvq(spec), spec)
        tensors |= {f"{name}.{part}": tensor for part, tensor in packed.items()}
        groups.append({"modules": [name], **spec.to_dict()})
    save_file(tensors, tmp_path / "model.safetensors")
    stored = {"quant_method": "gptvq", "bits": 2.5, "format_version": "1.0", "layers": groups}
    written = config.to_dict() | {
        "quantization_config": stored,
        "architectures": ["LlamaForCausalLM"],
    }
    (tmp_path / "config.json").write_text(json.dumps(written))
    return tmp_path


def specs_of(folder) -> dict[str, GPTVQSpec]:
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    shapes = {DOWN: (24, 43), GATE: (43, 24)}
    return {
        g["modules"][0]: GPTVQSpec(
            *shapes[g["modules"][0]], **{k: g[k] for k in g if k != "modules"}
        )
        for g in groups
    }


def test_every_byte_of_the_file_is_in_the_ledger(folder):
    checkpoint = read_checkpoint(folder)
    file = folder / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert checkpoint.file_bytes == file.stat().st_size
    assert checkpoint.packed_bytes + checkpoint.dense_bytes == file.stat().st_size - header
    assert [m.name for m in checkpoint.matrices] == [DOWN, GATE]
    for matrix, spec in zip(checkpoint.matrices, specs_of(folder).values(), strict=True):
        assert matrix.nbytes == spec.nbytes
        assert matrix.bits_per_weight == pytest.approx(spec.bits_per_weight)
    dense = {k: v for k, v in load_file(file).items() if k in checkpoint.dense}
    assert checkpoint.dense_weights == sum(t.numel() for t in dense.values())
    assert not any(name.startswith((DOWN, GATE)) for name in checkpoint.dense)


def test_errors_come_from_the_report(folder):
    assert read_checkpoint(folder).report is None
    row = {"name": GATE, "relative_error": 0.125, "seconds": 1.5}
    (folder / "quantization_report.json").write_text(json.dumps({"matrices": [row]}))
    down, gate = read_checkpoint(folder).matrices
    assert (gate.relative_error, gate.seconds) == (0.125, 1.5)
    assert down.relative_error is None


def test_shards(folder):
    tensors = load_file(folder / "model.safetensors")
    whole = read_checkpoint(folder)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({k: tensors[k] for k in keys}, folder / file)
    (folder / "model.safetensors").unlink()
    weight_map = {key: file for file, keys in parts.items() for key in keys}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    sharded = read_checkpoint(folder)
    assert [asdict(m) for m in sharded.matrices] == [asdict(m) for m in whole.matrices]
    assert sharded.dense == whole.dense


def test_headers_agree_with_safetensors(folder):
    file = folder / "model.safetensors"
    loaded = load_file(file)
    header = read_header(file)
    assert header.keys() == loaded.keys()
    for name, tensor in loaded.items():
        assert header[name].shape == tuple(tensor.shape)
        assert header[name].nbytes == tensor.numel() * tensor.element_size()


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_missing_and_misshapen_tensors_are_named(folder):
    rewrite(folder, lambda t: t.update({f"{DOWN}.indices": t[f"{DOWN}.indices"][:-1].clone()}))
    with pytest.raises(ValueError, match=rf"{DOWN}\.indices has shape"):
        read_checkpoint(folder)
    rewrite(folder, lambda t: t.pop(f"{DOWN}.indices"))
    with pytest.raises(ValueError, match=rf"{DOWN}\.indices is missing"):
        read_checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_files_are_refused(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"truncated|damaged"):
        read_checkpoint(folder)


def test_other_models_are_refused(folder, docs_llama):
    with pytest.raises(ValueError, match="no model packed by hf_vq"):
        read_checkpoint(docs_llama)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["layers"][0]["modules"] = ["model.layers.7.mlp.down_proj"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"layers\.7.*no such layer"):
        read_checkpoint(folder)
