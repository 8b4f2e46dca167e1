"""What theory says k-means codebooks reach: the mean squared error on unit Gaussian weights.

With H = I error feedback has nothing to feed back and the result must equal plain k-means vector
quantization: for scalars the Lloyd-Max quantizer, for vectors what the literature and independent
k-means runs give. No quantizer of R bits per weight can do better than 2**(-2 R).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from hf_vq.formats.gptvq import GPTVQSpec
from hf_vq.methods.gptvq import GPTVQOptions, quantize


class Check(NamedTuple):
    """Mean squared error per unit-variance weight: as known and as found."""

    dim: int
    bits: int
    expected: float
    found: float

    @property
    def ratio(self) -> float:
        return self.found / self.expected

    @property
    def passed(self) -> bool:
        """Within 2 % of what is known, and not below the rate-distortion bound."""
        return abs(self.ratio - 1) <= 0.02 and self.found >= 4.0**-self.bits


# (vector dimension, bits per weight, mean squared error, side of the Gaussian matrix): as many
# weights as it takes for the codebook not to be fitted to the sample.
KNOWN = [
    (1, 2, 0.1175, 256),
    (1, 3, 0.0345, 256),
    (1, 4, 0.0095, 256),
    (2, 2, 0.1065, 256),
    (4, 2, 0.098, 1024),
]


def check(dim: int, bits: int, expected: float, side: int) -> Check:
    """One codebook for the matrix, worked on until it settles; best of some seeds for vectors.

    Scalars have one optimum and start from evenly spaced ranks; vectors have many local ones.
    """
    weight = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    spec = GPTVQSpec(side, side, dim, 2 ** (bits * dim), side, side, "float16")
    tries = [("mahalanobis", 0)] if dim == 1 else [("kmeans++", seed) for seed in range(3)]
    errors = []
    for init, seed in tries:
        options = GPTVQOptions(
            kmeans_init=init,
            kmeans_iterations=100,
            refine_iterations=200 if dim < 4 else 10,
            seed=seed,
        )
        errors.append(quantize(weight, None, spec, options).relative_error)
    return Check(dim, bits, expected, min(errors))


def table(found: list[Check]) -> str:
    """Markdown."""
    lines = [
        "| vectors of | bits per weight | known | found | ratio | within 2 % |",
        "|---|---|---|---|---|---|",
    ]
    for c in found:
        verdict = "PASS" if c.passed else "MISS"
        lines.append(
            f"| {c.dim} | {c.bits} | {c.expected:.4f} | {c.found:.5f} | {c.ratio:.3f} | {verdict} |"
        )
    return "\n".join(lines)
