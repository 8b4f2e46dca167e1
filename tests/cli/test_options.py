"""Options are the configs' fields: all of them, with their ranges, and without their defaults."""

from __future__ import annotations

import inspect

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from hf_vq.cli.options import field_help, with_config_options
from hf_vq.configs import GPTVQConfig
from hf_vq.rules import Choice, Flag, Number

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


def test_every_field_of_the_config_is_an_option():
    options = {name for p in typer.main.get_command(app).params for name in p.opts}
    assert {f"--{name.replace('_', '-')}" for name in GPTVQConfig.rules} <= options
    assert runner.invoke(app, ["--help"]).exit_code == 0


def test_every_option_has_its_help_from_the_docstring():
    texts = field_help(GPTVQConfig)
    assert set(GPTVQConfig.rules) <= set(texts)
    assert all(texts[name] for name in GPTVQConfig.rules)
    parameters = inspect.signature(GPTVQConfig.__init__).parameters
    assert set(texts) == set(parameters) - {"self", "unknown"}


@pytest.mark.parametrize("name", list(GPTVQConfig.rules))
def test_values_arrive_as_the_config_takes_them(name):
    rule = GPTVQConfig.rules[name]
    flag = f"--{name.replace('_', '-')}"
    if isinstance(rule, Flag):
        assert parse(flag)[name] is True
        assert parse(f"--no-{flag[2:]}")[name] is False
        return
    values = rule.values if isinstance(rule, Choice) else (rule.low, rule.high, *rule.also)
    for value in values:
        got = parse(flag, f"{value:d}" if isinstance(value, int) else str(value))[name]
        assert got == value
        if isinstance(rule, Number) and rule.integer:
            assert isinstance(got, int)
    if rule.optional:
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


def test_the_range_is_in_the_message():
    result = runner.invoke(app, ["--vector-dim", "3"], terminal_width=200)
    assert result.exit_code == 2
    assert "1, 2, 4, 8" in " ".join(result.output.split())
