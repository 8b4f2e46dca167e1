"""CVXQ (Young, arXiv 2409.02026): one weight matrix to codes.

Rows of similar size and sensitivity are clustered; every group, one cluster in one input column,
gets its bit depth by rate-distortion allocation (`hf_vq.methods.allocation`), and the scale,
location and codes that lose least (`hf_vq.methods.cvxq_groups`).

Where this departs from the released code: D(B) is that of the quantizer in use instead of 2^-2B;
the allocation meets its budget exactly; levels are those of Lloyd and Max for Gaussian data unless
the spec says "laplace"; the search knows how scales are stored. Error feedback and the coordinate
descent that follows it are not part of the method at all (`error_feedback=False` is without): a
group lies in one column, so GPTQ's sweep fits, and its price per column, R_jj^2, is what the depths
are then allocated by.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from hf_vq.formats.cvxq import CVXQCodes, CVXQSpec, count_words, group_words
from hf_vq.methods.allocation import allocate_depths
from hf_vq.methods.cvxq_groups import Groups, Search, scale_grid, solve_columns
from hf_vq.methods.cvxq_levels import distortion_table
from hf_vq.methods.feedback import Factor
from hf_vq.methods.statistics import Statistics

# Columns whose compensation is kept fresh within a step; the rest are updated once per step.
_PANEL = 128
# Scales a group tries the first time, in multiples of what suits its variance.
_FIRST = (0.7, 0.84, 1.0, 1.19)
# And when it has one already, which competes.
_AGAIN = (1.0,)
# New depths are kept if they lower the loss of the sweep to this part of it, at least: what the
# refinement makes of the first ones is about 1 % better.
_CLEARLY = 0.97
# Sensitivities are raised to this part of their mean: an allocation needs an order for any budget.
_FLOOR = 1e-12


@dataclass(frozen=True)
class CVXQOptions:
    """How hard to work; nothing here changes the size of the result.

    distortion: "measured" allocates by the quantizer's own D(B), "law" by the paper's 2^-2B.
    reallocations: how often depths are allocated anew, by the weights as error feedback made them.
    """

    error_feedback: bool = True
    damping: float = 0.01
    reallocations: int = 1
    refine_iterations: int = 4
    fit_rounds: int = 3
    distortion: str = "measured"


@dataclass
class Quantized:
    """codes, tr(E H E^T) / tr(W H W^T) with the undamped H, and anything unusual.

    spec: that of the codes. Its num_words is what was asked for, or less where nothing was left
    to spend it on.
    """

    codes: CVXQCodes
    relative_error: float
    notes: list[str] = field(default_factory=list)
    spec: CVXQSpec | None = None


def quantize(
    weight: torch.Tensor,
    statistics: Statistics | None,
    spec: CVXQSpec,
    options: CVXQOptions = CVXQOptions(),
    depths: torch.Tensor | None = None,
) -> Quantized:
    """Quantize weight (out_features, in_features), any float dtype, on its own device.

    statistics: of the layer's inputs, on the same device. None: every input counts the same. spec:
    its num_words is the budget of the depths. depths: integers (M, I), for clusters as
    `cluster_rows` makes them; None: allocated within the matrix. Never writes to `weight`.
    """
    weight = weight.float()
    if statistics is None:
        statistics = Statistics(torch.eye(spec.in_features, device=weight.device), tokens=0)
    sensitivity = statistics.sensitivity
    # groups are stored column by column, so that any order of work can be undone
    factor = statistics.factor(options.damping, descending=options.error_feedback)
    order = factor.order
    if order is None:
        order = torch.arange(spec.in_features, device=weight.device)
    rows = torch.arange(spec.out_features, device=weight.device)
    if spec.permuted:
        rows = cluster_rows(weight, row_sensitivity(sensitivity, weight), spec.group_rows)
    target = clustered(weight, rows, spec.group_rows)[:, order]
    row_weight = clustered(_row_weight(sensitivity, weight)[:, None], rows, spec.group_rows)[:, 0]
    price = factor.upper.diagonal().square()
    measured = sensitivity is not None and sensitivity.dim() > 1
    if not options.error_feedback:
        # a whole map of gradients has the columns in it already, as the paper's has
        price = (factor.hessian.diagonal() - factor.added).clamp_min(0)
        price = torch.ones_like(price) if measured else price
    energy = group_energy(sensitivity, rows, spec, price.device, options.error_feedback)
    if energy.shape[1] > 1:
        energy = energy[:, order]
    solver = _Solver(target, row_weight, price * energy, statistics, factor, spec, options)
    if depths is None:
        solver.allocate_and_solve()
    else:
        solver.solve(depths.to(weight.device, torch.int64)[:, order], fixed=True)
    groups = solver.groups
    error = (target - groups.decode())[: spec.out_features]
    size, lost = factor.undamped(target), factor.undamped(error)
    notes = [*factor.notes, *_pruned(groups.depths)]
    found = replace(spec, num_words=count_words(groups.depths, spec.group_rows))
    return Quantized(
        _codes(groups, order, rows, spec), lost / size if size > 0 else 0.0, notes, found
    )


# -- sensitivities and clusters ----------------------------------------------------------------


def row_sensitivity(sensitivity: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
    """What an error in a row counts, float32 (O,), from `Statistics.sensitivity`; 1 without."""
    if sensitivity is None:
        return torch.ones(len(weight), device=weight.device)
    return sensitivity.float() if sensitivity.dim() == 1 else sensitivity.float().mean(1)


def _row_weight(sensitivity: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
    """The same with mean 1, and nowhere 0: a row without gradient still has its weights."""
    rows = row_sensitivity(sensitivity, weight)
    rows = rows / rows.mean().clamp_min(1e-30)
    return rows.clamp_min(1e-3)


def cluster_rows(weight: torch.Tensor, sensitivity: torch.Tensor, group_rows: int) -> torch.Tensor:
    """Rows in the order of their clusters, int64 (O,): position -> row (CVXQ section 4.2).

    Sorted by log2 of variance times sensitivity (O,), stable; cluster m is a run of `group_rows`.
    """
    variance = weight.float().var(1, unbiased=False).double()
    key = variance.clamp_min(1e-300).log2() + sensitivity.double().clamp_min(1e-300).log2()
    return key.argsort(stable=True)


def clustered(weight: torch.Tensor, rows: torch.Tensor, group_rows: int) -> torch.Tensor:
    """weight (O, c) with its rows in the order of their clusters, padded with zeros: (M * g, c)."""
    missing = -len(rows) % group_rows
    out = weight.new_zeros(len(rows) + missing, weight.shape[1])
    out[: len(rows)] = weight[rows]
    return out


def group_energy(
    sensitivity: torch.Tensor | None,
    rows: torch.Tensor,
    spec: CVXQSpec,
    device: torch.device,
    feedback: bool = True,
) -> torch.Tensor:
    """What the rows of every group count on average, float32 (M, 1), or (M, I) for a whole map.

    Padding counts nothing but takes room, so the last cluster's average is over its stored rows.
    sensitivity: as in `Statistics`. feedback: of a whole map the columns' own means are divided
    out: their level is the Hessian's to say, as error feedback lowers it.
    """
    if sensitivity is None:
        sensitivity = torch.ones(spec.out_features, device=device)
    flat = sensitivity.float().reshape(spec.out_features, -1)
    if flat.shape[1] > 1 and feedback:
        flat = flat / flat.mean(0).clamp_min(1e-30)
    grouped = clustered(flat, rows, spec.group_rows)
    return grouped.reshape(spec.num_clusters, spec.group_rows, -1).mean(1)


def group_variance(target: torch.Tensor, spec: CVXQSpec) -> torch.Tensor:
    """S^2 of every group, float32 (M, I): about the location, or about 0 without one.

    target: float32 (M * g, I), clustered.
    """
    shape = (spec.num_clusters, spec.group_rows, -1)
    count = torch.full((spec.num_clusters, 1), float(spec.group_rows), device=target.device)
    count[-1] -= spec.num_clusters * spec.group_rows - spec.out_features
    square = target.square().reshape(shape).sum(1) / count
    if spec.location == "none":
        return square
    return (square - (target.reshape(shape).sum(1) / count).square()).clamp_min(0)


def allocated(benefit: torch.Tensor, spec: CVXQSpec, distortion: str = "measured") -> torch.Tensor:
    """Depths uint8 (M, I) that take `spec.num_words` words, if the groups can be made to.

    benefit: (M, I), G^2 S^2, what a group's weights lose without any bits, per stored code. The
    law D(B) = 2^-2B is the paper's; see `CVXQOptions`.
    """
    if distortion == "measured":
        table = distortion_table(spec.levels)
    elif distortion == "law":
        table = 4.0 ** -torch.arange(9, dtype=torch.float64)
    else:
        raise ValueError(f'distortion must be "measured" or "law", got {distortion!r}')
    benefit = benefit.double()
    largest = float(benefit.max())
    raised = benefit.clamp_min(largest * _FLOOR) if largest > 0 else torch.ones_like(benefit)
    words = group_words(torch.arange(len(table)), spec.group_rows).tolist()
    ones = torch.ones(1, dtype=torch.int64, device=benefit.device)
    depths = allocate_depths(raised.flatten(), ones, table, spec.num_words, words)
    return depths.reshape(benefit.shape)


# -- codes -------------------------------------------------------------------------------------


class _Solver:
    """One matrix on its way from weights to codes, columns in the order of work.

    price: float32 (M, I), what a unit of squared error in a stored code of a group counts.
    """

    def __init__(
        self,
        target: torch.Tensor,
        row_weight: torch.Tensor,
        price: torch.Tensor,
        statistics: Statistics,
        factor: Factor,
        spec: CVXQSpec,
        options: CVXQOptions,
    ):
        self.target, self.price, self.spec, self.options = target, price, spec, options
        self.statistics, self.factor = statistics, factor
        columns = target.shape[1]
        self.panels = [(a, min(a + _PANEL, columns)) for a in range(0, columns, _PANEL)]
        self.groups = Groups(
            torch.zeros(price.shape, dtype=torch.int64, device=target.device),
            row_weight,
            scale_grid(target, spec.group_rows),
            spec.levels,
            spec.scale_dtype,
            spec.location,
        )

    def allocate_and_solve(self) -> None:
        self.solve(self._allocated(group_variance(self.target, self.spec)))

    def _allocated(self, variance: torch.Tensor) -> torch.Tensor:
        benefit = self.price.double() * variance.double()
        return allocated(benefit, self.spec, self.options.distortion).long()

    def solve(self, depths: torch.Tensor, fixed: bool = False) -> None:
        """Scales, locations and codes for depths (M, I); others if those turn out better."""
        groups, options = self.groups, self.options
        groups.depths = depths
        if not options.error_feedback:
            for a, b in self.panels:
                columns = self.target[:, a:b]
                zero = torch.zeros_like(columns)
                search = Search(_FIRST, options.fit_rounds)
                solve_columns(groups, a, columns, zero, zero[0], None, search, True)
            return
        with self.statistics.factored(self.factor) as upper:
            self._sweep(upper)
            for _ in range(0 if fixed else options.reallocations):
                if not self._reallocate(upper):
                    break
        for _ in range(options.refine_iterations):
            self._reassign()

    def _reallocate(self, upper: torch.Tensor) -> bool:
        """Depths by the variance of what the groups had to code, if that lowers the loss.

        Where much of a cluster is pruned, what it lost comes back as larger weights in the columns
        behind, and R_jj^2 S^2 of the weights as they were says far too little.
        """
        before = self.groups
        variance, least = self._compensated(upper)
        self.groups = before.copy()
        self.groups.depths = self._allocated(variance)
        self._sweep(upper)
        if self._compensated(upper)[1] < _CLEARLY * least:
            return True
        self.groups = before
        return False

    def _compensated(self, upper: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Variance of the compensated weights of every group, and the loss ||(W - Q) R||^2."""
        error = self.target - self.groups.decode()
        variance = torch.empty_like(self.price)
        loss = 0.0
        weight = self.groups.row_weight[:, None]
        for a, b in self.panels:
            inner = upper[a:b, a:b].triu()
            diagonal = inner.diagonal()
            lost = error[:, :a] @ upper[:a, a:b] + error[:, a:b] @ inner
            loss += float((weight * lost.square()).sum(dtype=torch.float64))
            # the compensated weight is what is stored and what is lost for good
            aim = self.target[:, a:b] - error[:, a:b] + lost / diagonal
            variance[:, a:b] = group_variance(aim, self.spec)
        return variance, loss

    def _sweep(self, upper: torch.Tensor) -> None:
        """Columns from left to right, each aiming at its compensated weights; see `feedback`."""
        error = torch.zeros_like(self.target)
        search = Search(_FIRST, self.options.fit_rounds)
        for a, b in self.panels:
            inner = upper[a:b, a:b].contiguous()
            carried = error[:, :a] @ upper[:a, a:b]
            ratio = 1 / inner.diagonal()
            error[:, a:b] = solve_columns(
                self.groups, a, self.target[:, a:b], carried, ratio, inner, search, True
            )

    def _reassign(self) -> None:
        """One pass of coordinate descent: each group's scale, location and codes given all others.

        A group's weights lie in one column, so what it should be is the same problem as without
        any Hessian, for another target: exact block descent, never worse.
        """
        hessian = self.factor.hessian
        search = Search(_AGAIN, self.options.fit_rounds)
        quantized = self.groups.decode()
        pull = (self.target - quantized) @ hessian
        for a, b in self.panels:
            inner = hessian[a:b, a:b].contiguous()
            u, ratio = pull[:, a:b].contiguous(), 1 / inner.diagonal()
            delta = solve_columns(self.groups, a, quantized[:, a:b], u, ratio, inner, search, False)
            pull[:, b:].addmm_(delta, hessian[a:b, b:])


def _codes(groups: Groups, order: torch.Tensor, rows: torch.Tensor, spec: CVXQSpec) -> CVXQCodes:
    """As the format wants them, columns back in their places."""
    back = order.argsort()
    m, g = groups.depths.shape[0], spec.group_rows
    codes = groups.codes.clone()
    codes[spec.out_features :] = 0
    location = None
    if spec.location != "none":
        location = groups.location_code() if spec.location == "int8" else groups.location
        location = location[:, back]
    logarithmic = spec.scale_dtype == "log8"
    scale = groups.scale[:, back]
    return CVXQCodes(
        depths=groups.depths[:, back].to(torch.uint8),
        codes=codes[:, back].reshape(m, g, -1).transpose(1, 2).long().contiguous(),
        scales=None if logarithmic else scale,
        scale_codes=groups.scale_code(scale).to(torch.uint8) if logarithmic else None,
        scale_grid=groups.grid if logarithmic else None,
        location=location,
        row_perm=rows if spec.permuted else None,
    )


def _pruned(depths: torch.Tensor) -> list[str]:
    pruned = int((depths == 0).sum())
    if not pruned:
        return []
    return [
        f"{pruned} of {depths.numel()} groups at 0 bits ({100 * pruned / depths.numel():.1f} %)"
    ]
