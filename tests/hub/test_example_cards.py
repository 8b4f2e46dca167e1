"""The cards in model_cards/ are what hf_vq wrote, and say what the JSON beside them says."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import ModelCard

from hf_vq.hub.card_text import is_untouched
from hf_vq.registry import METHODS
from tests.conftest import ROOT
from tests.hub.test_card import figures, leaves
from tests.hub_server import metadata_problem

CARDS = ROOT / "model_cards"


@pytest.mark.parametrize("method", METHODS)
def test_an_example_card(method):
    folder = CARDS / f"docs-llama-4m-{method}"
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert is_untouched(text) and metadata_problem(text) is None
    card = ModelCard(text)
    assert method in card.data.tags
    beside = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")]
    known = list(leaves(beside))
    for figure in figures(card.text):
        digits = len(figure.partition(".")[2])
        plain = float(figure.replace(",", ""))
        shown = [round(x * f, digits) for x in known for f in (1, 100, 1e-3, 1e-6, 1e-9)]
        assert any(abs(plain - x) < 1e-9 + 1e-3 * 10**-digits for x in shown), figure
    for line in text.splitlines():
        if line.startswith("!["):
            assert (folder / line.split("(")[1].rstrip(")")).is_file()
