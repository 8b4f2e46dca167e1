"""The "c" backend of the CVXQ operators on CPUs: cpu_cvxq.c and what prepares its arguments.

Codes are read where they are stored. What else a product of a few tokens needs, the groups of every
cluster by depth with where their codes start and their scales, is a layout (layouts.py).
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from hf_vq_kernels import cpu_build
from hf_vq_kernels.cpu_common import (
    DTYPES,
    by_blocks,
    check,
    floats,
    pointer,
    refuses_dtype,
)
from hf_vq_kernels.cvxq_reference import row_numbers
from hf_vq_kernels.dispatch import Backend
from hf_vq_kernels.layouts import Layouts
from hf_vq_kernels.levels import level_table_on
from torch import Tensor


class _Stored(ctypes.Structure):
    _fields_ = (
        ("words", ctypes.c_void_p),
        ("depths", ctypes.c_void_p),
        ("scale_codes", ctypes.c_void_p),
        ("scale_grid", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("location8", ctypes.c_void_p),
        ("location", ctypes.c_void_p),
        ("num_words", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("group_rows", ctypes.c_int64),
    )


class _Layout(ctypes.Structure):
    _fields_ = (
        ("words", ctypes.c_void_p),
        ("levels", ctypes.c_void_p),
        ("first", ctypes.c_void_p),
        ("count", ctypes.c_void_p),
        ("start", ctypes.c_void_p),
        ("column", ctypes.c_void_p),
        ("column_high", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("location", ctypes.c_void_p),
        ("num_words", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("group_rows", ctypes.c_int64),
        ("stride", ctypes.c_int64),
    )
    tensors: tuple[Tensor | None, ...]
    """What the pointers but `words` point to."""


def _nbytes(layout: _Layout) -> int:
    return sum(t.nbytes for t in layout.tensors[1:] if t is not None)


LAYOUTS = Layouts(_nbytes)
"""10 bytes per group, 2 more beyond 65536 columns, 4 more with locations, 44 per cluster."""
_PADDED = 4  # as in cpu_cvxq.h


def _plain(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().contiguous()


def _threads() -> ctypes.c_int64:
    return ctypes.c_int64(torch.get_num_threads())


def _build(packed: tuple[Any, ...], columns: int, geometry: tuple[Any, ...]) -> _Layout:
    """A layout, without the address of the words."""
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
    )
    stored = _Stored(*map(pointer, kept), words.numel(), rows, columns, group_rows)
    clusters = scales.shape[0]
    stride = -(-(columns + 9 * (_PADDED - 1)) // 16) * 16
    ahead = 16  # prefetching looks beyond the last slot
    shape = (clusters, stride)
    with torch.inference_mode(False):
        tensors = (
            level_table_on(levels, words.device),
            torch.empty(clusters, dtype=torch.int64),
            torch.empty((clusters, 9), dtype=torch.int32),
            torch.zeros(clusters * stride + ahead, dtype=torch.int32),
            torch.empty(shape, dtype=torch.int16),
            torch.empty(shape, dtype=torch.int16) if columns > 2**16 else None,
            torch.empty(shape, dtype=torch.float32),
            None if location is None else torch.empty(shape, dtype=torch.float32),
        )
    layout = _Layout(None, *map(pointer, tensors), words.numel(), rows, columns, group_rows, stride)
    layout.tensors = tensors
    status = cpu_build.library().hf_vq_cvxq_layout(
        ctypes.byref(stored), ctypes.byref(layout), _threads()
    )
    check(status, "hf_vq::cvxq")
    return layout


def _layout(
    packed: tuple[Any, ...], columns: int, geometry: tuple[Any, ...], keep: bool
) -> tuple[_Layout, Tensor]:
    """The layout with the address of the words, and the tensor that is at that address.

    One that is kept is used; a new one is kept where `keep` says so.
    """
    words: Tensor = packed[0].contiguous()
    tensors = tuple(t for t in packed[:5] if t is not None)
    key = (columns, geometry, packed[2].dtype, packed[4] is None or packed[4].dtype)
    layout = LAYOUTS.find(tensors, key)
    if layout is None:
        layout = _build(packed, columns, geometry)
        if keep:
            LAYOUTS.keep(tensors, key, layout)
    layout.words = words.data_ptr()
    return layout, words


def _decode(layout: _Layout, row: int, n: int, tile: Tensor) -> None:
    status = cpu_build.library().hf_vq_cvxq_decode(
        ctypes.byref(layout), ctypes.c_int64(row // layout.group_rows),
        ctypes.c_int64(-(-n // layout.group_rows)), DTYPES[tile.dtype],
        ctypes.c_void_p(tile.data_ptr()), _threads(),
    )  # fmt: skip
    check(status, "hf_vq::cvxq")


def _few() -> Any:
    """The C function of a few tokens, which takes plain numbers."""
    address, number, many = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    return cpu_build.function(
        "hf_vq_cvxq_linear", ctypes.POINTER(_Layout), number, address, address, address, number,
        address, many, many,
    )  # fmt: skip


def _linear(x: Tensor, *arguments: Any) -> Tensor:
    packed, bias, geometry = arguments[:6], arguments[6], arguments[7:]
    perm: Tensor | None = packed[5]
    layout, words = _layout(packed, x.shape[-1], geometry, keep=True)
    rows = geometry[0]
    tokens = x.numel() // x.shape[-1]
    if tokens <= cpu_build.library().hf_vq_cvxq_most_tokens():
        x = x.contiguous()
        y = torch.empty((*x.shape[:-1], rows), dtype=x.dtype)
        bias = floats(bias)
        if perm is not None:
            perm = perm.contiguous()
        status = _few()(
            layout, DTYPES[x.dtype], x.data_ptr(), pointer(bias), pointer(perm),
            0 if perm is None else perm.element_size(), y.data_ptr(), tokens,
            torch.get_num_threads(),
        )  # fmt: skip
        check(status, "hf_vq::cvxq_linear")
        del words  # not before: the layout has its address
        return y
    order = None if perm is None else row_numbers(perm)
    if bias is not None and order is not None:
        bias = bias.detach().index_select(0, order)
    y = by_blocks(cpu_build.library().hf_vq_cvxq_product, layout, x, rows, bias)
    del words  # not before: the layout has its address
    # into zeros, because the all-zero permutation of a layer without values names one row only
    return y if order is None else torch.zeros_like(y).index_copy_(-1, order, y)


def _dequantize(*arguments: Any) -> Tensor:
    packed, columns, geometry, dtype = arguments[:6], arguments[6], arguments[7:-1], arguments[-1]
    layout, words = _layout(packed, columns, geometry, keep=False)
    order = None if packed[5] is None else row_numbers(packed[5])
    rows = layout.rows
    # zeros, because the all-zero permutation of a layer without values names one row only
    weight = (torch.empty if order is None else torch.zeros)((rows, columns), dtype=dtype)
    step = max(1, 256 // layout.group_rows) * layout.group_rows
    room = torch.empty(min(step, rows) * columns, dtype=dtype)
    for row in range(0, rows, step):
        n = min(step, rows - row)
        tile = room[: n * columns].view(columns, n)
        _decode(layout, row, n, tile)
        if order is None:
            weight[row : row + n] = tile.T
        else:
            weight.index_copy_(0, order[row : row + n], tile.T.contiguous())
    del words  # not before: the layout has its address
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
