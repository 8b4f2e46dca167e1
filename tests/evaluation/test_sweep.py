"""Several sizes from one measurement, and their curve."""

from __future__ import annotations

import csv

import pytest

from hf_vq.configs import GPTVQConfig
from hf_vq.evaluation import sweep as module
from hf_vq.evaluation.sweep import SweepRow, draw, folder_name, sweep, write_csv
from hf_vq.footprint import Footprint
from hf_vq.plan import PlanError
from tests.models import QUICK, tiny, tokens


@pytest.fixture
def sizes():
    whole = Footprint(tiny("llama"), GPTVQConfig(), {}).dense().total
    return {str(int(whole * share)): int(whole * share) for share in (0.52, 0.6)}


def configs(sizes, path):
    return {
        name: GPTVQConfig(size=size, dataset=tokens(8), measurement=path, **QUICK)
        for name, size in sizes.items()
    }


def test_sizes_and_quality(dense, tmp_path, sizes, monkeypatch):
    from hf_vq.engine import measurement

    calls = []
    original = measurement.measure
    monkeypatch.setattr(measurement, "measure", lambda *a: calls.append(1) or original(*a))
    said = []
    made = configs(sizes, tmp_path / "m")
    held_out = tokens(4, 64, seed=5).flatten()
    rows = sweep(str(dense("llama")), tmp_path, made, tokens=held_out, seqlen=64, say=said.append)
    assert len(calls) == 1 and said == rows
    for row, size in zip(rows, sizes.values(), strict=True):
        assert 0.995 * size <= row.bytes <= size
        assert row.bytes == module.saved_bytes(tmp_path / row.folder)
        assert row.perplexity > 1 and row.kl >= 0 and row.perplexity_dense == rows[0][-1]
    assert rows[0].bits < rows[1].bits
    write_csv(rows, tmp_path / "s.csv")
    lines = list(csv.DictReader((tmp_path / "s.csv").open()))
    assert [int(line["bytes"]) for line in lines] == [row.bytes for row in rows]


def test_an_impossible_size_is_refused_before_any_work(dense, tmp_path, sizes):
    made = configs({**sizes, "small": 1000}, tmp_path / "m")
    with pytest.raises(PlanError, match="size=1000 is out of reach"):
        sweep(str(dense("llama")), tmp_path, made)
    assert not list(tmp_path.iterdir())


def test_names_of_folders():
    assert folder_name("7.5GB") == "7.5GB" and folder_name("fits:8GB@4096") == "fits-8GB-4096"


def test_the_curve(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [SweepRow(str(i), str(i), i * 10**6, i, 1.0, 30 - i, 1 / i, 0.5, 25) for i in (1, 2, 3)]
    draw(rows, tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"
