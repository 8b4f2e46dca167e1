"""Weighted k-means on many codebooks at once.

Points are grouped: `points` is (groups, n, d) and every group gets its own k centroids. Weights
have one value per point and coordinate (GPTVQ section 3.2: the cost of an error in one column), and
zero-weight points are padding: they attract nothing.
"""

from __future__ import annotations

import math

import torch

# Costs computed at once: (groups, n, k) values that should stay in a CPU's cache, and on a GPU are
# enough to fill it.
_CHUNK = {"cpu": 1 << 18}
_CHUNK_ELSEWHERE = 1 << 24
# Up to here the sums of the M-step are a matrix product with one-hot rows, beyond it a scatter.
_ONE_HOT_LIMIT = 16
# Up to here every point is compared with every centroid; beyond, see `kmeans_large`.
_EXACT_LIMIT = 1024
# Share of points that may be left out there, since they have no weight in some coordinate.
_FEW = 1 / 16
# Up to here k-means++ draws several candidates per seed of a 1-D codebook.
_GREEDY_LIMIT = 32


def _features(points: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(groups, n, 2 d): the weights, then the weighted points. All that an iteration reads."""
    return torch.cat([weights, weights * points], -1)


def _assign(features: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest centroid of every point, (groups, n), and its cost without the constant term."""
    groups, n, _ = features.shape
    k = centroids.shape[1]
    # w (x - c)^2 = w . c^2 - 2 (w x) . c + constant
    table = torch.cat([centroids.square(), -2 * centroids], -1).transpose(1, 2).contiguous()
    index = torch.empty(groups, n, dtype=torch.long, device=features.device)
    cost = torch.empty(groups, n, device=features.device)
    size = _CHUNK.get(features.device.type, _CHUNK_ELSEWHERE)
    some = max(1, size // (n * k))
    step = max(1, size // k) if some == 1 else n
    for g in range(0, groups, some):
        for lo in range(0, n, step):
            part = torch.bmm(features[g : g + some, lo : lo + step], table[g : g + some])
            # min() with indices is about twice as fast as argmin() on a CPU
            torch.min(
                part,
                -1,
                out=(cost[g : g + some, lo : lo + step], index[g : g + some, lo : lo + step]),
            )
    return index, cost


def assign(points: torch.Tensor, weights: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Index (groups, n) of the centroid nearest in the weighted distance.

    points, weights: (groups, n, d). centroids: (groups, k, d).
    """
    return _assign(_features(points, weights), centroids)[0]


def _accumulate(features: torch.Tensor, index: torch.Tensor, k: int) -> torch.Tensor:
    """Sums of the features over every cluster, (groups, k, 2 d)."""
    groups, _, width = features.shape
    if k <= _ONE_HOT_LIMIT:
        ranks = torch.arange(k, device=index.device)[:, None]
        size = _CHUNK.get(features.device.type, _CHUNK_ELSEWHERE)
        some = max(1, size // max(1, index.shape[1] * k))
        parts = zip(index.split(some), features.split(some), strict=True)
        return torch.cat([torch.bmm((i[:, None] == ranks).to(f.dtype), f) for i, f in parts])
    flat = (index + k * torch.arange(groups, device=index.device)[:, None]).reshape(-1)
    total = torch.zeros(groups * k, width, device=features.device)
    return total.index_add_(0, flat, features.reshape(-1, width)).reshape(groups, k, width)


def mahalanobis_seeds(points: torch.Tensor, present: torch.Tensor, k: int) -> torch.Tensor:
    """k points per group, evenly spaced in the rank of their Mahalanobis distance (GPTVQ 3.2).

    present: bool (groups, n), False for padding.
    """
    count = present.sum(1, keepdim=True).clamp_min(1)
    mask = present[..., None]
    mean = (points * mask).sum(1, keepdim=True) / count[..., None]
    centred = (points - mean) * mask
    scatter = centred.transpose(1, 2) @ centred
    ridge = scatter.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * 1e-6 + 1e-30
    scatter = scatter + ridge * torch.eye(points.shape[2], device=points.device)
    distance = (centred * torch.linalg.solve(scatter, centred.transpose(1, 2)).transpose(1, 2)).sum(
        -1
    )
    order = distance.masked_fill(~present, float("inf")).argsort(dim=1, stable=True)
    steps = torch.linspace(0, 1, k, device=points.device, dtype=torch.float64)
    rank = (steps[None] * (count - 1)).round().long()
    pick = order.gather(1, rank)
    return points.gather(1, pick[..., None].expand(-1, -1, points.shape[2]))


def kmeans_plus_plus_seeds(
    points: torch.Tensor, weights: torch.Tensor, k: int, generator: torch.Generator
) -> torch.Tensor:
    """k-means++ (Arthur, Vassilvitskii 2007): the next seed in proportion to squared distance.

    Small 1-D codebooks get its greedy variant: of several draws the one that leaves the least cost.
    """
    groups, n, d = points.shape
    rows = torch.arange(groups, device=points.device)
    trials = 2 + int(math.log(k)) if d == 1 and k <= _GREEDY_LIMIT else 1
    chosen = torch.zeros(groups, k, d, device=points.device)
    chance = weights.sum(-1)
    nearest = torch.full((groups, n), float("inf"), device=points.device)
    for m in range(k):
        cumulative = chance.double().cumsum(1)
        draws = torch.rand(groups, trials, generator=generator, dtype=torch.float64)
        draws = draws.to(points.device) * cumulative[:, -1:]
        picks = torch.searchsorted(cumulative, draws).clamp_max(n - 1)
        best, least = nearest, torch.full((groups,), float("inf"), device=points.device)
        for pick in picks.unbind(1):
            seed = points[rows, pick]
            gap = (weights * (points - seed[:, None]).square()).sum(-1)
            left = torch.minimum(nearest, gap)
            cost = left.sum(1)
            better = cost < least
            chosen[:, m] = torch.where(better[:, None], seed, chosen[:, m])
            best = torch.where(better[:, None], left, best)
            least = torch.where(better, cost, least)
        nearest = best
        # All points taken: repeat any, the duplicates stay empty and are re-seeded later.
        chance = torch.where(nearest.sum(1, keepdim=True) > 0, nearest, torch.ones_like(nearest))
    return chosen


def kmeans(
    points: torch.Tensor,
    weights: torch.Tensor,
    k: int,
    *,
    iterations: int,
    init: str = "mahalanobis",
    seed: int = 0,
    tolerance: float = 1e-4,
) -> torch.Tensor:
    """Weighted Lloyd iterations; returns centroids (groups, k, d).

    points: (groups, n, d). weights: (groups, n, d), or (groups, n, 1) where they are equal for all
    coordinates of a point. Empty clusters are re-seeded at the points that are served worst (the
    release lets them collapse to zero). Stops early when the cost falls by less than `tolerance` of
    itself. With more than 1024 centroids, k-means++ and equal weights within every point, time and
    memory go by sqrt(k) instead of k (`kmeans_large`); a few points whose weights are partly 0, as
    of vectors that stick out of a matrix, then count as padding.
    """
    if k > _EXACT_LIMIT and init == "kmeans++":
        mass = _equal_weights(weights)
        if mass is not None:
            from hf_vq.methods.kmeans_large import kmeans_large  # which imports this file

            options: dict = {"iterations": iterations, "seed": seed, "tolerance": tolerance}
            pairs = zip(points, mass, strict=True)
            return torch.stack([kmeans_large(p, w, k, **options) for p, w in pairs])
    weights = weights.expand_as(points)
    features = _features(points, weights)
    d = points.shape[2]
    if init == "kmeans++":
        generator = torch.Generator().manual_seed(seed)
        centroids = kmeans_plus_plus_seeds(points, weights, k, generator)
    else:
        centroids = mahalanobis_seeds(points, weights.sum(-1) > 0, k)
    constant = (features[..., d:] * points).sum(-1)
    total_constant = float(constant.sum())
    previous = float("inf")
    for _ in range(iterations):
        index, cost = _assign(features, centroids)
        sums = _accumulate(features, index, k)
        mass = sums[..., :d]
        centroids = torch.where(mass > 0, sums[..., d:] / mass.clamp_min(1e-30), centroids)
        empty = mass.sum(-1) <= 0
        if bool(empty.any()) and _reseed(centroids, empty, points, cost + constant):
            previous = float("inf")
            continue
        now = float(cost.sum()) + total_constant
        if previous - now <= tolerance * now:
            break
        previous = now
    return centroids


def _equal_weights(weights: torch.Tensor) -> torch.Tensor | None:
    """The one weight of every point, (groups, n), 0 where a coordinate has none; None if some
    point has several, or more than a few would be left out."""
    least, most = weights.amin(-1), weights.amax(-1)
    partly = (least == 0) & (most > 0)
    few = partly.sum(1) <= _FEW * (most > 0).sum(1)
    return least if bool(few.all() & ((least == most) | partly).all()) else None


def _reseed(
    centroids: torch.Tensor, empty: torch.Tensor, points: torch.Tensor, cost: torch.Tensor
) -> bool:
    """Move centroids of empty clusters, in place, to the points that are served worst.

    False if there is none left that is served badly (fewer distinct points than centroids).
    """
    worst = cost.topk(min(centroids.shape[1], points.shape[1]), dim=1)
    place = (empty.cumsum(1) - 1).clamp(0, worst.indices.shape[1] - 1)
    pick = worst.indices.gather(1, place)
    floor = 1e-6 * cost.mean(1, keepdim=True).clamp_min(1e-30)
    useful = empty & (worst.values.gather(1, place) > floor)
    fresh = points.gather(1, pick[..., None].expand(-1, -1, points.shape[2]))
    centroids[useful] = fresh[useful]
    return bool(useful.any())
