"""Quantize, save and reload with an installed hf_vq; run by .ci/run outside the checkout."""

from __future__ import annotations

import argparse
import sys
from importlib import resources
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("out")
parser.add_argument("--not-from", help="folder that no module may come from")
parser.add_argument("--autoload", action="store_true", help="load OUT without importing hf_vq")
arguments = parser.parse_args()
probe = torch.arange(64).view(1, -1)

if arguments.autoload:
    reloaded = AutoModelForCausalLM.from_pretrained(arguments.out)
    assert "hf_vq" in sys.modules, "hf-vq-autoload did not import hf_vq"
    with torch.no_grad():
        assert torch.equal(reloaded(probe).logits, torch.load("logits.pt"))
    print("loaded without an import of hf_vq: the same logits")
    sys.exit()

import hf_vq_kernels  # noqa: E402

import hf_vq  # noqa: E402

for module in (hf_vq, hf_vq_kernels):
    file = Path(module.__file__).resolve()
    assert not file.is_relative_to(arguments.not_from), f"{file} is the checkout's"
    assert (file.parent / "py.typed").is_file(), f"{module.__name__} has no py.typed"
card = resources.files("hf_vq.model_cards") / "card.md.j2"
assert "hf_vq" in card.read_text(encoding="utf-8")

tokens = torch.randint(0, 4096, (16, 64), generator=torch.Generator().manual_seed(0))
config = hf_vq.GPTVQConfig(
    bits=3,
    dataset=tokens,
    nsamples=16,
    seqlen=64,
    refine_iterations=1,
    modules_to_not_convert=["layers.1", "layers.2", "layers.3"],  # one block shows it
)
model = AutoModelForCausalLM.from_pretrained(arguments.model, quantization_config=config)
model.save_pretrained(arguments.out)
reloaded = AutoModelForCausalLM.from_pretrained(arguments.out)
with torch.no_grad():
    logits = model(probe).logits
    assert torch.equal(reloaded(probe).logits, logits), "the reloaded model differs"
torch.save(logits, "logits.pt")
print(f"{hf_vq.__version__}: quantized, saved and reloaded; the same logits")
