"""Quantizing with CVXQ: what is planned is what is saved, and it reads back as it was."""

from __future__ import annotations

import filecmp
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from hf_vq.cli import app
from hf_vq.config_cvxq import CVXQConfig
from hf_vq.config_vptq import VPTQConfig
from hf_vq.hub.checkpoint import read_checkpoint
from hf_vq.loading import packed_layers
from tests.models import DISK, PROMPT, load, logits, tiny, tokens
from tests.published import stored

pytestmark = pytest.mark.smoke

QUICK = {"refine_iterations": 1, "fit_rounds": 1}


@pytest.fixture(scope="module")
def cvxq(dense, tmp_path_factory):
    """A model with biases quantized on load, and the folder it was saved in."""
    folder = tmp_path_factory.mktemp("cvxq") / "packed"
    overrides = {"down_proj": {"location": "int8", "group_rows": 16}, "q_proj": {"bits": 4}}
    config = CVXQConfig(2.5, dataset=tokens(8), overrides=overrides, **QUICK)
    model = load(dense("llama-bias"), quantization_config=config)
    model.save_pretrained(folder)
    return model, folder


def test_reads_back_as_it_was(cvxq, tmp_path):
    model, folder = cvxq
    again = load(folder)
    assert torch.equal(logits(again), logits(model))
    specs = {name: layer.spec for name, layer in packed_layers(model).items()}
    assert {name: layer.spec for name, layer in packed_layers(again).items()} == specs
    for device_map in ("cpu", "auto"):
        assert torch.equal(logits(load(folder, device_map=device_map)), logits(model))
    off = load(folder, device_map=DISK, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(off), logits(model))
    again.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json", "quantization_report.json", "README.md"):
        assert filecmp.cmp(folder / name, tmp_path / "again" / name, shallow=False), name


def test_reads_back_in_another_process(cvxq, tmp_path):
    model, folder = cvxq
    torch.save((PROMPT, logits(model)), tmp_path / "expected.pt")
    script = (
        "import sys, torch, hf_vq; from transformers import AutoModelForCausalLM;"
        "torch.set_num_threads(1); prompt, expected = torch.load(sys.argv[2]);"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval();"
        "assert torch.equal(model(prompt).logits, expected)"
    )
    arguments = [sys.executable, "-c", script, str(folder), str(tmp_path / "expected.pt")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_overrides_and_targets_reach_the_layers(cvxq):
    model, folder = cvxq
    layers = packed_layers(model)
    down = [layer.spec for name, layer in layers.items() if "down_proj" in name]
    assert down and all((s.location, s.group_rows) == ("int8", 16) for s in down)
    queries = [layer.spec for name, layer in layers.items() if "q_proj" in name]
    others = [layer.spec for name, layer in layers.items() if "q_proj" not in name]
    for specs, target in ((queries, 4), (others, 2.5)):
        bits = 8 * sum(s.nbytes for s in specs) / sum(s.num_weights for s in specs)
        assert 0.97 * target < bits <= target
    written = stored(folder)
    config = CVXQConfig.from_dict(written)
    assert config.is_quantized and config.to_dict() == written


def test_ledger_report_and_card(cvxq):
    _, folder = cvxq
    checkpoint = read_checkpoint(folder)
    assert checkpoint.method == "cvxq"
    assert all(m.relative_error is not None for m in checkpoint.matrices)
    ledger = checkpoint.report["ledger"]
    assert ledger["decoder_bits"] == pytest.approx(checkpoint.packed_bits)
    files = load_file(folder / "model.safetensors")
    assert ledger["model_bytes"] == sum(t.nbytes for t in files.values())
    assert checkpoint.report["bits"] == pytest.approx(checkpoint.packed_bits)
    assert "- cvxq" in (folder / "README.md").read_text()


def test_dequantized(cvxq):
    model, folder = cvxq
    dense = load(folder, quantization_config=CVXQConfig(dequantize=True))
    assert not packed_layers(dense)
    torch.testing.assert_close(logits(dense), logits(model), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", ["llama-tied", "opt"])
def test_other_models_without_data(dense, tmp_path, kind):
    model = load(dense(kind), quantization_config=CVXQConfig(4, dataset=None, **QUICK))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))
    assert read_checkpoint(tmp_path).packed_bits <= 4


@pytest.mark.parametrize("value", [0.0, 0.25])
@pytest.mark.parametrize("location", ["none", "int8"])
def test_constant_matrices(tmp_path, value, location):
    """They need fewer bits than planned; what is said about the files is still true."""
    model = tiny("llama")
    with torch.no_grad():
        for name in ("gate_proj", "down_proj"):
            getattr(model.model.layers[0].mlp, name).weight.fill_(value)
    model.save_pretrained(tmp_path / "dense")
    config = CVXQConfig(
        3, dataset=tokens(8), location=location, asymmetric_calibration=False, **QUICK
    )
    packed = load(tmp_path / "dense", quantization_config=config)
    weight = packed.model.layers[0].mlp.down_proj.dequantize(torch.float32)
    if value == 0 or location == "none":
        torch.testing.assert_close(weight, torch.full_like(weight, value), rtol=0.05, atol=1e-6)
    packed.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), logits(packed))
    checkpoint = read_checkpoint(tmp_path / "out")
    assert checkpoint.report["ledger"]["packed_bytes"] == checkpoint.packed_bytes
    assert checkpoint.packed_bits <= 3


@pytest.mark.parametrize("kind", ["llama", "llama-bias"])
def test_bias_correction(dense, tmp_path, kind):
    config = CVXQConfig(3, dataset=tokens(8), bias_correction=True, **QUICK)
    model = load(dense(kind), quantization_config=config)
    layers = packed_layers(model)
    assert all(layer.bias is not None and bool(layer.bias.any()) for layer in layers.values())
    assert model.model.layers[0].mlp.up_proj.to_linear().bias is not None
    model.save_pretrained(tmp_path / "once")
    again = load(tmp_path / "once")
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "twice")
    for name in ("model.safetensors", "config.json"):
        assert filecmp.cmp(tmp_path / "once" / name, tmp_path / "twice" / name, shallow=False)
    checkpoint = read_checkpoint(tmp_path / "once")
    added = 0 if kind == "llama-bias" else sum(2 * la.out_features for la in layers.values())
    assert checkpoint.packed_bytes == added + sum(la.spec.nbytes for la in layers.values())
    assert 2.95 < checkpoint.packed_bits <= 3
    ledger = checkpoint.report["ledger"]
    assert ledger["packed_bytes"] == checkpoint.packed_bytes
    files = load_file(tmp_path / "once" / "model.safetensors")
    assert ledger["model_bytes"] == sum(t.nbytes for t in files.values())


def test_added_biases_of_a_dense_model_are_warned_of(dense, caplog):
    config = CVXQConfig(3, dataset=tokens(8), bias_correction=True, **QUICK)
    for kind, lost in (("llama", True), ("llama-bias", False)):
        caplog.clear()
        model = load(dense(kind), quantization_config=config).dequantize()
        assert ("14 layers of this dense model" in caplog.text) == lost
        assert model.model.layers[0].mlp.up_proj.bias is not None


@pytest.mark.parametrize("weight_energies", [False, True])
def test_measured_again_on_the_quantized_model(dense, weight_energies):
    config = CVXQConfig(
        3, dataset=tokens(8), reestimations=1, weight_energies=weight_energies,
        quantize_embeddings=True, **QUICK
    )  # fmt: skip
    once = CVXQConfig(3, dataset=tokens(8), quantize_embeddings=True, **QUICK)
    again = load(dense("llama-tied"), quantization_config=config)
    plain = load(dense("llama-tied"), quantization_config=once)
    assert not torch.equal(logits(again), logits(plain))
    assert again.hf_quantizer.report["gains"] != plain.hf_quantizer.report["gains"]
    assert len(again.hf_quantizer.report["matrices"]) == len(packed_layers(again))
    head, embedding = again.get_output_embeddings(), again.get_input_embeddings()
    assert head.qweight is embedding.qweight
    with pytest.raises(ValueError, match="set one of them to 0"):
        VPTQConfig(reestimations=1, finetune_steps=2)


def test_bad_input_is_refused(cvxq, dense, tmp_path):
    with pytest.raises(ValueError, match=r"already quantized \(its config\.json says cvxq\)"):
        load(cvxq[1], quantization_config=CVXQConfig(3))
    with pytest.raises(ValueError, match=r"bits=1 is out of reach for a .* matrix .*reachable"):
        config = CVXQConfig(1, group_rows=8, scale_dtype="float32")
        load(dense("llama"), quantization_config=config)
    with pytest.raises(ValueError, match="too few for the Hessian"):
        load(dense("llama"), quantization_config=CVXQConfig(3, dataset=tokens(1)))
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"1\.self_attn\.o_proj: 1 of .* NaN or infinite"):
        load(tmp_path, quantization_config=CVXQConfig(3))


def test_from_the_shell(dense, tmp_path):
    model, out = dense("llama"), tmp_path / "out"
    geometry = ["--bits", "3", "--group-rows", "32", "--levels", "companding", "--no-permuted"]
    result = CliRunner().invoke(
        app, ["quantize", str(model), str(out), "--method", "cvxq", *geometry]
    )
    assert result.exit_code == 0, result.output
    assert stored(out)["levels"] == "laplace"
    for entry in stored(out)["layers"]:
        assert entry["group_rows"] == 32 and not entry["permuted"] and entry["levels"] == "laplace"
    result = CliRunner().invoke(app, ["inspect", str(out), "--json"])
    assert json.loads(result.output)["method"] == "cvxq"
