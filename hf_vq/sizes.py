"""Sizes as people write them: "7.5GB" of files, or "fits:8GB" of memory with a context in it.

GB, MB and kB are powers of 1000, as in a file listing of the Hub; GiB, MiB and KiB of 1024.
"""

from __future__ import annotations

import math
import numbers
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

DEFAULT_CONTEXT = 4096
"""Tokens that "fits:" makes room for unless told, or the model's own limit if that is lower."""
_UNITS = {"B": 0, "KB": 1, "MB": 2, "GB": 3, "TB": 4}
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_EXAMPLES = '"7.5GB", "800MB", "7GiB", a number of bytes, "fits:8GB" or "fits:8GB@4096"'


class Size(NamedTuple):
    """What was asked for, in bytes.

    fits: of memory, for the model and the key-value cache of `context` tokens (None: the default).
    """

    bytes: int
    fits: bool = False
    context: int | None = None


def parse_size(value: str | int) -> Size:
    """Raises ValueError for anything but the forms in this module's description."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = float(value)
        if not (math.isfinite(number) and number >= 1 and number == int(number)):
            raise ValueError(f"{value!r} is no number of bytes; write {_EXAMPLES}")
        return Size(int(value))  # type: ignore[call-overload]
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no size; write {_EXAMPLES}")
    head, colon, rest = value.strip().rpartition(":")
    if colon and head.strip().lower() != "fits":
        raise ValueError(f"{value!r}: only 'fits:' can stand before a size; write {_EXAMPLES}")
    amount, at, tokens = rest.partition("@")
    context = None
    if at:
        if not colon:
            raise ValueError(f"{value!r}: a context belongs to 'fits:', as in 'fits:8GB@4096'")
        if not re.fullmatch(r"\s*[1-9]\d*\s*", tokens, re.ASCII):
            raise ValueError(f"{value!r}: the context after @ is a positive number of tokens")
        context = int(tokens)
    return Size(_bytes(amount.strip(), value), bool(colon), context)


def _bytes(text: str, whole: str) -> int:
    found = _SIZE.fullmatch(text)
    if found is None or (found[3] and not found[2]):
        raise ValueError(f"{whole!r} is no size; write {_EXAMPLES}")
    power = _UNITS[f"{found[2].upper()}B"]
    number = int(float(found[1]) * (1024 if found[3] else 1000) ** power)
    if number < 1:
        raise ValueError(f"{whole!r} is less than a byte")
    return number


def human(size: int) -> str:
    """1234567 -> "1.235 MB": decimal, for messages."""
    for unit, power in reversed(_UNITS.items()):
        if size >= 1000**power:
            digits = 0 if unit == "B" else 3
            return f"{size / 1000**power:.{digits}f} {unit.replace('KB', 'kB')}"
    return f"{size} B"


@dataclass(frozen=True)
class SizeRule:
    """Rule of a config field: a size, or None."""

    optional: bool = True

    def check(self, name: str, value: Any) -> str | int | None:
        """The value as it was written; raises ValueError naming the field."""
        if value is None and self.optional:
            return None
        try:
            parsed = parse_size(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        return value.strip() if isinstance(value, str) else parsed.bytes


class Beside(NamedTuple):
    """What has to be in memory beside the weights, in bytes."""

    context: int
    cache: int
    activations: int


def beside_the_model(architecture: Any, itemsize: int, context: int | None = None) -> Beside:
    """The key-value cache of one sequence and a margin for activations.

    architecture: the text config of a Transformers model. itemsize: bytes of a value of its dtype.
    context: tokens; None: `DEFAULT_CONTEXT`, or fewer if the model takes no more. The cache is
    ``layers * 2 * kv heads * head_dim * context`` values; sliding windows and compressed caches
    need less. The margin is what a prefill in one piece holds at a time in one block: four hidden
    states and two intermediate ones per token; and the float32 logits of one position. What the
    runtime itself takes (a CUDA context, say) is not in it. Raises ValueError if the config does
    not say what the cache depends on, or for a context beyond the model's.
    """

    def get(*names: str) -> int | None:
        found = (getattr(architecture, name, None) for name in names)
        return next((v for v in found if isinstance(v, int) and not isinstance(v, bool)), None)

    longest = get("max_position_embeddings")
    if context is None:
        context = min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT)
    elif longest is not None and context > longest:
        raise ValueError(f"a context of {context} tokens exceeds the model's {longest}")
    layers, hidden = get("num_hidden_layers"), get("hidden_size")
    heads = get("num_attention_heads")
    if layers is None or hidden is None or heads is None:
        raise ValueError(
            f"{type(architecture).__name__} does not say how large its key-value cache is; "
            "give a size without 'fits:'"
        )
    cached = (get("num_key_value_heads") or heads) * (get("head_dim") or hidden // heads)
    inner = get("intermediate_size", "ffn_dim", "n_inner") or 4 * hidden
    return Beside(
        context,
        layers * 2 * cached * context * itemsize,
        context * (4 * hidden + 2 * inner) * itemsize + 4 * (get("vocab_size") or 0),
    )
