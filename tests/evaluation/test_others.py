"""hqq, optimum-quanto and bitsandbytes on the CPU: decoded weights, and what they store."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_vq.evaluation import others
from hf_vq.evaluation.others import OTHERS, Unavailable, installed, quantize_other


def needs(method: str) -> None:
    package = OTHERS[method].package
    if not installed(package):
        pytest.skip(f"{package} is not installed, so hf-vq compare --methods {method} is not run")


CASES = [
    # bits asked for, and those of two bytes each for scale and zero of 128 weights (hqq, quanto)
    *(("hqq", 2, 2.25), ("hqq", 4, 4.25), ("hqq", 8, 8.25)),
    *(("quanto", 2, 2.25), ("quanto", 4, 4.25), ("quanto", 8, 8.05)),  # at 8 bits one scale per row
    ("bnb", 4, 4.14),  # one byte per 64 weights, and little more
]


@pytest.mark.parametrize(("method", "bits", "stored"), CASES)
def test_it_runs_here(method, bits, stored, docs_llama):
    needs(method)
    dense = AutoModelForCausalLM.from_pretrained(docs_llama, dtype=torch.float32)
    model, found = quantize_other(str(docs_llama), method, bits)
    assert stored <= found < stored + 0.15, "smaller groups where theirs do not fit"
    weights = dense.state_dict()
    errors = {
        name: float((value - weights[name]).norm() / weights[name].norm())
        for name, value in model.state_dict().items()
        if not torch.equal(value, weights[name])
    }
    assert len(errors) == 28 and all("proj" in name for name in errors)
    expected = {2: 0.55, 4: 0.13, 8: 0.02}[bits]
    assert expected / 4 < max(errors.values()) < expected, max(errors.values())
    assert next(model.parameters()).dtype == torch.float32


def test_what_cannot_run_says_why(docs_llama, monkeypatch):
    with pytest.raises(Unavailable, match="bnb has no 3 bits"):
        quantize_other(str(docs_llama), "bnb", 3)
    monkeypatch.setattr(others.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match=r"optimum\.quanto is not installed"):
        quantize_other(str(docs_llama), "quanto", 4)
    monkeypatch.undo()
    assert installed("torch.nn") and not installed("no_such_package.within")
