"""How a GPTVQ matrix spends its bits: the geometry for an all-in target.

Bits per weight are index_bits / vector_dim for the codes, 4 / scale_block for the scales and, for
int8 codebooks, 8 / n for the codebooks, where n is the number of weights per codebook number. Among
all geometries that cost no more than the target, the one with the least expected error is
taken. The expected error is a fit to measured rows, not a theory: 4**-rate times a factor per
vector dimension (what k-means reaches on Gaussian data, relative to 4**-rate), times n**ADAPTATION
for how closely the codebooks can follow the weights, times a factor for the scales.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from hf_vq.formats.gptvq import GPTVQSpec

# -- Preferences, all of them -----------------------------------------------------------
GAUSSIAN_FACTOR = {1: 1.88, 2: 1.70, 4: 1.57, 8: 1.47}
"""Mean squared error of k-means at 2 bits per weight on unit Gaussian data, times 4**2."""
ADAPTATION = 0.06
"""Error grows by n**ADAPTATION."""
SCALES_FACTOR = {0: 1.0, 64: 0.92, 32: 0.84, 16: 0.78}
"""Error with a scale per so many columns, relative to none; these widths are tried unasked."""
MAX_INDEX_BITS = {1: 8, 2: 8, 4: 8, 8: 8}
"""Largest codebooks chosen unasked: the cost of k-means and of decoding grows with their size."""
MIN_WEIGHTS_PER_NUMBER = 8
"""Never store more codebook numbers than this allows, even where the target leaves room."""
STRIPE = 128
"""Preferred stripe width in columns, where the number of groups does not depend on it."""
STRIPE_RANGE = (64, 256)
"""Widths searched first; wider ones only where a codebook needs more weights than these hold."""
WIDTH_PENALTY = 0.01
"""Relative error charged per factor of two that a stripe differs from the preferred width."""
RAGGED_PENALTY = 0.02
"""Relative error charged for stripes that do not divide the columns evenly."""


def choose_spec(
    out_features: int,
    in_features: int,
    bits: float | None,
    overrides: dict[str, Any] | None = None,
) -> GPTVQSpec:
    """The geometry of a matrix at no more than `bits` per weight, all-in.

    `overrides` fixes some of vector_dim, index_bits, group_size, group_columns, codebook_dtype,
    scale_block, scale_domain and svd_rank (None: free). With bits=None, vector_dim, index_bits and
    group_size decide alone. Raises ValueError naming the reachable range if nothing fits.
    """
    fixed = tuple(sorted((k, v) for k, v in (overrides or {}).items() if v is not None))
    return _choose(out_features, in_features, bits, fixed)


@lru_cache(maxsize=4096)
def _choose(
    rows: int, columns: int, bits: float | None, fixed: tuple[tuple[str, Any], ...]
) -> GPTVQSpec:
    overrides = dict(fixed)
    for widths in ("preferred", "any"):
        found = [s for s in _candidates(rows, columns, bits, overrides, widths) if _fits(s, bits)]
        if found:
            return min(found, key=expected_error)
    raise ValueError(_out_of_reach(rows, columns, bits, overrides))


def _fits(spec: GPTVQSpec, bits: float | None) -> bool:
    # the tolerance only forgives the rounding of floats: 2.1 * 10 is not 21
    return bits is None or spec.bits_per_weight <= bits * (1 + 1e-12)


def _candidates(
    rows: int, columns: int, bits: float | None, overrides: dict[str, Any], widths: str
) -> Iterator[GPTVQSpec]:
    precision = {
        k: overrides[k] for k in ("codebook_dtype", "scale_domain", "svd_rank") if k in overrides
    }
    for dim in _dims(columns, overrides):
        for index_bits in _index_bits(dim, bits, overrides):
            if overrides.get("svd_rank", 0) >= 2**index_bits:
                continue
            for width, block in itertools.product(
                _widths(columns, dim, overrides, widths), _scale_blocks(dim, bits, overrides)
            ):
                whole = GPTVQSpec(
                    rows,
                    columns,
                    vector_dim=dim,
                    num_centroids=2**index_bits,
                    group_rows=rows,
                    group_columns=width,
                    scale_block=block,
                    **precision,
                )
                yield _with_rows(whole, _group_rows(whole, bits, overrides.get("group_size")))


def _dims(columns: int, overrides: dict[str, Any]) -> list[int]:
    if "vector_dim" in overrides:
        dims = [overrides["vector_dim"]]
    else:
        dims = [1] if overrides.get("svd_rank") else [d for d in GAUSSIAN_FACTOR if d <= columns]
    # a vector may lie in one group and one scale block only
    cuts = [overrides.get(k, 0) for k in ("group_columns", "scale_block")]
    return [d for d in dims if not any(cut % d for cut in cuts)]


def _index_bits(dim: int, bits: float | None, overrides: dict[str, Any]) -> list[int]:
    if "index_bits" in overrides:
        return [overrides["index_bits"]]
    return [b for b in range(1, MAX_INDEX_BITS[dim] + 1) if bits is None or b / dim < bits]


def _scale_blocks(dim: int, bits: float | None, overrides: dict[str, Any]) -> list[int]:
    if "scale_block" in overrides:
        return [overrides["scale_block"]]
    if bits is None:  # the size is what the given fields cost
        return [0]
    return [block for block in SCALES_FACTOR if block % dim == 0]


def _widths(columns: int, dim: int, overrides: dict[str, Any], which: str) -> list[int]:
    padded = math.ceil(columns / dim) * dim
    size = overrides.get("group_size")
    if "group_columns" in overrides:
        return [min(overrides["group_columns"], padded)]
    if size and size < min(columns, STRIPE_RANGE[1]):  # less than a row: GPTVQ's 1 x size groups
        return [max(dim, size // dim * dim)]
    low, high = STRIPE_RANGE if which == "preferred" else (dim, padded)
    if columns <= low:
        return [padded]
    even = [w for w in range(dim, padded + 1, dim) if columns % w == 0 and low <= w <= high]
    counts = range(math.ceil(columns / high), columns // low + 1)
    # uneven stripes: where there are few, so that one more or less matters, or nothing else fits
    typical = round(columns / STRIPE)
    ragged = [n for n in counts if n <= 16 or (not even and n == typical)]
    widths = {math.ceil(math.ceil(columns / n) / dim) * dim for n in ragged}
    return sorted({*even, *widths})


def _group_rows(whole: GPTVQSpec, bits: float | None, group_size: int | None) -> int:
    """Fewest rows per codebook that the target allows, evened out over the row groups."""
    rows = whole.out_features
    if group_size:
        return max(1, min(rows, round(group_size / whole.group_columns)))
    if bits is None or rows == 1:
        return rows
    per_group = _with_rows(whole, math.ceil(rows / 2)).nbytes - whole.nbytes
    room = bits * whole.num_weights / 8 - whole.nbytes
    groups = 1 + max(0, math.floor(room / per_group))
    numbers = whole.num_stripes * (whole.svd_rank or whole.num_centroids * whole.vector_dim)
    groups = min(groups, rows, max(1, whole.num_weights // (numbers * MIN_WEIGHTS_PER_NUMBER)))
    return math.ceil(rows / groups)


def _with_rows(spec: GPTVQSpec, group_rows: int) -> GPTVQSpec:
    fields = {**spec.to_dict(), "group_rows": group_rows}
    return GPTVQSpec(spec.out_features, spec.in_features, **fields)


def expected_error(spec: GPTVQSpec) -> float:
    """Per weight, relative to the weights' energy; a fit, good for comparing specs."""
    rate = spec.index_bits / spec.vector_dim
    codebooks = spec.num_stripes * spec.num_row_groups
    numbers = codebooks * (spec.svd_rank or spec.num_centroids * spec.vector_dim)
    error = GAUSSIAN_FACTOR[spec.vector_dim] * 4.0**-rate
    error *= (spec.num_weights / numbers) ** ADAPTATION
    error *= SCALES_FACTOR.get(spec.scale_block, 1.0)
    error *= 1 + WIDTH_PENALTY * abs(math.log2(spec.group_columns / STRIPE))
    if spec.in_features % spec.group_columns:
        error *= 1 + RAGGED_PENALTY
    return error


def _out_of_reach(rows: int, columns: int, bits: float | None, overrides: dict[str, Any]) -> str:
    asked = ", ".join(f"{k}={v!r}" for k, v in overrides.items())
    under = f" with {asked}" if asked else ""
    reachable = [
        s.bits_per_weight
        for target in (None, 8.0)
        for s in _candidates(rows, columns, target, overrides, "any")
    ]
    if not reachable:
        return f"no geometry for a {rows} x {columns} matrix{under}: the fields exclude each other"
    low, high = min(reachable), min(8.0, max(reachable))
    span = f"{low:.3f} to {max(high, low):.3f}"
    return (
        f"bits={bits:g} is out of reach for a {rows} x {columns} matrix{under}; reachable: {span} "
        "bits per weight, all-in. Raise bits, leave the matrix dense with modules_to_not_convert, "
        "or give it its own bits with overrides"
    )
