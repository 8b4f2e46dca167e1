"""The "c" backend of the CVXQ operators on CPUs: cpu_cvxq.c and what prepares its arguments.

It reads the tensors as they are stored; where groups start is summed in every call.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from hf_vq_kernels import cpu_build
from hf_vq_kernels.cpu_common import (
    DTYPES,
    FEW_TOKENS,
    check,
    few_tokens,
    floats,
    many_tokens,
    pointer,
    refuses_dtype,
)
from hf_vq_kernels.cvxq_reference import row_numbers
from hf_vq_kernels.dispatch import Backend
from hf_vq_kernels.levels import level_table_on
from torch import Tensor


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("words", ctypes.c_void_p),
        ("depths", ctypes.c_void_p),
        ("scale_codes", ctypes.c_void_p),
        ("scale_grid", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("location8", ctypes.c_void_p),
        ("location", ctypes.c_void_p),
        ("levels", ctypes.c_void_p),
        ("num_words", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("group_rows", ctypes.c_int64),
    )


def _plain(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().contiguous()


def _matrix(packed: tuple[Any, ...], columns: int, geometry: tuple[Any, ...]) -> Any:
    """The structure, the first word of every cluster, and the tensors that both point to."""
    words, depths, scales, grid, location, _ = packed
    rows, group_rows, levels = geometry
    coded = grid is not None
    in_units = location is not None and not location.is_floating_point()
    kept = (
        _plain(words),
        _plain(depths),
        _plain(scales) if coded else None,
        floats(grid),
        None if coded else floats(scales),
        _plain(location) if in_units else None,
        None if in_units else floats(location),
        level_table_on(levels, words.device),
    )
    matrix = _Matrix(*map(pointer, kept), words.numel(), rows, columns, group_rows)
    first = torch.empty(scales.shape[0] + 1, dtype=torch.int64)
    cpu_build.library().hf_vq_cvxq_first_words(
        ctypes.byref(matrix), ctypes.c_void_p(first.data_ptr()),
        ctypes.c_int64(torch.get_num_threads()),
    )  # fmt: skip
    return matrix, first, kept


def _decode(matrix: _Matrix, first: Tensor, row: int, n: int, tile: Tensor) -> None:
    clusters = -(-n // matrix.group_rows)
    status = cpu_build.library().hf_vq_cvxq_decode(
        ctypes.byref(matrix), ctypes.c_void_p(first.data_ptr()),
        ctypes.c_int64(row // matrix.group_rows), ctypes.c_int64(clusters), DTYPES[tile.dtype],
        ctypes.c_void_p(tile.data_ptr()), ctypes.c_int64(torch.get_num_threads()),
    )  # fmt: skip
    check(status, "hf_vq::cvxq")


def _linear(x: Tensor, *arguments: Any) -> Tensor:
    packed, bias, geometry = arguments[:6], arguments[6], arguments[7:]
    matrix, first, kept = _matrix(packed, x.shape[-1], geometry)
    rows = matrix.rows
    order = None if packed[5] is None else row_numbers(packed[5])
    if bias is not None and order is not None:
        bias = bias.detach().index_select(0, order)
    if x.numel() // x.shape[-1] < FEW_TOKENS:
        linear = cpu_build.library().hf_vq_cvxq_linear

        def product(*rest: Any) -> int:
            return linear(ctypes.byref(matrix), ctypes.c_void_p(first.data_ptr()), *rest)

        y = few_tokens(product, x, rows, bias)
    else:

        def decode(row: int, n: int, tile: Tensor) -> None:
            _decode(matrix, first, row, n, tile)

        y = many_tokens(x, rows, bias, matrix.group_rows, decode, transposed=True)
    del kept  # not before: the structure points to these tensors
    # into zeros, because the all-zero permutation of a layer without values names one row only
    return y if order is None else torch.zeros_like(y).index_copy_(-1, order, y)


def _dequantize(*arguments: Any) -> Tensor:
    packed, columns, geometry, dtype = arguments[:6], arguments[6], arguments[7:-1], arguments[-1]
    matrix, first, kept = _matrix(packed, columns, geometry)
    order = None if packed[5] is None else row_numbers(packed[5])
    rows = matrix.rows
    # zeros, because the all-zero permutation of a layer without values names one row only
    weight = (torch.empty if order is None else torch.zeros)((rows, columns), dtype=dtype)
    step = max(1, 256 // matrix.group_rows) * matrix.group_rows
    room = torch.empty(min(step, rows) * columns, dtype=dtype)
    for row in range(0, rows, step):
        n = min(step, rows - row)
        tile = room[: n * columns].view(columns, n)
        _decode(matrix, first, row, n, tile)
        if order is None:
            weight[row : row + n] = tile.T
        else:
            weight.index_copy_(0, order[row : row + n], tile.T.contiguous())
    del kept  # not before: the structure points to these tensors
    return weight


def _refuses(packed: tuple[Any, ...], dtype: torch.dtype, columns: int) -> str | None:
    depths, scales = packed[1], packed[2]
    if scales.shape[1] != columns or depths.shape[1] != -(-columns // 8):
        return f"scales of shape {tuple(scales.shape)} do not describe {columns} columns"
    return refuses_dtype(dtype)


def _refuses_linear(x: Tensor, *arguments: Any) -> str | None:
    if x.dim() == 0 or x.numel() == 0:
        return "x is empty"
    return _refuses(arguments[:6], x.dtype, x.shape[-1])


def _refuses_dequantize(*arguments: Any) -> str | None:
    return _refuses(arguments[:6], arguments[-1], arguments[6])


BACKENDS = (
    Backend("c", "cvxq_linear", ("cpu",), cpu_build.unavailable, _refuses_linear, _linear),
    Backend(
        "c", "cvxq_dequantize", ("cpu",), cpu_build.unavailable, _refuses_dequantize, _dequantize
    ),
)
