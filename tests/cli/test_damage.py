"""Damaged folders and machines that lack something: one line that says what, where, what to do."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hf_vq.cli import app
from tests.models import packed, tiny, tokens

COMMANDS = {
    "inspect": ["inspect", "{folder}"],
    "eval": ["eval", "{folder}", "--dataset", "{data}", "--seqlen", "32", "--no-generate"],
    "push": ["push", "{folder}", "me/model", "--dry-run"],
}
FAST = ["--kmeans-iterations", "2", "--refine-iterations", "0", "--allocation", "uniform"]


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A packed model's folder, and beside it an original and tokens."""
    top = tmp_path_factory.mktemp("models")
    np.save(top / "data.npy", tokens(4, 64).numpy())
    tiny("llama").save_pretrained(top / "dense")
    packed("llama").save_pretrained(top / "packed")
    return top


def refused(*arguments) -> str:
    """The message of a command that fails, on one line."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    message = " ".join(result.output.replace("│", " ").split())
    assert result.exit_code != 0, message
    assert "Traceback" not in message and "HF_VQ_DEBUG" not in message
    return message


def cut(name, keep):
    def damage(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:keep])

    return damage


def put(name, text):
    return lambda folder: (folder / name).write_text(text)


def stored(**changes):
    """Other values in what config.json says about quantization."""

    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"].update(changes)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def unnamed(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["layers"][0]["modules"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("command", list(COMMANDS))
@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (cut("model.safetensors", -999), "model.safetensors"),
        (cut("model.safetensors", 99), "model.safetensors"),
        (cut("model.safetensors", 0), "model.safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
        (put("config.json", "{ not JSON"), "config.json"),
        (stored(layers="all"), "config.json: layers"),
        (stored(bits="many"), "config.json: bits='many'"),
        (stored(format_version="99.0"), "format version 99.0"),
        (unnamed, "config.json: modules"),
    ],
    ids=["short", "header", "empty", "gone", "garbage", "layers", "bits", "version", "unnamed"],
)
def test_damaged_folders(intact, tmp_path, damage, named, command):
    folder = shutil.copytree(intact / "packed", tmp_path / "packed")
    damage(folder)
    places = {"folder": folder, "data": intact / "data.npy"}
    assert named in refused(*(a.format(**places) for a in COMMANDS[command]))


@pytest.mark.parametrize("command", ["eval", "push"])
def test_damaged_figures_are_named(intact, tmp_path, command):
    folder = shutil.copytree(intact / "packed", tmp_path / "packed")
    (folder / "evaluation.json").write_text("[1, 2")
    places = {"folder": folder, "data": intact / "data.npy"}
    assert "evaluation.json" in refused(*(a.format(**places) for a in COMMANDS[command]))


@pytest.mark.parametrize("report", ["{nope", '{"matrices": 3}', '{"matrices": [1]}'])
def test_a_damaged_report_is_named(intact, tmp_path, report):
    folder = shutil.copytree(intact / "packed", tmp_path / "packed")
    (folder / "quantization_report.json").write_text(report)
    assert "quantization_report.json" in refused("inspect", folder)


@pytest.mark.parametrize("method", ["zip", None])
def test_random_weights_are_not_evaluated(intact, tmp_path, method):
    """What nothing here can unpack loads as a model with random weights."""
    folder = shutil.copytree(intact / "packed", tmp_path / "packed")
    stored(quant_method=method)(folder)
    message = refused("eval", folder, "--dataset", intact / "data.npy", "--seqlen", "32")
    assert "random" in message or "quant_method" in message


def test_damaged_originals(intact, tmp_path):
    folder = shutil.copytree(intact / "dense", tmp_path / "dense")
    cut("model.safetensors", -999)(folder)
    for command in (["plan", folder], ["quantize", folder, tmp_path / "out", *FAST]):
        assert "model.safetensors has" in refused(*command)


def test_random_weights_are_not_quantized(intact, tmp_path):
    folder = shutil.copytree(intact / "dense", tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 3
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    message = refused("quantize", folder, tmp_path / "out", *FAST)
    assert "lacks 9 of its weights" in message and "model.layers.2" in message
    assert not (tmp_path / "out").exists()


def test_figures_that_could_not_be_written_are_not_measured(intact, tmp_path):
    message = refused(
        *("eval", intact / "packed", "--dataset", intact / "data.npy"),
        *("--json", tmp_path / "none" / "figures.json"),
    )
    assert "there is no folder" in message


def test_a_quantization_config_that_is_none(intact, tmp_path):
    folder = shutil.copytree(intact / "packed", tmp_path / "packed")
    put("config.json", json.dumps({"model_type": "llama", "quantization_config": 3}))(folder)
    for command in COMMANDS.values():
        places = {"folder": folder, "data": intact / "data.npy"}
        message = refused(*(a.format(**places) for a in command))
        assert "quantization_config is 3, not an object" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device that is asked for")
@pytest.mark.parametrize("option", ["--device-map", "--calibration-device"])
def test_devices_that_are_not_there(intact, tmp_path, option):
    message = refused(
        *("quantize", intact / "dense", tmp_path / "out", "--dataset", intact / "data.npy"),
        *(option, "cuda:0", "--seqlen", "32", *FAST),
    )
    assert "cuda:0 cannot be used here" in message and not (tmp_path / "out").exists()


def test_the_tokenizer_comes_with_the_model_or_neither_does(
    intact, tmp_path, docs_llama, monkeypatch
):
    from transformers import PreTrainedTokenizerBase

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
    message = refused(
        *("quantize", intact / "dense", tmp_path / "out", "--dataset", intact / "data.npy"),
        *("--tokenizer", docs_llama, "--seqlen", "32", *FAST),
    )
    assert f"could not be saved to {tmp_path}/out ([Errno 28] No space left on device)" in message
    assert list(tmp_path.iterdir()) == []
