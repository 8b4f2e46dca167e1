"""Every kind of calibration data gives windows, and every kind of bad data one clear error."""

from __future__ import annotations

import json
import logging
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_vq.configs import GPTVQConfig
from hf_vq.engine.calibration import (
    CalibrationError,
    describe_dataset,
    load_calibration,
    load_tokens,
)

TEXTS = [f"Line {i}: the quick brown fox jumps over the lazy dog." for i in range(60)]


class Letters:
    """A tokenizer of one id per character, which records how much it was given."""

    def __init__(self):
        self.seen = []

    def __call__(self, text, add_special_tokens=True, verbose=True):
        assert not add_special_tokens
        self.seen.append(text)
        return {"input_ids": [ord(c) for c in text]}


def load(dataset, tokenizer=None, max_length=128, vocab_size=None, **fields):
    config = GPTVQConfig(dataset=dataset, tokenizer=tokenizer or Letters(), **fields)
    return load_calibration(config, "nowhere", max_length, vocab_size)


def text_of(windows):
    return ["".join(map(chr, row)) for row in windows.tolist()]


def test_strings_are_joined_and_cut():
    windows = load(TEXTS, seqlen=16, nsamples=1000)
    assert windows.dtype == torch.int64
    whole = "".join(t + "\n\n" for t in TEXTS)
    assert "".join(text_of(windows)) == whole[: len(whole) // 16 * 16]


def test_windows_are_drawn_with_the_seed():
    first, again = (load(TEXTS, seqlen=16, nsamples=5, seed=3) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (5, 16)
    assert not torch.equal(first, load(TEXTS, seqlen=16, nsamples=5, seed=4))
    assert len({tuple(row) for row in first.tolist()}) == 5
    every = text_of(load(TEXTS, seqlen=16, nsamples=1000))
    assert all(window in every for window in text_of(first))


def test_default_seqlen_is_the_context():
    assert load(["x" * 500], nsamples=2).shape == (2, 128)
    assert load(["x" * 9000], nsamples=2, max_length=None).shape == (2, 2048)


def test_files(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("\n\n".join(TEXTS), encoding="utf-8")
    lines = tmp_path / "a.jsonl"
    lines.write_text(
        "".join(json.dumps({"text": t, "body": "B" * 40}) + "\n" for t in TEXTS), encoding="utf-8"
    )
    expected = load(TEXTS, seqlen=16, nsamples=1000)
    assert torch.equal(load(str(text), seqlen=16, nsamples=1000), expected)
    assert torch.equal(load(str(lines), seqlen=16, nsamples=1000), expected)
    body = load(f"{lines}#body", seqlen=16, nsamples=1000)
    assert set("".join(text_of(body))) == {"B", "\n"}


def test_generators_and_datasets_are_read_once_and_only_as_far_as_needed():
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield {"text": "abcdefgh " * 1000}

    assert load(endless(), seqlen=16, nsamples=4).shape == (4, 16)
    assert len(taken) < 20
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": TEXTS})
    assert torch.equal(load(table, seqlen=16, nsamples=9), load(TEXTS, seqlen=16, nsamples=9))


@pytest.mark.parametrize(
    "form",
    [
        lambda t: t,
        lambda t: t.to(torch.int32),
        lambda t: t.numpy(),
        lambda t: t.numpy().astype(np.uint16),
        lambda t: t.tolist(),
        lambda t: list(t),
        lambda t: [row.numpy() for row in t],
    ],
)
def test_token_ids(form):
    tokens = torch.arange(96).reshape(6, 16)
    assert torch.equal(load(form(tokens), nsamples=6), tokens)
    assert load(form(tokens), nsamples=4).shape == (4, 16)
    # rows longer than a window are cut, none crosses from one row into the next
    assert torch.equal(load(form(tokens), seqlen=8), tokens.reshape(12, 8))
    flat = load(tokens.flatten().numpy(), seqlen=32, nsamples=3)
    assert torch.equal(flat, tokens.reshape(3, 32))


def test_ragged_samples_are_put_end_to_end():
    rows = [list(range(10)), list(range(10, 40))]
    assert torch.equal(load(rows, seqlen=20, nsamples=9), torch.arange(40).reshape(2, 20))


def test_tokenized_samples_of_any_iterable():
    rows = [{"input_ids": list(range(16)), "attention_mask": [1] * 16} for _ in range(4)]
    expected = torch.arange(16).repeat(4, 1)
    assert torch.equal(load(iter(rows), seqlen=16, nsamples=4), expected)
    assert torch.equal(load((r["input_ids"] for r in rows), seqlen=16, nsamples=4), expected)


def test_npy(tmp_path):
    path = tmp_path / "t.npy"
    np.save(path, np.arange(64, dtype=np.uint16).reshape(2, 32))
    assert torch.equal(load(str(path)), torch.arange(64).reshape(2, 32))
    path.write_bytes(path.read_bytes()[:90])
    with pytest.raises(CalibrationError, match=r"t\.npy"):
        load(str(path))


@given(st.lists(st.integers(0, 299), min_size=1, max_size=200), st.integers(8, 64))
def test_windows_hold_the_tokens_in_order(ids, seqlen):
    windows = load(ids, seqlen=seqlen, nsamples=1000)
    kept = windows.flatten().tolist()
    assert kept == ids[: len(kept)]
    assert len(ids) - len(kept) < min(seqlen, len(ids))


def test_no_data_is_a_mode_with_a_price(caplog):
    with caplog.at_level(logging.WARNING):
        assert load(None) is None
    assert "no calibration data" in caplog.text


def test_too_little_data_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        load(TEXTS[:2], seqlen=16, nsamples=100)
    assert "of the 100 windows" in caplog.text


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("missing/file.txt", r"missing/file\.txt cannot be read: No such file"),
        ("missing.jsonl", r"missing\.jsonl cannot be read: No such file"),
        ("missing.npy", r"missing\.npy"),
        (["", "  \n"], "is empty"),
        (iter([]), "is empty"),
        (torch.empty(0, dtype=torch.long), "is empty"),
        (torch.zeros(2, 8), "must be integers"),
        (np.zeros((2, 8)), "must be integers"),
        (torch.zeros(2, 8, 2, dtype=torch.long), r"\(samples, tokens\)"),
        ([{"body": "x"}], "no string 'text'"),
        ([b"bytes"], "no string 'text'"),
        ({"train": ["x"]}, "cannot read calibration data from dict"),
        (object(), "cannot read calibration data from object"),
        ([5, 300], "token id 300 is outside of the model's vocabulary of 300"),
        ([5, -100], "token id -100 is outside"),
    ],
)
def test_bad_data(dataset, message):
    with pytest.raises(CalibrationError, match=message):
        load(dataset, vocab_size=300)


def test_bad_files(tmp_path):
    broken = tmp_path / "a.jsonl"
    broken.write_text('{"text": "ok"}\n{"text": \n', encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"a\.jsonl:2 is no JSON"):
        load(str(broken))
    empty = tmp_path / "b.txt"
    empty.write_text("\n \n", encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"\(b\.txt\) is empty"):
        load(str(empty))
    binary = tmp_path / "c.txt"
    binary.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(CalibrationError, match="not UTF-8"):
        load(str(binary))
    other = tmp_path / "d.csv"
    other.write_text("x")
    with pytest.raises(CalibrationError, match=r"\.txt, \.jsonl, \.npy"):
        load(str(other))


def test_hub_id_without_network_is_one_sentence():
    pytest.importorskip("datasets")
    with pytest.raises(CalibrationError, match="cannot be loaded from the Hub") as caught:
        load("no-such-user/no-such-dataset:config:train")
    assert "\n" not in str(caught.value)


def test_hub_id_is_name_config_split(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return [{"text": "abc " * 40, "body": "xyz " * 40}]

    module = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(__import__("sys").modules, "datasets", module)
    load("wikitext:wikitext-2-raw-v1:train", seqlen=8)
    load("org/name#body", seqlen=8)
    assert asked == [
        (("wikitext", "wikitext-2-raw-v1"), {"split": "train"}),
        (("org/name", None), {"split": "train"}),
    ]


@pytest.mark.parametrize("tokenizer", [None, "no-such-user/no-such-tokenizer"])
def test_tokenizer_that_cannot_be_found(tokenizer):
    config = GPTVQConfig(dataset=TEXTS, tokenizer=tokenizer)
    with pytest.raises(CalibrationError, match="no tokenizer found at 'no") as caught:
        load_calibration(config, "nowhere/at-all", 128, None)
    assert "\n" not in str(caught.value)
    with pytest.raises(CalibrationError, match="need a tokenizer"):
        load_tokens(TEXTS, None)


def test_a_real_tokenizer(docs_llama):
    config = GPTVQConfig(dataset=TEXTS, seqlen=32, nsamples=4)
    windows = load_calibration(config, str(docs_llama), 1024, 4096)
    assert windows.shape == (4, 32)
    assert torch.equal(
        load_tokens(TEXTS, str(docs_llama))[:8],
        load_calibration(
            GPTVQConfig(dataset=TEXTS, seqlen=8, nsamples=10**6), str(docs_llama), 1024, 4096
        )[0],
    )


def test_long_texts_are_tokenized_in_pieces():
    letters = Letters()
    load(["x" * 300_000, "y"], tokenizer=letters, seqlen=64, nsamples=10**6)
    assert max(map(len, letters.seen)) < 140_000
    assert "".join(letters.seen) == "x" * 300_000 + "\n\ny\n\n"


def test_window_longer_than_the_context_is_refused():
    with pytest.raises(CalibrationError, match="range is 8 to 128"):
        load(TEXTS, seqlen=129)


def test_descriptions_hold_no_path(tmp_path):
    path = str(tmp_path / "secret" / "a.txt")
    assert describe_dataset(path) == "a.txt"
    assert describe_dataset(f"{path[:-4]}.jsonl#body") == "a.jsonl#body"
    assert (
        describe_dataset("wikitext:wikitext-2-raw-v1:train") == "wikitext:wikitext-2-raw-v1:train"
    )
    assert describe_dataset(torch.zeros(3, 4)) == "token ids of shape [3, 4]"
    assert describe_dataset(["a", "b"]) == "2 strings"
    assert describe_dataset(x for x in "ab") == "generator"
    assert describe_dataset(None) is None
