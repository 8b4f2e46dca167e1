"""Refinement after the sweep: better codes for fixed codebooks, better codebooks for fixed codes.

The sweep is greedy: no code is looked at again once the columns to its right are known. Both steps
here work on the exact layer objective ``tr(E H E^T)``, ``E = W - Q``, and can only lower it:

* `reassign`, cyclic coordinate descent: every vector in turn takes the centroid that is best with
  all the others as they now stand.
* `fit_codebooks`, GPTVQ's codebook update (section 3.3) solved as what it is, a convex
  least-squares problem, by preconditioned conjugate gradients instead of Adam.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

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


def reassign(weight: torch.Tensor, hessian: torch.Tensor, state: Lookup, beam: int = 1) -> None:
    """One pass of coordinate descent over all vectors, in place. beam: as in `solve_panel`."""
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
                beam=beam,
            )
            pull[:, stop:].addmm_(delta, hessian[start:stop, stop:])


def importance(hessian: torch.Tensor, state: Lookup) -> torch.Tensor:
    """Diagonal of the codebooks' normal matrix, in the shape of `state.books`: their mass."""
    out = torch.zeros_like(state.books)
    diagonal = hessian.diagonal()[None]
    for _, groups, part in state.row_chunks():
        each = diagonal * part.row_mask
        out[:, groups] += part.scatter(each, part.addresses(), squared=True)
    return out


def _normal_product(
    hessian: torch.Tensor,
    chunks: list[tuple[slice, slice, Lookup]],
    books: torch.Tensor,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the normal matrix makes of `books`: gather, multiply by H, scatter.

    With a weight: the same for ``weight - gathered``, that is, minus half of the loss's gradient.
    chunks: those of the state. Addresses are made anew each time: kept, they would be as large as
    the matrix, and making them takes a fraction of the product.
    """
    out = torch.zeros_like(books)
    for rows, groups, part in chunks:
        addresses = part.addresses()
        dense = part.decode(books[:, groups], addresses)
        if weight is not None:
            dense = weight[rows] - dense
        dense = (dense * part.row_mask) @ hessian * part.row_mask
        out[:, groups] += part.scatter(dense, addresses)
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
    basis (rank, k) the 1-D codebooks stay in its span. Returns what was added to `state.books`, or
    to their factors (S, G, rank).
    """

    def expand(values: torch.Tensor) -> torch.Tensor:
        return values if basis is None else (values @ basis)[..., None]

    def project(books: torch.Tensor) -> torch.Tensor:
        return books if basis is None else books[..., 0] @ basis.T

    chunks = list(state.row_chunks())
    mass = importance(hessian, state)
    if basis is not None:
        mass = mass[..., 0] @ basis.square().T
    precondition = torch.where(mass > 0, 1 / mass.clamp_min(1e-30), 0)

    residual = project(_normal_product(hessian, chunks, state.books, weight))
    solution = _conjugate_gradients(
        lambda values: project(_normal_product(hessian, chunks, expand(values))),
        residual,
        precondition,
        iterations,
        tolerance,
    )
    state.books = state.books + expand(solution)
    return solution


def fit_column_scale(
    weight: torch.Tensor, hessian: torch.Tensor, state: Lookup, *, iterations: int = 10
) -> None:
    """Least-squares column scales for fixed codes and codebooks, in place; never raises the loss.

    With P the look-ups without their scale the loss is a quadratic in it, whose matrix
    (P^T P) * H is only applied, never formed: conjugate gradients as in `fit_codebooks`.
    """
    scale = state.column_scale
    assert scale is not None
    chunks = [(rows, replace(part, column_scale=None)) for rows, _, part in state.row_chunks()]

    def product(values: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        out = torch.zeros_like(values)
        for rows, part in chunks:
            plain = part.decode() * part.row_mask
            dense = plain * values
            if weight is not None:
                dense = weight[rows] * part.row_mask - dense
            out += ((dense @ hessian) * plain).sum(0)
        return out

    mass = torch.zeros_like(scale)
    for _, part in chunks:
        mass += (part.decode() * part.row_mask).square().sum(0)
    mass *= hessian.diagonal()
    precondition = torch.where(mass > 0, 1 / mass.clamp_min(1e-30), 0)
    state.column_scale = scale + _conjugate_gradients(
        product, product(scale, weight), precondition, iterations
    )


def _conjugate_gradients(
    product: Callable[[torch.Tensor], torch.Tensor],
    residual: torch.Tensor,
    precondition: torch.Tensor,
    iterations: int,
    tolerance: float = 1e-4,
) -> torch.Tensor:
    """Solve ``product(x) = residual`` for a positive semidefinite product; x lowers its quadratic.

    Stops when the preconditioned residual's energy has fallen to `tolerance` of itself.
    """
    solution = torch.zeros_like(residual)
    direction = precondition * residual
    energy = first = (residual * direction).sum()
    for _ in range(iterations):
        if not bool(energy > tolerance * first):
            break
        step = product(direction)
        curvature = (direction * step).sum()
        if not bool(curvature > 0):
            break
        length = energy / curvature
        solution += length * direction
        residual = residual - length * step
        preconditioned = precondition * residual
        fresh = (residual * preconditioned).sum()
        direction = preconditioned + (fresh / energy) * direction
        energy = fresh
    return solution
