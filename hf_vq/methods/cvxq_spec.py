"""How a CVXQ matrix spends its bits: the geometry for an all-in target.

A group costs 4 bits for its depth, 8 for its scale (16 as float16) and perhaps a location, whatever
its size; a row permutation 16 bits per row; everything else is words of codes. So every target can
be met to within one word or so, and the question is only how large the groups are. The expected
error is a fit to measured rows, not a theory: 4**-rate times a power of group_rows for how closely
depths and scales can follow the weights, times a factor for clusters of similar rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

from hf_vq.formats.bitstream import packed_words
from hf_vq.formats.cvxq import MAX_DEPTH, CVXQSpec

# -- Preferences, all of them -----------------------------------------------------------
ADAPTATION = 0.045
"""Error grows by group_rows**(ADAPTATION * rate): at 3 bits 10 % with every doubling."""
CLUSTERED_FACTOR = 0.97
"""Error with rows clustered by size, relative to rows as they come."""
CLUSTERED_FACTOR_EXPANDING = 0.88
"""The same where there are more rows than columns: the neurons of an MLP differ most."""
GROUP_ROWS = (32, 1024)
"""Sizes tried unasked, besides all rows in one cluster; multiples of 32, which need no padding."""
MIN_MEAN_DEPTH = 0.5
"""Bits per weight that are left for the codes at least, unless the target was set lower."""

_FIELDS = ("group_rows", "scale_dtype", "location", "levels", "permuted")


def choose_spec(
    out_features: int,
    in_features: int,
    bits: float | None,
    overrides: dict[str, Any] | None = None,
    *,
    added_bias: bool = False,
) -> CVXQSpec:
    """The geometry of a matrix at no more than `bits` per weight, all-in.

    `overrides` fixes some of group_rows (more than there are: all of them), scale_dtype, location,
    levels and permuted, and mean_depth, the bits of the codes alone (None: free). With bits=None,
    mean_depth decides. added_bias: a 16-bit bias is part of the target, because bias correction
    will add one. Raises ValueError naming the reachable range if nothing fits.
    """
    fixed = tuple(sorted((k, v) for k, v in (overrides or {}).items() if v is not None))
    return _choose(out_features, in_features, bits, fixed, added_bias)


@lru_cache(maxsize=4096)
def _choose(
    rows: int,
    columns: int,
    bits: float | None,
    fixed: tuple[tuple[str, Any], ...],
    added_bias: bool,
) -> CVXQSpec:
    overrides = dict(fixed)
    mean_depth = overrides.pop("mean_depth", None)
    if bits is None and mean_depth is None:
        raise ValueError("bits=None needs a mean_depth to go by")
    found = []
    for spec in _candidates(rows, columns, overrides):
        words = most_words(spec) if bits is None else index_budget(spec, bits, added_bias)
        if mean_depth is None:
            least = min(MIN_MEAN_DEPTH, bits or 0.0) * spec.num_weights / 32
        else:
            words = least = min(words, depth_budget(spec, mean_depth))
            if depth_budget(spec, mean_depth) > words:
                continue
        if words > 0 and words >= least:
            found.append(replace(spec, num_words=words))
    if not found:
        raise ValueError(_out_of_reach(rows, columns, bits, dict(fixed), added_bias))
    return min(found, key=expected_error)


def index_budget(spec: CVXQSpec, bits: float, added_bias: bool = False) -> int:
    """Words left for codes at `bits` per weight all-in; negative if the rest alone is too much.

    spec: any num_words. added_bias: as in `choose_spec`. Rounded down to what depths can add up to,
    so `num_words` can be met exactly.
    """
    rest = replace(spec, num_words=0).nbytes + (2 * spec.out_features if added_bias else 0)
    # the tolerance only forgives the rounding of floats: 2.1 * 10 is not 21
    words = math.floor((bits * spec.num_weights / 8 - rest) / 4 * (1 + 1e-12))
    return min(_reachable(spec, words), most_words(spec))


def depth_budget(spec: CVXQSpec, mean_depth: float) -> int:
    """Words of codes at a mean depth (the paper's R), over weights and padding alike."""
    words = mean_depth * spec.num_groups * spec.group_rows / 32
    return min(_reachable(spec, math.floor(words * (1 + 1e-12))), most_words(spec))


def most_words(spec: CVXQSpec) -> int:
    """Words of codes with every group at the greatest depth."""
    return spec.num_groups * packed_words(spec.group_rows, MAX_DEPTH)


def _reachable(spec: CVXQSpec, words: int) -> int:
    steps = [packed_words(spec.group_rows, depth) for depth in range(1, MAX_DEPTH + 1)]
    step = math.gcd(*steps)
    return words // step * step


def _candidates(rows: int, columns: int, overrides: dict[str, Any]) -> Iterator[CVXQSpec]:
    given = {k: overrides[k] for k in _FIELDS if k in overrides}
    unknown = set(overrides) - set(_FIELDS)
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: not part of a CVXQ geometry")
    permuted = given.pop("permuted", None)
    if "group_rows" in given:
        sizes = [min(rows, given.pop("group_rows"))]
    else:
        low, high = GROUP_ROWS
        sizes = list(range(low, min(high, rows - 1) + 1, 32))
        sizes.append(rows)
    for size in sizes:
        for order in (False, True) if permuted is None else (permuted,):
            if order and size >= rows and permuted is None:
                continue
            yield CVXQSpec(rows, columns, size, 0, **given, permuted=bool(order and size < rows))


def expected_error(spec: CVXQSpec) -> float:
    """Per weight, relative to the weights' energy; a fit, good for comparing specs."""
    stored = spec.num_groups * spec.group_rows
    rate = 32 * spec.num_words / stored
    error = 4.0**-rate * spec.group_rows ** (ADAPTATION * rate)
    if spec.permuted:
        expanding = spec.out_features > spec.in_features
        error *= CLUSTERED_FACTOR_EXPANDING if expanding else CLUSTERED_FACTOR
    return error


def _out_of_reach(
    rows: int, columns: int, bits: float | None, overrides: dict[str, Any], added_bias: bool
) -> str:
    asked = ", ".join(f"{k}={v!r}" for k, v in overrides.items())
    under = f" with {asked}" if asked else ""
    overrides = dict(overrides)
    mean_depth = overrides.pop("mean_depth", MIN_MEAN_DEPTH)
    low, high = math.inf, 0.0
    for spec in _candidates(rows, columns, overrides):
        extra = 16 * spec.out_features / spec.num_weights if added_bias else 0.0
        least = replace(spec, num_words=depth_budget(spec, mean_depth))
        low = min(low, least.bits_per_weight + extra)
        high = max(high, replace(spec, num_words=most_words(spec)).bits_per_weight + extra)
    return (
        f"bits={bits:g} is out of reach for a {rows} x {columns} matrix{under}; reachable: "
        f"{low:.3f} to {high:.3f} bits per weight, all-in. Raise bits, leave the matrix dense with "
        "modules_to_not_convert, or give it its own bits with overrides"
    )
