"""Codebooks at their stored precision: integers with a scale, half floats, low-rank factors."""

from __future__ import annotations

import torch

from hf_vq.methods.lookup import Lookup

_LIMIT = {"int8": 127, "int4": 7}
# Shares of the largest entry that an integer codebook's top value may stand for. Clipping a rare
# outlier pays at 4 bits; at 8 the rounding error is too small to matter.
_CLIPPING = {"int8": (1.0,), "int4": tuple(1 - 0.03 * i for i in range(16))}


def as_integers(
    values: torch.Tensor, mass: torch.Tensor, dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round (..., n) values to integers times one scale per leading index (GPTVQ section 3.4).

    mass: (..., n), how much an error in each entry costs; the scale with the least cost is taken.
    Returns integers as float32 (..., n) and scales (...), representable in bfloat16.
    """
    top = _LIMIT[dtype]
    peak = values.abs().amax(-1)
    best_cost = torch.full_like(peak, float("inf"))
    best_scale = torch.ones_like(peak)
    for share in _CLIPPING[dtype]:
        scale = (peak * share / top).clamp_min(1e-30).bfloat16().float()
        rounded = (values / scale[..., None]).round().clamp(-top - 1, top) * scale[..., None]
        cost = (mass * (rounded - values).square()).sum(-1)
        better = cost < best_cost
        best_cost = torch.where(better, cost, best_cost)
        best_scale = torch.where(better, scale, best_scale)
    integers = (values / best_scale[..., None]).round().clamp(-top - 1, top)
    return integers, best_scale


def sort_entries(state: Lookup) -> None:
    """Sort every 1-D codebook and rename its codes, in place: nothing changes but the order.

    Sorted codebooks of a matrix resemble each other, which is what a low rank needs.
    """
    books, order = state.codebooks[..., 0].sort(-1)
    rank = order.argsort(-1)
    flat = rank.reshape(-1).index_select(0, state.addresses()[0].reshape(-1))
    state.index = flat.reshape(state.index.shape).to(state.index.dtype)
    state.codebooks = books[..., None].contiguous()


def low_rank(books: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors (S, G, rank) and basis (rank, k) of 1-D codebooks (S, G, k, 1), by SVD.

    The basis is representable in float16. It carries the size of each component, so that the
    factors are all of about one magnitude and can share an integer scale.
    """
    table = books.reshape(-1, books.shape[2])
    u, s, v = torch.linalg.svd(table, full_matrices=False)
    size = (u[:, :rank] * s[:rank]).square().mean(0).sqrt().clamp_min(1e-20)
    basis = torch.zeros(rank, books.shape[2], device=books.device)  # rows beyond the SVD's stay 0
    basis[: len(size)] = (v[:rank] * size[:, None]).half().float()
    factors = table @ torch.linalg.pinv(basis)
    return factors.reshape(*books.shape[:2], rank), basis
