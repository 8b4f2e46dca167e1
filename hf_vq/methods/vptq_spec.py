"""How a VPTQ matrix spends its bits: the geometry for an all-in target.

Bits per weight are index_bits / vector_dim for the codes, 16 per number of every codebook, 32 per
input column for a norm and 16 for a permutation, and 16 per vector of the outlier columns. Among
all geometries that cost no more than the target, the one with the least expected error is taken.
The expected error is a fit, not a theory: 4**-rate times what k-means reaches on Gaussian vectors
(measured, below), times n**ADAPTATION for how closely the codebooks can follow the weights, n the
number of weights per codebook number, times factors for the norm, the order of the columns and
whatever makes decoding slower.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any, NamedTuple

from hf_vq.formats.vptq import VPTQSpec

# -- What quantizers of Gaussian vectors reach ------------------------------------------
GAUSSIAN_BITS = (1, 2, 4, 6, 8, 10, 12)
"""Index bits of the columns of the table; in between it is linear, beyond it constant."""
GAUSSIAN_FACTOR = {
    1: (1.45, 1.88, 2.45, 2.68, 2.72, 2.72, 2.72),
    2: (1.36, 1.45, 1.78, 1.92, 2.00, 1.99, 1.97),
    4: (1.20, 1.29, 1.37, 1.48, 1.53, 1.56, 1.55),
    6: (1.14, 1.21, 1.28, 1.33, 1.36, 1.38, 1.38),
    8: (1.11, 1.17, 1.22, 1.25, 1.27, 1.28, 1.28),
    10: (1.08, 1.13, 1.18, 1.21, 1.22, 1.23, 1.23),
    12: (1.07, 1.11, 1.16, 1.18, 1.18, 1.18, 1.18),
    16: (1.05, 1.08, 1.12, 1.14, 1.14, 1.13, 1.13),
}
"""Vector dimension -> mean squared error of k-means on unit Gaussian data times 4**rate: the
geometric mean of the error on the training vectors (64 per centroid; 32 at 12 bits) and on others.
At 1 bit, and for 10 dimensions, interpolated."""
RESIDUAL_EXPONENT = 0.8
"""Two stages reach F(main bits) * F(residual bits)**this, F as above. Measured from 16 + 16 to
256 + 256 centroids in 2 to 16 dimensions: 0.9 to 1.5 if every stage takes its nearest centroid,
0.7 to 0.95 with a beam of 8 main centroids, 0.45 to 0.8 if the codebooks are then refitted; 0.55
to 1.2 in matrices of a small language model, quantized with feedback and refinement."""

# -- Preferences, all of them -----------------------------------------------------------
ADAPTATION = 0.01
"""Error grows by n**ADAPTATION. On matrices of a small language model a second codebook gained
nothing; where it costs next to nothing it may."""
NORM_FACTOR = 0.98
"""Error with a scale and bias per column, relative to none (measured there: 0.98 to 0.99)."""
UNSORTED_FACTOR = 1.03
"""Error of groups of neighbouring columns relative to one group, or to groups of a permutation:
those are quantized in order of descending Hessian diagonal (measured: 1.015 to 1.03)."""
OUTLIER_MASS = 0.065
"""Share of the error that the worst 1 % of the columns holds; it grows as the root of their number
(VPTQ, table 7: 1, 2 and 5 % outliers lower the log perplexity lost by 6.5, 10.6 and 13.7 %)."""
OUTLIER_PERCENTS = (0.0,)
"""Shares of outlier columns tried unasked: none, because the shapes do not tell where they pay."""
OUTLIER_PERCENTS_IMPLIED = (1.0, 2.0)
"""Those tried where only the outliers' geometry is given."""
VECTOR_DIMS = (2, 4, 6, 8, 10, 12, 16)
"""Vector dimensions tried unasked: those that the format's reference kernels know."""
MAX_INDEX_BITS = 16
"""Of one codebook. A main and a residual index are one code of at most 32 bits."""
MAX_OUTLIER_INDEX_BITS = 13
"""Largest outlier codebook chosen unasked."""
FAST_INDEX_BITS = 12
"""Larger codebooks leave the fast memory of a GPU, and take long to train: chosen unasked only
with LARGE_VECTORS_PER_CENTROID, and each doubling is charged LARGE_PENALTY of the error."""
LARGE_VECTORS_PER_CENTROID = 64
LARGE_PENALTY = 0.02
MIN_VECTORS_PER_CENTROID = 4
"""Fewer make a codebook a list of the weights."""
RESIDUAL_PENALTY = 0.04
"""Relative error charged for the second look-up of a residual codebook."""
GROUP_PENALTY = 0.005
"""Relative error charged for every doubling of the codebooks that decoding needs at once."""
MIN_GROUP_COLUMNS = 128
"""Groups chosen unasked are at least so wide, ..."""
MAX_GROUPS = 64
"""... and at most so many."""


def choose_spec(
    out_features: int,
    in_features: int,
    bits: float | None,
    overrides: dict[str, Any] | None = None,
) -> VPTQSpec:
    """The geometry of a matrix at no more than `bits` per weight, all-in.

    `overrides` fixes some of vector_dim, num_centroids, num_res_centroids (0: no residual),
    num_groups, outlier_percent (of the columns; 0: none), outlier_vector_dim, outlier_centroids,
    norm ("none", "mean-std" or "min-max"), permute and codebook_dtype (None: free). With bits=None
    the geometry is what the given fields say, vector_dim and num_centroids among them, and nothing
    besides. Raises ValueError naming the reachable range if nothing fits.
    """
    given = overrides or {}
    if bits is None and not (given.get("vector_dim") and given.get("num_centroids")):
        raise ValueError("bits=None leaves the size to vector_dim and num_centroids: give both")
    fixed = tuple(sorted((k, v) for k, v in given.items() if v is not None))
    return _choose(out_features, in_features, bits, fixed)


@lru_cache(maxsize=4096)
def _choose(
    rows: int, columns: int, bits: float | None, fixed: tuple[tuple[str, Any], ...]
) -> VPTQSpec:
    overrides = dict(fixed)
    _refuse_impossible(rows, columns, overrides)
    # nearly always one of the first fits: the spec's padding is all that can stand in its way
    for most in (50, None):
        found = _candidates(rows, columns, bits, overrides)
        for choice in sorted(found) if most is None else heapq.nsmallest(most, found):
            spec = _spec(rows, columns, choice, overrides)
            # the tolerance only forgives the rounding of floats: 2.1 * 10 is not 21
            if bits is None or spec.bits_per_weight <= bits * (1 + 1e-12):
                return spec
    raise ValueError(_out_of_reach(rows, columns, bits, overrides))


def _refuse_impossible(rows: int, columns: int, overrides: dict[str, Any]) -> None:
    """Raise ValueError for given fields that no matrix of this shape can have."""
    groups = overrides.get("num_groups", 1)
    outliers = any(percent > 0 for percent in _outlier_percents(overrides))
    if columns % groups and not outliers:  # outlier columns can take up the rest
        even = [g for g in range(1, min(columns, 4 * groups) + 1) if columns % g == 0]
        near = min(even, key=lambda g: abs(g - groups))
        raise ValueError(
            f"num_groups={groups} does not divide the {columns} columns of a {rows} x {columns} "
            f"matrix; the nearest that does is {near}"
        )
    dim = overrides.get("vector_dim", min(VECTOR_DIMS))
    vectors = math.ceil(rows / dim) * columns // groups
    for name in ("num_centroids", "num_res_centroids"):
        if overrides.get(name, 0) > vectors:
            raise ValueError(
                f"{name}={overrides[name]} is more than the {vectors} vectors of {dim} weights in "
                f"a group of a {rows} x {columns} matrix; take at most "
                f"{2 ** int(math.log2(vectors))} for it, with overrides, or leave it dense with "
                "modules_to_not_convert"
            )


class _Fields(NamedTuple):
    vector_dim: int
    main_bits: int
    res_bits: int
    num_groups: int
    outlier_columns: int
    outlier_vector_dim: int
    outlier_bits: int
    norm: bool
    permuted: bool


class _Choice(NamedTuple):
    """One geometry, ordered by error. least_bits: its cost, but for the padding of index words."""

    error: float
    least_bits: float
    fields: _Fields


def _spec(rows: int, columns: int, choice: _Choice, overrides: dict[str, Any]) -> VPTQSpec:
    f = choice.fields
    return VPTQSpec(
        rows,
        columns,
        vector_dim=f.vector_dim,
        num_centroids=2**f.main_bits,
        num_res_centroids=2**f.res_bits if f.res_bits else 0,
        num_groups=f.num_groups,
        outlier_columns=f.outlier_columns,
        outlier_vector_dim=f.outlier_vector_dim,
        outlier_centroids=2**f.outlier_bits if f.outlier_columns else 0,
        norm="columns" if f.norm else "none",
        permuted=f.permuted,
        codebook_dtype=overrides.get("codebook_dtype", "float16"),
    )


def _candidates(
    rows: int, columns: int, bits: float | None, overrides: dict[str, Any]
) -> Iterator[_Choice]:
    """All geometries that may fit: those are left out whose codes and codebooks alone do not."""
    free = bits is not None
    float_bits = 32 if overrides.get("codebook_dtype") == "float32" else 16
    budget = math.inf if bits is None else bits * rows * columns * (1 + 1e-12)
    norms = [False, True] if free else [False]
    if "norm" in overrides:
        norms = [overrides["norm"] != "none"]
    for dim in [overrides["vector_dim"]] if "vector_dim" in overrides else VECTOR_DIMS:
        blocks = math.ceil(rows / dim)
        for groups, outliers, v0, b0 in _cuts(rows, columns, dim, free, overrides):
            width = columns - outliers
            vectors = blocks * width
            side = math.ceil(rows / v0) * outliers * 16 + v0 * 2**b0 * float_bits if outliers else 0
            orders = _orders(columns, groups, outliers, free, overrides)
            for main, res in _index_bits(vectors // groups, free, overrides):
                numbers = groups * dim * (2**main + (2**res if res else 0))
                cost = vectors * (main + res) + numbers * float_bits + side
                if cost > budget:
                    continue
                error = _expected_error(rows * width, numbers, dim, main, res, groups)
                if outliers:
                    error = _with_outliers(error, rows, columns, outliers, v0, b0)
                for norm in norms:
                    for permuted in orders:
                        total = cost + norm * 2 * columns * float_bits + permuted * columns * 16
                        if total > budget:
                            continue
                        factor = _order_and_norm(norm, groups, permuted)
                        fields = _Fields(dim, main, res, groups, outliers, v0, b0, norm, permuted)
                        yield _Choice(error * factor, total / (rows * columns), fields)


def _cuts(
    rows: int, columns: int, dim: int, free: bool, overrides: dict[str, Any]
) -> Iterator[tuple[int, int, int, int]]:
    """(groups, outlier columns, outlier vector_dim, outlier index bits) that fit together."""
    if "num_groups" in overrides:
        counts = [overrides["num_groups"]]
    else:
        most = min(MAX_GROUPS, columns // MIN_GROUP_COLUMNS) if free else 1
        counts = [g for g in range(1, most + 1) if columns % g == 0] or [1]
    for groups in counts:
        for percent in _outlier_percents(overrides):
            if percent == 0:
                if columns % groups == 0:
                    yield groups, 0, 0, 0
                continue
            outliers = math.ceil(columns * percent / 100)
            outliers += (columns - outliers) % groups  # the groups have to come out even
            if outliers >= columns:
                continue
            v0 = overrides.get("outlier_vector_dim") or _outlier_dim(dim)
            vectors = math.ceil(rows / v0) * outliers
            if "outlier_centroids" in overrides:
                sizes = [_log2("outlier_centroids", overrides)]
            else:
                sizes = _sizes(vectors, MAX_OUTLIER_INDEX_BITS) or [1]
            for b0 in sizes:
                yield groups, outliers, v0, b0


def _outlier_percents(overrides: dict[str, Any]) -> tuple[float, ...]:
    if "outlier_percent" in overrides:
        return (overrides["outlier_percent"],)
    if "outlier_vector_dim" in overrides or "outlier_centroids" in overrides:
        return OUTLIER_PERCENTS_IMPLIED
    return OUTLIER_PERCENTS


def _outlier_dim(dim: int) -> int:
    """The format's reference kernels need a divisor of the other columns' vector dimension."""
    return next((v for v in (4, 2, 3) if dim % v == 0), dim)


def _orders(
    columns: int, groups: int, outliers: int, free: bool, overrides: dict[str, Any]
) -> list[bool]:
    """Whether to permute. Only a permutation brings the outliers to the front."""
    if "permute" in overrides:
        return [overrides["permute"]]
    if columns > 2**16:  # the format's permutations have 16 bits per column
        return [False]
    if outliers:
        return [True]
    return [False, True] if free and groups > 1 else [False]


def _index_bits(vectors: int, free: bool, overrides: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Bits of main and residual indices, for codebooks of `vectors` vectors each.

    The residual codebook is no larger than the main one: the format's reference decoder could not
    read it.
    """
    if "num_centroids" in overrides:
        mains = [_log2("num_centroids", overrides)]
    else:
        mains = _sizes(vectors, MAX_INDEX_BITS) or [1]
    for main in mains:
        if overrides.get("num_res_centroids"):
            res = _log2("num_res_centroids", overrides)
            sizes = [res] if res <= main or "num_centroids" in overrides else []
        elif "num_res_centroids" in overrides or not free:
            sizes = [0]
        else:
            sizes = [0, *_sizes(vectors, main)]
        yield from ((main, res) for res in sizes if main + res <= 2 * MAX_INDEX_BITS)


def _sizes(vectors: int, most: int) -> list[int]:
    """Index bits of the codebooks that so many vectors can fill."""
    found = []
    for b in range(1, most + 1):
        least = MIN_VECTORS_PER_CENTROID if b <= FAST_INDEX_BITS else LARGE_VECTORS_PER_CENTROID
        if vectors >= least * 2**b:
            found.append(b)
    return found


def _log2(name: str, overrides: dict[str, Any]) -> int:
    size = overrides[name]
    found = (size - 1).bit_length()
    if size != 2**found or not 1 <= found <= MAX_INDEX_BITS:
        raise ValueError(f"{name}={size} must be a power of two from 2 to {2**MAX_INDEX_BITS}")
    return found


@cache
def _gaussian(dim: int, index_bits: int) -> float:
    """Error of one codebook on unit Gaussian vectors, times 4**rate."""
    row = GAUSSIAN_FACTOR[max(d for d in GAUSSIAN_FACTOR if d <= dim)]
    after = next((i for i, b in enumerate(GAUSSIAN_BITS) if b >= index_bits), len(row) - 1)
    high = GAUSSIAN_BITS[after]
    if index_bits >= high:
        return row[after]
    low = GAUSSIAN_BITS[after - 1]
    return row[after - 1] + (row[after] - row[after - 1]) * (index_bits - low) / (high - low)


def expected_error(spec: VPTQSpec) -> float:
    """Per weight, relative to the weights' energy; a fit, good for comparing specs."""
    rows, columns, outliers = spec.out_features, spec.in_features, spec.outlier_columns
    numbers = spec.num_groups * spec.vector_dim * (spec.num_centroids + spec.num_res_centroids)
    error = _expected_error(
        rows * (columns - outliers),
        numbers,
        spec.vector_dim,
        spec.main_bits,
        spec.res_bits,
        spec.num_groups,
    )
    if outliers:
        v0, b0 = spec.outlier_vector_dim, (spec.outlier_centroids - 1).bit_length()
        error = _with_outliers(error, rows, columns, outliers, v0, b0)
    return error * _order_and_norm(spec.norm != "none", spec.num_groups, spec.permuted)


def _order_and_norm(norm: bool, groups: int, permuted: bool) -> float:
    return (NORM_FACTOR if norm else 1) * (UNSORTED_FACTOR if groups > 1 and not permuted else 1)


def _expected_error(
    weights: int, numbers: int, dim: int, main: int, res: int, groups: int
) -> float:
    """Relative to the weights' energy; of the columns that are no outliers."""
    error = _gaussian(dim, main) * 4.0 ** (-(main + res) / dim)
    if res:
        error *= _gaussian(dim, res) ** RESIDUAL_EXPONENT * (1 + RESIDUAL_PENALTY)
    error *= max(1.0, weights / numbers) ** ADAPTATION
    large = max(0, main - FAST_INDEX_BITS) + max(0, res - FAST_INDEX_BITS)
    return error * (1 + LARGE_PENALTY * large) * (1 + GROUP_PENALTY * math.log2(groups))


def _with_outliers(error: float, rows: int, columns: int, outliers: int, v0: int, b0: int) -> float:
    mass = min(0.9, OUTLIER_MASS * math.sqrt(100 * outliers / columns))
    own = _expected_error(rows * outliers, v0 * 2**b0, v0, b0, 0, 1)
    return (1 - mass) * error + mass * own


def _out_of_reach(rows: int, columns: int, bits: float | None, overrides: dict[str, Any]) -> str:
    asked = ", ".join(f"{k}={v!r}" for k, v in overrides.items())
    under = f" with {asked}" if asked else ""
    found = sorted(_candidates(rows, columns, math.inf, overrides), key=lambda c: c.least_bits)
    if not found:
        return f"no geometry for a {rows} x {columns} matrix{under}: the fields exclude each other"
    # a spec costs a little more than its least, so the extremes are among a few at either end
    ends = found[:200] + [c for c in found if c.least_bits <= 8][-200:]
    costs = [_spec(rows, columns, c, overrides).bits_per_weight for c in ends]
    low = min(costs)
    high = max((c for c in costs if c <= 8), default=low)
    return (
        f"bits={bits:g} is out of reach for a {rows} x {columns} matrix{under}; reachable: "
        f"{low:.3f} to {high:.3f} bits per weight, all-in. Raise bits, leave the matrix dense with "
        "modules_to_not_convert, or give it its own bits with overrides"
    )
