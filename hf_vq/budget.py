"""One target for many matrices: each gets what it can make most of.

Small matrices pay more per weight for their codebooks, so meeting the target matrix by matrix
leaves bits unused in some and starves others. Here the target holds for all matrices together:
every one has a curve of (bytes, expected error) over the specs it could have, and
`hf_vq.methods.allocation` picks one of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from hf_vq.formats.base import LayerSpec
from hf_vq.methods.allocation import allocate
from hf_vq.registry import Method

# Targets in bits per weight, relative to the one asked for, at which specs are looked for.
_OFFSETS = [step / 8 for step in range(-12, 25)] + [-1 / 16, 1 / 16, 3 / 16, 5 / 16]
_LEAST, _MOST = 1.0, 8.0


class Wanted(NamedTuple):
    """A matrix to be packed: its shape and the config that holds for it."""

    shape: tuple[int, ...]
    layer: Any


class UnreachableError(ValueError):
    """A matrix cannot have what is asked for; `name` is the matrix."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name = name


def choose_specs(
    method: Method, wanted: Mapping[str, Wanted], gains: Mapping[str, float] | None = None
) -> dict[str, LayerSpec]:
    """A spec for every matrix; those with one target in bits meet it together.

    gains: what each matrix's relative error costs (`hf_vq.engine.sensitivity`); None: as much as
    its number of weights. Every matrix alone must be able to meet its target. Raises
    `UnreachableError` otherwise.
    """
    specs: dict[str, LayerSpec] = {}
    together: dict[float, list[str]] = {}
    for name, (shape, layer) in wanted.items():
        try:
            specs[name] = method.choose_spec(*shape, layer.bits, _fields(layer))
        except ValueError as error:
            raise UnreachableError(name, str(error)) from None
        if layer.bits is not None:
            together.setdefault(layer.bits, []).append(name)
    for bits, names in together.items():
        specs.update(_share(method, bits, {name: wanted[name] for name in names}, gains))
    return specs


def _fields(layer: Any) -> dict[str, Any]:
    return {field: getattr(layer, field) for field in layer.spec_fields}


def _share(
    method: Method,
    bits: float,
    wanted: Mapping[str, Wanted],
    gains: Mapping[str, float] | None,
) -> dict[str, LayerSpec]:
    """Specs of at most `bits` per weight on average, of the least expected error in all."""
    curves: dict[tuple, list[LayerSpec]] = {}
    items = []
    for shape, layer in wanted.values():
        fields = _fields(layer)
        key = (shape, tuple(fields.items()))
        if key not in curves:
            curves[key] = _curve(method, shape, bits, fields)
        items.append(curves[key])
    if gains is None:
        costs = [float(specs[0].num_weights) for specs in items]
    else:
        # one that nothing reached (an expert): as the least of the others
        least = min((g for g in gains.values() if g > 0), default=1.0)
        costs = [gains.get(name, 0.0) or least for name in wanted]
    errors = [
        [cost * method.expected_error(s) for s in specs]
        for cost, specs in zip(costs, items, strict=True)
    ]
    sizes = [[s.nbytes for s in specs] for specs in items]
    weights = sum(specs[0].num_weights for specs in items)
    # the tolerance only forgives the rounding of floats: 2.1 * 10 is not 21
    found = allocate(sizes, errors, bits * weights / 8 * (1 + 1e-12))
    chosen = (specs[i] for specs, i in zip(items, found.choice, strict=True))
    return dict(zip(wanted, chosen, strict=True))


def _curve(
    method: Method, shape: tuple[int, ...], bits: float, fields: dict[str, Any]
) -> list[LayerSpec]:
    """Specs around the target, the one for the target itself among them."""
    found = [method.choose_spec(*shape, bits, fields)]
    for offset in _OFFSETS:
        if _LEAST <= bits + offset <= _MOST:
            try:
                found.append(method.choose_spec(*shape, bits + offset, fields))
            except ValueError:  # out of this matrix's reach
                continue
    return list(dict.fromkeys(found))
