"""Whether a compiled library computes what it should, on the processor at hand.

Which instructions the C sources use depends on the processor, so a library meets processors that
its authors had not. `cpu_build` therefore lets every library that it has compiled prove itself
once, in a process of its own (which may crash), before anything is computed with it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import hf_vq_kernels
import torch
from hf_vq_kernels import cpu_build
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}
TOKENS = (1, 5, 40)
WRONG = 3
"""Exit status of a process whose library computes something else."""

# (name, linear, dequantize, packed tensors, geometry, out_features, in_features)
Case = tuple[str, Callable[..., Tensor], Callable[..., Tensor], tuple, tuple, int, int]


def _words(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)


def _gptvq(
    generator: torch.Generator, rows: int, columns: int, dim: int, bits: int, block: int
) -> Case:
    group_rows, group_columns = rows // 2, 256
    books = (-(-columns // group_columns), -(-rows // group_rows))
    codebooks = torch.randint(-127, 128, (*books, 2**bits, dim), generator=generator)
    scale_codes = scale_grid = None
    if block:
        blocks = -(-columns // block)
        scale_codes = _words(generator, rows, -(-blocks // 8))
        scale_grid = torch.stack([torch.zeros(blocks), torch.full((blocks,), 0.125)]).half()
    packed = (
        _words(generator, rows, -(-(-(-columns // dim) * bits) // 32)), codebooks.to(torch.int8),
        (0.01 * torch.rand(books, generator=generator)).bfloat16(), None, scale_codes, scale_grid,
    )  # fmt: skip
    geometry = (dim, 2**bits, group_rows, group_columns, block, True)
    linear, dequantize = hf_vq_kernels.gptvq_linear, hf_vq_kernels.gptvq_dequantize
    name = f"gptvq, {2**bits} vectors of {dim}"
    return name, linear, dequantize, packed, geometry, rows, columns


def _vptq(
    generator: torch.Generator, rows: int, columns: int, dim: int, bits: int, res_bits: int
) -> Case:
    words = -(-columns * (bits + res_bits) // 32)
    main, res = (
        torch.randn((1, 2**b * dim), generator=generator).half() if b else None
        for b in (bits, res_bits)
    )
    norm = torch.randn((2, columns), generator=generator).half()
    indices = _words(generator, 1, -(-rows // dim), words)
    packed = (indices, main, res, None, None, None, norm[0], norm[1])
    linear, dequantize = hf_vq_kernels.vptq_linear, hf_vq_kernels.vptq_dequantize
    name = f"vptq, {2**bits} vectors of {dim}"
    return name, linear, dequantize, packed, (rows, dim, 0, False), rows, columns


def _cvxq(generator: torch.Generator, rows: int, columns: int, group_rows: int) -> Case:
    clusters = -(-rows // group_rows)
    depths = torch.randint(0, 9, (clusters, columns), generator=generator)
    size = int(((depths * group_rows + 31) // 32).sum())
    padded = torch.nn.functional.pad(depths, (0, -columns % 8)).unflatten(-1, (-1, 8))
    together = (padded << (4 * torch.arange(8))).sum(-1)
    packed = (
        _words(generator, size), (together - (together >> 31 << 32)).to(torch.int32),
        torch.randint(0, 256, (clusters, columns), generator=generator).to(torch.uint8),
        torch.tensor([[0.0], [0.005]]).expand(2, clusters).contiguous().half(),
        torch.randint(-128, 128, (clusters, columns), generator=generator).to(torch.int8), None,
    )  # fmt: skip
    linear, dequantize = hf_vq_kernels.cvxq_linear, hf_vq_kernels.cvxq_dequantize
    name = f"cvxq, {group_rows} rows"
    return name, linear, dequantize, packed, (rows, group_rows, "lloyd"), rows, columns


def cases() -> Iterator[Case]:
    """Matrices of every format and of every way in which its sources compute."""
    generator = torch.Generator().manual_seed(0)
    for dim, bits, block in ((2, 4, 0), (2, 4, 32), (4, 8, 0), (4, 8, 32), (2, 6, 64), (1, 3, 0)):
        yield _gptvq(generator, 70, 900, dim, bits, block)
    for dim, bits, res_bits in ((8, 12, 0), (8, 8, 8), (6, 10, 0), (4, 8, 0), (8, 16, 0)):
        yield _vptq(generator, 98, 333, dim, bits, res_bits)
    for group_rows in (128, 32, 24):
        yield _cvxq(generator, 200, 301, group_rows)


def complaint() -> str | None:
    """What the library of this process computes wrong, in one line; None if it is right."""
    generator = torch.Generator().manual_seed(1)
    for name, linear, dequantize, packed, geometry, rows, columns in cases():
        with hf_vq_kernels.use_backend("torch"):
            weight = dequantize(*packed, columns, *geometry, torch.float32)
        bias = torch.randn(rows, generator=generator)
        with hf_vq_kernels.use_backend("c"):
            for dtype, tolerance in TOLERANCE.items():
                if not torch.equal(
                    dequantize(*packed, columns, *geometry, dtype), weight.to(dtype)
                ):
                    return f"{name}: decoding to {dtype}"
                for tokens in TOKENS:
                    x = torch.randn((tokens, columns), generator=generator).to(dtype)
                    y = linear(x, *packed, bias, *geometry).double()
                    right = x.double() @ weight.double().T + bias
                    error = float((y - right).norm() / right.norm())
                    if not error <= tolerance:
                        return f"{name}: {tokens} tokens in {dtype}, relative error {error:.1e}"
    return None


def main(arguments: list[Any]) -> None:
    """arguments: the path of the library to be proved."""
    cpu_build.load(arguments[0])
    found = complaint()
    if found is not None:
        print(found)
        sys.exit(WRONG)
