"""Patterns pick whole name components."""

from __future__ import annotations

import pytest

from hf_vq.patterns import check_pattern, matches

NAME = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    "pattern",
    [
        NAME,
        "down_proj",
        "layers.1",
        "model",
        "mlp.down_proj",
        "*down_proj",
        "model.layers.[0-3].*",
        "re:.*down_proj",
        r"re:model\.layers\.\d+\.mlp\.(up|down)_proj",
    ],
)
def test_picks(pattern):
    assert matches(pattern, NAME)


@pytest.mark.parametrize(
    "pattern",
    ["down", "proj", "layers.10", "ayers.1", "re:down_proj", "down*", "Model", "layers.2"],
)
def test_does_not_pick(pattern):
    assert not matches(pattern, NAME)


def test_numbers_are_whole():
    assert not matches("layers.1", "model.layers.10.mlp.down_proj")
    assert not matches("mlp.gate", "model.layers.1.mlp.gate_proj")


@pytest.mark.parametrize("pattern", ["", None, 3, "re:("])
def test_refused_where_written(pattern):
    with pytest.raises(ValueError, match="here"):
        check_pattern(pattern, "here")
