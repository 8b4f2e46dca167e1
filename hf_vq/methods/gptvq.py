"""GPTVQ (van Baalen et al., arXiv 2402.15319): one weight matrix to codes.

For every stripe of columns, codebooks are fitted by weighted k-means to the weights as error
feedback has left them; the sweep picks a centroid for `vector_dim` columns at a time; then codes and
codebooks are refined in turn on the exact output error (`hf_vq.methods.refine`), and the codebooks
are rounded to their stored precision with the codes re-chosen for the rounded ones.

Where this departs from the released code (each measured, see docs and tests): k-means and look-up
weights are 1/u^2 as the derivation asks, feedback uses the exact block of `vector_dim` columns,
scales are divided out of the live weights, empty clusters are re-seeded, the codebook update is a
convex solve, and codes are revisited.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hf_vq.formats.gptvq import GPTVQCodes, GPTVQSpec
from hf_vq.methods import refine
from hf_vq.methods.feedback import Factor, correction, factorize, sweep
from hf_vq.methods.kmeans import kmeans
from hf_vq.methods.lookup import Lookup
from hf_vq.methods.statistics import Statistics

# Points one codebook is trained on, per centroid: more do not move its centroids measurably.
_POINTS_PER_CENTROID = 128


@dataclass(frozen=True)
class GPTVQOptions:
    """How hard to work; nothing here changes the size of the result."""

    kmeans_init: str = "mahalanobis"
    kmeans_iterations: int = 30
    damping: float = 0.01
    refine_iterations: int = 4
    codebook_update: bool = True
    codebook_update_iterations: int = 30
    feedback: bool = True
    seed: int = 0


@dataclass
class Quantized:
    """codes, tr(E H E^T) / tr(W H W^T) with the undamped H, and anything unusual.

    E is the distance to what was aimed at: the weight, with `Statistics.shift` the corrected one.
    """

    codes: GPTVQCodes
    relative_error: float
    notes: list[str] = field(default_factory=list)


def quantize(
    weight: torch.Tensor,
    statistics: Statistics | None,
    spec: GPTVQSpec,
    options: GPTVQOptions = GPTVQOptions(),
) -> Quantized:
    """Quantize weight (out_features, in_features), any float dtype, on its own device."""
    columns = spec.num_vectors * spec.vector_dim
    hessian = (
        torch.eye(spec.in_features, device=weight.device)
        if statistics is None
        else statistics.hessian.to(weight.device)
    )
    factor = factorize(hessian, options.damping)
    dense = aim = weight.float()
    if statistics is not None and statistics.shift is not None:
        aim = dense + correction(dense, statistics.shift.to(dense.device), factor)
    pad_columns = columns - spec.in_features
    if pad_columns:
        # Padding columns are free: no input ever reaches them.
        tiny = 1e-3 * float(factor.hessian.diagonal().mean())
        filler = torch.full((pad_columns,), tiny, device=weight.device)
        factor = Factor(
            torch.block_diag(factor.upper, torch.diag(filler.sqrt())),
            torch.block_diag(factor.hessian, torch.diag(filler)),
            factor.damping,
            factor.notes,
        )
    target = torch.zeros(spec.num_row_groups * spec.group_rows, columns, device=weight.device)
    target[: spec.out_features, : spec.in_features] = aim
    solver = _Solver(target, factor, spec, options)
    solver.sweep()
    solver.refine()
    codes = solver.codes()
    error = (target - solver.state.decode())[: spec.out_features, : spec.in_features]
    norm = float(((dense @ hessian) * dense).sum(dtype=torch.float64))
    lost = float(((error @ hessian) * error).sum(dtype=torch.float64))
    return Quantized(codes, lost / norm if norm > 0 else 0.0, factor.notes)


class _Solver:
    """One matrix on its way from weights to codes."""

    def __init__(
        self, target: torch.Tensor, factor: Factor, spec: GPTVQSpec, options: GPTVQOptions
    ):
        self.target, self.factor, self.spec, self.options = target, factor, spec, options
        device = target.device
        rows = len(target)
        self.state = Lookup(
            codebooks=torch.zeros(
                spec.num_stripes,
                spec.num_row_groups,
                spec.num_centroids,
                spec.vector_dim,
                device=device,
            ),
            index=torch.zeros(rows, spec.num_vectors, dtype=torch.long, device=device),
            scale=None,
            vectors_per_stripe=spec.group_columns // spec.vector_dim,
            row_mask=(torch.arange(rows, device=device) < spec.out_features).float()[:, None],
        )
        self.codebook_scales: torch.Tensor | None = None
        self.codebook_ints: torch.Tensor | None = None

    # -- sweep ---------------------------------------------------------------------------------
    def sweep(self) -> None:
        sweep(self.target, self.factor.upper, self.state, self._begin)

    def _begin(self, start: int, stop: int, compensated: torch.Tensor) -> None:
        if start % self.spec.group_columns:
            return
        end = min(start + self.spec.group_columns, self.target.shape[1])
        if end > stop:  # a stripe wider than a panel: its later columns as they stand
            compensated = torch.cat([compensated, self.target[:, stop:end]], 1)
        stripe = start // self.spec.group_columns
        importance = self.factor.upper.diagonal()[start:end].square()
        self.state.codebooks[stripe] = self._fit_stripe(compensated, importance)

    def _fit_stripe(self, weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
        spec = self.spec
        d, groups = spec.vector_dim, spec.num_row_groups
        points = weight.reshape(groups, -1, d)
        w = (importance[None] * self.state.row_mask).reshape(groups, -1, d)
        limit = _POINTS_PER_CENTROID * spec.num_centroids
        if points.shape[1] > limit:
            generator = torch.Generator().manual_seed(self.options.seed)
            pick = torch.randperm(points.shape[1], generator=generator)[:limit].sort().values
            pick = pick.to(points.device)
            points, w = points[:, pick], w[:, pick]
        return kmeans(
            points,
            w,
            spec.num_centroids,
            iterations=self.options.kmeans_iterations,
            init=self.options.kmeans_init,
            seed=self.options.seed,
        )

    # -- refinement ------------------------------------------------------------------------------
    def refine(self) -> None:
        h = self.factor.hessian
        for _ in range(self.options.refine_iterations):
            self._update()
            refine.reassign(self.target, h, self.state)
        self._update()
        self._round()
        refine.reassign(self.target, h, self.state)

    def _update(self) -> None:
        if self.options.codebook_update:
            refine.fit_codebooks(
                self.target,
                self.factor.hessian,
                self.state,
                iterations=self.options.codebook_update_iterations,
            )

    def _round(self) -> None:
        if self.spec.codebook_dtype == "float16":
            self.state.codebooks = self.state.codebooks.half().float()
            return
        top = {"int8": 127, "int4": 7}[self.spec.codebook_dtype]
        books = self.state.codebooks
        scale = (books.abs().amax((2, 3)) / top).clamp_min(1e-30).bfloat16().float()
        ints = (books / scale[..., None, None]).round().clamp(-top - 1, top)
        self.codebook_scales, self.codebook_ints = scale, ints
        self.state.codebooks = ints * scale[..., None, None]

    def codes(self) -> GPTVQCodes:
        return GPTVQCodes(
            indices=self.state.index[: self.spec.out_features],
            codebooks=self.state.codebooks if self.codebook_ints is None else self.codebook_ints,
            codebook_scales=self.codebook_scales,
        )
