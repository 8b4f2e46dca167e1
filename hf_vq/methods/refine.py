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
    total = 0.0
    for rows, _, part in state.row_chunks():
        error = (weight[rows] - part.decode()) * part.row_mask
        total += float(((error @ hessian) * error).sum(dtype=torch.float64))
    return total


def reassign(weight: torch.Tensor, hessian: torch.Tensor, state: Lookup) -> None:
    """One pass of coordinate descent over all vectors, in place."""
    d = state.dim
    identity = torch.eye(d, device=weight.device)
    panels = state.panels(_PANEL)
    metrics = [diagonal_blocks(hessian[a:b, a:b], d) for a, b in panels]
    for rows, _, part in state.row_chunks():
        quantized = part.decode()
        pull = (weight[rows] - quantized) @ hessian  # E H, kept up to date panel by panel
        for (start, stop), metric in zip(panels, metrics, strict=True):
            delta = solve_panel(
                part,
                start // d,
                base=quantized[:, start:stop],
                u=pull[:, start:stop],
                a=identity.expand(len(metric), d, d),
                m=metric,
                b=hessian[start:stop, start:stop],
            )
            pull[:, stop:].addmm_(delta, hessian[start:stop, stop:])


def importance(hessian: torch.Tensor, state: Lookup) -> torch.Tensor:
    """Diagonal of the codebooks' normal matrix, as (S, G, k, d): the mass behind every entry."""
    out = torch.zeros_like(state.codebooks)
    diagonal = hessian.diagonal()[None]
    for _, groups, part in state.row_chunks():
        each = (diagonal * part.row_mask).reshape(-1, state.dim)
        if part.scale is not None:
            each = each * part.scale.reshape(-1, 1).square()
        table = torch.zeros(part.codebooks.numel() // state.dim, state.dim, device=each.device)
        table.index_add_(0, part.address().reshape(-1), each)
        out[:, groups] += table.reshape(part.codebooks.shape)
    return out


def _normal_product(
    hessian: torch.Tensor,
    chunks: list[tuple[slice, slice, Lookup, torch.Tensor]],
    books: torch.Tensor,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the normal matrix makes of codebooks (S, G, k, d): gather, multiply by H, scatter.

    With a weight: the same for ``weight - gathered``, that is, minus half of the loss's gradient.
    chunks: those of the state, with their addresses.
    """
    d = books.shape[-1]
    out = torch.zeros_like(books)
    for rows, groups, part, address in chunks:
        dense = part.decode(books[:, groups], address)
        if weight is not None:
            dense = weight[rows] - dense
        parts = ((dense * part.row_mask) @ hessian * part.row_mask).reshape(-1, d)
        if part.scale is not None:
            parts = parts * part.scale.reshape(-1, 1)
        table = torch.zeros(part.codebooks.numel() // d, d, device=parts.device)
        table.index_add_(0, address.reshape(-1), parts)
        out[:, groups] += table.reshape(part.codebooks.shape)
    return out


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

    The normal matrix couples all codebooks of the matrix through H and is never formed. With a
    basis (rank, k) the 1-D codebooks stay in its span. Returns what was added to the codebooks
    (S, G, k, d), or to their factors (S, G, rank).
    """

    def expand(values: torch.Tensor) -> torch.Tensor:
        return values if basis is None else (values @ basis)[..., None]

    def project(books: torch.Tensor) -> torch.Tensor:
        return books if basis is None else books[..., 0] @ basis.T

    chunks = [(*chunk, chunk[2].address()) for chunk in state.row_chunks()]
    mass = importance(hessian, state)
    if basis is not None:
        mass = mass[..., 0] @ basis.square().T
    precondition = torch.where(mass > 0, 1 / mass.clamp_min(1e-30), 0)

    residual = project(_normal_product(hessian, chunks, state.codebooks, weight))
    solution = torch.zeros_like(residual)
    direction = precondition * residual
    energy = first = (residual * direction).sum()
    for _ in range(iterations):
        if not bool(energy > tolerance * first):
            break
        product = project(_normal_product(hessian, chunks, expand(direction)))
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
    state.codebooks = state.codebooks + expand(solution)
    return solution
