"""benchmarks/gpu.py runs every section, and neither a failure nor the clock costs the others."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def gpu_report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_report

    return gpu_report


def test_a_dry_run_goes_through_every_section(tmp_path: Path) -> None:
    out = tmp_path / "report.md"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--dry", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report, _, missing = out.read_text().partition("## Not measured")
    assert "DRY RUN" in report and "All right." in report
    for section in (
        "Copy bandwidth", "## 16 x 64", "## Decoding", "Slower than dense", "Tiles or a dense",
        "## LoRA step", "## Gradients of codebooks", "## Look-ups", "## Memory", "## Launches",
        "## 8 x 64",
    ):  # fmt: skip
        assert section in report, section
    assert "NO |" not in report, "gradients differ from run to run"
    for line in missing.strip().splitlines():  # what is not installed, and nothing else
        assert "ModuleNotFoundError" in line or "bitsandbytes" in line, line


def test_a_section_that_fails_costs_the_others_nothing(gpu_report: ModuleType) -> None:
    report = gpu_report.Report(60.0)

    def wrong(_: object) -> None:
        raise RuntimeError("out of luck\nand more")

    assert report.run("first", wrong) is None
    assert report.run("second", lambda r: r.say("done") or 7) == 7
    assert report.not_measured == ["first: RuntimeError: out of luck"]
    assert "done" in report.lines


def test_the_budget_cuts_off_a_section_that_does_not_end(gpu_report: ModuleType) -> None:
    report = gpu_report.Report(0.2)

    def endless(_: object) -> None:
        while True:
            time.sleep(0.01)

    report.run("endless", endless)
    report.run("late", lambda r: r.say("never"))
    assert report.not_measured == [
        "endless: cut off in the middle, the budget was spent",
        "late: no time left",
    ]
    assert "never" not in report.lines
    assert not report.has(1, "a row")


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_and_time_everything_is_listed_as_not_measured() -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--budget", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, "nothing was found right"
    assert "- correctness: no time left" in done.stdout
    assert "- LoRA steps: no GPU" in done.stdout
