"""Sensitivities in a file: the same ones back, and only for the model they are of."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from hf_vq.configs import GPTVQConfig
from hf_vq.engine.measurement import MeasurementError, measured, stored
from hf_vq.plan import make_plan
from tests.models import QUICK, load, on_meta, tiny, tokens

LAYERS = make_plan(on_meta("llama"), GPTVQConfig(3.0)).layers
RECORDED = {"base_model": "someone/model", "hf_vq_version": "0", "calibration": {"seed": 0}}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("measured") / "folder" / "m.safetensors")
    model, device = tiny("llama", torch.float32), torch.device("cpu")
    return path, measured(path, model, LAYERS, tokens(4), device, 0, RECORDED)


def test_round_trip(file):
    path, found = file
    again = stored(path, LAYERS, "someone/model")
    assert again.gains == found.gains and again.rows.keys() == found.rows.keys()
    assert all(torch.equal(again.rows[n], rows) for n, rows in found.rows.items())
    assert os.listdir(os.path.dirname(path)) == ["m.safetensors"]


def test_part_of_the_layers(file):
    part = dict(list(LAYERS.items())[:3])
    found = stored(file[0], part)
    assert list(found.gains) == list(part)


def test_no_file():
    assert stored(None, LAYERS) is None and stored("missing", LAYERS) is None


def test_another_model(file):
    with pytest.raises(MeasurementError, match="measured on someone/model, not on other/model"):
        stored(file[0], LAYERS, "other/model")
    other = make_plan(on_meta("mixtral"), GPTVQConfig(3.0)).layers
    with pytest.raises(MeasurementError, match="belongs to another model"):
        stored(file[0], other)
    fewer = {"model.layers.7.mlp.up_proj": next(iter(LAYERS.values()))}
    with pytest.raises(MeasurementError, match=r"layers\.7\.mlp\.up_proj .* is not in it"):
        stored(file[0], fewer)


def test_another_question(file):
    assert stored(file[0], LAYERS, asked=("loss", False)) is not None
    with pytest.raises(MeasurementError, match=r"measured with sensitivity='loss'.*not 'pca'"):
        stored(file[0], LAYERS, asked=("pca", False))


def test_no_measurement(tmp_path):
    path = str(tmp_path / "x")
    (tmp_path / "x").write_text("nonsense")
    with pytest.raises(MeasurementError, match="is no measurement"):
        stored(path, LAYERS)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(MeasurementError, match="is no measurement"):
        stored(path, LAYERS)
    save_file({"a": torch.zeros(2)}, path, {"hf_vq_measurement": json.dumps([1])})
    with pytest.raises(MeasurementError, match="is no measurement"):
        stored(path, LAYERS)


def test_a_wrong_file_is_refused_before_the_work(file, dense, monkeypatch):
    monkeypatch.setattr("hf_vq.quantizer.VQHfQuantizer._quantize", None)
    config = GPTVQConfig(3.0, dataset=tokens(8), measurement=file[0], **QUICK)
    with pytest.raises(MeasurementError, match="belongs to another model"):
        load(dense("qwen2"), quantization_config=config)
