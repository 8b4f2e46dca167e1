"""The generated model card: valid metadata, only measured figures, no local paths."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import ModelCard

from hf_vq.configs import GPTVQConfig
from hf_vq.hub.card import render_card, write_card

LEDGER = {
    "decoder_bits": 2.2411,
    "model_bits": 5.5,
    "model_bytes": 2_900_000,
    "model_dense_bytes": 8_000_000,
}
EVALUATION = {
    "seqlen": 512,
    "windows": 100,
    "perplexity": 24.1234,
    "perplexity_dense": 20.8896,
    "kl": 0.16543,
    "top1": 0.7712,
    "dataset": "some-corpus",
}


def saved_config(**recorded) -> dict:
    stored = GPTVQConfig(bits=2.25).to_dict()
    stored |= {"layers": [{"modules": ["a"]}], "format_version": "1.0", **recorded}
    return {"model_type": "llama", "quantization_config": stored}


def test_metadata_places_the_model_under_its_base():
    text = render_card(saved_config(base_model="org/base", base_model_revision="abc123"))
    data = ModelCard(text).data.to_dict()
    assert data["base_model"] == "org/base" and data["base_model_relation"] == "quantized"
    assert {"hf-vq", "gptvq", "quantized", "2-bit"} <= set(data["tags"])
    assert data["library_name"] == "transformers"
    assert "abc123" in text and "arxiv.org/abs/2402.15319" in text


def test_without_a_hub_base_there_is_none():
    text = render_card(saved_config())
    data = ModelCard(text).data.to_dict()
    assert "base_model" not in data and "base_model_relation" not in data
    assert "Nothing was measured" in text and "## Size" not in text


def test_the_snippet_imports_the_plugin_and_says_why():
    text = render_card(saved_config(), repository="me/packed")
    assert "import hf_vq" in text and "*random* weights" in text
    assert 'from_pretrained("me/packed")' in text


def test_measured_figures_and_sizes():
    text = render_card(saved_config(base_model="org/base"), {"ledger": LEDGER}, EVALUATION)
    for figure in ("2.241", "8,000,000", "2,900,000", "20.890", "24.123", "0.1654", "77.1 %"):
        assert figure in text
    assert "100 non-overlapping windows of 512 tokens of some-corpus" in text
    result = ModelCard(text).data.eval_results[0]
    assert result.metric_type == "perplexity" and result.metric_value == 24.1234


def test_without_an_original_nothing_is_made_up():
    text = render_card(saved_config(), None, {"seqlen": 8, "windows": 3, "perplexity": 30.0})
    assert "not measured" in text and "KL" not in text.split("## Measured")[1].split("##")[0]


def test_cells_cannot_break_the_table():
    calibration = {"dataset": "a|b\n`c`", "nsamples": 4, "seed": None}
    text = render_card(saved_config(calibration=calibration))
    assert "| calibration dataset | `a\\|b 'c'` |" in text
    assert "calibration seed" not in text


@pytest.mark.parametrize("config", [{}, {"quantization_config": {"quant_method": "gptvq"}}])
def test_a_dense_model_gets_no_card(config):
    with pytest.raises(ValueError, match="no packed model"):
        render_card(config)


def test_a_card_of_one_s_own_is_kept(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(saved_config()))
    (tmp_path / "quantization_report.json").write_text(json.dumps({"ledger": LEDGER}))
    assert write_card(tmp_path)
    assert "2.241" in (tmp_path / "README.md").read_text(encoding="utf-8")
    (tmp_path / "quantization_report.json").unlink()
    assert write_card(tmp_path), "a generated card follows the model"
    assert "2.241" not in (tmp_path / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text("mine")
    assert not write_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    new = tmp_path / "new"
    new.mkdir()
    (new / "config.json").write_text(json.dumps(saved_config()))
    assert not write_card(new, unless_in=tmp_path) and not (new / "README.md").exists()
    assert write_card(new, unless_in=tmp_path / "nothing")


def test_no_card_beside_a_dense_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert not write_card(tmp_path) and not (tmp_path / "README.md").exists()
