"""Fixtures of tests that walk through a model."""

from __future__ import annotations

import pytest

from hf_vq.engine import run, walk
from hf_vq.methods.statistics import HessianAccumulator


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setenv("HF_VQ_PROGRESS", "0")


@pytest.fixture
def small_batches(monkeypatch):
    """Two windows of 24 tokens at a time."""
    monkeypatch.setattr(run, "_batch_size", lambda specs, seqlen: 2)


@pytest.fixture
def collected(monkeypatch):
    """All statistics, in the order in which they were asked for: (hessian, shift, tokens)."""
    found = []

    class Spy(HessianAccumulator):
        def statistics(self):
            out = super().statistics()
            shift = None if out.shift is None else out.shift.clone()
            found.append((out.hessian.clone(), shift, out.tokens))
            return out

    monkeypatch.setattr(walk, "HessianAccumulator", Spy)
    return found
