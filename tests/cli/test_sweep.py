"""`hf-vq sweep`: folders, a CSV, and clear refusals."""

from __future__ import annotations

import numpy as np
import pytest
from typer.testing import CliRunner

from hf_vq.cli import app
from hf_vq.configs import GPTVQConfig
from hf_vq.footprint import Footprint
from tests.models import tiny, tokens

runner = CliRunner()


def invoke(*arguments):
    return runner.invoke(app, ["sweep", *map(str, arguments)])


@pytest.mark.parametrize("evaluate", [True, False])
def test_a_sweep(dense, tmp_path, evaluate):
    whole = Footprint(tiny("llama"), GPTVQConfig(), {}).dense().total
    data = tmp_path / "data.npy"
    np.save(data, tokens(8).numpy())
    quick = ("--kmeans-iterations", 1, "--refine-iterations", 0, "--no-codebook-update")
    more = ("--eval-dataset", data, "--eval-seqlen", 64) if evaluate else ()
    size, out = int(whole * 0.6), tmp_path / "out"
    result = invoke(dense("llama"), out, "--sizes", size, "--dataset", data, *quick, *more)
    assert result.exit_code == 0, result.output
    assert (out / str(size) / "config.json").exists() and (out / "measurement.safetensors").exists()
    assert len((out / "sweep.csv").read_text().splitlines()) == 2
    assert ("KL" in result.output) == evaluate


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--sizes", ""], "different sizes"),
        (["--sizes", "1MB,1MB"], "different sizes"),
        (["--sizes", "1MB", "--bits", "3"], "takes --sizes"),
        (["--sizes", "1MB", "--size", "2MB"], "takes --sizes"),
        (["--sizes", "1XB"], "'1XB' is no size"),
        (["--sizes", "1kB"], "out of reach"),
    ],
)
def test_refusals(dense, tmp_path, arguments, text, monkeypatch):
    monkeypatch.delenv("HF_VQ_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "300")
    result = invoke(dense("llama"), tmp_path / "out", *arguments)
    assert result.exit_code and "Traceback" not in result.output
    assert text in " ".join(result.output.replace("│", " ").split())
