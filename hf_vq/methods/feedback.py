"""Second-order error feedback: the damped factor of the Hessian and the column sweep.

With ``H = R R^T``, R upper triangular, the output error of quantizing W to Q column by column is
``||(W - Q) R||^2 = sum_j ||(W - Q)_j R_jj + sum_{i<j} (W - Q)_i R_ij||^2``. Everything left of
column j is fixed when j is quantized, so the best it can aim for is the *compensated* weight
``W_j + sum_{i<j} (W - Q)_i R_ij / R_jj`` at a price of ``R_jj^2`` per unit of squared error. That
is GPTQ's and GPTVQ's update (their U is R^-1, so R_jj^2 is their 1/[H^-1]_jj) without ever
inverting the Hessian, exact for vectors of several columns too: then R_jj is a block.

Both vector methods use it: GPTVQ with steps of `vector_dim` columns, VPTQ with steps of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from hf_vq.methods.lookup import Lookup, diagonal_blocks
from hf_vq.methods.panel import solve_panel


@dataclass
class Factor:
    """H + damping = upper @ upper.T, and what had to be done to get there.

    upper: float32 (c, c) upper triangular. hessian: the damped H that it factors. damping: relative
    to mean(diag H). added: the same, as what was added to the diagonal. notes: empty when nothing
    unusual happened. order: place -> input channel, where they are not in their own order.
    """

    upper: torch.Tensor
    hessian: torch.Tensor
    damping: float
    added: float
    notes: list[str]
    order: torch.Tensor | None = None

    def undamped(self, matrix: torch.Tensor) -> float:
        """tr(M H M^T) for the Hessian as it was before damping."""
        damped = float(((matrix @ self.hessian) * matrix).sum(dtype=torch.float64))
        return max(0.0, damped - self.added * float(matrix.square().sum(dtype=torch.float64)))


def factorize(hessian: torch.Tensor, damping: float = 0.01, *, in_place: bool = False) -> Factor:
    """Damp and factor a Hessian of shape (c, c); never fails, says what it did instead.

    Dead inputs (zero diagonal) get the damping alone. If the factorization breaks down (too few
    tokens, rounding) the damping grows tenfold up to 1, then only the diagonal is kept; a Hessian
    with non-finite entries falls back to its diagonal, or to the identity. in_place: damp the given
    float32 matrix itself, which saves a copy.
    """
    notes: list[str] = []
    h = hessian if in_place else hessian.float().clone()
    if not all_finite(h):
        diagonal = h.diagonal().clone()
        usable = bool(torch.isfinite(diagonal).all()) and bool((diagonal > 0).any())
        notes.append("non-finite Hessian: " + ("its diagonal" if usable else "identity") + " used")
        h.zero_().diagonal().copy_(diagonal if usable else torch.ones_like(diagonal))
    diagonal = h.diagonal().clone()
    dead = int((diagonal <= 0).sum())
    if dead:
        notes.append(f"{dead} dead input channels")
    mean = float(diagonal.clamp_min(0).mean())
    if mean <= 0:
        notes.append("all-zero Hessian: identity used")
        h.zero_().diagonal().fill_(1.0)
        diagonal, mean = h.diagonal().clone(), 1.0
    level = damping
    while level <= 1.0:
        h.diagonal().copy_(diagonal + level * mean)
        upper = _upper_factor(h)
        if upper is not None:
            if level != damping:
                notes.append(f"damping raised to {level:g}")
            return Factor(upper, h, level, level * mean, notes)
        level = max(level, 1e-4) * 10
    notes.append("Hessian not positive definite: its diagonal used")
    level = max(damping, 1e-4)  # dead inputs need some, or the sweep would divide by zero
    h.zero_().diagonal().copy_(diagonal.clamp_min(0) + level * mean)
    return Factor(h.sqrt(), h, level, level * mean, notes)


def all_finite(matrix: torch.Tensor) -> bool:
    """Whether no entry is NaN or infinite; a slice at a time, for isfinite makes copies."""
    return all(bool(torch.isfinite(rows).all()) for rows in matrix.split(256))


def _upper_factor(matrix: torch.Tensor) -> torch.Tensor | None:
    """R upper triangular with R R^T = matrix, or None if it is not positive definite.

    One new (c, c) array and nothing else: for a wide layer this is the peak of memory. R is the
    Cholesky factor of the matrix read backwards, read backwards; reading both axes of a contiguous
    matrix backwards is reading its memory backwards.
    """
    work = matrix.clone(memory_format=torch.contiguous_format)
    _reverse(work)
    info = torch.empty((), dtype=torch.int32, device=work.device)
    # LAPACK factors column-major matrices where they are; of a symmetric one that is the transpose
    lower = work.mT
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    if int(info) != 0 or not bool(torch.isfinite(work.diagonal().sum())):
        return None
    _reverse(work)
    return work.mT


def _reverse(matrix: torch.Tensor, chunk: int = 1 << 20) -> None:
    """Reverse both axes of a contiguous matrix, in place."""
    flat = matrix.view(-1)
    n = len(flat)
    for lo in range(0, n // 2, chunk):
        hi = min(lo + chunk, n // 2)
        front = flat[lo:hi].flip(0)
        flat[lo:hi] = flat[n - hi : n - lo].flip(0)
        flat[n - hi : n - lo] = front


def correction(pull: torch.Tensor, factor: Factor) -> torch.Tensor:
    """What to add to a weight W (r, c) so that it undoes what earlier layers have lost.

    The original model feeds the layer x_dense, the quantized one x. The weight that comes closest
    to ``W x_dense`` on x is ``W + W S H^-1`` with S = mean (x_dense - x) x^T, and the error of
    any Q is that of missing it, plus a constant: the asymmetric calibration of GPTAQ
    (arXiv 2504.02692) as a change of target, good for any method. pull: W S, float32 (r, c), is
    overwritten with the result.
    """
    upper, order = factor.upper, factor.order
    if order is not None:
        sorted_pull = correction(pull[:, order], replace(factor, order=None))
        return pull.index_copy_(1, order, sorted_pull)
    torch.linalg.solve_triangular(upper.mT, pull, upper=False, left=False, out=pull)
    return torch.linalg.solve_triangular(upper, pull, upper=True, left=False, out=pull)


def bias_correction(
    weight: torch.Tensor, quantized: torch.Tensor, mean_input: torch.Tensor
) -> torch.Tensor:
    """What to add to the bias, float32 (O,): -(W_q - W) xbar (CVXQ section 7; its sign is a typo).

    weight, quantized: (O, I). mean_input: (I,), the mean input over tokens. Afterwards the mean of
    the layer's output is that of the unquantized one on the same inputs.
    """
    return (weight.float() - quantized.float()) @ mean_input.float()


def fold(factor: Factor, step: int = 256) -> torch.Tensor:
    """Make H and R of `factor` share the array of H, for a time in which only R is needed.

    R takes the upper triangle and the diagonal, H is symmetric and keeps what is below. Returns
    the diagonal of H, which `unfold` needs.
    """
    h, upper = factor.hessian, factor.upper
    diagonal = h.diagonal().clone()
    for a in range(0, len(h), step):
        b = a + step
        h[a:b, a:b] = upper[a:b, a:b].triu() + h[a:b, a:b].tril(-1)
        h[a:b, b:] = upper[a:b, b:]
    factor.upper = h
    return diagonal


def unfold(factor: Factor, diagonal: torch.Tensor, step: int = 256) -> None:
    """Give a folded factor its H back; R is gone."""
    h = factor.hessian
    for a in range(0, len(h), step):
        b = a + step
        below = h[a:b, a:b].tril(-1)
        h[a:b, a:b] = below + below.mT
        h[a:b, b:] = h[b:, a:b].mT
    h.diagonal().copy_(diagonal)
    factor.upper = torch.empty(0, 0, device=h.device)


def sweep(
    weight: torch.Tensor,
    upper: torch.Tensor,
    state: Lookup,
    begin_panel: Callable[[int, int, torch.Tensor], None],
    width: int = 128,
    beam: int = 1,
) -> torch.Tensor:
    """Choose the codes of `state` from left to right, each aiming at the compensated weight.

    weight: float32 (r, c). upper: (c, c) from `factorize`, read on and above its diagonal only.
    Panels of about `width` columns are announced by ``begin_panel(start, stop, compensated)``,
    where compensated (r, stop - start) is what their weights should be, given the codes of all
    columns left of them; the codebooks of the panel's stripe must be in place when it returns.
    beam: as in `solve_panel`. Returns ``weight - Q`` (r, c).
    """
    d = state.dim
    error = torch.zeros_like(weight)
    for start, stop in state.panels(width):
        inner = upper[start:stop, start:stop].triu()
        carried = error[:, :start] @ upper[:start, start:stop]
        shift = torch.linalg.solve_triangular(inner, carried, upper=True, left=False)
        begin_panel(start, stop, weight[:, start:stop] + shift)
        corner = diagonal_blocks(inner, d).transpose(1, 2)
        error[:, start:stop] = solve_panel(
            state,
            start // d,
            base=weight[:, start:stop],
            u=carried,
            a=corner,
            m=corner.transpose(1, 2) @ corner,
            b=inner,
            beam=beam,
        )
    return error
