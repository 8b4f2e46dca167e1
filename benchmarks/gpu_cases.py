"""Random packed matrices for benchmarks of GPU kernels, and their compilation in parallel.

A case is what the operators take: tensors and geometry, with random codes and codebooks of the
sizes that are used in earnest. Values do not matter for time; they come out near 1.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import hf_vq_kernels.cvxq_reference as cvxq_reference
import hf_vq_kernels.reference as gptvq_reference
import hf_vq_kernels.vptq_reference as vptq_reference
import torch
from torch import Tensor

REFERENCES: dict[str, Callable[..., Tensor]] = {
    "gptvq": gptvq_reference.gptvq_dequantize,
    "vptq": vptq_reference.vptq_dequantize,
    "cvxq": cvxq_reference.cvxq_dequantize,
}


@dataclass(frozen=True)
class Case:
    """One packed matrix: `packed` and `geometry` are those of the operators of `method`."""

    method: str
    packed: tuple[Tensor | None, ...]
    geometry: tuple[Any, ...]
    out_features: int
    in_features: int

    @property
    def nbytes(self) -> int:
        """What a product has to read."""
        return sum(t.nbytes for t in self.packed if t is not None)

    @property
    def bits(self) -> float:
        """Bits per weight, everything counted."""
        return 8 * self.nbytes / (self.out_features * self.in_features)

    def linear(self, x: Tensor) -> Tensor:
        """The operator, as a layer calls it."""
        return getattr(torch.ops.hf_vq, f"{self.method}_linear")(
            x, *self.packed, None, *self.geometry
        )

    def input_gradient(self, grad: Tensor) -> Tensor:
        """The operator that the backward pass calls."""
        operator = getattr(torch.ops.hf_vq, f"{self.method}_input_gradient")
        return operator(grad, *self.packed, self.in_features, *self.geometry)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The operator that makes the dense weight."""
        operator = getattr(torch.ops.hf_vq, f"{self.method}_dequantize")
        return operator(*self.packed, self.in_features, *self.geometry, dtype)

    def embedding(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The operator that decodes rows `ids`."""
        operator = getattr(torch.ops.hf_vq, f"{self.method}_embedding")
        return operator(ids, *self.packed, self.in_features, *self.geometry, dtype)

    def to(self, device: str) -> Case:
        """The same matrix on another device."""
        return replace(self, packed=tuple(None if t is None else t.to(device) for t in self.packed))

    def trainable(self) -> Case:
        """The same matrix as training sees it: with codebooks or scales in float32."""
        packed = list(self.packed)
        if self.method == "gptvq":
            values = gptvq_reference.expand_codebooks(
                *packed[1:4], self.geometry[1], self.geometry[0]
            )
            packed[1:4] = [values, None, None]
        elif self.method == "cvxq":
            packed[2:4] = [cvxq_reference.expand_scales(packed[2], packed[3]), None]
        packed = [t if t is None or not t.is_floating_point() else t.float() for t in packed]
        return replace(self, packed=tuple(packed))

    def packed_gradients(self, grad: Tensor, x: Tensor) -> list[Tensor]:
        """The operator that gives gradients of floating codebooks, scales and norms."""
        operator = getattr(torch.ops.hf_vq, f"{self.method}_packed_gradients")
        return operator(grad, *self.packed, x, *self.geometry, self.trained())

    def trained(self) -> list[bool]:
        """Which packed tensors have gradients."""
        grids = {"gptvq": 5, "cvxq": 3}  # of scales, which have none
        return [
            t is not None and t.is_floating_point() and i != grids.get(self.method)
            for i, t in enumerate(self.packed)
        ]

    def reference(self) -> Tensor:
        """The dense weight in float32, by the readable specification, on the CPU."""
        packed = [None if t is None else t.cpu() for t in self.packed]
        return REFERENCES[self.method](*packed, self.in_features, *self.geometry, torch.float32)


def _words(*shape: int, device: str) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device)


def _normal(*shape: int, device: str, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def gptvq(
    rows: int, columns: int, device: str, dim: int, size: int, group: tuple[int, int],
    scale_block: int = 0, dtype: torch.dtype = torch.int8,
) -> Case:  # fmt: skip
    """`size` must be a power of two: all codes are valid then. `group`: rows, columns."""
    bits, vectors = (size - 1).bit_length(), -(-columns // dim)
    books = (-(-columns // group[1]), -(-rows // group[0]))
    if dtype == torch.int8:
        entries = torch.randint(-128, 128, (*books, size, dim), dtype=dtype, device=device)
        scales: Tensor | None = torch.full(books, 1 / 64, dtype=torch.bfloat16, device=device)
    else:
        entries, scales = _normal(*books, size, dim, device=device, dtype=dtype), None
    codes = grid = None
    if scale_block:
        blocks = -(-columns // scale_block)
        codes = _words(rows, -(-blocks * 4 // 32), device=device)
        grid = torch.full((2, blocks), 0.1, dtype=torch.bfloat16, device=device)
    packed = (
        _words(rows, -(-vectors * bits // 32), device=device), entries, scales, None, codes, grid,
    )  # fmt: skip
    return Case("gptvq", packed, (dim, size, *group, scale_block, True), rows, columns)


def vptq(
    rows: int, columns: int, device: str, dim: int, size: int, res_size: int = 0,
    norm: bool = True, permuted: bool = True,
) -> Case:  # fmt: skip
    """One group of columns, norms per column, no outliers."""
    bits = (size - 1).bit_length() + max(res_size - 1, 0).bit_length()
    perm = torch.randperm(columns, device=device).to(torch.int16) if permuted else None
    packed = (
        _words(1, -(-rows // dim), -(-columns * bits // 32), device=device),
        _normal(1, size * dim, device=device),
        _normal(1, res_size * dim, device=device) if res_size else None,
        None,
        None,
        perm,
        1 + 0.1 * _normal(columns, device=device) if norm else None,
        0.1 * _normal(columns, device=device) if norm else None,
    )
    return Case("vptq", packed, (rows, dim, 0, False), rows, columns)


def cvxq(rows: int, columns: int, device: str, group_rows: int = 32) -> Case:
    """Depths of 2, 3 and 4 bits, 3 on average; 8-bit scales, no locations."""
    clusters = -(-rows // group_rows)
    nibbles = torch.randint(2, 5, (clusters, -(-columns // 8), 8), device=device)
    nibbles.view(clusters, -1)[:, columns:] = 0
    shifts = torch.arange(0, 32, 4, device=device)
    depths = (nibbles << shifts).sum(-1).to(torch.int32)
    words = int(((nibbles * group_rows + 31) // 32).sum())
    grid = torch.tensor([[-1.0], [0.01]], device=device).half().expand(2, clusters).contiguous()
    scales = torch.randint(0, 256, (clusters, columns), dtype=torch.uint8, device=device)
    packed = (_words(words, device=device), depths, scales, grid, None, None)
    return Case("cvxq", packed, (rows, group_rows, "lloyd"), rows, columns)


# name -> (rows, columns, device) -> Case
FORMATS: dict[str, Callable[[int, int, str], Case]] = {
    "gptvq 2-D k16": lambda r, c, d: gptvq(r, c, d, 2, 16, (16, 256)),
    "gptvq 4-D k256": lambda r, c, d: gptvq(r, c, d, 4, 256, (256, 256)),
    "vptq v6 k4096": lambda r, c, d: vptq(r, c, d, 6, 4096),
    "vptq v8 k65536": lambda r, c, d: vptq(r, c, d, 8, 65536),
    "vptq v8 k65536+256": lambda r, c, d: vptq(r, c, d, 8, 65536, 256),
    "cvxq 3 bits": cvxq,
}


def compile_in_parallel(
    jobs: list[tuple[str, int, int, int]], target: tuple[str, Any, int], multiprocessors: int
) -> None:
    """Compile what `jobs` (format, rows, columns, tokens) need into Triton's cache on disk.

    Every configuration of every kernel, in as many processes as there are cores: tuning then times
    kernels without waiting for the compiler. `target`: backend, architecture, threads per warp.
    """
    workers = max(1, min(len(jobs), os.cpu_count() or 1))
    pool = ProcessPoolExecutor(workers, get_context("spawn"))
    try:
        arguments = [(job, target, multiprocessors) for job in jobs]
        for _ in pool.map(_compile, arguments):
            pass
    finally:  # what is cut off by the budget must not be waited for
        pool.shutdown(wait=False, cancel_futures=True)


class Absent:
    """What Triton asks a driver before it compiles: what for."""

    def __init__(self, target: tuple[str, Any, int]) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(*target)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _compile(arguments: tuple[tuple[str, int, int, int], tuple[str, Any, int], int]) -> None:
    (name, rows, columns, tokens), target, multiprocessors = arguments
    torch.set_num_threads(1)
    import importlib

    from hf_vq_kernels import triton_common, triton_product
    from triton.runtime import driver
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    driver.set_active(Absent(target))
    triton_common._multiprocessors = lambda device: multiprocessors
    triton_common._may_time = lambda: True  # so that no configuration is left out
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    def every(self: Any, *args: Any, **kwargs: Any) -> None:
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        for config in self.early_config_prune(self.configs, named):
            with contextlib.suppress(Exception):  # the tuner meets it again, and leaves it out
                self.fn.run(*args, **kwargs, **config.all_kwargs())

    JITFunction.run, Autotuner.run = compile_only, every
    case = FORMATS[name](rows, columns, "cpu")
    module = importlib.import_module(f"hf_vq_kernels.triton_{case.method}")
    matrix = module.matrix(*case.packed, columns, *case.geometry)
    x = torch.zeros((tokens, columns), dtype=torch.bfloat16)
    if tokens <= 4:
        module.decode(x, matrix, None)
    else:
        if case.method == "vptq":
            x, matrix = module.arranged(x, matrix)
        triton_product.product(x, matrix, None)
    if math.gcd(tokens, 16) == 16:
        triton_product.dequantize(matrix, torch.bfloat16)
