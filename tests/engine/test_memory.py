"""Freed memory goes back to the system, where the C library can be told to."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_vq.engine import memory


@pytest.fixture(autouse=True)
def fresh():
    memory._glibc.cache_clear()
    yield
    memory._glibc.cache_clear()


@pytest.fixture
def library(monkeypatch):
    """A C library that notes what it is asked."""
    asked = []
    fake = SimpleNamespace(
        asked=asked,
        gnu_get_libc_version=lambda: b"2",
        mallopt=lambda *what: asked.append(what),
        malloc_trim=lambda pad: asked.append(("trim", pad)),
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda name: fake)
    return fake


def test_trims_all_of_the_heap(library):
    memory.release()
    assert library.asked == [("trim", 0)]


def test_what_was_changed_is_changed_back(library):
    with pytest.raises(RuntimeError), memory.returning_large_arrays(1 << 30) as release:
        inside = dict(library.asked)
        assert release is memory.release
        raise RuntimeError
    after = library.asked[2:]
    assert dict(after[:2]).keys() == inside.keys() == {-1, -3}
    assert all(dict(after[:2])[key] > value for key, value in inside.items())
    assert after[2:] == [("trim", 0)]


def test_small_models_are_spared(library):
    with memory.returning_large_arrays(1 << 20) as release:
        release()
    assert library.asked == []


@pytest.mark.parametrize("trouble", [OSError, AttributeError, TypeError])
def test_other_systems_go_without(monkeypatch, trouble):
    def broken(name):
        raise trouble

    monkeypatch.setattr(ctypes, "CDLL", broken)
    memory.release()
    with memory.returning_large_arrays(1 << 30):
        memory.release()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_large_arrays_are_returned_when_freed():
    if memory._glibc() is None:
        pytest.skip("another C library")

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def held():
        """Bytes that stay of four arrays when something small is left behind them."""
        arrays = [torch.ones(5 << 20) for _ in range(4)]
        behind = torch.ones(1 << 10)
        before = resident()
        del arrays
        return 80 * 2**20 - (before - resident()), behind

    torch.ones(31 << 18)  # what makes glibc put such arrays into the heap
    with memory.returning_large_arrays(1 << 30):
        assert held()[0] < 8 * 2**20
