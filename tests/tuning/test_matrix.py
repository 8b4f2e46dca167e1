"""Every common adapter over every method: it trains, its gradients are those over dense layers, and
what is saved computes the same in another process."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="needs peft")

from peft import PeftModel, get_peft_model

from tests.tuning.packing import METHODS, TOKENS, adapters, decoded, logits, packed, train

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ADAPTERS = ("lora", "dora", "ia3", "vera", "oft")

pytestmark = pytest.mark.filterwarnings("ignore")


def randomized(model: PeftModel) -> PeftModel:
    """Adapters away from their start, where half of the gradients are 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_over_dense_layers(method: str, adapter: str) -> None:
    found = []
    for base in (packed(method), decoded(packed(method))):
        torch.manual_seed(0)
        model = randomized(get_peft_model(base, adapters()[adapter]))
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    over_packed, over_dense = found
    assert over_packed.keys() == over_dense.keys()
    assert len(over_packed) > 2
    for name, wanted in over_dense.items():
        size = wanted.abs().max()
        assert size > 0, name
        error = (over_packed[name] - wanted).abs().max() / size
        assert error < 1e-5, f"{name}: {error}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_trains_and_reloads(method: str, dtype: str, tmp_path: Path) -> None:
    for name, config in adapters().items():
        torch.manual_seed(0)
        model = get_peft_model(packed(method, DTYPES[dtype]), config)
        losses = train(model)
        assert losses[-1] < losses[0] - 1e-3, f"{name}: {losses}"
        model.save_pretrained(tmp_path / name)
        again = PeftModel.from_pretrained(packed(method, DTYPES[dtype]), tmp_path / name)
        assert torch.equal(logits(again), logits(model)), name


_RELOAD = """
import sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import torch
import hf_vq
assert "peft" not in sys.modules  # importing hf_vq stays cheap
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
assert BaseTuner.inject_adapter._hf_vq_wrapped  # and PEFT is wrapped when it comes
from transformers import AutoModelForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
for folder in sorted(Path(sys.argv[1]).glob("*/*")):
    saved = torch.load(folder / "logits.pt")
    dtype = saved["dtype"]
    base = AutoModelForCausalLM.from_pretrained(folder.parent / "base", dtype=dtype)
    if folder.name == "base":
        model = base
    elif folder.name == "lora" and dtype == torch.float32:  # an adapter's folder is enough
        # in bfloat16 too, but it would round the adapter, which PEFT keeps in float32
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        assert {p.dtype for n, p in model.named_parameters() if "lora" in n} == {dtype}
    else:
        model = PeftModel.from_pretrained(base, folder)
    model.eval()
    with torch.no_grad():
        found = model(input_ids=saved["tokens"]).logits.float()
    assert torch.equal(found, saved["logits"]), f"{folder}: {(found - saved['logits']).abs().max()}"
    print(folder.parent.name, folder.name)
"""


def test_reloads_in_a_fresh_process(tmp_path: Path) -> None:
    count = 0
    for method, dtype in itertools.product(METHODS, DTYPES):
        folder = tmp_path / f"{method}-{dtype}"
        packed(method, DTYPES[dtype]).save_pretrained(folder / "base")
        for name in ("base", *ADAPTERS):
            torch.manual_seed(0)
            model = packed(method, DTYPES[dtype])
            model.name_or_path = str(folder / "base")
            if name != "base":
                model = randomized(get_peft_model(model, adapters()[name]))
                model.save_pretrained(folder / name)
            saved = {"tokens": TOKENS, "logits": logits(model), "dtype": DTYPES[dtype]}
            torch.save(saved, folder / name / "logits.pt")
            count += 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = subprocess.run(
            [sys.executable, "-c", _RELOAD, str(tmp_path)], capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.split("\n")) == count + 1
