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
from hf_vq.methods.allocation import AllocationError, allocate
from hf_vq.registry import Method

# Targets in bits per weight, relative to the one asked for, at which specs are looked for.
_OFFSETS = [step / 8 for step in range(-12, 25)] + [-1 / 16, 1 / 16, 3 / 16, 5 / 16]
_LEAST, _MOST = 1.0, 8.0
# Targets that a size is met with, beside those around its average: all there are, coarsely, and
# finely at the lower end, which says what is out of reach.
_GRID = [step / 8 for step in range(8, 17)] + [step / 4 for step in range(9, 33)]


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
    method: Method,
    wanted: Mapping[str, Wanted],
    gains: Mapping[str, float] | None = None,
    added: Mapping[str, int] | None = None,
) -> dict[str, LayerSpec]:
    """A spec for every matrix; those with one target in bits meet it together.

    gains: what each matrix's relative error costs (`hf_vq.engine.sensitivity`); None: as much as
    its number of weights. added: bytes stored beside a matrix that count towards the target, as
    those of a bias that it had not before. Every matrix alone must be able to meet its target.
    Raises `UnreachableError` otherwise.
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
        pool = Pool(method, {name: wanted[name] for name in names}, gains, around(bits))
        beside = sum((added or {}).get(name, 0) for name in names)
        # the tolerance only forgives the rounding of floats: 2.1 * 10 is not 21
        budget = bits * pool.num_weights / 8 * (1 + 1e-12) - beside
        alone = {name: specs[name] for name in names}
        try:
            best = pool.choose(budget)
        except AllocationError as error:
            raise UnreachableError(names[0], f"bits={bits:g} is out of reach: {error}") from None
        # of few matrices it may leave so much unused that each for itself is better
        if pool.fits(alone, budget) and pool.total(alone) < pool.total(best):
            best = alone
        specs.update(best)
    return specs


def around(bits: float) -> list[float]:
    """Targets in bits per weight to look for specs at; `bits` is the first."""
    near = (bits + offset for offset in _OFFSETS)
    return [bits, *(b for b in near if _LEAST <= b <= _MOST)]


def everywhere(bits: float) -> list[float]:
    """Targets over the whole range, more of them around `bits`."""
    return sorted({*around(min(max(bits, _LEAST), _MOST)), *_GRID})


class Pool:
    """Matrices that share one budget: what each could be, and what that would cost.

    gains: what each matrix's relative error costs (`hf_vq.engine.sensitivity`); None: as much as
    its number of weights. targets: bits per weight to look for specs at. Raises `UnreachableError`
    for a matrix that can have none of them.
    """

    def __init__(
        self,
        method: Method,
        wanted: Mapping[str, Wanted],
        gains: Mapping[str, float] | None,
        targets: list[float],
    ) -> None:
        self.method, self.wanted = method, wanted
        curves: dict[tuple, list[LayerSpec]] = {}
        self._items: dict[str, list[LayerSpec]] = {}
        for name, (shape, layer) in wanted.items():
            fields = _fields(layer)
            key = (shape, tuple(fields.items()))
            if key not in curves:
                curves[key] = _curve(method, name, shape, targets, fields)
            self._items[name] = curves[key]
        weights = {name: specs[0].num_weights for name, specs in self._items.items()}
        self.num_weights = sum(weights.values())
        if gains is None:
            self.costs = {name: float(number) for name, number in weights.items()}
        else:
            # one that nothing reached (an expert): as the least of the others
            least = min((g for g in gains.values() if g > 0), default=1.0)
            self.costs = {name: gains.get(name, 0.0) or least for name in wanted}

    def smallest(self) -> dict[str, LayerSpec]:
        """Every matrix as small as it can be."""
        return {n: min(specs, key=lambda s: s.nbytes) for n, specs in self._items.items()}

    def choose(self, budget: float) -> dict[str, LayerSpec]:
        """Specs of at most `budget` bytes together, of the least expected error in all.

        Raises `hf_vq.methods.allocation.AllocationError` for less than the smallest take.
        """
        errors = [[self.error(n, s) for s in specs] for n, specs in self._items.items()]
        sizes = [[s.nbytes for s in specs] for specs in self._items.values()]
        found = allocate(sizes, errors, budget)
        pairs = zip(self._items.items(), found.choice, strict=True)
        return {name: specs[i] for (name, specs), i in pairs}

    def total(self, specs: Mapping[str, LayerSpec]) -> float:
        """What all of them would cost."""
        return sum(self.error(name, spec) for name, spec in specs.items())

    def fits(self, specs: Mapping[str, LayerSpec], budget: float) -> bool:
        """Whether they take at most so many bytes."""
        return sum(spec.nbytes for spec in specs.values()) <= budget

    def error(self, name: str, spec: LayerSpec) -> float:
        """What the matrix called `name` would cost as `spec`."""
        return self.costs[name] * self.method.expected_error(spec)

    def filled(self, name: str, spec: LayerSpec, spare: int) -> LayerSpec | None:
        """What the matrix could be instead with `spare` bytes more; None: nothing better."""
        bits = min(_MOST, 8 * (spec.nbytes + spare) / spec.num_weights)
        shape, layer = self.wanted[name]
        try:
            found = self.method.choose_spec(*shape, bits, _fields(layer))
        except ValueError:
            return None
        return found if self.error(name, found) < self.error(name, spec) else None


def _fields(layer: Any) -> dict[str, Any]:
    return {field: getattr(layer, field) for field in layer.spec_fields}


def _curve(
    method: Method,
    name: str,
    shape: tuple[int, ...],
    targets: list[float],
    fields: dict[str, Any],
) -> list[LayerSpec]:
    """Specs for as many of the targets as the matrix can meet."""
    found, reason = [], ""
    for bits in targets:
        try:
            found.append(method.choose_spec(*shape, bits, fields))
        except ValueError as error:  # out of this matrix's reach
            reason = str(error)
    if not found:
        raise UnreachableError(name, reason)
    return list(dict.fromkeys(found))
