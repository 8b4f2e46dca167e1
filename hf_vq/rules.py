"""What one config field may be, with error messages that say the allowed range."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Any, Protocol


class Rule(Protocol):
    """Checks and normalises the value of a field."""

    def check(self, name: str, value: Any) -> Any:
        """The value to store; raises ValueError naming the field and its allowed values."""


@dataclass(frozen=True)
class Number:
    """A finite number in [low, high]; `also` lists single values outside of it."""

    low: float
    high: float
    integer: bool = False
    optional: bool = False
    also: tuple[float, ...] = ()

    def check(self, name: str, value: Any) -> Any:
        if value is None and self.optional:
            return None
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            whole = isinstance(value, numbers.Integral)
            # plain Python numbers, because numpy's do not go into JSON
            number = int(value) if whole else float(value)  # type: ignore[call-overload]
            inside = self.low <= number <= self.high or number in self.also
            # infinities and NaN fail the comparison, whatever the bounds
            if inside and not (self.integer and number % 1):
                return int(number) if self.integer else number
        raise ValueError(f"{name}={value!r} must be {self}")

    def __str__(self) -> str:
        kind = "an integer" if self.integer else "a number"
        also = "".join(f" or {v}" for v in self.also)
        none = " or None" if self.optional else ""
        return f"{kind} from {self.low} to {self.high}{also}{none}"


@dataclass(frozen=True)
class PowerOfTwo:
    """A power of two in [low, high], which are powers of two; `also` lists values beside them."""

    low: int
    high: int
    optional: bool = False
    also: tuple[int, ...] = ()

    def check(self, name: str, value: Any) -> Any:
        if value is None and self.optional:
            return None
        if isinstance(value, numbers.Real) and not isinstance(value, bool) and value == value // 1:
            number = int(value)  # type: ignore[call-overload]
            power = self.low <= number <= self.high and number & (number - 1) == 0
            if power or number in self.also:
                return number
        also = "".join(f" or {v}" for v in self.also)
        none = " or None" if self.optional else ""
        raise ValueError(
            f"{name}={value!r} must be a power of two from {self.low} to {self.high}{also}{none}"
        )


@dataclass(frozen=True)
class Choice:
    """One of a few values; `aliases` are other words for some of them, as (word, value)."""

    values: tuple[Any, ...]
    optional: bool = False
    aliases: tuple[tuple[str, Any], ...] = ()

    def check(self, name: str, value: Any) -> Any:
        if value is None and self.optional:
            return None
        for word, meant in self.aliases:
            if value == word:
                return meant
        for known in self.values:
            if not isinstance(value, bool) and value == known:
                return known
        listed = ", ".join(map(repr, self.values))
        raise ValueError(
            f"{name}={value!r} must be one of {listed}{' or None' if self.optional else ''}"
        )


@dataclass(frozen=True)
class Flag:
    """True or False."""

    optional: bool = False

    def check(self, name: str, value: Any) -> bool | None:
        if value is None and self.optional:
            return None
        if not isinstance(value, bool):
            none = " or None" if self.optional else ""
            raise ValueError(f"{name}={value!r} must be True or False{none}")
        return value
