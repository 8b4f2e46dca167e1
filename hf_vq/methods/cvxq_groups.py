"""Groups of scalar codes: their state, and the search for scale, location and codes together.

A group is a run of `group_rows` rows of one column, ``weight = location + scale * level[code]``
(CVXQ section 3). The search (section 6's grid, refined by least squares) only ever looks at scales
and locations as they are stored, so what it chooses needs no rounding afterwards; a code is always
the level nearest to its weight.

`solve_columns` works through the columns of a panel, each choice felt by the columns to its right,
as `hf_vq.methods.panel` does for vectors. Clusters of rows are independent. On a CPU with numba it
is compiled; elsewhere it runs column by column over all clusters at once in torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hf_vq_kernels.levels import MAX_DEPTH, level_table

from hf_vq.methods.cvxq_levels import best_scale, thresholds
from hf_vq.methods.panel import _over_rows

# Stored precisions, numbered for the compiled code
SCALES = {"float32": 0, "float16": 1, "log8": 2}
LOCATIONS = {"none": 0, "float32": 1, "float16": 2, "int8": 3}
LOCATION_STEPS = 64  # int8 locations count in 1/64 of the scale


@dataclass(frozen=True)
class Search:
    """Scales tried for a group: multiples of what suits its variance, then least squares.

    widths: the multiples. rounds: at most so many times scale and location are fitted to the codes
    and the codes chosen anew, as long as that helps.
    """

    widths: tuple[float, ...]
    rounds: int


@dataclass
class Groups:
    """A matrix of groups, M clusters of g rows (padded), I columns, in the order of work.

    depths: int64 (M, I). scale, location: float32 (M, I), as stored. codes: uint8 (M * g, I).
    row_weight: float32 (M * g,), what an error in a row counts, 0 for padding. grid: float32
    (2, M), offset and step of log8 scales.
    """

    depths: torch.Tensor
    row_weight: torch.Tensor
    grid: torch.Tensor
    kind: str
    scale_dtype: str
    location_dtype: str
    scale: torch.Tensor = field(init=False)
    location: torch.Tensor = field(init=False)
    codes: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.scale = self.store_scale(torch.ones(self.depths.shape, device=self.depths.device))
        self.location = torch.zeros_like(self.scale)
        rows, columns = len(self.row_weight), self.depths.shape[1]
        self.codes = torch.zeros(rows, columns, dtype=torch.uint8, device=self.depths.device)

    @property
    def group_rows(self) -> int:
        return len(self.row_weight) // len(self.depths)

    def copy(self) -> Groups:
        other = replace(self)
        other.scale, other.location = self.scale.clone(), self.location.clone()
        other.codes = self.codes.clone()
        return other

    def decode(self) -> torch.Tensor:
        """The dense matrix, float32 (M * g, I), padding included."""
        levels, g = level_table(self.kind).to(self.scale.device), self.group_rows
        out = torch.empty(self.codes.shape, device=self.scale.device)
        for m in range(len(self.depths)):
            rows = slice(m * g, (m + 1) * g)
            level = levels[(1 << self.depths[m]) + self.codes[rows].long()]
            out[rows] = torch.addcmul(self.location[m], self.scale[m], level)
        return out

    def store_scale(self, scale: torch.Tensor, cluster: slice = slice(None)) -> torch.Tensor:
        """The nearest scales that can be stored, float32. scale: (M, ...), positive."""
        if self.scale_dtype != "log8":
            return scale.to(getattr(torch, self.scale_dtype)).float()
        return self.scale_values(self.scale_code(scale, cluster), cluster)

    def scale_code(self, scale: torch.Tensor, cluster: slice = slice(None)) -> torch.Tensor:
        """Codes of log8 scales, int64. scale: (M, ...)."""
        offset, step = (t[(...,) + (None,) * (scale.dim() - 1)] for t in self.grid[:, cluster])
        z = scale.double().clamp_min(1e-300).log2()
        return ((z - offset) / step).round().clamp(0, 255).long()

    def scale_values(self, codes: torch.Tensor, cluster: slice = slice(None)) -> torch.Tensor:
        """What the format's decoder makes of log8 codes (M, ...)."""
        offset, step = (t[(...,) + (None,) * (codes.dim() - 1)] for t in self.grid[:, cluster])
        return (offset.double() + step.double() * codes).exp2().float()

    def store_location(self, location: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The nearest locations that can be stored beside these scales, float32."""
        if self.location_dtype == "none":
            return torch.zeros_like(location)
        if self.location_dtype == "int8":
            unit = scale / LOCATION_STEPS
            z = torch.where(unit > 0, location / unit, 0.0).round().clamp(-128, 127)
            return z * unit
        return location.to(getattr(torch, self.location_dtype)).float()

    def location_code(self) -> torch.Tensor:
        """int8 locations as stored, int64 (M, I)."""
        return (self.location / (self.scale / LOCATION_STEPS)).round().long()


def scale_grid(weight: torch.Tensor, group_rows: int) -> torch.Tensor:
    """Offset and step of every cluster's log8 scales, float32 (2, M), exact in float16.

    weight: float32 (M * g, I). Reaches from under half of the smallest group's size to over twice
    that of the largest, which leaves room for what error feedback adds to the weights; groups
    more than 2**12 times smaller than the largest do not stretch it.
    """
    size = weight.reshape(-1, group_rows, weight.shape[1]).square().mean(1).sqrt().double()
    top = size.amax(1).clamp_min(1e-7)
    low = size.amin(1).maximum(top * 2.0**-12)
    offset = (low.log2() - 1.5).half().float()
    # 16-bit floats are coarser than the grid where the exponents are large: round the step up
    step = ((top.log2() + 1.5 - offset) / 255 * (1 + 2.0**-11)).half().float()
    return torch.stack([offset, step])


def solve_columns(
    groups: Groups,
    first: int,
    base: torch.Tensor,
    u: torch.Tensor,
    ratio: torch.Tensor,
    b: torch.Tensor | None,
    search: Search,
    fresh: bool,
) -> torch.Tensor:
    """Choose the groups of columns first, first + 1, ... from left to right; returns base - q.

    Column j aims at ``base_j + u_j * ratio_j``; what it misses, ``base_j - q_j``, is added times
    b[j, k] to every u_k to its right. base, u: float32 (M * g, P), u is used up. ratio (P,). b:
    (P, P), or None where columns do not feel each other. fresh: forget the scales and locations
    that the groups have; otherwise they compete, so that no group gets worse.
    """
    columns = slice(first, first + base.shape[1])
    compiled = _compiled() if base.device.type == "cpu" else None
    if compiled is not None:
        return compiled(groups, columns, base, u, ratio, b, search, fresh)
    g, (m, width) = groups.group_rows, (len(groups.depths), base.shape[1])
    weight = groups.row_weight.reshape(m, g)
    delta = base.clone()
    for j in range(width):
        at = first + j
        x = (base[:, j] + u[:, j] * ratio[j]).reshape(m, g)
        fit = fit_groups(groups, at, x, weight, search, fresh)
        groups.scale[:, at], groups.location[:, at] = fit.scale, fit.location
        groups.codes[:, at] = fit.codes.reshape(-1).to(torch.uint8)
        delta[:, j] -= fit.decoded.reshape(-1)
        if b is not None and j + 1 < width:
            u[:, j + 1 :].addmm_(delta[:, j : j + 1], b[j : j + 1, j + 1 :])
    return delta


@dataclass
class _Fit:
    """Groups (M, g) for given scales and locations (M,)."""

    scale: torch.Tensor
    location: torch.Tensor
    codes: torch.Tensor
    level: torch.Tensor
    decoded: torch.Tensor
    error: torch.Tensor


def fit_groups(
    groups: Groups,
    column: int,
    x: torch.Tensor,
    weight: torch.Tensor,
    search: Search,
    fresh: bool,
) -> _Fit:
    """Scale, location and codes of one column's groups for the targets x (M, g).

    weight: (M, g), of the squared errors. A readable version of what is compiled for CPUs.
    """
    depth = groups.depths[:, column]
    tables = [t.to(x.device) for t in _tables(groups.kind)]

    def evaluate(scale: torch.Tensor, location: torch.Tensor) -> _Fit:
        scale = groups.store_scale(scale)
        location = groups.store_location(location, scale)
        inverse = torch.where(scale > 0, 1 / scale, 0.0)[:, None]
        y = (x - location[:, None]) * inverse
        codes = torch.zeros_like(y, dtype=torch.int64)
        start = (1 << depth)[:, None]
        for bit in reversed(range(MAX_DEPTH)):
            more = codes + (1 << bit)
            up = (bit < depth)[:, None] & (y > tables[1][start + more.clamp_max(start - 1)])
            codes = torch.where(up, more, codes)
        level = tables[0][start + codes]
        decoded = torch.addcmul(location[:, None], scale[:, None], level)
        error = (weight * (x - decoded).square()).sum(1)
        return _Fit(scale, location, codes, level, decoded, error)

    def better(best: _Fit | None, other: _Fit) -> _Fit:
        if best is None:
            return other
        win = other.error < best.error
        picked = {
            name: torch.where(win if old.dim() == 1 else win[:, None], new, old)
            for (name, old), new in zip(vars(best).items(), vars(other).values(), strict=True)
        }
        return _Fit(**picked)

    total = weight.sum(1)
    mean = (weight * x).sum(1) / total
    if groups.location_dtype == "none":
        mean = torch.zeros_like(mean)
    size = ((weight * (x - mean[:, None]).square()).sum(1) / total).sqrt() * tables[2][depth]
    # without bits the location is all there is: a scale in whose steps it can be told
    size = torch.where(depth == 0, mean.abs() * (LOCATION_STEPS / 100), size)
    best = None if fresh else evaluate(groups.scale[:, column], groups.location[:, column])
    for width in search.widths:
        best = better(best, evaluate(size * width, mean))
    assert best is not None
    for _ in range(search.rounds):
        scale, location = _least_squares(groups, x, weight, best)
        best = better(best, evaluate(scale, location))
    return best


def _least_squares(
    groups: Groups, x: torch.Tensor, weight: torch.Tensor, fit: _Fit
) -> tuple[torch.Tensor, torch.Tensor]:
    """A scale (M,) that is best for the codes, the old one where none is, and its location."""
    s = weight.sum(1)
    sl, sll = (weight * fit.level).sum(1), (weight * fit.level.square()).sum(1)
    sx, sxl = (weight * x).sum(1), (weight * x * fit.level).sum(1)
    if groups.location_dtype == "none":
        sl, sx = torch.zeros_like(sl), torch.zeros_like(sx)
    curvature = sll - sl * sl / s
    scale = (sxl - sl * sx / s) / curvature
    scale = torch.where((curvature > 1e-6 * sll) & (scale > 0), scale, fit.scale)
    scale = groups.store_scale(scale)
    return scale, (sx - scale * sl) / s


@functools.cache
def _tables(kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels (512,), lower ends of the codes (512,), scale at unit variance (9,); float32."""
    centre = [best_scale(kind, depth) for depth in range(MAX_DEPTH + 1)]
    return level_table(kind), thresholds(kind).float(), torch.tensor(centre)


@functools.cache
def _compiled() -> Callable | None:
    """`solve_columns` compiled, or None without numba."""
    try:
        from hf_vq.methods.cvxq_numba import columns_panel
    except ImportError:
        return None
    panel: Any = columns_panel  # typed by numba as what it was before it was compiled

    def run(
        groups: Groups,
        columns: slice,
        base: torch.Tensor,
        u: torch.Tensor,
        ratio: torch.Tensor,
        b: torch.Tensor | None,
        search: Search,
        fresh: bool,
    ) -> torch.Tensor:
        delta = base.contiguous().clone()
        coupled = b is not None
        b = torch.zeros(1, 1) if b is None else b
        values = groups.grid.new_zeros(len(groups.depths), 256)
        if groups.scale_dtype == "log8":
            values = groups.scale_values(torch.arange(256).expand(len(groups.depths), 256))
        state = [
            t[:, columns].contiguous().numpy()
            for t in (groups.depths, groups.scale, groups.location, groups.codes)
        ]
        inputs = [t.contiguous().numpy() for t in (u, ratio, b, groups.row_weight)]
        storage = (
            groups.grid.contiguous().numpy(),
            values.contiguous().numpy(),
            SCALES[groups.scale_dtype],
            LOCATIONS[groups.location_dtype],
        )
        tables = [t.numpy() for t in (*_tables(groups.kind), torch.tensor(search.widths))]
        _over_rows(
            lambda lo, hi: panel(
                delta.numpy(),
                *inputs,
                coupled,
                *state,
                *storage,
                *tables,
                search.rounds,
                fresh,
                lo,
                hi,
            ),
            len(groups.depths),
        )
        groups.scale[:, columns] = torch.from_numpy(state[1])
        groups.location[:, columns] = torch.from_numpy(state[2])
        groups.codes[:, columns] = torch.from_numpy(state[3])
        return delta

    return run
