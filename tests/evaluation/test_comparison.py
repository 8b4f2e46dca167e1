"""Methods beside each other: equal sizes, one pass of the original, reasons for what is missing."""

from __future__ import annotations

import json

import pytest

from hf_vq.evaluation import others
from hf_vq.evaluation.baselines import bits_per_weight
from hf_vq.evaluation.comparison import ComparisonRow, compare_methods, draw, table, write
from tests.models import tokens

ABOUT = {"protocol": "as in the test"}


def test_ours_get_what_scalar_rounding_costs(dense):
    said = []
    itself, rows = compare_methods(
        *(str(dense("llama")), ["rtn", "gptvq", "bnb", "hqq"], [3]),
        *(tokens(8), tokens(3, 64, seed=5)),
        say=lambda itself, rows: said.append((itself, rows[-1])),
    )
    assert said == [(itself, row) for row in rows] and itself > 1
    found = {row.method: row for row in rows}
    assert found["gptvq"].bits <= bits_per_weight(3) and found["gptvq"].kl >= 0
    assert found["rtn"].kl > 0 and found["rtn"].seconds > 0 and found["rtn"].cpu > 0
    assert found["bnb"].note == "bnb has no 3 bits" and found["bnb"].kl is None
    with pytest.raises(ValueError, match="no method 'magic'"):
        compare_methods("nothing", ["magic"], [2], tokens(1), tokens(1))


def test_a_package_that_is_missing_is_a_row(dense, monkeypatch):
    monkeypatch.setattr(others.importlib.util, "find_spec", lambda name: None)
    _, rows = compare_methods(str(dense("llama")), ["hqq"], [2], tokens(4), tokens(2, 64))
    assert rows == [ComparisonRow("hqq", 2, note="hqq is not installed")]


def rows(kl: float) -> list[ComparisonRow]:
    return [
        ComparisonRow("rtn", 2, 2.281, 100.0, 1.5, 6.0, 0.4, 1.0, 1.0),
        ComparisonRow("gptvq", 2, 2.28, 24.0, kl, 1.0, 0.8, 10.0, 9.0),
        ComparisonRow("hqq", 2, note="hqq is not installed"),
    ]


def test_the_table_marks_the_best(tmp_path):
    text = table(20.5, rows(0.11))
    assert "| 2 | gptvq | 2.280 | 24.000 | **0.1100** |" in text
    assert "| 2 | hqq | hqq is not installed |" in text and "20.500" in text


def test_written_and_continued(tmp_path):
    write(tmp_path, 20.5, rows(0.11), ABOUT)
    more = [ComparisonRow("gptvq", 3, 3.2, 21.0, 0.02, 0.3, 0.9, 10.0, 9.0)]
    write(tmp_path, 20.5, more, ABOUT)
    kept = json.loads((tmp_path / "comparison.json").read_text())["rows"]
    assert [(r["nominal"], r["method"]) for r in kept] == [
        (2, "rtn"),
        (2, "gptvq"),
        (2, "hqq"),
        (3, "gptvq"),
    ]
    write(tmp_path, 20.5, more, {"protocol": "another"})
    assert len(json.loads((tmp_path / "comparison.json").read_text())["rows"]) == 1


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    draw(rows(0.11), tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"


def test_a_library_that_fails_is_a_row(dense, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("needs a\nGPU")

    monkeypatch.setitem(others.OTHERS, "hqq", others.Other("torch", (2,), broken))
    _, rows = compare_methods(str(dense("llama")), ["hqq"], [2], tokens(4), tokens(2, 64))
    assert rows == [ComparisonRow("hqq", 2, note="RuntimeError: needs a GPU")]
