"""k-means with thousands of centroids: time and memory of n sqrt(k) instead of n k.

Three ideas, in the order of their use:

- Seeds come from a few rounds of sampling in proportion to squared distance, many seeds per round
  (k-means||, Bahmani et al., arXiv 1203.6402), where distances are only taken inside of sqrt(k)
  coarse cells.
- An iteration moves a point to the best among the nearest neighbours of the centroid that it has
  (Agustsson, Timofte, Van Gool, "k^2-means", arXiv 1605.09299). Points that were far off get where
  they belong in a few steps, since lists of neighbours overlap.
- The first iterations see a sample of the points, the last ones all.

The means are exact for the assignment; the assignment is not quite the exact one. The result
depends on the seed, not on the number of threads: every point is treated alone, and no sum is
taken in an order that threads decide (on a CPU).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from hf_vq.methods import kmeans as exact

# Numbers worked on at once, as in `kmeans`.
_CHUNK = {"cpu": 1 << 20}
_CHUNK_ELSEWHERE = 1 << 26
# Points per centroid that the seeds and the first iterations see.
_SAMPLE = 32
# Points per coarse cell that its centre is made from.
_CELL_SAMPLE = 128
# Rounds of sampling in which all seeds are drawn.
_ROUNDS = 10
# Centroids that a point can move to in one iteration.
_NEIGHBOURS = 96
# Cells in which the neighbours of a centroid are looked for.
_PROBE = 24
# Cells in which codes are looked for.
SEARCHED = 16
# Iterations between two looks at who is whose neighbour, and at empty clusters.
_REFRESH = 5


def _chunk(device: torch.device) -> int:
    return _CHUNK.get(device.type, _CHUNK_ELSEWHERE)


@dataclass
class Cells:
    """Centroids in coarse cells. centres: (C, d). members: all k centroids' numbers, int64, those
    of a cell beside each other; cell c has those from starts[c] up to starts[c + 1]. None is empty.
    """

    centres: torch.Tensor
    members: torch.Tensor
    starts: list[int]

    def of(self, cell: int) -> torch.Tensor:
        return self.members[self.starts[cell] : self.starts[cell + 1]]

    def arrays(self, centroids: torch.Tensor) -> list[Any]:
        """What the compiled `search` reads: centres, book sorted by cell, their squares, starts."""
        tables = [self.centres.T.contiguous(), centroids[self.members].T.contiguous()]
        pairs = [array for t in tables for array in (t.numpy(), t.square().sum(0).numpy())]
        return [*pairs, torch.tensor(self.starts).numpy()]


def sort_into_cells(centres: torch.Tensor, centroids: torch.Tensor) -> Cells:
    """Every centroid (k, d) to its nearest centre (C, d); centres that get none are dropped."""
    kept = torch.bincount(nearest(centroids, centres), minlength=len(centres)) > 0
    return Cells(centres[kept], *_sorted(centres[kept], centroids))


def _sorted(centres: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """An order in which points of one cell are beside each other, and where each cell starts."""
    cell = nearest(points, centres)
    ends = torch.bincount(cell, minlength=len(centres)).cumsum(0)
    return cell.argsort(stable=True), [0, *ends.tolist()]


def build_cells(centroids: torch.Tensor, seed: int = 0) -> Cells:
    """Centroids (k, d) in about sqrt(k) cells of their own."""
    generator = torch.Generator().manual_seed(seed)
    mass = torch.ones(len(centroids), device=centroids.device)
    centres = _centres(centroids, mass, round(math.sqrt(len(centroids))), generator)
    return sort_into_cells(centres, centroids)


def nearest(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Index (n,) of the centroid nearest to each point, exactly."""
    return _nearest(points, centroids)[1]


def _nearest(points: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared distance (without that of the point from 0) and index of the nearest centroid."""
    index = torch.empty(len(points), dtype=torch.int64, device=points.device)
    cost = torch.empty(len(points), device=points.device)
    square, table = centroids.square().sum(1), centroids.T.contiguous()
    step = max(1, _chunk(points.device) // len(centroids))
    for lo in range(0, len(points), step):
        part = torch.addmm(square, points[lo : lo + step], table, alpha=-2)
        torch.min(part, 1, out=(cost[lo : lo + step], index[lo : lo + step]))
    return cost, index


def kmeans_large(
    points: torch.Tensor,
    weights: torch.Tensor,
    k: int,
    *,
    iterations: int,
    seed: int = 0,
    tolerance: float = 1e-4,
) -> torch.Tensor:
    """Centroids (k, d) of points (n, d) with weights (n,); points without weight are ignored."""
    present = weights > 0
    points, weights = points[present], weights[present]
    n, d = points.shape
    if n <= k:
        fill = points[-1:] if n else points.new_zeros(1, d)
        return torch.cat([points, fill.expand(k - n, d)])
    mean = (weights.double() @ points.double() / weights.double().sum()).float()
    points = points - mean  # what follows works with differences of squares
    generator = torch.Generator().manual_seed(seed)
    pick: torch.Tensor | None = None
    if n > _SAMPLE * k:
        pick = torch.randperm(n, generator=generator)[: _SAMPLE * k].sort().values
        pick = pick.to(points.device)
    some = (points, weights) if pick is None else (points[pick], weights[pick])
    centres = _centres(*some, round(math.sqrt(k)), generator)
    centroids = _seeds(*some, centres, k, generator)
    if pick is not None:
        rough = iterations - iterations // 3
        centroids = _iterate(*some, centres, centroids, rough, tolerance)
        iterations -= rough
    return _iterate(points, weights, centres, centroids, iterations, tolerance) + mean


def _centres(
    points: torch.Tensor, weights: torch.Tensor, count: int, generator: torch.Generator
) -> torch.Tensor:
    """Centres (count, d) of coarse cells, from a sample."""
    pick = torch.randperm(len(points), generator=generator)[: _CELL_SAMPLE * count]
    pick = pick.sort().values.to(points.device)
    mass = weights[pick, None].expand(-1, points.shape[1])
    found = exact.kmeans(points[pick][None], mass[None], count, iterations=10, init="kmeans++")
    return found[0]


def _seeds(
    points: torch.Tensor,
    weights: torch.Tensor,
    centres: torch.Tensor,
    k: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """k of the points, the more likely the farther they are from those drawn in earlier rounds."""
    order, starts = _sorted(centres, points)
    points, weights = points[order], weights[order]
    edges = torch.tensor(starts, device=points.device)
    length = points.square().sum(1)
    far = length + length.mean()  # of points in cells that have no seed yet
    gap = torch.full_like(weights, float("inf"))
    chance = weights.clone()
    seeds: list[torch.Tensor] = []
    missing = k
    for _ in range(2 * _ROUNDS):
        wanted = min(missing, -(-k // _ROUNDS))
        cumulative = chance.double().cumsum(0)
        if not wanted or not bool(cumulative[-1] > 0):
            break
        # one draw from each of `wanted` equal parts of the sum
        start = torch.rand(wanted, generator=generator, dtype=torch.float64)
        draw = (start + torch.arange(wanted)).to(points.device) * (cumulative[-1] / wanted)
        drawn = torch.searchsorted(cumulative, draw).clamp_max(len(points) - 1).unique()
        drawn = drawn[chance[drawn] > 0]
        seeds.append(drawn)
        missing -= len(drawn)
        bounds = torch.searchsorted(drawn, edges).tolist()
        for c, (lo, hi) in enumerate(pairwise(bounds)):
            if lo == hi:
                continue
            part = slice(starts[c], starts[c + 1])
            cost = _nearest(points[part], points[drawn[lo:hi]])[0] + length[part]
            torch.minimum(gap[part], cost.clamp_min_(0), out=gap[part])
        gap[drawn] = 0
        chance = torch.where(torch.isfinite(gap), gap, far) * weights
    pick = torch.cat(seeds)
    if missing:  # fewer distinct points than centroids: repeat some, their clusters stay empty
        pick = torch.cat([pick, pick[:1].expand(missing)])
    return points[pick]


def _iterate(
    points: torch.Tensor,
    weights: torch.Tensor,
    centres: torch.Tensor,
    centroids: torch.Tensor,
    iterations: int,
    tolerance: float,
) -> torch.Tensor:
    """Lloyd's iterations, where a point moves among the neighbours of its centroid."""
    if not iterations:
        return centroids
    k = len(centroids)
    cells = sort_into_cells(centres, centroids)
    index = candidates(points, centroids, cells, 1, 1)[:, 0]
    near = torch.empty(0)
    previous, age = float("inf"), _REFRESH
    for left in reversed(range(iterations)):
        if age == _REFRESH:
            # points of one cluster beside each other: its neighbours are then read once
            order = index.argsort(stable=True)
            points, weights, index = points[order], weights[order], index[order]
            near = _neighbours(centroids, sort_into_cells(centres, centroids))
            age = 0
        age += 1
        index, cost = descend(points, centroids, near, index)
        features = torch.cat([weights[:, None], weights[:, None] * points], 1)
        sums = exact._accumulate(features[None], index[None], k)[0]
        mass = sums[:, :1]
        centroids = torch.where(mass > 0, sums[:, 1:] / mass.clamp_min(1e-30), centroids)
        cost *= weights
        now = float(cost.double().sum())
        settled = previous - now <= tolerance * now
        previous = now
        # a centroid that moves far is nobody's neighbour until the next look at that
        empty = mass[:, 0] <= 0
        look = left and (settled or age == _REFRESH) and bool(empty.any())
        if look and _reseed(centroids, empty, points, index, cost):
            previous, age = float("inf"), _REFRESH
        elif settled:
            break
    return centroids


def _reseed(
    centroids: torch.Tensor,
    empty: torch.Tensor,
    points: torch.Tensor,
    index: torch.Tensor,
    cost: torch.Tensor,
) -> bool:
    """Move centroids of empty clusters, in place, to the points that are served worst, which become
    theirs. False if there are none that are served badly."""
    idle = empty.nonzero()[:, 0]
    worst = cost.topk(min(len(idle), len(cost)))
    worst_at = worst.indices[worst.values > 1e-6 * cost.mean()]
    idle = idle[: len(worst_at)]
    centroids[idle] = points[worst_at]
    index[worst_at] = idle
    return len(idle) > 0


def candidates(
    points: torch.Tensor, centroids: torch.Tensor, cells: Cells, probe: int, count: int
) -> torch.Tensor:
    """(n, count): the centroids nearest to each point in the `probe` cells around it, nearest
    first, -1 where there are fewer. The numba version ranks cells for every point, not every cell.
    """
    found = torch.full((len(points), count), -1, device=points.device)
    if points.device.type == "cpu" and (compiled := _compiled()) is not None:
        arrays = [points.contiguous().numpy(), *cells.arrays(centroids)]
        over_rows(
            lambda lo, hi: compiled.search_all(*arrays, probe, found.numpy(), lo, hi), len(points)
        )
        return torch.where(found < 0, found, cells.members[found])
    order, starts = _sorted(cells.centres, points)
    apart = torch.cdist(cells.centres, cells.centres, compute_mode="donot_use_mm_for_euclid_dist")
    for c, others in enumerate(apart.argsort(dim=1, stable=True)[:, :probe].tolist()):
        near = torch.cat([cells.of(o) for o in others])
        book = centroids[near].T.contiguous()
        square = book.square().sum(0)
        step = max(1, _chunk(points.device) // len(near))
        for mine in order[starts[c] : starts[c + 1]].split(step):
            cost = torch.addmm(square, points[mine], book, alpha=-2)
            best = cost.topk(min(count, len(near)), largest=False).indices
            found[mine, : best.shape[1]] = near[best]
    return found


def _neighbours(centroids: torch.Tensor, cells: Cells) -> torch.Tensor:
    """(k, m): every centroid, then those nearest to it among those of the cells around it."""
    itself = torch.arange(len(centroids), device=centroids.device)[:, None]
    near = candidates(centroids, centroids, cells, _PROBE, min(_NEIGHBOURS, len(centroids)))
    return torch.cat([itself, torch.where(near < 0, itself, near)], 1)


def descend(
    points: torch.Tensor, centroids: torch.Tensor, near: torch.Tensor, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Index (n,) of the best centroid for every point among near[index], and squared distance.

    points: (n, d). near: (k, m), numbers of centroids. index: (n,), where points are now.
    """
    compiled = _compiled() if points.device.type == "cpu" else None
    cost = torch.empty(len(points), device=points.device)
    if compiled is not None:
        index = index.clone()
        arrays = [t.contiguous().numpy() for t in (points, centroids, near, index, cost)]
        over_rows(lambda lo, hi: compiled.descend(*arrays, lo, hi), len(points))
        return index, cost
    out = torch.empty_like(index)
    step = max(1, _chunk(points.device) // (near.shape[1] * points.shape[1]))
    for lo in range(0, len(points), step):
        part = slice(lo, lo + step)
        choice = near[index[part]]
        gap = (points[part, None] - centroids[choice]).square_().sum(-1)
        cost[part], best = gap.min(1)
        out[part] = choice.gather(1, best[:, None])[:, 0]
    return out, cost


def over_rows(work: Callable[[int, int], None], rows: int) -> None:
    """Run work(lo, hi) over all rows, on as many threads as torch would use."""
    threads = min(torch.get_num_threads(), max(1, rows // 64))
    if threads == 1:
        work(0, rows)
        return
    edges = [rows * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, edges[:-1], edges[1:]))


@functools.cache
def _compiled() -> Any:
    """The compiled loops, or None without numba."""
    try:
        from hf_vq.methods import kmeans_numba
    except ImportError:
        return None
    return kmeans_numba
