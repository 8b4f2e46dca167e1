"""Kept logits of the original stand in for it exactly, and only for what they are of."""

from __future__ import annotations

import pytest
import torch

from hf_vq.evaluation import Teacher, compare, evaluate
from hf_vq.evaluation.generation import (
    check,
    continuations,
    divergence,
    prompts_of,
    repetition,
    speed,
)
from tests.models import packed, tiny, tokens


@pytest.fixture(scope="module")
def models():
    return tiny("llama"), packed("llama")


WINDOWS = tokens(5, 40)


@pytest.mark.parametrize("kept", [True, False])
def test_one_pass_serves_many_comparisons(models, tmp_path, kept):
    dense, quantized = models
    file = tmp_path / "logits" if kept else None
    teacher = Teacher.measure(dense, WINDOWS, file, "base")
    assert teacher.logits.dtype == torch.bfloat16, "nothing is rounded, nothing is widened"
    if kept:
        teacher = Teacher.load(file, WINDOWS, "base")
    assert compare(teacher, quantized, WINDOWS) == compare(dense, quantized, WINDOWS)
    itself = compare(teacher, dense, WINDOWS)
    assert itself.kl == itself.kl_p99 == 0 and itself.top1 == 1
    assert teacher.bytes == evaluate(quantized, WINDOWS, 40, dense=dense).bytes_dense


def test_the_spread_of_kl_is_that_of_the_positions(models):
    dense, quantized = models
    with torch.no_grad():
        p, q = (m(WINDOWS).logits.float().log_softmax(-1) for m in (dense, quantized))
    kl = (p.exp() * (p - q)).sum(-1).flatten().double()
    found = compare(dense, quantized, WINDOWS)
    assert found.kl == pytest.approx(kl.mean().item(), rel=1e-4)
    assert found.kl_median == pytest.approx(kl.quantile(0.5).item(), rel=1e-4)
    assert found.kl_p99 == pytest.approx(kl.quantile(0.99).item(), rel=1e-4)


def test_what_is_kept_is_refused_for_anything_else(models, tmp_path):
    file = tmp_path / "logits"
    teacher = Teacher.measure(models[0], WINDOWS, file, "base")
    with pytest.raises(ValueError, match="another model"):
        Teacher.load(file, WINDOWS, "other")
    with pytest.raises(ValueError, match="other text or windows"):
        Teacher.load(file, WINDOWS[:3], "base")
    with pytest.raises(ValueError, match="other windows"):
        compare(teacher, models[1], WINDOWS[:3])
    with open(file, "ab") as stream:
        stream.write(b"x")
    with pytest.raises(ValueError, match="incomplete"):
        Teacher.load(file, WINDOWS, "base")
    (tmp_path / "logits.json").write_text("{")
    with pytest.raises(ValueError, match="no logits that hf_vq kept"):
        Teacher.load(file, WINDOWS, "base")


def test_an_interrupted_pass_leaves_no_file(tmp_path):
    model = tiny("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        Teacher.measure(model, WINDOWS, tmp_path / "logits")
    assert not (tmp_path / "logits").exists()


def test_continuations_are_kept_too(models, tmp_path):
    prompts = prompts_of(WINDOWS)
    teacher = Teacher.measure(models[0], WINDOWS, tmp_path / "logits", "base")
    own = teacher.continuations(prompts, 6)
    again = Teacher.load(tmp_path / "logits", WINDOWS, "base")
    assert torch.equal(again.continuations(prompts, 6), own)
    assert again.continuations(prompts, 7) is None, "neither kept nor a model at hand"


def test_continuations_are_greedy_and_run_past_the_end_of_text(models):
    prompts = prompts_of(WINDOWS, 2, 9)
    assert prompts.tolist() == WINDOWS[:2, :9].tolist()
    ids = prompts
    with torch.no_grad():
        for _ in range(5):
            ids = torch.cat([ids, models[0](ids).logits[:, -1:].argmax(-1)], 1)
    assert continuations(models[0], prompts, 5).tolist() == ids[:, 9:].tolist()


def test_repetition_and_divergence():
    loop = torch.tensor([[1, 2] * 5])
    assert repetition(loop, 2) == pytest.approx(7 / 9)  # 9 bigrams, 2 kinds
    assert repetition(torch.arange(10)[None]) == 0
    assert repetition(torch.arange(3)[None]) == 0, "shorter than an n-gram"
    other = loop.clone()
    other[0, 4] = 9
    assert divergence(loop, other) == 4 and divergence(loop, loop) == 10


def test_the_check_and_the_speed(models):
    dense, quantized = models
    prompts = prompts_of(WINDOWS)
    found = check(quantized, WINDOWS, continuations(dense, prompts, 8), 8)
    assert found["prompts"] == 5 and found["prompt_tokens"] == 20 and found["new_tokens"] == 8
    assert 0 <= found["divergence"] <= 8 and 0 <= found["repetition"] <= 1
    same = check(dense, WINDOWS, continuations(dense, prompts, 8), 8)
    assert same["divergence"] == 8 and same["repetition"] == same["repetition_dense"]
    measured = speed(quantized, WINDOWS, 4, runs=1)
    assert measured["tokens_per_second"] > 0
    assert measured["peak_memory_bytes"]["process"] > 1 << 20
