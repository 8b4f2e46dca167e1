"""What all Triton kernels of this package share: reading codes, launching, tuning, split sums.

Kernels take the packed tensors as one tuple (None where a layer has no such tensor) and the sizes
as one tuple of constants, so that a layer is compiled for its shape and what it lacks costs
nothing. Nothing here is particular to CUDA: Triton's AMD and Intel targets compile the same code.

With TRITON_INTERPRET=1 in the environment before triton is first imported, the same kernels run on
CPU tensors, slowly, in Triton's interpreter; tests do that.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns of a tile in all kernels that build tiles of weights.
TILE_COLUMNS = 64

# Whether kernels run in Triton's interpreter, decided when triton was imported.
INTERPRETED = tl.constexpr(not isinstance(tl.zeros, triton.JITFunction))


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return bool(INTERPRETED.value)


def devices() -> tuple[str, ...]:
    """The device types that the kernels compute on in this process."""
    return ("cuda", "xpu", "cpu") if interpreting() else ("cuda", "xpu")


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the device of `tensor` the current one: kernels are launched on that."""
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 108 if device.type != "cpu" else 2


def splits_for(programs: int, work: int, device: torch.device) -> int:
    """Into how many parts to cut sums of `work` steps that `programs` programs compute.

    A power of two, so that each device has about four programs per multiprocessor, and 1 where the
    rows alone give that: the parts of a sum are added by a launch of its own.
    """
    wanted = 4 * _multiprocessors(device)
    splits = 1
    while programs * splits * 2 <= wanted and splits * 2 <= min(work, 32):
        splits *= 2
    return splits


@triton.constexpr_function
def period_words(bits: int, wide: int) -> int:
    """The fewest words, a multiple of `wide`, that hold whole codes of `bits` bits."""
    return math.lcm(math.lcm(bits, 32) // 32, wide)


@triton.constexpr_function
def period_codes(bits: int, wide: int) -> int:
    """The codes of so many words."""
    return math.lcm(math.lcm(bits, 32) // 32, wide) * 32 // bits


def wide_enough(wide: int, bits: int, stream: int, tokens: int) -> bool:
    """Whether to read `wide` words of streams of `stream` words, of codes of `bits` bits, at once.

    They must be aligned, and a thread should not take more than 32 codes apart at once, or multiply
    them with more than two tokens: that takes the compiler long.
    """
    codes = period_codes(bits, wide)
    return wide == 1 or (stream % wide == 0 and codes <= 32 and codes * tokens <= 64)


def power_of_two(n: int, low: int = 1, high: int = 1 << 30) -> int:
    """The smallest power of two that is not below `n`, within low..high."""
    return max(low, min(high, 1 << (max(n, 1) - 1).bit_length()))


def config(warps: int, stages: int = 2, **sizes: int) -> triton.Config:
    """One point of a tuning space."""
    return triton.Config(sizes, num_warps=warps, num_stages=stages)


def tuned(
    key: list[str],
    configs: list[triton.Config],
    reset: list[str] | None = None,
    fits: Callable[[dict[str, Any], dict[str, Any]], bool] | None = None,
) -> Callable[[Any], Any]:
    """`triton.autotune` over `configs`, the first of which is used where nothing can be timed.

    `key`: names of constants that are numbers, words or tuples of these. `reset`: names of tensors
    that the kernel adds to, which are zeroed between timings. `fits(sizes, constants)`: whether a
    configuration makes sense for a matrix; it must for the first. Times are kept on disk beside
    Triton's compiled kernels. Nothing is timed in the interpreter,
    while a CUDA graph is captured (run the layer once before), or with HF_VQ_TUNE=0.
    """

    def prune(
        configs: list[triton.Config], named: dict[str, Any], **constants: Any
    ) -> list[triton.Config]:
        if not _may_time():
            return configs[:1]
        known = named | constants
        return [c for c in configs if fits is None or fits(c.kwargs, known)]

    def decorate(kernel: Any) -> Any:
        if isinstance(kernel, triton.JITFunction):
            tuner = triton.autotune(
                configs=configs,
                key=key,
                prune_configs_by={"early_config_prune": prune},
                do_bench=_bench,
                cache_results=True,
                reset_to_zero=reset,
            )(kernel)
        else:
            tuner = triton.autotune(configs=configs[:1], key=key)(kernel)
        tuner.space = configs
        return tuner

    return decorate


def _may_time() -> bool:
    if os.environ.get("HF_VQ_TUNE", "1") == "0" or not torch.cuda.is_available():
        return False
    return not torch.cuda.is_current_stream_capturing()


def _bench(call: Callable[[], None], quantiles: Any) -> Any:
    if not _may_time():  # older versions of Triton time a single configuration as well
        return [0.0, 0.0, 0.0]
    return triton.testing.do_bench(call, warmup=2, rep=10, quantiles=quantiles)


# Threads of a warp.
WARP = 64 if torch.version.hip else 32

# What torch's types are called in kernels: in words, which the record of tuning can hold.
TYPES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int8: "int8",
}

# An integer type of so many bytes.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def in_units(tensor: Tensor, entries: int) -> tuple[Tensor, int]:
    """`tensor` as integers that hold several entries each, and how many: one load brings them all.

    A unit holds the largest power of two of entries that divides `entries`, in up to 8 bytes. The
    tensor is contiguous; it is copied where it does not start at an address for such integers.
    """
    size = tensor.dtype.itemsize
    together = min(entries & -entries, 8 // size)
    tensor = tensor.detach()
    if tensor.data_ptr() % (together * size) or tensor.storage_offset() % together:
        tensor = tensor.clone()
    return tensor.reshape(-1).view(_INTEGERS[together * size]), together


@triton.jit
def entry_of(unit, NUMBER: tl.constexpr, TYPE: tl.constexpr):
    """Entry NUMBER, of a type of TYPES, of units that `in_units` made, float32."""
    if TYPE == "int8":
        # In the low bits of 2**23, because instructions that convert integers are slow.
        bits = ((unit >> (8 * NUMBER)).to(tl.int32) & 255) ^ 0x4B000080
        value = bits.to(tl.float32, bitcast=True) - 8388736.0
    elif TYPE == "float32":
        value = (unit >> (32 * NUMBER)).to(tl.int32).to(tl.float32, bitcast=True)
    elif TYPE == "float16":
        value = (unit >> (16 * NUMBER)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        tl.static_assert(TYPE == "bfloat16")
        value = (unit >> (16 * NUMBER)).to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)
    return value


@triton.jit
def multiply(a, b, total):
    """total + a @ b, in float32; a, of any float type, is rounded to the type of b."""
    a = a.to(b.dtype)
    if INTERPRETED and b.dtype == tl.bfloat16:  # which would multiply the bits of bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def read_codes(words, stream, number, inside, BITS: tl.constexpr):
    """Code `number` of BITS (1..32) bits of the streams that start at word `stream`, uint32.

    The three broadcast against each other; codes that are not `inside` are 0.
    """
    bit = number * BITS
    at = words + stream + (bit >> 5)
    offset = (bit & 31).to(tl.uint32)
    codes = tl.load(at, mask=inside, other=0).to(tl.uint32, bitcast=True) >> offset
    if 32 % BITS != 0:
        crosses = inside & (offset + BITS > 32)
        high = tl.load(at + 1, mask=crosses, other=0).to(tl.uint32, bitcast=True)
        codes |= (high << 1) << (31 - offset)  # two steps: shifting by 32 is undefined
    if BITS < 32:
        codes &= (1 << BITS) - 1
    return codes


@triton.jit
def load_words(
    words, start, period, here, WORDS: tl.constexpr, STREAM: tl.constexpr, WIDE: tl.constexpr
):
    """Words period * WORDS .. period * WORDS + WORDS - 1 of streams of STREAM words.

    A tuple of WORDS uint32 tensors of the shape (lanes,) of `period`, 0 where not `here` or beyond
    the stream, which begins at words + start. WIDE (1, 2 or 4; it divides WORDS) of them are read
    by one load of a thread where WIDE divides STREAM, because streams are aligned then.
    """
    out = ()
    for first in tl.static_range(0, WORDS, WIDE):
        number = period * WORDS + first
        known = here
        if WIDE == 1:
            if STREAM % WORDS != 0:
                known = here & (number < STREAM)
            word = tl.load(words + (start + number), mask=known, other=0)
            out = out + (word.to(tl.uint32, bitcast=True),)
        else:
            offset = tl.arange(0, WIDE)[None, :]
            known = here[:, None]
            if STREAM % WORDS != 0:
                known = known & (number[:, None] + offset < STREAM)
            group = tl.load(words + ((start + number)[:, None] + offset), mask=known, other=0)
            group = group.to(tl.uint32, bitcast=True)
            if WIDE == 2:
                word_0, word_1 = tl.split(group)
                out = out + (word_0, word_1)
            else:
                tl.static_assert(WIDE == 4)
                even, odd = tl.split(tl.reshape(group, (group.shape[0], 2, 2)))
                word_0, word_2 = tl.split(even)
                word_1, word_3 = tl.split(odd)
                out = out + (word_0, word_1, word_2, word_3)
    return out


@triton.jit
def load_units(units, number, here, COUNT: tl.constexpr):
    """Units number .. number + COUNT - 1 (COUNT: 1 or 2) of `in_units`, by one load; a tuple."""
    if COUNT == 1:
        out = (tl.load(units + number, mask=here, other=0),)
    else:
        tl.static_assert(COUNT == 2)
        at = units + (number[:, None] + tl.arange(0, 2)[None, :])
        unit_0, unit_1 = tl.split(tl.load(at, mask=here[:, None], other=0))
        out = (unit_0, unit_1)
    return out


@triton.jit
def code_of(words, NUMBER: tl.constexpr, BITS: tl.constexpr):
    """Code NUMBER of words that `load_words` read, uint32, with other codes above it."""
    FIRST: tl.constexpr = NUMBER * BITS // 32
    SHIFT: tl.constexpr = NUMBER * BITS % 32
    code = words[FIRST] >> SHIFT
    if SHIFT + BITS > 32:
        code |= words[FIRST + 1] << (32 - SHIFT)
    return code


@triton.constexpr_function
def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below `n`, in kernels."""
    return 1 << (n - 1).bit_length()


@triton.constexpr_function
def log_2(n: int) -> int:
    """The logarithm of a power of two, in kernels."""
    return n.bit_length() - 1


@triton.jit
def sum_lanes(values, COUNT: tl.constexpr, PADDED: tl.constexpr):
    """Sums of COUNT one-dimensional tensors, in one (PADDED,) tensor; PADDED: a power of two.

    One reduction of all together: threads meet once, not COUNT times.
    """
    together = values
    for _ in tl.static_range(PADDED - COUNT):
        together = together + (tl.zeros_like(values[0]),)
    if PADDED == 1:
        result = tl.sum(tl.reshape(together[0], (1, together[0].shape[0])), axis=1)
    else:
        LEVELS: tl.constexpr = log_2(PADDED)
        for level in tl.static_range(LEVELS):
            pairs = ()
            for i in tl.static_range(PADDED >> (level + 1)):
                pair = tl.join(together[i], together[i + (PADDED >> (level + 1))])
                pairs = pairs + (pair,)
            together = pairs
        result = tl.sum(tl.reshape(together[0], (values[0].shape[0], PADDED)), axis=0)
    return result


@triton.jit
def add_splits(parts, bias, out, size, rows, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = sum over s of parts[s, i], in this order, plus bias[i % rows] unless bias is None.

    parts: float32 (SPLITS, size); out: (size,) of any float type.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in tl.static_range(SPLITS):
        total += tl.load(parts + at, mask=inside, other=0.0)
        parts += size
    if bias is not None:
        total += tl.load(bias + at % rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def sum_splits(parts: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Launch `add_splits`: parts float32 (splits, *out.shape), bias (out.shape[-1],) or None."""
    size = out.numel()
    grid = (triton.cdiv(size, 1024),)
    add_splits[grid](parts, bias, out, size, out.shape[-1], parts.shape[0], BLOCK=1024)
