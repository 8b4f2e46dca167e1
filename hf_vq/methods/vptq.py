"""VPTQ (Liu et al., arXiv 2409.17066): one weight matrix to codes.

Vectors are runs of output rows of one input column, so error feedback acts after every column.
Columns are worked on in order of descending Hessian diagonal, whether or not the format stores a
permutation: with a single group the codes are put back in place. Codebooks are trained by k-means
in the normalised space, the residual one on what the first pass of the sweep leaves, after which
the sweep starts again from the weights; then codes (a beam over main and residual centroids) and
codebooks (least squares under the Hessian), with the norm if there is one, are refined in turn.

Where this departs from the released code: the Hessian moves into the normalised space with the
weights, rows that pad the last vector have no say, and everything after the second sweep.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hf_vq.formats.vptq import FLOATS, VPTQCodes, VPTQSpec
from hf_vq.methods import refine
from hf_vq.methods.feedback import Factor, sweep
from hf_vq.methods.kmeans import kmeans
from hf_vq.methods.lookup import Lookup
from hf_vq.methods.statistics import Statistics

# Points one codebook is trained on, per centroid; the refinement sees all.
_POINTS_PER_CENTROID = 128
# Rounds in which outlier columns and the others are refined in turn, each given the other.
_OUTLIER_ROUNDS = 2


@dataclass(frozen=True)
class VPTQOptions:
    """How hard to work, and what the norm is made of; nothing here changes the size."""

    norm: str | None = None
    kmeans_iterations: int = 10
    damping: float = 0.01
    error_feedback: bool = True
    refine_iterations: int = 4
    codebook_update: bool = True
    codebook_update_iterations: int = 30
    beam: int = 8
    seed: int = 0


@dataclass
class Quantized:
    """codes, tr(E H E^T) / tr(W H W^T) with the undamped H, and anything unusual."""

    codes: VPTQCodes
    relative_error: float
    notes: list[str] = field(default_factory=list)


def quantize(
    weight: torch.Tensor,
    statistics: Statistics | None,
    spec: VPTQSpec,
    options: VPTQOptions = VPTQOptions(),
) -> Quantized:
    """Quantize weight (out_features, in_features), any float dtype, on its own device.

    statistics: of the layer's inputs, on the same device. None: every input counts the same. Never
    writes to `weight`.
    """
    weight = weight.float()
    if statistics is None:
        statistics = Statistics(torch.eye(spec.in_features, device=weight.device), tokens=0)
    factor = statistics.factor(options.damping, spec.descending)
    order = torch.arange(spec.in_features, device=weight.device)
    if factor.order is not None:
        order = factor.order
    target = weight[:, order]
    solver = _Solver(target, factor, _norm(target, spec, options.norm), spec, options)
    solver.solve()
    size, lost = factor.undamped(target), factor.undamped(solver.error())
    return Quantized(solver.codes(order), lost / size if size > 0 else 0.0, factor.notes)


def _norm(
    weight: torch.Tensor, spec: VPTQSpec, kind: str | None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Scale and bias of every column, as they can be stored."""
    if spec.norm == "none":
        return None
    if spec.norm != "columns":
        raise ValueError(f"a norm over {spec.norm} can be read, but not chosen for quantizing")
    if kind == "min-max":
        bias = weight.amin(0)
        scale = weight.amax(0) - bias
    else:
        bias = weight.mean(0)
        scale = (weight - bias).square().mean(0).sqrt()
    # a column of equal weights is its bias
    scale = torch.where(scale > 1e-6 * weight.abs().max(), scale, 1.0)
    dtype = FLOATS[spec.codebook_dtype]
    return scale.to(dtype).float(), bias.to(dtype).float()


class _Solver:
    """One matrix on its way from weights to codes: its outlier columns, then the others.

    All columns are in the order of work. Given the codes of one part, the other is a problem of its
    own, with another target: what is lost in the first is made up for in the second.
    """

    def __init__(
        self,
        target: torch.Tensor,
        factor: Factor,
        norm: tuple[torch.Tensor, torch.Tensor] | None,
        spec: VPTQSpec,
        options: VPTQOptions,
    ):
        self.target, self.spec = target, spec
        n = spec.outlier_columns
        shapes = [(spec.num_groups, spec.vector_dim, spec.num_centroids, spec.num_res_centroids)]
        if n:
            shapes.insert(0, (1, spec.outlier_vector_dim, spec.outlier_centroids, 0))
        ranges = [slice(0, n), slice(n, None)][-len(shapes) :]
        self.upper, self.hessian = factor.upper, factor.hessian
        self.parts = [
            _Part(columns, shape, factor, norm, spec, options)
            for columns, shape in zip(ranges, shapes, strict=True)
        ]

    def solve(self) -> None:
        main = self.parts[-1]
        if len(self.parts) == 1:
            main.fit(self.target)
            main.refine(self.target)
            return
        outliers, n = self.parts[0], self.spec.outlier_columns
        outliers.fit(self.target[:, :n])
        main.fit(self._for_main())
        corner = torch.linalg.cholesky(self.hessian[:n, :n])
        for _ in range(_OUTLIER_ROUNDS):
            pull = main.error(self.target[:, n:]) @ self.hessian[n:, :n]
            outliers.refine(self.target[:, :n] + torch.cholesky_solve(pull.T, corner).T)
            main.refine(self._for_main())

    def _for_main(self) -> torch.Tensor:
        """The columns behind the outliers, with what the codes of those ask them to make up for."""
        n = self.spec.outlier_columns
        carried = self.parts[0].error(self.target[:, :n]) @ self.upper[:n, n:]
        shift = torch.linalg.solve_triangular(self.upper[n:, n:], carried, upper=True, left=False)
        return self.target[:, n:] + shift

    def error(self) -> torch.Tensor:
        """W - Q, columns in the order of work."""
        return torch.cat([p.error(self.target[:, p.columns]) for p in self.parts], 1)

    def codes(self, order: torch.Tensor) -> VPTQCodes:
        spec, main = self.spec, self.parts[-1].state
        outliers = self.parts[0].state if spec.outlier_columns else None
        # without a stored permutation the only group is all columns: back to where they were
        back = None if spec.permuted else order.argsort()

        def grouped(index: torch.Tensor) -> torch.Tensor:
            index = index.long() if back is None or outliers else index.long()[:, back]
            return index.reshape(len(index), spec.num_groups, -1).transpose(0, 1).contiguous()

        def placed(values: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat(values)[order.argsort()]

        norm = [p.norm for p in self.parts if p.norm is not None]
        return VPTQCodes(
            indices=grouped(main.index),
            centroids=main.codebooks[:, 0],
            res_indices=None if main.residual_index is None else grouped(main.residual_index),
            res_centroids=None if main.residual is None else main.residual[:, 0],
            outlier_indices=None if outliers is None else outliers.index.long(),
            outlier_centroids=None if outliers is None else outliers.codebooks[0, 0],
            perm=order if spec.permuted else None,
            scale=placed([scale for scale, _ in norm]) if norm else None,
            bias=placed([bias for _, bias in norm]) if norm else None,
        )


class _Part:
    """Columns that are looked up in the same codebooks.

    shape: groups, rows per vector, centroids, residual centroids (0: none). norm: scale and bias of
    all columns; those of the part are kept, and refined. Targets are (rows, columns of the part).
    """

    def __init__(
        self,
        columns: slice,
        shape: tuple[int, int, int, int],
        factor: Factor,
        norm: tuple[torch.Tensor, torch.Tensor] | None,
        spec: VPTQSpec,
        options: VPTQOptions,
    ):
        self.columns, self.spec, self.options = columns, spec, options
        self.hessian = factor.hessian[columns, columns]
        self.upper = factor.upper[columns, columns]
        groups, v, self.num_centroids, self.num_residual = shape
        device, width, rows = self.hessian.device, len(self.hessian), spec.out_features
        blocks = -(-rows // v)
        self.padding = blocks * v - rows
        scale, bias = (norm[0][columns], norm[1][columns]) if norm else (None, None)
        self.bias = torch.zeros(width, device=device) if bias is None else bias
        self.state = Lookup(
            codebooks=torch.zeros(groups, 1, self.num_centroids, v, device=device),
            index=torch.zeros(blocks, width, dtype=torch.int32, device=device),
            scale=None,
            vectors_per_stripe=width // groups,
            row_mask=(torch.arange(blocks * v, device=device) < rows).float()[:, None],
            vector_rows=v,
            column_scale=scale,
        )

    @property
    def norm(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        scale = self.state.column_scale
        return None if scale is None else (scale, self.bias)

    def error(self, target: torch.Tensor) -> torch.Tensor:
        return target - self.bias - self.state.decode()[: len(target)]

    # -- codebooks and a first choice of codes ---------------------------------------------------
    def fit(self, target: torch.Tensor) -> None:
        """Main codebooks, a sweep; residual codebooks on what it leaves, another sweep."""
        state, aim = self.state, self._aim(target)
        state.codebooks = self._codebooks(aim, self.num_centroids)
        missed = self._sweep(aim)
        if self.num_residual:
            state.residual = self._codebooks(missed, self.num_residual)
            state.residual_index = torch.zeros_like(state.index)
            self._sweep(aim)

    def _aim(self, target: torch.Tensor) -> torch.Tensor:
        """What look-up and column scale should give, rows padded."""
        return torch.nn.functional.pad(target - self.bias, (0, 0, 0, self.padding))

    def _sweep(self, aim: torch.Tensor) -> torch.Tensor:
        """Codes for all columns; returns what each column missed of its compensated weights."""
        upper = self.upper
        if not self.options.error_feedback:
            upper = torch.diag(upper.diagonal())
        error = sweep(aim, upper, self.state, lambda *_: None, beam=self.options.beam)
        return (error @ upper) / upper.diagonal()

    def _codebooks(self, aim: torch.Tensor, k: int) -> torch.Tensor:
        """k-means over the vectors of every group: (groups, 1, k, v)."""
        state, options = self.state, self.options
        weights = self.upper.diagonal().square() * state.row_mask
        if state.column_scale is not None:
            aim, weights = aim / state.column_scale, weights * state.column_scale.square()
        out = []
        for lo in range(0, aim.shape[1], state.vectors_per_stripe):
            stripe = slice(lo, lo + state.vectors_per_stripe)
            points, mass = (
                part[:, stripe].reshape(len(state.index), state.vector_rows, -1).mT.flatten(0, 1)
                for part in (aim, weights)
            )
            limit = _POINTS_PER_CENTROID * k
            if len(points) > limit:
                generator = torch.Generator().manual_seed(options.seed)
                pick = torch.randperm(len(points), generator=generator)[:limit].sort().values
                points, mass = points[pick.to(points.device)], mass[pick.to(points.device)]
            centroids = kmeans(
                points[None],
                mass[None],
                k,
                iterations=options.kmeans_iterations,
                init="kmeans++",
                seed=options.seed,
            )
            out.append(centroids)
        return torch.stack(out)

    # -- refinement ------------------------------------------------------------------------------
    def refine(self, target: torch.Tensor) -> None:
        """Codes, codebooks and norm in turn, at their stored precision; never worse than before."""
        rounds = self.options.refine_iterations
        best = self._stored(target)
        for _ in range(rounds):
            self._update(target)
            refine.reassign(self._aim(target), self.hessian, self.state, self.options.beam)
        self._update(target)
        self.state, self.bias, _ = min(best, self._stored(target), key=lambda stored: stored[2])

    def _update(self, target: torch.Tensor) -> None:
        if not self.options.codebook_update:
            return
        refine.fit_codebooks(
            self._aim(target),
            self.hessian,
            self.state,
            iterations=self.options.codebook_update_iterations,
        )
        if self.state.column_scale is not None:
            refine.fit_column_scale(self._aim(target), self.hessian, self.state)
            # the best bias makes every column's error average out, whatever the Hessian
            self.bias = self.bias + self.error(target).mean(0)

    def _stored(self, target: torch.Tensor) -> tuple[Lookup, torch.Tensor, float]:
        """State and bias as they would be stored, codes chosen for them, and their loss."""
        dtype = FLOATS[self.spec.codebook_dtype]
        before = self.state, self.bias
        self.state = self.state.copy()
        self.state.books = self.state.books.to(dtype).float()
        if self.state.column_scale is not None:
            self.state.column_scale = self.state.column_scale.to(dtype).float()
            self.bias = self.bias.to(dtype).float()
        aim = self._aim(target)
        if self.options.refine_iterations:
            refine.reassign(aim, self.hessian, self.state, self.options.beam)
        out = self.state, self.bias, refine.loss(aim, self.hessian, self.state)
        self.state, self.bias = before
        return out
