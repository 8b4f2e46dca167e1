"""Rules accept their range, refuse the rest, and say the range."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_vq.rules import Choice, Flag, Number, PowerOfTwo


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "2", True, None, [2], 0.99, 8.01])
def test_number_refuses(value):
    with pytest.raises(ValueError, match=r"bits=.* must be a number from 1 to 8"):
        Number(1, 8).check("bits", value)


def test_number_also_and_optional():
    rule = Number(8, 256, integer=True, optional=True, also=(0,))
    assert rule.check("x", 0) == 0
    assert rule.check("x", None) is None
    with pytest.raises(ValueError, match="an integer from 8 to 256 or 0 or None"):
        rule.check("x", 4)
    with pytest.raises(ValueError):
        rule.check("x", 8.5)


@given(st.integers(0, 2**63 - 1))
def test_large_integers_are_exact(value):
    assert Number(0, 2**63 - 1, integer=True).check("seed", value) == value


@pytest.mark.parametrize("value", [np.float32(2.5), np.int64(3)])
def test_numpy_becomes_json(value):
    assert json.dumps(Number(1, 8).check("bits", value)) == str(float(value)).removesuffix(".0")


def test_integers_stay_integers():
    assert type(Number(1, 8).check("bits", 2)) is int
    assert type(Number(1, 8, integer=True).check("bits", 2.0)) is int


def test_choice():
    rule = Choice((1, 2, 4), optional=True)
    assert rule.check("d", 2) == 2
    assert rule.check("d", None) is None
    for bad in (3, True, "2"):
        with pytest.raises(ValueError, match="must be one of 1, 2, 4 or None"):
            rule.check("d", bad)


def test_power_of_two():
    rule = PowerOfTwo(2, 65536, optional=True, also=(0,))
    assert [rule.check("k", v) for v in (2, 65536, 0, 16.0, None)] == [2, 65536, 0, 16, None]
    assert type(rule.check("k", np.int32(8))) is int
    for bad in (1, 3, 131072, -2, 2.5, True, "16", float("nan"), float("inf")):
        with pytest.raises(ValueError, match="power of two from 2 to 65536 or 0 or None"):
            rule.check("k", bad)
    with pytest.raises(ValueError, match=r"from 2 to 16$"):
        PowerOfTwo(2, 16).check("k", None)


def test_flag():
    assert Flag(optional=True).check("f", None) is None
    assert Flag().check("f", False) is False
    for bad in (0, None, "yes"):
        with pytest.raises(ValueError, match="True or False"):
            Flag().check("f", bad)


def test_another_word_for_a_choice():
    rule = Choice(("a", "b"), aliases=(("second", "b"),))
    assert rule.check("field", "second") == "b" and rule.check("field", "a") == "a"
    with pytest.raises(ValueError, match="field='third' must be one of 'a', 'b'"):
        rule.check("field", "third")
