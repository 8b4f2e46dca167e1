"""The examples in examples/ run as a user runs them, here on a model of one small block."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import hf_vq  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def small(tmp_path: Path, docs_llama: Path) -> Path:
    folder = tmp_path / "model"
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=4096,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(docs_llama).save_pretrained(folder)
    return folder


def run(name: str, *options: object) -> dict[str, float]:
    """What a script prints as `label: number`, or `label number -> number`, the last one."""
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, options)]
    environment = {**os.environ, "HF_VQ_PROGRESS": "0", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.findall(r"^([\w ,]+?):? (?:perplexity )?(?:[\d.]+ -> )?([\d.]+)$", done.stdout, re.M)
    return {label: float(value) for label, value in found}


def test_qlora(small: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs peft")
    out = tmp_path / "out"
    found = run("qlora.py", "--steps", 3, "--windows", 8, "--out", out, "--model", small)
    assert found["reloaded"] == found["trained"] != found["corrected by the adapter"]
    assert found["corrected by the adapter"] != found["2 bits"] != found["original"]
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)
    assert merged.config.quantization_config.method == "vptq"


def test_tune_codebooks(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = run("tune_codebooks.py", "--steps", 3, "--windows", 8, "--out", out, "--model", small)
    assert {"KL", "perplexity"} <= found.keys()
    tuned = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert tuned.config.quantization_config.method == "gptvq"
