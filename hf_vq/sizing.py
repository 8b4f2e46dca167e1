"""A size for the whole model: what is left for the matrices, and how it is spent to the end.

The files' headers and `config.json` depend a little on what is chosen, so a choice is made, the
files it gives are sized (`hf_vq.footprint`), and the budget of the next choice is moved by what is
left over or missing. What the allocation over the candidates leaves at last is given to single
matrices in turn, those first in which an error matters most.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from hf_vq.budget import Pool, Wanted, choose_specs, everywhere
from hf_vq.config_base import VQConfig
from hf_vq.footprint import Footprint, SavedSize
from hf_vq.formats.base import LayerSpec
from hf_vq.registry import Method
from hf_vq.sizes import Beside, beside_the_model, human, parse_size

logger = logging.getLogger(__name__)

TOLERANCE = 0.005
"""Files are at most this much smaller than asked for, if the method can reach that."""
_GOOD_ENOUGH = 0.0005
"""Share of the size below which the rest is left."""
_CHOICES, _FILLINGS = 16, 64


class SizeError(ValueError):
    """The size asked for is none that this model can have; says which there are."""


class Fitted(NamedTuple):
    """Specs for all matrices, the files they give, and the size that was to be met, in bytes."""

    layers: dict[str, LayerSpec]
    size: SavedSize
    limit: int


def file_limit(config: VQConfig, model: Any) -> tuple[int, Beside | None]:
    """Bytes that the files may take, and what was set aside for "fits:".

    Raises `SizeError` if the context alone takes all the memory.
    """
    assert config.size is not None
    asked = parse_size(config.size)
    if not asked.fits:
        return asked.bytes, None
    try:
        beside = beside_the_model(
            model.config.get_text_config(decoder=True), model.dtype.itemsize, asked.context
        )
    except ValueError as error:
        raise SizeError(f"size={config.size!r}: {error}") from None
    left = asked.bytes - beside.cache - beside.activations
    if left <= 0:
        raise SizeError(
            f"size={config.size!r}: {beside.context} tokens of context take "
            f"{human(beside.cache)} of cache and {human(beside.activations)} of activations, which "
            "leaves nothing for the model; ask for a shorter context"
        )
    return left, beside


def fit_size(
    model: Any,
    config: VQConfig,
    method: Method,
    wanted: Mapping[str, Wanted],
    gains: Mapping[str, float] | None,
    recorded: Mapping[str, Any],
) -> Fitted:
    """Specs with which the saved files take `config.size` at most, and hardly less.

    Matrices with a target in bits of their own have it beforehand. recorded: what `config.json`
    will say beside the layers. Raises `SizeError` for a size that is out of reach or not below that
    of the dense model, and `hf_vq.budget.UnreachableError` as `choose_specs` does.
    """
    limit, beside = file_limit(config, model)
    asked = f"size={config.size!r}" + (f" leaves {human(limit)} of files, which" if beside else "")
    footprint = Footprint(model, config, recorded)
    dense = footprint.dense().total
    if limit >= dense:
        raise SizeError(
            f"{asked} is no less than the {human(dense)} ({dense} bytes) that the model takes as "
            "it is; use it unquantized, or ask for less"
        )
    own = {name: w for name, w in wanted.items() if w.layer.bits is not None}
    fixed = choose_specs(method, own, gains)
    shared = {name: w for name, w in wanted.items() if name not in own}
    weights = sum(w.shape[0] * w.shape[1] for w in shared.values())
    dense_part = sum(w.shape[0] * w.shape[1] for w in wanted.values()) * model.dtype.itemsize
    rest = dense - dense_part + sum(s.nbytes for s in fixed.values())
    pool = Pool(method, shared, gains, everywhere(8 * (limit - rest) / max(weights, 1)))
    order = {name: fixed.get(name) for name in wanted}

    def sized(specs: Mapping[str, LayerSpec]) -> Fitted:
        layers = {name: spec or specs[name] for name, spec in order.items()}
        return Fitted(layers, footprint.packed(layers), limit)

    smallest = sized(pool.smallest())
    if smallest.size.total > limit:
        least = smallest.size.total
        raise SizeError(
            f"{asked} is out of reach: the smallest files that {method.name} can make of this "
            f"model take {human(least)} ({least} bytes)"
        )
    best = _filled(_search(pool, sized, smallest), pool, sized)
    if best.size.total < limit * (1 - TOLERANCE):
        logger.warning(
            "%s: the files will take %s (%d bytes), the most that %s makes use of here",
            asked,
            human(best.size.total),
            best.size.total,
            method.name,
        )
    return best


def _search(pool: Pool, sized: Any, start: Fitted) -> Fitted:
    """The largest files within the limit that the candidates of `pool` give."""
    best, limit = start, start.limit
    low = sum(start.layers[name].nbytes for name in pool.wanted)
    high: int | None = None
    budget = low + limit - start.size.total
    for _ in range(_CHOICES):
        found = sized(pool.choose(budget))
        spare = limit - found.size.total
        if spare < 0:
            high = budget
        else:
            low = max(low, budget)
            if found.size.total > best.size.total:
                best = found
            if spare <= limit * _GOOD_ENOUGH:
                break
        following = budget + spare
        if following <= low or (high is not None and following >= high):
            following = (low + (high or following)) // 2
        if following in (low, budget):
            break
        budget = following
    return best


def _filled(best: Fitted, pool: Pool, sized: Any) -> Fitted:
    """`best` with what it leaves given to single matrices, as long as that makes them better."""
    tries = 0
    useless: set[tuple[Any, int]] = set()
    for name in sorted(pool.wanted, key=lambda n: -pool.error(n, best.layers[n])):
        spare = best.limit - best.size.total
        while spare > best.limit * _GOOD_ENOUGH and tries < _FILLINGS:
            spec = best.layers[name]
            if (spec, spare) in useless:
                break
            better = pool.filled(name, spec, spare)
            found = None
            if better is not None and better.nbytes >= spec.nbytes:
                found = sized({**best.layers, name: better})
                tries += 1
            if found is not None and best.size.total < found.size.total <= best.limit:
                best = found
                break
            useless.add((spec, spare))
            spare //= 2  # a header or an entry of config.json may have taken the difference
    return best
