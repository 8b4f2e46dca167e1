"""The evaluation record, its table, and samples from the bundled model."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_vq.evaluation import evaluate, generate_sample, print_evaluation, stored_bytes


@pytest.fixture(scope="module")
def model(docs_llama):
    return AutoModelForCausalLM.from_pretrained(docs_llama)


@pytest.fixture(scope="module")
def tokenizer(docs_llama):
    return AutoTokenizer.from_pretrained(docs_llama)


@pytest.fixture(scope="module")
def tokens(tokenizer):
    text = "This document specifies the behaviour of the function and of its arguments. " * 12
    return torch.tensor(tokenizer(text)["input_ids"])


def noisy(docs_llama):
    other = AutoModelForCausalLM.from_pretrained(docs_llama)
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in other.model.layers:
            weight = layer.mlp.up_proj.weight
            weight += 0.3 * weight.float().std() * torch.randn_like(weight)
    return other


def test_with_an_original(docs_llama, model, tokenizer, tokens):
    quantized = noisy(docs_llama)
    result = evaluate(
        quantized, tokens, 32, dense=model, tokenizer=tokenizer, prompt="The", max_new_tokens=3
    )
    assert result.windows == tokens.numel() // 32 and result.seqlen == 32
    assert result.perplexity_dense < 100, "a trained model predicts prose"
    assert result.kl > 1e-4 and 0 < result.top1 < 1
    assert result.sample_dense == generate_sample(model, tokenizer, "The", 3)
    stream = io.StringIO()
    print_evaluation(result, Console(file=stream, width=100))
    printed = stream.getvalue()
    for part in ("original", "quantized", f"{result.perplexity:.4f}", f"{result.kl:.4f}"):
        assert part in printed
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()


def test_without_an_original(model, tokens):
    result = evaluate(model, tokens, 32)
    assert result.kl is None and "kl" not in result.to_dict()
    stream = io.StringIO()
    print_evaluation(result, Console(file=stream, width=100))
    assert "original" not in stream.getvalue()


def test_samples_are_greedy_continuations(model, tokenizer):
    prompt = "The purpose of this"
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    for _ in range(6):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    expected = tokenizer.decode(ids[0], skip_special_tokens=True)
    assert prompt + generate_sample(model, tokenizer, prompt, 6) == expected
    with pytest.raises(ValueError, match="no tokens"):
        generate_sample(model, tokenizer, "", 6)


def test_a_prompt_needs_a_tokenizer(model, tokens):
    with pytest.raises(ValueError, match="tokenizer"):
        evaluate(model, tokens, 32, prompt="The")


def test_stored_bytes_is_the_file_without_its_header(docs_llama, model):
    file = docs_llama / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert stored_bytes(model) == file.stat().st_size - header
