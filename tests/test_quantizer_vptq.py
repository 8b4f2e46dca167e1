"""Quantizing with VPTQ: what is written is the published layout, and reads back as it was."""

from __future__ import annotations

import filecmp
import json

import pytest
import torch
from transformers import VptqConfig
from typer.testing import CliRunner

from hf_vq.cli import app
from hf_vq.config_gptvq import GPTVQConfig
from hf_vq.config_vptq import VPTQConfig
from hf_vq.hub.checkpoint import read_checkpoint
from hf_vq.loading import packed_layers
from tests.formats.test_vptq_config import OFFICIAL
from tests.models import DISK, QUICK, load, logits, tokens
from tests.published import stored

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def vptq(dense, tmp_path_factory):
    """A model with biases quantized on load, and the folder it was saved in."""
    folder = tmp_path_factory.mktemp("vptq") / "packed"
    overrides = {"down_proj": {"norm": "none", "permute": False}, "q_proj": {"bits": 4}}
    config = VPTQConfig(3, dataset=tokens(8), overrides=overrides, **QUICK)
    model = load(dense("llama-bias"), quantization_config=config)
    model.save_pretrained(folder)
    return model, folder


def test_reads_back_as_it_was(vptq, tmp_path):
    model, folder = vptq
    again = load(folder)
    assert torch.equal(logits(again), logits(model))
    specs = {name: layer.spec for name, layer in packed_layers(model).items()}
    assert {name: layer.spec for name, layer in packed_layers(again).items()} == specs
    assert torch.equal(logits(load(folder, device_map="auto")), logits(model))
    off = load(folder, device_map=DISK, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(off), logits(model))
    again.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json", "quantization_report.json", "README.md"):
        assert filecmp.cmp(folder / name, tmp_path / "again" / name, shallow=False), name


def test_the_config_is_the_published_one_with_ours_beside_it(vptq):
    model, folder = vptq
    written = stored(folder)
    assert written["quant_method"] == "vptq" and "layers" not in written
    layers = written["config_for_layers"]
    assert layers.keys() == packed_layers(model).keys()
    assert all(entry.keys() == OFFICIAL and entry["bias"] for entry in layers.values())
    assert written["bits"] == 3 and written["calibration"]["nsamples"] == 8
    config = VPTQConfig.from_dict(written)
    assert config.is_quantized and config.to_dict() == written
    # Transformers' own class reads it too
    assert VptqConfig(**written).config_for_layers.keys() == layers.keys()


def test_ledger_report_and_card(vptq):
    _, folder = vptq
    checkpoint = read_checkpoint(folder)
    assert checkpoint.method == "vptq" and checkpoint.packed_bits <= 3.5
    assert "config_for_layers" not in checkpoint.settings
    assert all(m.relative_error is not None for m in checkpoint.matrices)
    ledger = checkpoint.report["ledger"]
    assert ledger["decoder_bits"] == pytest.approx(checkpoint.packed_bits)
    card = (folder / "README.md").read_text()
    assert "[VPTQ](https://arxiv.org/abs/2409.17066)" in card and "- vptq" in card
    assert "config_for_layers" not in card


def test_dequantized(vptq, tmp_path):
    model, folder = vptq
    dense = load(folder, quantization_config=VPTQConfig(dequantize=True))
    assert not packed_layers(dense)
    torch.testing.assert_close(logits(dense), logits(model), rtol=2e-2, atol=2e-2)
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_other_libraries_configs_are_one_clear_sentence(vptq, dense):
    with pytest.raises(ValueError, match=r"VptqConfig cannot quantize .* hf_vq\.VPTQConfig\("):
        load(dense("llama"), quantization_config=VptqConfig())
    for config in (VptqConfig(), GPTVQConfig()):
        names = f"quantized with VPTQConfig but you are passing a {type(config).__name__}"
        with pytest.raises(ValueError, match=names):
            load(vptq[1], quantization_config=config)
    with pytest.raises(ValueError, match=r"already quantized \(its config\.json says vptq\)"):
        load(vptq[1], quantization_config=VPTQConfig(3))


def test_from_the_shell(dense, tmp_path):
    model, out = dense("llama"), tmp_path / "out"
    geometry = ["--bits", "none", "--vector-dim", "6", "--num-centroids", "32", "--norm", "none"]
    result = CliRunner().invoke(
        app, ["quantize", str(model), str(out), "--method", "vptq", "--no-permute", *geometry]
    )
    assert result.exit_code == 0, result.output
    assert stored(out)["norm"] == "none"
    for entry in stored(out)["config_for_layers"].values():
        assert entry["vector_lens"][1] == 6 and entry["num_centroids"][1] == 32
        assert not entry["enable_norm"] and not entry["enable_perm"]
    result = CliRunner().invoke(app, ["inspect", str(out), "--json"])
    assert json.loads(result.output)["method"] == "vptq"
    result = CliRunner().invoke(
        app, ["quantize", str(model), str(out), "--method", "gptvq", "--num-centroids", "32"]
    )
    assert result.exit_code == 2 and "gptvq has no field num_centroids" in result.output
