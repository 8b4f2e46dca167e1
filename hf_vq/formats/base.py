"""What every packed format has in common: a spec per matrix, and the exact tensors it is stored in.

A `LayerSpec` is the shape-only description of one packed matrix. It is what the plan chooses, what
`config.json` records and what the loader needs to build an empty layer; everything that has a size
(bytes, bits per weight) is computed from `layout()` and nothing else, so a ledger cannot drift
from the file.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch


class TensorLayout(NamedTuple):
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class LayerSpec(ABC):
    """Everything but the values of one packed matrix of shape (out_features, in_features)."""

    method: ClassVar[str]

    out_features: int
    in_features: int

    @abstractmethod
    def layout(self) -> dict[str, TensorLayout]:
        """Name -> shape and dtype of every tensor that stores this matrix (bias apart)."""

    @property
    def descending(self) -> bool:
        """Whether columns are quantized in order of descending Hessian diagonal."""
        return False

    @property
    def trainable(self) -> LayerSpec | None:
        """The same matrix with codebooks that an optimizer can move: float32. None: cannot be."""
        return None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.layout().values())

    @property
    def num_weights(self) -> int:
        return self.out_features * self.in_features

    @property
    def bits_per_weight(self) -> float:
        """All-in: codes with their padding, codebooks and every scale, over the dense weights."""
        return 8 * self.nbytes / self.num_weights

    def to_dict(self) -> dict[str, Any]:
        """The fields that `config.json` stores: all but the shape, which the model knows."""
        fields = dataclasses.asdict(self)
        del fields["out_features"], fields["in_features"]
        return fields
