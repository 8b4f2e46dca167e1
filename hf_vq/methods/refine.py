"""Refinement after the sweep: better codes for fixed codebooks, better codebooks for fixed codes.

The sweep is greedy: no code is looked at again once the columns to its right are known. Both steps
here work on the exact layer objective ``tr(E H E^T)``, ``E = W - Q``, and can only lower it:

* `reassign`, cyclic coordinate descent: every vector in turn takes the centroid that is best with
  all the others as they now stand.
* `fit_codebooks`, GPTVQ's codebook update (section 3.3) solved as what it is, a convex
  least-squares problem, by preconditioned conjugate gradients instead of Adam.
"""

from __future__ import annotations

import torch

from hf_vq.methods.lookup import Lookup, diagonal_blocks
from hf_vq.methods.panel import solve_panel

# Columns whose products are kept fresh within a pass; the rest are updated once per panel.
_PANEL = 64


def loss(weight: torch.Tensor, hessian: torch.Tensor, state: Lookup) -> float:
    """tr(E H E^T) over the real rows."""
    error = (weight - state.decode()) * state.row_mask
    return float(((error @ hessian) * error).sum(dtype=torch.float64))


def reassign(weight: torch.Tensor, hessian: torch.Tensor, state: Lookup) -> None:
    """One pass of coordinate descent over all vectors, in place."""
    d = state.dim
    quantized = state.decode()
    pull = (weight - quantized) @ hessian  # E H, kept up to date panel by panel
    for start, stop in state.panels(_PANEL):
        local = hessian[start:stop, start:stop]
        metric = diagonal_blocks(local, d)
        delta = solve_panel(
            state,
            start // d,
            base=quantized[:, start:stop],
            u=pull[:, start:stop],
            a=torch.eye(d, device=weight.device).expand(len(metric), d, d),
            m=metric,
            b=local,
        )
        pull.addmm_(delta, hessian[start:stop])


def importance(hessian: torch.Tensor, state: Lookup) -> torch.Tensor:
    """Diagonal of the codebooks' normal matrix, as (S, G, k, d): the mass behind every entry."""
    each = (hessian.diagonal()[None] * state.row_mask).reshape(-1, state.dim)
    if state.scale is not None:
        each = each * state.scale.reshape(-1, 1).square()
    table = torch.zeros_like(state.codebooks.reshape(-1, state.dim))
    return table.index_add_(0, state.address().reshape(-1), each).reshape(state.codebooks.shape)


def fit_codebooks(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    state: Lookup,
    *,
    iterations: int,
    tolerance: float = 1e-4,
    basis: torch.Tensor | None = None,
) -> torch.Tensor:
    """Least-squares codebooks for fixed codes, in place; never raises the loss.

    The normal matrix couples all codebooks of the matrix through H and is never formed: its product
    with a codebook is gather, multiply by H, scatter. With a basis (rank, k) the 1-D codebooks stay
    in its span. Returns what was added to the codebooks (S, G, k, d), or to their factors
    (S, G, rank).
    """
    shape = state.codebooks.shape
    address = state.address().reshape(-1)
    rows, columns = weight.shape
    scale = None if state.scale is None else state.scale.reshape(-1, 1)

    def scatter(dense: torch.Tensor) -> torch.Tensor:
        parts = (dense * state.row_mask).reshape(-1, state.dim)
        if scale is not None:
            parts = parts * scale
        table = torch.zeros(shape[0] * shape[1] * shape[2], state.dim, device=dense.device)
        table.index_add_(0, address, parts)
        return table if basis is None else table.reshape(-1, shape[2]) @ basis.T

    def gather(values: torch.Tensor) -> torch.Tensor:
        table = values if basis is None else (values @ basis).reshape(-1, 1)
        q = table.index_select(0, address)
        return (q if scale is None else q * scale).reshape(rows, columns) * state.row_mask

    mass = importance(hessian, state)
    if basis is None:
        mass = mass.reshape(-1, state.dim)
    else:
        mass = mass.reshape(-1, shape[2]) @ basis.square().T
    precondition = torch.where(mass > 0, 1 / mass.clamp_min(1e-30), 0)

    residual = scatter(((weight - state.decode()) * state.row_mask) @ hessian)
    solution = torch.zeros_like(residual)
    direction = precondition * residual
    energy = first = (residual * direction).sum()
    for _ in range(iterations):
        if not bool(energy > tolerance * first):
            break
        product = scatter(gather(direction) @ hessian)
        curvature = (direction * product).sum()
        if not bool(curvature > 0):
            break
        length = energy / curvature
        solution += length * direction
        residual -= length * product
        preconditioned = precondition * residual
        fresh = (residual * preconditioned).sum()
        direction = preconditioned + (fresh / energy) * direction
        energy = fresh
    added = solution if basis is None else solution @ basis
    state.codebooks = state.codebooks + added.reshape(shape)
    return solution.reshape(shape if basis is None else (*shape[:2], len(basis)))
