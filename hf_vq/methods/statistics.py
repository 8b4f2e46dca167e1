"""Second-order statistics of the inputs of a linear layer.

Every method measures the damage of replacing W by Q on the layer's own output,
``mean_t ||(W - Q) x_t||^2 = tr((W - Q) H (W - Q)^T)`` with ``H = mean_t x_t x_t^T`` (GPTQ eq. 1,
GPTVQ section 2). The factor 2 of the papers' Hessian is left out: no step depends on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_vq.methods.feedback import Factor, factorize, fold, unfold

# Tokens per input channel that make the shift half as certain as it looks.
_SHRINKAGE = 8


@dataclass
class Statistics:
    """What calibration knows about the inputs of one matrix.

    hessian: float32 (in_features, in_features), mean of x x^T over `tokens` tokens.
    shift: float32 (in_features, in_features) or None, mean of (x_dense - x) x^T where x_dense is
    what the layer would have seen in the unquantized model. pull: in its place W @ shift, where
    just one W reads the input. owned: nobody else needs `hessian`, so `factor` may damp it in
    place: a wide layer can hardly spare a copy. last: owned, and only one more matrix will be
    quantized with it, which `factored` makes use of. sensitivity: float32, up to a factor, what an
    error counts in every row (out_features,) or weight (out_features, in_features) of the one
    matrix it is for (the mean square of a gradient); None: the same in all rows, and in the
    columns what the Hessian says. mean: float32 (in_features,) or None, the mean of x.
    """

    hessian: torch.Tensor
    tokens: int
    shift: torch.Tensor | None = None
    owned: bool = False
    pull: torch.Tensor | None = None
    last: bool = False
    _factor: Factor | None = field(default=None, repr=False)
    _asked: float | None = field(default=None, repr=False)
    _order: torch.Tensor | None = field(default=None, repr=False)
    sensitivity: torch.Tensor | None = None
    mean: torch.Tensor | None = None

    def trust(self) -> float:
        """How much of a shift to believe, 0 to 1: its noise grows with channels per token."""
        return self.tokens / (self.tokens + _SHRINKAGE * len(self.hessian))

    def factor(self, damping: float, descending: bool = False) -> Factor:
        """The damped and factored Hessian, shared by all matrices that read the same input.

        descending: with the channels in order of their mean square, largest first (`Factor.order`).
        Asking for one order takes the place of the other.
        """
        if descending != (self._order is not None):
            self._reorder(descending)
        if self._factor is None or self._asked != damping:
            if self._factor is not None and self.owned:
                self.hessian.diagonal().sub_(self._factor.added)
            self._factor = factorize(self.hessian, damping, in_place=self.owned)
            self._factor.order = self._order
            self._asked = damping
        return self._factor

    def _reorder(self, descending: bool) -> None:
        if self._factor is not None and self.owned:
            self.hessian.diagonal().sub_(self._factor.added)
        self._factor = None
        new = descending_order(self.hessian) if self._order is None else self._order.argsort()
        self.hessian, self.owned = self.hessian[new][:, new], True
        self._order = new if descending else None

    @contextmanager
    def factored(self, factor: Factor) -> Iterator[torch.Tensor]:
        """The upper triangle R of `factor`, for as long as its Hessian is not needed.

        What is below the diagonal is not to be read. Of the last matrix's own factor, H and R live
        in one array meanwhile, and afterwards R is gone.
        """
        if not self.last or factor is not self._factor or factor.hessian is not self.hessian:
            yield factor.upper
            return
        diagonal = fold(factor)
        try:
            yield factor.upper
        finally:
            unfold(factor, diagonal)
            self._asked = None  # whoever asks again needs a new one


def descending_order(hessian: torch.Tensor) -> torch.Tensor:
    """Place in the order -> channel, for a Hessian (c, c)."""
    return hessian.diagonal().argsort(descending=True, stable=True)


@contextmanager
def exact_products_of(dtype: torch.dtype) -> Iterator[None]:
    """Let the CPU multiply float32 copies of bfloat16 data in its bfloat16 units.

    The inputs are representable in bfloat16 and the units accumulate in float32, so nothing is
    lost, and machines that have them do it 3 to 10 times faster.
    """
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if dtype is not torch.bfloat16 or not hasattr(matmul, "fp32_precision"):
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class HessianAccumulator:
    """Running sums of x and x x^T in float32 (and, when asked for, of x_dense x^T).

    weight: the only W that reads this input, (r, in_features), where ``W (x_dense - x) x^T`` is to
    be summed instead; for a W that is much wider than high it is smaller and cheaper.
    """

    def __init__(
        self,
        in_features: int,
        device: torch.device | str,
        with_shift: bool = False,
        weight: torch.Tensor | None = None,
    ):
        self.total = torch.zeros(in_features, in_features, device=device)
        self.sum = torch.zeros(in_features, device=device)
        self.weight = weight if with_shift else None
        rows = in_features if weight is None else len(weight)
        self.cross = torch.zeros(rows, in_features, device=device) if with_shift else None
        self.tokens = 0

    def add(self, x: torch.Tensor, dense: torch.Tensor | None = None) -> None:
        """Add a batch of inputs of shape (..., in_features), any float dtype.

        dense: the same tokens in the unquantized model. Without it (as for an expert, whose tokens
        the router may have chosen differently) there is no shift for this matrix.
        """
        flat = x.reshape(-1, x.shape[-1])
        wide = flat.float()
        self.sum += wide.sum(0)
        with exact_products_of(x.dtype):
            self.total.addmm_(wide.T, wide)
            if dense is None or dense.shape != x.shape:
                self.cross = None
            elif self.cross is not None:
                aim = dense.reshape(flat.shape).float()
                if self.weight is not None:
                    # Of a difference the bfloat16 units lose 2^-9, at random from token to token:
                    # as much less than the shift itself varies between them
                    aim = (aim - wide) @ self.weight.float().T
                self.cross.addmm_(aim.T, wide)
        self.tokens += flat.shape[0]

    def statistics(self) -> Statistics:
        """The means. Takes the sums along: they are too large to be held twice."""
        tokens = max(self.tokens, 1)
        cross, self.cross = self.cross, None
        shift: torch.Tensor | None = None
        pull: torch.Tensor | None = None
        if cross is not None and self.weight is None:
            shift = cross.sub_(self.total).div_(tokens)
        elif cross is not None:
            pull = cross.div_(tokens)
        hessian, self.total = self.total.div_(tokens), torch.empty(0)
        mean = self.sum / tokens
        return Statistics(hessian, self.tokens, shift, owned=True, pull=pull, mean=mean)
