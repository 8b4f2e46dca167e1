"""Command-line options made from the configs' fields.

A field of a config becomes an option without being named here: its allowed values come from its
rule, its help from the config's docstring, and its default stays in the config alone, because
options that are not given are not passed on.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from typing import Annotated, Any

import typer

from hf_vq.registry import METHODS
from hf_vq.rules import Choice, Flag, Number, PowerOfTwo, Rule

_NONE = object()  # "none" given on the command line, as against no option given


class _Parser:
    """Text of an option -> value of the field, refused with the fields' own messages.

    Methods may have fields of one name with different rules. What any of them allows passes here;
    the config of the method that is chosen has the last word.
    """

    def __init__(self, name: str, rules: dict[str, Rule]) -> None:
        self.name = name
        self.rules = rules
        self.__name__ = name  # typer asks every parser for a name

    def __call__(self, text: Any) -> Any:
        if not isinstance(text, str):
            return text
        problems: dict[str, list[str]] = {}
        for method, rule in self.rules.items():
            try:
                return rule.check(self.name, _literal(text))
            except ValueError as error:
                problems.setdefault(str(error), []).append(method)
        if text.lower() == "none" and any(_optional(rule) for rule in self.rules.values()):
            return _NONE
        raise typer.BadParameter(_per_method(problems))


def _optional(rule: Rule) -> bool:
    return getattr(rule, "optional", False)


def _per_method(texts: dict[str, list[str]]) -> str:
    """One text, or each with the methods that it is about."""
    if len(texts) == 1:
        return next(iter(texts))
    return "; ".join(f"{', '.join(methods)}: {text}" for text, methods in texts.items())


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
    return "INTEGER" if isinstance(rule, PowerOfTwo) else "VALUE"


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
    rules: dict[str, dict[str, Rule]] = {}  # field -> method -> rule
    for method in METHODS.values():
        for name, rule in method.config.rules.items():  # type: ignore[attr-defined]
            if name not in taken:
                rules.setdefault(name, {})[method.name] = rule
    extra = {name: _parameter(name, by_method) for name, by_method in rules.items()}

    def wrapper(**values: Any) -> Any:
        fields = {name: values.pop(name) for name in extra}
        given = {n: None if v is _NONE else v for n, v in fields.items() if v is not None}
        return command(fields=given, **values)

    parameters = [*own, *extra.values()]
    wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
    wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


def config_class(method: str, fields: dict[str, Any]) -> type:
    """The config of `method`; raises typer.BadParameter if it has not all the `fields` given."""
    if method not in METHODS:
        known = ", ".join(METHODS)
        raise typer.BadParameter(f"{method!r} is not one of {known}", param_hint="--method")
    config = METHODS[method].config
    foreign = sorted(fields.keys() - config.rules.keys())  # type: ignore[attr-defined]
    if foreign:
        raise typer.BadParameter(f"{method} has no field {foreign[0]}", param_hint="--method")
    return config


def parse_overrides(text: str | None) -> Any:
    """JSON of the option --overrides."""
    if text is None:
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"no valid JSON: {error}", param_hint="--overrides") from None


def _parameter(name: str, rules: dict[str, Rule]) -> inspect.Parameter:
    flag = name.replace("_", "-")
    panel = f"Fields of the config ({', '.join(rules)}; unset: chosen by the library)"
    texts: dict[str, list[str]] = {}
    for method in rules:
        texts.setdefault(field_help(METHODS[method].config).get(name, ""), []).append(method)
    annotation: Any
    if all(isinstance(rule, Flag) for rule in rules.values()):
        option = typer.Option(
            f"--{flag}/--no-{flag}", help=_per_method(texts), rich_help_panel=panel
        )
        annotation = Annotated[bool | None, option]
    else:
        option = typer.Option(
            f"--{flag}",
            help=_per_method(texts),
            metavar=" or ".join(dict.fromkeys(_metavar(rule) for rule in rules.values())),
            parser=_Parser(name, rules),
            rich_help_panel=panel,
        )
        annotation = Annotated[Any | None, option]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )
