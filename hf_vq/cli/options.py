"""Command-line options made from the configs' fields.

A field of a config becomes an option without being named here: its allowed values come from its
rule, its help from the config's docstring, and its default stays in the config alone, because
options that are not given are not passed on.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any

import typer

from hf_vq.registry import METHODS
from hf_vq.rules import Choice, Flag, Number, Rule

_NONE = object()  # "none" given on the command line, as against no option given


class _Parser:
    """Text of an option -> value of the field, refused with the field's own message."""

    def __init__(self, name: str, rule: Rule) -> None:
        self.name = name
        self.rule = rule
        self.__name__ = name  # typer asks every parser for a name

    def __call__(self, text: Any) -> Any:
        if not isinstance(text, str):
            return text
        if text.lower() == "none" and getattr(self.rule, "optional", False):
            return _NONE
        try:
            return self.rule.check(self.name, _literal(text))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None


def _literal(text: str) -> Any:
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text


def _metavar(rule: Rule) -> str:
    if isinstance(rule, Choice):
        return "|".join(map(str, rule.values))
    if isinstance(rule, Number):
        return "INTEGER" if rule.integer else "NUMBER"
    return "VALUE"


def field_help(config: type) -> dict[str, str]:
    """Field -> its text in the `Args:` section of a config's docstring, on one line."""
    doc = inspect.getdoc(config) or ""
    _, _, after = doc.partition("Args:\n")
    args = re.split(r"\n(?=\S)", after)[0]
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?= {4}\S)", "\n" + args):
        names, colon, text = entry.strip().partition(":")
        if colon:
            for name in names.split(","):
                found[name.strip()] = " ".join(text.split())
    return found


def with_config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Replace a command's `fields` parameter by one option per field of all methods' configs."""
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.name != "fields"]
    taken = {p.name for p in own}
    extra: dict[str, inspect.Parameter] = {}
    for method in METHODS.values():
        texts = field_help(method.config)
        rules: dict[str, Rule] = method.config.rules  # type: ignore[attr-defined]
        for name, rule in rules.items():
            if name not in taken and name not in extra:
                extra[name] = _parameter(name, rule, texts.get(name, ""), method.name)

    def wrapper(**values: Any) -> Any:
        fields = {name: values.pop(name) for name in extra}
        given = {n: None if v is _NONE else v for n, v in fields.items() if v is not None}
        return command(fields=given, **values)

    parameters = [*own, *extra.values()]
    wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
    wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


def _parameter(name: str, rule: Rule, text: str, method: str) -> inspect.Parameter:
    flag = name.replace("_", "-")
    panel = f"Fields of the config ({method}; unset: chosen by the library)"
    annotation: Any
    if isinstance(rule, Flag):
        option = typer.Option(f"--{flag}/--no-{flag}", help=text, rich_help_panel=panel)
        annotation = Annotated[bool | None, option]
    else:
        option = typer.Option(
            f"--{flag}",
            help=text,
            metavar=_metavar(rule),
            parser=_Parser(name, rule),
            rich_help_panel=panel,
        )
        annotation = Annotated[Any | None, option]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )
