"""Packed matrices as an optimizer can move them, and back at the precision they are stored in.

`widen` gives the same matrix, bit for bit, with everything that can be trained as float32: the
codebooks (with norms) of VPTQ, the codebooks of GPTVQ with their scales multiplied in, the scales
and locations of CVXQ. `narrow` rounds trained values to what the stored spec has room for. Codes
stay as they are, and so do the grids that 4- and 8-bit scales lie on. What was not trained comes
back as it was: ``narrow(widen(tensors)) == tensors``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from hf_vq_kernels.cvxq_reference import LOCATION_UNIT, expand_scales
from torch import Tensor

from hf_vq.formats.bitstream import pack_bits, unpack_bits
from hf_vq.formats.cvxq import CVXQSpec
from hf_vq.formats.gptvq import GPTVQSpec
from hf_vq.formats.vptq import VPTQSpec

Tensors = Mapping[str, Tensor]

_TOP = {"int8": 127, "int4": 7}


def trained_names(spec: Any) -> list[str]:
    """The tensors of a wide spec that `narrow` takes values from."""
    return [name for name, stored in spec.layout().items() if stored.dtype == torch.float32]


# -- GPTVQ -----------------------------------------------------------------------------


def widen_gptvq(tensors: Tensors, spec: GPTVQSpec) -> tuple[dict[str, Tensor], GPTVQSpec]:
    """Codebooks (or factors and basis) as float32, their scales multiplied in."""
    wide = dataclasses.replace(spec, codebook_dtype="float32")
    out = {name: tensors[name] for name in wide.layout() if name in tensors}
    name = _entries(spec)
    values = tensors[name]
    if spec.codebook_dtype == "int4":
        nibbles = unpack_bits(values, 4, spec.num_centroids * spec.vector_dim)
        shape = (spec.num_centroids, spec.vector_dim)
        values = ((nibbles ^ 8) - 8).unflatten(-1, shape)
    values = values.to(torch.float32, copy=True)
    if "codebook_scales" in tensors:
        values = values * _scales(tensors["codebook_scales"].float(), values)
    out[name] = values
    if spec.svd_rank:
        out["codebook_basis"] = tensors["codebook_basis"].float()
    return {key: out[key] for key in wide.layout()}, wide


def narrow_gptvq(trained: Tensors, stored: Tensors, spec: GPTVQSpec) -> dict[str, Tensor]:
    """Integers keep their scale, except for int8 entries that have outgrown it."""
    out = dict(stored)
    if spec.svd_rank:
        out["codebook_basis"] = trained["codebook_basis"].to(stored["codebook_basis"].dtype)
    name = _entries(spec)
    values = trained[name]
    if spec.codebook_dtype not in _TOP:
        out[name] = values.to(stored[name].dtype)
        return out
    top = _TOP[spec.codebook_dtype]
    scales = stored["codebook_scales"]
    if spec.codebook_dtype == "int8":
        # up, or the largest entry would be cut off; 2^-7 is more than rounding to bfloat16 takes
        largest = values.abs().flatten(2).amax(-1)
        grown = (largest / top * (1 + 2**-7)).to(scales.dtype)
        # an untrained -128 must stay, whichever way its product with the scale was rounded
        outgrown = largest > scales.float() * (top + 1 + 2**-10)
        scales = torch.where(outgrown, grown, scales)
        out["codebook_scales"] = scales
    integers = (values / _scales(scales.float(), values)).round().clamp(-top - 1, top)
    if spec.codebook_dtype == "int4":
        out[name] = pack_bits(integers.flatten(-2).to(torch.int64) & 15, 4)
    else:
        out[name] = integers.to(torch.int8)
    return out


def _entries(spec: GPTVQSpec) -> str:
    return "codebook_factors" if spec.svd_rank else "codebooks"


def _scales(scales: Tensor, values: Tensor) -> Tensor:
    """(S, G) scales to go with (S, G, ...) values; 1 where a codebook is all zero."""
    return scales.clamp_min(1e-30).view(*scales.shape, *[1] * (values.dim() - 2))


# -- VPTQ ------------------------------------------------------------------------------


def widen_vptq(tensors: Tensors, spec: VPTQSpec) -> tuple[dict[str, Tensor], VPTQSpec]:
    """All codebooks and norms as float32."""
    wide = spec.trainable
    layout = wide.layout()
    return {name: tensors[name].to(layout[name].dtype) for name in layout}, wide


def narrow_vptq(trained: Tensors, stored: Tensors, spec: VPTQSpec) -> dict[str, Tensor]:
    """All codebooks and norms at their stored precision."""
    return {name: trained[name].to(tensor.dtype) for name, tensor in stored.items()}


# -- CVXQ ------------------------------------------------------------------------------


def narrow_cvxq(trained: Tensors, stored: Tensors, spec: CVXQSpec) -> dict[str, Tensor]:
    """Scales and locations at their stored precision; 8-bit ones on the grids they lay on."""
    out, scales = dict(stored), trained["scales"]
    if spec.scale_dtype == "log8":
        offset, step = stored["scale_grid"].float().unsqueeze(-1)
        codes = (scales.clamp_min(2.0**-120).log2() - offset) / step
        codes = codes.round().clamp(0, 255).to(torch.uint8)
        out["scale_codes"] = torch.where(step != 0, codes, stored["scale_codes"])
        scales = expand_scales(out["scale_codes"], stored["scale_grid"])
    else:
        out["scales"] = scales.to(stored["scales"].dtype)
        scales = out["scales"].float()
    if spec.location == "int8":
        unit = scales * LOCATION_UNIT
        units = torch.where(unit == 0, stored["location"].float(), trained["location"] / unit)
        out["location"] = units.round().clamp(-128, 127).to(torch.int8)
    elif spec.location != "none":
        out["location"] = trained["location"].to(stored["location"].dtype)
    return out
