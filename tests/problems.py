"""Random quantization problems for the tests of the methods, and their answers by brute force."""

from __future__ import annotations

import torch

from hf_vq.methods.lookup import Lookup


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed))


def hessian_of(columns: int, seed: int = 0, tokens: int | None = None) -> torch.Tensor:
    """mean x x^T of correlated inputs whose channels differ in size, float32 (c, c)."""
    mixing = normal(columns, columns, seed=seed) / columns**0.5
    mixing = mixing + torch.eye(columns)
    size = (0.7 * normal(columns, seed=seed + 1)).exp()
    x = normal(tokens or 4 * columns, columns, seed=seed + 2) @ mixing * size
    return x.T @ x / len(x)


def random_lookup(
    rows: int,
    columns: int,
    d: int,
    k: int,
    *,
    groups: int = 1,
    stripe: int | None = None,
    scaled: bool = False,
    padded_rows: int = 0,
    seed: int = 0,
) -> Lookup:
    """Random codebooks and codes; `stripe` columns share a codebook, the last rows are padding."""
    stripe = stripe or columns
    vectors = columns // d
    return Lookup(
        codebooks=normal(-(-columns // stripe), groups, k, d, seed=seed + 10),
        index=torch.randint(0, k, (rows, vectors), generator=generator(seed + 11)),
        scale=(0.4 * normal(rows, vectors, seed=seed + 12)).exp() if scaled else None,
        vectors_per_stripe=stripe // d,
        row_mask=(torch.arange(rows) < rows - padded_rows).float()[:, None],
    )


def exact_loss(weight: torch.Tensor, hessian: torch.Tensor, quantized: torch.Tensor) -> float:
    """tr(E H E^T) in float64."""
    error = (weight - quantized).double()
    return float(((error @ hessian.double()) * error).sum())


def slow_decode(state: Lookup) -> torch.Tensor:
    """The dense matrix, entry by entry, float64."""
    rows, vectors = state.index.shape
    d, groups = state.dim, state.codebooks.shape[1]
    out = torch.empty(rows, vectors * d, dtype=torch.float64)
    for r in range(rows):
        for v in range(vectors):
            book = state.codebooks[v // state.vectors_per_stripe, r // (rows // groups)]
            scale = 1.0 if state.scale is None else float(state.scale[r, v])
            out[r, v * d : (v + 1) * d] = scale * book[state.index[r, v]].double()
    return out
