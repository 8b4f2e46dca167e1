"""`hf-vq plan`: the same figures as the library's, and clear refusals."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import hf_vq
from hf_vq.cli import app
from hf_vq.registry import METHODS
from tests.models import tiny

runner = CliRunner()


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    tiny("llama").save_pretrained(folder)
    return folder


def plan(*arguments) -> str:
    result = runner.invoke(app, ["plan", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("method", list(METHODS))
def test_json_is_the_librarys_plan(dense, method):
    figures = json.loads(plan(dense, "--method", method, "--bits", "3", "--json"))
    expected = hf_vq.plan_model(dense, METHODS[method].config(3.0))
    assert figures["totals"] == expected.ledger().to_dict()
    assert figures["checked_against_files"] is True
    assert figures["settings"]["bits"] == 3 and figures["settings"]["quant_method"] == method
    specs = {name: group["spec"] for group in figures["packed"] for name in group["names"]}
    assert specs == {name: spec.to_dict() for name, spec in expected.layers.items()}
    reasons = {name: group["reason"] for group in figures["dense"] for name in group["names"]}
    assert reasons == expected.dense


@pytest.mark.parametrize("method", list(METHODS))
def test_tables(dense, method):
    output = plan(dense, "--method", method, "--bits", "3")
    expected = hf_vq.plan_model(dense, METHODS[method].config(3.0))
    ledger = expected.ledger()
    assert f"{len(ledger.rows) - 2} matrices to pack with {method}" in output
    for figure in (ledger.packed_bytes, ledger.model_bytes, ledger.model_dense_bytes):
        assert f"{figure:,}" in output
    assert f"{ledger.decoder_bits:.3f}" in output and f"{ledger.model_bits:.3f}" in output
    first_field = next(iter(next(iter(expected.layers.values())).to_dict()))
    assert "up_proj" in output and f"{first_field}=" in output
    assert "lm_head" in output and "the output head" in output
    assert "no weight file" not in output


def test_settings_reach_the_plan(dense):
    output = plan(
        *(dense, "--bits", "4", "--vector-dim", "2", "--dtype", "float32"),
        *("--overrides", '{"layers.0": false, "v_proj": {"bits": 3}}'),
        *("--modules-to-not-convert", "re:.*[oO]_proj"),
    )
    assert "left dense by overrides" in output and "'re:.*[oO]_proj'" in output
    assert "self_attn.v_proj" in output and "7 matrices" in output
    assert "vector_dim=2" in output and "vector_dim=1" not in output
    assert f"{2 * 2 * sum(p.numel() for p in tiny('llama').parameters()):,}" in output


def test_a_config_without_weights(dense, tmp_path):
    (tmp_path / "config.json").write_text((dense / "config.json").read_text())
    output = plan(tmp_path, "--bits", "3")
    assert "no weight file confirmed them" in output
    totals = [line for line in plan(dense, "--bits", "3").splitlines() if "whole model" in line]
    assert totals[0] in output


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["{dense}", "--bits", "0.5"], 2, "from 1 to 8"),
        (["{dense}", "--method", "magic"], 2, "is not one of gptvq"),
        (["{dense}", "--method", "gptvq", "--no-such-field", "3"], 2, "--no-such-field"),
        (["{dense}", "--overrides", "{{"], 2, "no valid JSON"),
        (["{dense}", "--overrides", '{{"dwn_proj": {{"bits": 3}}}}'], 1, "near: model.layers"),
        (["{dense}", "--bits", "1", "--vector-dim", "1"], 1, "vector_dim=1"),
        (["{dense}/nothing"], 1, "no folder"),
        (["{empty}"], 1, "holds no model"),
    ],
)
def test_bad_input_is_one_clear_error(dense, tmp_path, arguments, code, text, monkeypatch):
    monkeypatch.delenv("HF_VQ_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "300")
    filled = [a.format(dense=dense, empty=tmp_path) for a in arguments]
    result = runner.invoke(app, ["plan", *filled])
    assert result.exit_code == code and "Traceback" not in result.output
    assert text in " ".join(result.output.replace("│", " ").split())
