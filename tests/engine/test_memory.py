"""Freed memory goes back to the system, where the C library can be told to."""

from __future__ import annotations

import ctypes

import pytest

from hf_vq.engine import memory


@pytest.fixture(autouse=True)
def fresh():
    memory._trim.cache_clear()
    yield
    memory._trim.cache_clear()


def test_trims_all_of_the_heap(monkeypatch):
    asked = []
    library = type("Library", (), {"malloc_trim": staticmethod(asked.append)})
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    memory.release()
    memory.release()
    assert asked == [0, 0]


@pytest.mark.parametrize("trouble", [OSError, AttributeError, TypeError])
def test_other_systems_go_without(monkeypatch, trouble):
    def broken(name):
        raise trouble

    monkeypatch.setattr(ctypes, "CDLL", broken)
    memory.release()


def test_on_this_system():
    memory.release()
