"""Metrics against sums written out by hand, in float64 and one position at a time."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_vq.evaluation import compare, metrics, perplexity, windows

VOCABULARY = 13


class Bigram(nn.Module):
    """Logits depend on the current token alone, so that every probability can be looked up."""

    def __init__(self, seed: int, vocabulary: int = VOCABULARY, dtype: torch.dtype = torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        table = 2 * torch.randn(vocabulary, vocabulary, generator=generator)
        self.table = nn.Parameter(table.to(dtype))
        self.dropout = nn.Dropout(0.5)
        self.batches: list[int] = []

    def forward(self, input_ids, use_cache=None):
        self.batches.append(input_ids.shape[0])
        return SimpleNamespace(logits=self.dropout(self.table[input_ids]))


def tokens_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def brute_perplexity(table: torch.Tensor, rows: torch.Tensor) -> float:
    p = torch.softmax(table.double(), -1)
    losses = [-math.log(p[a, b]) for row in rows.tolist() for a, b in itertools.pairwise(row)]
    return math.exp(sum(losses) / len(losses))


@settings(max_examples=30, deadline=None)
@given(seqlen=st.integers(2, 9), count=st.integers(1, 60), seed=st.integers(0, 999))
def test_perplexity_equals_the_written_out_sum(seqlen, count, seed):
    tokens = tokens_of(count, seed)
    model = Bigram(seed)
    if count < seqlen:
        with pytest.raises(ValueError, match="do not fill one window"):
            perplexity(model, tokens, seqlen)
        return
    rows = windows(tokens, seqlen)
    expected = brute_perplexity(model.table.detach(), rows)
    assert perplexity(model, tokens, seqlen) == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, rows, seqlen) == pytest.approx(expected, rel=1e-5)


def test_compare_equals_the_written_out_sum():
    dense, quantized = Bigram(1), Bigram(2)
    rows = windows(tokens_of(70), 7)
    p = torch.softmax(dense.table.detach().double(), -1)
    q = torch.softmax(quantized.table.detach().double(), -1)
    flat = rows.flatten().tolist()
    kl = [sum(p[t, v] * math.log(p[t, v] / q[t, v]) for v in range(VOCABULARY)) for t in flat]
    same = [int(p[t].argmax() == q[t].argmax()) for t in flat]
    result = compare(dense, quantized, rows)
    assert result.kl == pytest.approx(float(sum(kl)) / len(flat), rel=1e-5)
    assert result.top1 == pytest.approx(sum(same) / len(flat))
    assert result.positions == len(flat) == 70
    assert result.perplexity_dense == pytest.approx(perplexity(dense, rows, 7), rel=1e-6)
    expected = brute_perplexity(quantized.table.detach(), rows)
    assert result.perplexity_quantized == pytest.approx(expected, rel=1e-5)


def test_compare_is_not_symmetric_and_zero_with_itself():
    a, b = Bigram(1), Bigram(2)
    rows = windows(tokens_of(60), 6)
    assert compare(a, b, rows).kl != pytest.approx(compare(b, a, rows).kl, rel=1e-3)
    itself = compare(a, a, rows)
    assert itself.kl == 0 and itself.top1 == 1


def test_slices_and_batches_do_not_change_the_result(monkeypatch):
    dense, quantized = Bigram(1), Bigram(2, dtype=torch.bfloat16)
    rows = windows(tokens_of(330), 11)
    whole = compare(dense, quantized, rows), perplexity(quantized, rows, 11)
    monkeypatch.setattr(metrics, "_MAX_LOGITS", 3 * VOCABULARY)
    dense.batches.clear()
    dense.config = SimpleNamespace(vocab_size=VOCABULARY)
    quantized.config = dense.config
    sliced = compare(dense, quantized, rows), perplexity(quantized, rows, 11)
    assert sliced[0].kl == pytest.approx(whole[0].kl, rel=1e-6)
    assert sliced[0].top1 == whole[0].top1
    assert sliced[0].perplexity_quantized == pytest.approx(whole[1], rel=1e-6)
    assert sliced[1] == pytest.approx(whole[1], rel=1e-6)
    assert set(dense.batches) == {1}


def test_dropout_is_off_inside_and_modes_come_back():
    model = Bigram(3).train()
    model.dropout.eval()
    rows = windows(tokens_of(40), 8)
    assert perplexity(model, rows, 8) == perplexity(model, rows, 8)
    assert model.training and not model.dropout.training


def test_windows_drop_the_incomplete_last_one():
    assert windows(torch.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows(torch.arange(8, dtype=torch.int16), 4).dtype == torch.int64


@pytest.mark.parametrize(
    ("tokens", "seqlen", "message"),
    [
        (torch.arange(9), 1, "at least 2"),
        (torch.zeros(2, 5), 4, "windows of 5"),
        (torch.zeros(0, 4), 4, "no windows"),
        (torch.zeros(1, 2, 4), 4, r"\(N,\) or \(n, seqlen\)"),
    ],
)
def test_windows_refuse(tokens, seqlen, message):
    with pytest.raises(ValueError, match=message):
        windows(tokens, seqlen)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_models_are_named_not_averaged(bad):
    model = Bigram(4)
    rows = windows(tokens_of(40), 8)
    with torch.no_grad():
        model.table[int(rows[0, 0]), 0] = bad
    with pytest.raises(ValueError, match="NaN or Inf in windows 0"):
        perplexity(model, rows, 8)
    with pytest.raises(ValueError, match="NaN or Inf"):
        compare(Bigram(5), model, rows)


def test_foreign_tokens_and_foreign_vocabularies_are_refused():
    model = Bigram(4)
    model.config = SimpleNamespace(vocab_size=VOCABULARY)
    with pytest.raises(ValueError, match="another tokenizer"):
        perplexity(model, torch.full((8,), VOCABULARY), 4)
    with pytest.raises(ValueError, match="vocabularies differ"):
        compare(model, Bigram(1, vocabulary=VOCABULARY + 1), windows(tokens_of(8), 4))
    with pytest.raises(ValueError, match="windows of shape"):
        compare(model, model, tokens_of(8))
