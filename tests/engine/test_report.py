"""The reporter shows a line per matrix and keeps all of it as JSON."""

from __future__ import annotations

import io
import json
import threading

import pytest
import torch
from rich.console import Console

from hf_vq.engine.report import MemoryMeter, Reporter
from hf_vq.formats.gptvq import GPTVQSpec

SPEC = GPTVQSpec(30, 172, 2, 16, 7, 64)


def run(terminal=False, **environment):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=140)
    reporter = Reporter(console)
    reporter.start(2, 2 * SPEC.num_weights)
    reporter.matrix("model.layers.0.a", SPEC, 0.125, 1.5, ["damping grew to 0.1"])
    reporter.matrix("model.layers.0.b", SPEC, 0.25, 0.5)
    reporter.note("something odd")
    reporter.finish()
    reporter.finish()
    return reporter, console.file.getvalue()


def test_lines_and_json():
    reporter, shown = run()
    line = next(x for x in shown.splitlines() if "layers.0.a" in x)
    for part in ("30x172", f"{SPEC.bits_per_weight:.3f} bits", "0.12500", "1.50 s", "damping grew"):
        assert part in line
    assert "something odd" in shown
    assert shown.count("peak memory") == 1
    report = json.loads(json.dumps(reporter.to_dict()))
    assert [m["name"] for m in report["matrices"]] == ["model.layers.0.a", "model.layers.0.b"]
    assert report["matrices"][0]["shape"] == [30, 172]
    assert report["matrices"][0]["notes"] == ["damping grew to 0.1"]
    assert report["bits"] == pytest.approx(SPEC.bits_per_weight)
    assert report["peak_memory_bytes"]["process"] > 1 << 20
    assert report["notes"] == ["something odd"]
    assert report["seconds"] > 0


def test_processor_time_is_counted_beside_the_clock_s(monkeypatch):
    clock = {"perf_counter": [100.0, 112.5], "process_time": [5.0, 8.25]}
    for name, times in clock.items():
        monkeypatch.setattr(f"hf_vq.engine.report.time.{name}", times.pop)
        times.reverse()
    reporter = Reporter(Console(file=io.StringIO()))
    reporter.start(1, 1)
    reporter.finish()
    report = reporter.to_dict()
    assert (report["seconds"], report["cpu_seconds"]) == (12.5, 3.25)


def test_a_bar_with_an_estimate_on_terminals():
    _, shown = run(terminal=True)
    assert "2/2 matrices" in shown
    assert "left" in shown


def test_silence(monkeypatch):
    monkeypatch.setenv("HF_VQ_PROGRESS", "0")
    reporter, shown = run(terminal=True)
    assert shown == ""
    assert len(reporter.to_dict()["matrices"]) == 2


def test_silence_by_transformers_verbosity():
    from transformers import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        assert run()[1] == ""
    finally:
        logging.set_verbosity(before)


def test_memory_meter_sees_a_peak_and_stops():
    meter = MemoryMeter(interval=0.001)
    meter.start()
    before = meter._thread
    block = torch.ones(40 << 20, dtype=torch.uint8)
    meter._sample()
    peak = meter.peaks["process"]
    del block
    assert meter.stop()
    assert not meter.stop()
    assert meter.peaks["process"] >= peak
    assert before not in threading.enumerate()


def test_finish_without_start():
    Reporter(Console(file=io.StringIO())).finish()
