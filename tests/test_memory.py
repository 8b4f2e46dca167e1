"""Freed memory goes back to the system, where the C library can be told to."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from hf_vq import memory


@pytest.fixture(autouse=True)
def fresh():
    memory._glibc.cache_clear()
    yield
    memory._glibc.cache_clear()


@pytest.fixture
def asked(monkeypatch):
    """What a C library was told."""
    calls = []
    functions = {
        "malloc_trim": lambda pad: calls.append(("trim", pad)),
        "mallopt": lambda what, value: calls.append((what, value)),
    }
    library = type("Library", (), {n: staticmethod(f) for n, f in functions.items()})
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    return calls


def test_trims_all_of_the_heap(asked):
    memory.release()
    memory.release()
    assert asked == [("trim", 0), ("trim", 0)]


def test_the_threshold_comes_back(asked):
    with pytest.raises(KeyError), memory.own_pages():
        raise KeyError
    assert [what for what, _ in asked] == [-3, -1, -3, -1]
    assert asked[0][1] < asked[2][1] == 32 * 2**20
    assert asked[1][1] < asked[3][1] == 64 * 2**20


def test_nested(asked):
    with memory.own_pages():
        with memory.own_pages(size=4096):
            pass
        with memory.own_pages(False, 512):
            pass
    limits = [value for what, value in asked if what == -3]
    assert limits == [memory.LARGE, 4096, memory.LARGE, 32 * 2**20]


def test_small_models_are_left_alone(asked):
    with memory.own_pages(wanted=False):
        pass
    assert asked == []


@pytest.mark.parametrize("trouble", [OSError, AttributeError, TypeError])
def test_other_systems_go_without(monkeypatch, trouble):
    def broken(name):
        raise trouble

    monkeypatch.setattr(ctypes, "CDLL", broken)
    memory.release()
    with memory.own_pages():
        pass


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_freed_array_leaves_the_process():
    if memory._glibc() is None:
        pytest.skip("another C library than glibc")
    code = """
import torch
from hf_vq.memory import own_pages

def pages():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

with own_pages():
    ends, freed = [], 0
    for _ in range(8):  # with a survivor behind each, nothing could be trimmed from the heap's end
        array = torch.ones(2**20)
        ends.append(torch.ones(100))
        before = pages()
        del array
        freed += before - pages()
print(freed)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 7 * 2**22
