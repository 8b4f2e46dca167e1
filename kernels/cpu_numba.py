"""The "numba" backend: products of a few tokens on CPUs where there is no C compiler.

Loops over the codes as they are stored, compiled by numba when the first packed layer runs (some
seconds, once per machine: numba caches them) and never where the "c" backend computes. numba is
imported with the first call. Rows are shared among torch's number of threads.
"""

from __future__ import annotations

import functools
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from hf_vq_kernels.bits import unpack_bits
from hf_vq_kernels.cpu_common import refuses_dtype
from hf_vq_kernels.cvxq_reference import expand_location, expand_scales, row_numbers
from hf_vq_kernels.dispatch import Backend
from hf_vq_kernels.levels import level_table_on
from hf_vq_kernels.reference import expand_codebooks
from hf_vq_kernels.reference import expand_scales as expand_row_scales
from torch import Tensor

FEW_TOKENS = 6
"""Fewer are multiplied; more take a decoded weight."""


def _unavailable() -> str | None:
    if importlib.util.find_spec("numba") is None:
        return "the package numba is not installed"
    return None


@functools.cache
def _loops() -> tuple[Any, Any]:
    """The compiled loops of GPTVQ and CVXQ, over units low .. high - 1 of rows."""
    from numba import njit

    compiled = njit(nogil=True, cache=True, fastmath={"contract", "reassoc"})
    return compiled(_gptvq_rows), compiled(_cvxq_clusters)


def _gptvq_rows(words, bits, table, group_rows, group_columns, scales, block, x, y, low, high):  # type: ignore[no-untyped-def]
    """y[t, r] = sum over columns of x[t] times row r; scales (rows, blocks) if block > 0."""
    tokens, columns = x.shape
    stripes, _, _, dim = table.shape
    mask = (1 << bits) - 1
    for r in range(low, high):
        g = r // group_rows
        for t in range(tokens):
            y[t, r] = 0
        for s in range(stripes):
            book = table[s, g]
            first, last = s * group_columns // dim, min((s + 1) * group_columns, columns)
            for v in range(first, (last + dim - 1) // dim):
                word, shift = v * bits >> 5, v * bits & 31
                code = int(words[r, word]) >> shift
                if shift + bits > 32:
                    code |= int(words[r, word + 1]) << (32 - shift)
                code &= mask
                column = v * dim
                factor = scales[r, column // block] if block > 0 else scales[0, 0]
                for t in range(tokens):
                    value = x[t, column] * book[code, 0]
                    for i in range(1, min(dim, columns - column)):
                        value += x[t, column + i] * book[code, i]
                    y[t, r] += value * factor


def _cvxq_clusters(words, first, depth, scale, levels, group_rows, x, y, low, high):  # type: ignore[no-untyped-def]
    """y[t, r] = sum over columns of x[t] times scale times level, of clusters low .. high - 1."""
    tokens, columns = x.shape
    rows = y.shape[1]
    for m in range(low, high):
        begin = m * group_rows
        end = min(begin + group_rows, rows)
        for t in range(tokens):
            y[t, begin:end] = 0
        for j in range(columns):
            bits = depth[m, j]
            if bits == 0:
                continue
            word, shift = first[m, j], 0
            mask, base = (1 << bits) - 1, 1 << bits
            for r in range(begin, end):
                code = int(words[word]) >> shift
                if shift + bits > 32:
                    code |= int(words[word + 1]) << (32 - shift)
                level = levels[base + (code & mask)] * scale[m, j]
                for t in range(tokens):
                    y[t, r] += x[t, j] * level
                shift += bits
                if shift >= 32:
                    shift -= 32
                    word += 1


def _in_threads(loop: Any, units: int, *arguments: Any) -> None:
    threads = min(torch.get_num_threads(), units)
    if threads <= 1:
        loop(*arguments, 0, units)
        return

    def share(part: int) -> None:
        loop(*arguments, units * part // threads, units * (part + 1) // threads)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(share, range(threads)))  # raises what a part has raised


def _plain(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1]).float().contiguous()


def _unsigned(words: Tensor) -> Any:
    return words.detach().contiguous().numpy().view("uint32")


def _finish(y: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None:
        y = y + bias.detach()
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])


def _gptvq_linear(x: Tensor, *arguments: Any) -> Tensor:
    indices, codebooks, book_scales, basis, codes, grid, bias = (
        None if t is None else t.detach() for t in arguments[:7]
    )
    dim, k, group_rows, group_columns, block, log = arguments[7:]
    assert indices is not None and codebooks is not None
    table = expand_codebooks(codebooks, book_scales, basis, k, dim).float().contiguous()
    if codes is None or grid is None or block == 0:
        block, scales = 0, torch.ones((1, 1))
    else:
        scales = expand_row_scales(codes, grid, grid.shape[1], log).float().contiguous()
    flat, rows = _plain(x), indices.shape[0]
    y = torch.empty((flat.shape[0], rows))
    _in_threads(
        _loops()[0], rows, _unsigned(indices), (k - 1).bit_length(), table.numpy(), group_rows,
        group_columns, scales.numpy(), block, flat.numpy(), y.numpy(),
    )  # fmt: skip
    return _finish(y, x, bias)


def _cvxq_linear(x: Tensor, *arguments: Any) -> Tensor:
    words, depths, scales, grid, location, perm, bias = (
        None if t is None else t.detach() for t in arguments[:7]
    )
    rows, group_rows, levels = arguments[7:]
    assert words is not None and depths is not None and scales is not None
    flat = _plain(x)
    depth = unpack_bits(depths, 4, flat.shape[1]).long().contiguous()
    sizes = (depth.flatten() * group_rows + 31) >> 5
    first = (sizes.cumsum(0) - sizes).view(depth.shape)
    scale = expand_scales(scales, grid).contiguous()
    table = level_table_on(levels, words.device)
    y = torch.empty((flat.shape[0], rows))
    _in_threads(
        _loops()[1], depth.shape[0], _unsigned(words), first.numpy(), depth.numpy(), scale.numpy(),
        table.numpy(), group_rows, flat.numpy(), y.numpy(),
    )  # fmt: skip
    if location is not None:
        shift = flat @ expand_location(location, scale).T  # (tokens, clusters)
        y += shift.repeat_interleave(group_rows, dim=1)[:, :rows]
    if perm is not None:
        y = torch.zeros_like(y).index_copy_(1, row_numbers(perm), y)
    return _finish(y, x, bias)


def _refuses(x: Tensor, fits: bool) -> str | None:
    if x.dim() == 0 or x.numel() == 0:
        return "x is empty"
    if x.numel() // x.shape[-1] >= FEW_TOKENS:
        return f"it multiplies fewer than {FEW_TOKENS} tokens"
    if not fits:
        return f"the packed tensors do not describe {x.shape[-1]} columns"
    return refuses_dtype(x.dtype)


def _refuses_gptvq(x: Tensor, *arguments: Any) -> str | None:
    if x.dim() == 0:
        return "x is empty"
    dim, k = arguments[7:9]
    words = (-(-x.shape[-1] // dim) * (k - 1).bit_length() + 31) // 32
    return _refuses(x, arguments[0].shape[-1] == words)


def _refuses_cvxq(x: Tensor, *arguments: Any) -> str | None:
    return _refuses(x, x.dim() > 0 and arguments[2].shape[1] == x.shape[-1])


BACKENDS = (
    Backend("numba", "gptvq_linear", ("cpu",), _unavailable, _refuses_gptvq, _gptvq_linear),
    Backend("numba", "cvxq_linear", ("cpu",), _unavailable, _refuses_cvxq, _cvxq_linear),
)
