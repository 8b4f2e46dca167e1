"""Weighted k-means on many codebooks at once.

Points are grouped: `points` is (groups, n, d) and every group gets its own k centroids. Weights
have one value per point and coordinate (GPTVQ section 3.2: the cost of an error in one column), and
zero-weight points are padding: they attract nothing.
"""

from __future__ import annotations

import torch

# Distances of one chunk, so that no (groups, n, k) array larger than this exists (float32 values).
_CHUNK = 1 << 24


def assign(points: torch.Tensor, weights: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Index (groups, n) of the centroid nearest in the weighted distance.

    points, weights: (groups, n, d). centroids: (groups, k, d). Constant terms are left out.
    """
    groups, n, _ = points.shape
    k = centroids.shape[1]
    linear = (-2 * centroids).transpose(1, 2)
    square = centroids.square().transpose(1, 2)
    out = torch.empty(groups, n, dtype=torch.long, device=points.device)
    chunk = max(1, _CHUNK // (groups * k))
    for lo in range(0, n, chunk):
        w = weights[:, lo : lo + chunk]
        cost = torch.bmm(w, square)
        cost.baddbmm_(w * points[:, lo : lo + chunk], linear)
        out[:, lo : lo + chunk] = cost.argmin(-1)
    return out


def _accumulate(
    points: torch.Tensor, weights: torch.Tensor, index: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    groups, _, d = points.shape
    flat = (index + k * torch.arange(groups, device=index.device)[:, None]).reshape(-1)
    both = torch.cat([weights * points, weights], -1).reshape(-1, 2 * d)
    total = torch.zeros(groups * k, 2 * d, device=points.device).index_add_(0, flat, both)
    return total[:, :d].reshape(groups, k, d), total[:, d:].reshape(groups, k, d)


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
    """k-means++ (Arthur and Vassilvitskii 2007): next seed drawn in proportion to squared distance."""
    groups, n, d = points.shape
    rows = torch.arange(groups, device=points.device)
    chosen = torch.empty(groups, k, d, device=points.device)
    chance = weights.sum(-1)
    nearest = torch.full((groups, n), float("inf"), device=points.device)
    for m in range(k):
        cumulative = chance.double().cumsum(1)
        draw = torch.rand(groups, 1, generator=generator, dtype=torch.float64).to(points.device)
        pick = torch.searchsorted(cumulative, draw * cumulative[:, -1:]).clamp_max(n - 1)[:, 0]
        chosen[:, m] = points[rows, pick]
        gap = (weights * (points - chosen[:, m : m + 1]).square()).sum(-1)
        nearest = torch.minimum(nearest, gap)
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

    Empty clusters are re-seeded at the points that are served worst (the release lets them
    collapse to zero). Stops early when the cost falls by less than `tolerance` of itself.
    """
    present = weights.sum(-1) > 0
    if init == "kmeans++":
        generator = torch.Generator().manual_seed(seed)
        centroids = kmeans_plus_plus_seeds(points, weights, k, generator)
    else:
        centroids = mahalanobis_seeds(points, present, k)
    previous = float("inf")
    for _ in range(iterations):
        index = assign(points, weights, centroids)
        total, mass = _accumulate(points, weights, index, k)
        centroids = torch.where(mass > 0, total / mass.clamp_min(1e-30), centroids)
        gap = points - centroids.gather(1, index[..., None].expand(-1, -1, points.shape[2]))
        cost_each = (weights * gap.square()).sum(-1)
        cost = float(cost_each.sum())
        empty = mass.sum(-1) <= 0
        if bool(empty.any()):
            worst = cost_each.topk(min(k, points.shape[1]), dim=1).indices
            place = (empty.cumsum(1) - 1).clamp(0, worst.shape[1] - 1)
            fresh = points.gather(
                1, worst.gather(1, place)[..., None].expand(-1, -1, points.shape[2])
            )
            useful = cost_each.gather(1, worst.gather(1, place)) > 0
            centroids = torch.where((empty & useful)[..., None], fresh, centroids)
            if bool((empty & useful).any()):
                previous = float("inf")
                continue
        if previous - cost <= tolerance * cost:
            break
        previous = cost
    return centroids
