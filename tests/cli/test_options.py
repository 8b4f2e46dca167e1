"""Options are the configs' fields: all of them, with their ranges, and without their defaults."""

from __future__ import annotations

import inspect

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from hf_vq.cli.options import field_help, with_config_options
from hf_vq.configs import CVXQConfig, GPTVQConfig, VPTQConfig
from hf_vq.rules import Choice, Flag, Number
from hf_vq.sizes import SizeRule

runner = CliRunner()
received: list[dict] = []

app = typer.Typer()


@app.command()
@with_config_options
def command(name: str = "x", *, fields: dict) -> None:
    received.append({"name": name, **fields})


def parse(*arguments: str) -> dict:
    received.clear()
    result = runner.invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return received[0]


def test_unset_options_are_not_passed():
    assert parse() == {"name": "x"}


CONFIGS = [GPTVQConfig, VPTQConfig, CVXQConfig]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_of_the_config_is_an_option(config):
    options = {name for p in typer.main.get_command(app).params for name in p.opts}
    assert {f"--{name.replace('_', '-')}" for name in config.rules} <= options
    assert runner.invoke(app, ["--help"]).exit_code == 0


@pytest.mark.parametrize("config", CONFIGS)
def test_every_option_has_its_help_from_the_docstring(config):
    texts = field_help(config)
    assert set(config.rules) <= set(texts)
    assert all(texts[name] for name in config.rules)
    parameters = inspect.signature(config.__init__).parameters
    assert set(texts) == set(parameters) - {"self", "unknown"}


@pytest.mark.parametrize(
    ("config", "name"), [(config, name) for config in CONFIGS for name in config.rules]
)
def test_values_arrive_as_the_config_takes_them(config, name):
    rule = config.rules[name]
    flag = f"--{name.replace('_', '-')}"
    if isinstance(rule, Flag):
        assert parse(flag)[name] is True
        assert parse(f"--no-{flag[2:]}")[name] is False
        return
    if isinstance(rule, SizeRule):
        values: tuple = ("7.5GB", "fits:8GiB@512", 123456)
    else:
        values = rule.values if isinstance(rule, Choice) else (rule.low, rule.high, *rule.also)
    for value in values:
        got = parse(flag, f"{value:d}" if isinstance(value, int) else str(value))[name]
        assert got == value
        if isinstance(rule, Number) and rule.integer:
            assert isinstance(got, int)
    if rule.optional and "none" not in values:
        assert parse(flag, "none")[name] is None


@settings(max_examples=40, deadline=None)
@given(text=st.text(min_size=1, max_size=8).filter(lambda t: not t.startswith("-")))
def test_any_text_is_a_value_or_a_usage_error(text):
    result = runner.invoke(app, ["--bits", text])
    try:
        valid = text.lower() == "none" or 1 <= float(text) <= 8
    except ValueError:
        valid = False
    assert result.exit_code == (0 if valid else 2), result.output


def message(*arguments: str) -> str:
    """Of a usage error, on one line."""
    result = runner.invoke(app, list(arguments), terminal_width=200)
    assert result.exit_code == 2
    return " ".join(result.output.replace("│", " ").split())


def test_the_range_is_in_the_message():
    assert "scale_block=4 must be an integer from 8 to 256" in message("--scale-block", "4")


def test_methods_with_a_field_of_one_name_each_say_their_range():
    text = message("--vector-dim", "17")
    assert "gptvq: vector_dim=17 must be one of 1, 2, 4, 8 or None" in text
    assert "vptq: vector_dim=17 must be an integer from 2 to 16 or None" in text
    # what one of them takes is left to the config of the one that is chosen
    assert parse("--vector-dim", "1") == {"name": "x", "vector_dim": 1}
    assert parse("--vector-dim", "6") == {"name": "x", "vector_dim": 6}
    assert message("--bits", "9").count("from 1 to 8") == 1
