"""Sizes as people write them, and what has to fit beside a model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, LlamaConfig

from hf_vq.sizes import Size, SizeRule, beside_the_model, human, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("7.5GB", Size(7_500_000_000)),
        ("7.5 gb", Size(7_500_000_000)),
        ("7.5GiB", Size(7_680 * 1024**2)),
        ("800MB", Size(800_000_000)),
        ("12k", Size(12_000)),
        ("1TiB", Size(1024**4)),
        ("123456", Size(123_456)),
        (123_456, Size(123_456)),
        ("10B", Size(10)),
        ("fits:8GB", Size(8_000_000_000, True)),
        (" Fits: 8GiB @ 2048 ", Size(8 * 1024**3, True, 2048)),
    ],
)
def test_parse(text, size):
    assert parse_size(text) == size
    assert parse_size(SizeRule().check("size", text)) == size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no size"),
        ("GB", "no size"),
        ("7.5XB", "no size"),
        ("7,5GB", "no size"),
        ("8iB", "no size"),
        ("-1GB", "no size"),
        ("nan", "no size"),
        ("0MB", "less than a byte"),
        (0, "no number of bytes"),
        (-5, "no number of bytes"),
        (2.5, "no number of bytes"),
        (float("inf"), "no number of bytes"),
        (True, "no size"),
        ([1], "no size"),
        ("8GB@4096", "belongs to 'fits:'"),
        ("fits:8GB@", "positive number of tokens"),
        ("fits:8GB@0", "positive number of tokens"),
        ("fit:8GB", "only 'fits:'"),
        ("fits:", "no size"),
    ],
)
def test_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_size(text)
    with pytest.raises(ValueError, match=r"^size: "):
        SizeRule().check("size", text)


def test_none_is_no_size():
    assert SizeRule().check("size", None) is None


@given(st.integers(1, 10**15))
def test_numbers_are_bytes(number):
    assert parse_size(number).bytes == parse_size(str(number)).bytes == number
    assert human(number)[-1] == "B"


def test_the_cache_of_a_llama():
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
    )
    # 128 KiB per token in 16 bits, as every table says
    assert beside_the_model(config, 2).cache == 4096 * 128 * 1024
    assert beside_the_model(config, 2, 100).context == 100
    assert 0 < beside_the_model(config, 2, 100).activations < 100 * 2 * 2**16
    with pytest.raises(ValueError, match="exceeds the model's 131072"):
        beside_the_model(config, 2, 131073)


def test_short_models_and_other_names():
    found = beside_the_model(GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=128), 4)
    assert found.context == 128 and found.cache == 2 * 2 * 64 * 128 * 4
    with pytest.raises(ValueError, match="does not say"):
        beside_the_model(SimpleNamespace(hidden_size=3), 2)
