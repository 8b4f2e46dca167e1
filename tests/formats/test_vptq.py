"""The VPTQ format: what a spec admits, packing, older storages, and what `check` refuses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from math import ceil

import pytest
import torch
from helpers_vptq import ODD_VPTQ, random_vptq, vptq_specs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_vq.formats import FormatError
from hf_vq.formats.vptq import VPTQCodes, VPTQSpec, check, modernize, pack, unpack

SPEC = ODD_VPTQ["outliers"]
WHERE = "model.layers.3.mlp.up_proj"
STORAGES = ("packed", "int16", "float16")


def same(a: VPTQCodes, b: VPTQCodes) -> None:
    for field in dataclasses.fields(VPTQCodes):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert (x is None) == (y is None), field.name
        assert x is None or (x.dtype == y.dtype and torch.equal(x, y)), field.name


def bits(tensor: Tensor) -> Tensor:
    """What is stored: NaN patterns of float16 indices compare equal as integers."""
    return tensor.view(torch.int16) if tensor.dtype == torch.float16 else tensor


@settings(deadline=None)
@given(vptq_specs(STORAGES), st.integers(0, 2**32))
def test_round_trip(spec: VPTQSpec, seed: int) -> None:
    codes = random_vptq(spec, seed)
    before = copy.deepcopy(codes)
    tensors = pack(codes, spec)
    same(codes, before)

    layout = spec.layout()
    assert list(tensors) == list(layout)
    for name, tensor in tensors.items():
        assert (tuple(tensor.shape), tensor.dtype) == layout[name], name
        assert tensor.is_contiguous()
    assert sum(t.nbytes for t in tensors.values()) == spec.nbytes
    check(tensors, spec, WHERE)

    unpacked = unpack(tensors, spec)
    same(unpacked, codes)
    for name, tensor in pack(unpacked, spec).items():
        assert torch.equal(bits(tensor), bits(tensors[name])), name


@settings(deadline=None)
@given(vptq_specs(STORAGES), st.integers(0, 2**32))
def test_modernized_matrices_hold_the_same_codes(spec: VPTQSpec, seed: int) -> None:
    codes = random_vptq(spec, seed)
    tensors = pack(codes, spec)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    packed, packed_spec = modernize(tensors, spec)
    assert packed_spec == dataclasses.replace(spec, storage="packed")
    check(packed, packed_spec, WHERE)
    same(unpack(packed, packed_spec), codes)
    for name, tensor in tensors.items():
        assert torch.equal(bits(tensor), bits(before[name])), name


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", ODD_VPTQ)
def test_meta_layout_equals_real(name: str, storage: str) -> None:
    spec = dataclasses.replace(ODD_VPTQ[name], storage=storage)
    codes = random_vptq(spec)
    for field in dataclasses.fields(codes):
        if (value := getattr(codes, field.name)) is not None:
            setattr(codes, field.name, value.to("meta"))
    tensors = pack(codes, spec)
    assert all(t.is_meta for t in tensors.values())
    check(tensors, spec, WHERE)
    vectors = (spec.num_groups, spec.num_row_blocks, spec.group_columns)
    assert unpack(tensors, spec).indices.shape == vectors
    modern, modern_spec = modernize(tensors, spec)
    check(modern, modern_spec, WHERE)


@pytest.mark.parametrize("storage", STORAGES)
def test_packed_tensors_share_no_memory_with_the_codes(storage: str) -> None:
    spec = dataclasses.replace(SPEC, storage=storage, codebook_dtype="float32")
    codes = random_vptq(spec)
    before = copy.deepcopy(codes)
    tensors = pack(codes, spec)
    held = {name: tensor.clone() for name, tensor in tensors.items()}
    for tensor in pack(codes, spec).values():
        tensor.zero_()
    same(codes, before)
    unpacked = unpack(tensors, spec)
    for field in dataclasses.fields(unpacked):
        getattr(unpacked, field.name).zero_()
    for name, tensor in tensors.items():
        assert torch.equal(bits(tensor), bits(held[name])), name


def test_codes_that_require_grad_can_be_packed() -> None:
    codes = random_vptq(SPEC)
    codes.centroids.requires_grad_()
    assert not pack(codes, SPEC)["centroids.weight"].requires_grad


@pytest.mark.parametrize("groups", [1, 4])
def test_bits_per_weight_by_hand(groups: int) -> None:
    # 4096 x 4160: 64 outlier columns in vectors of 4 with 16-bit indices, then 12 + 8 bits per 8
    spec = VPTQSpec(4096, 4160, 8, 4096, 256, groups, 64, 4, 512, "columns", True)
    total = 512 * groups * 32 * ceil(4096 // groups * 20 / 32)
    total += 16 * groups * 8 * (4096 + 256)
    total += 1024 * 64 * 16 + 16 * 4 * 512
    total += 16 * 2 * 4160 + 16 * 4160
    assert spec.bits_per_weight == total / (4096 * 4160)


# ---------------------------------------------------------------------- 16 and 32 bits of unsigned


def test_bit_stream_of_every_row_by_python_integers() -> None:
    # 37 codes of 18 bits: 666 bits in 21 words, 6 bits of padding, per row and not across rows
    spec = VPTQSpec(20, 37, 8, 4096, 64)
    codes = random_vptq(spec)
    codes.indices[0, 1, 36], codes.res_indices[0, 1, 36] = 4095, 63
    words = pack(codes, spec)["indices"]
    assert words.shape == (1, 3, 21) and words.dtype == torch.int32
    assert (words < 0).any()  # or a signed reading would not be noticed
    for block in range(3):
        number = 0
        for c in range(37):
            code = int(codes.indices[0, block, c]) | int(codes.res_indices[0, block, c]) << 12
            number |= code << (18 * c)
        row = [(number >> (32 * w)) & 0xFFFFFFFF for w in range(21)]
        assert [word & 0xFFFFFFFF for word in words[0, block].tolist()] == row
    assert int(words[0, 1, 20]) >> 8 == 2**18 - 1  # the last code, and zeros after it


def test_the_lower_column_is_in_the_low_half() -> None:
    spec = VPTQSpec(4, 3, 4, 256, 256)
    codes = random_vptq(spec)
    codes.indices[0, 0] = torch.tensor([0x12, 0xAB, 0xFF])
    codes.res_indices[0, 0] = torch.tensor([0x34, 0xCD, 0x01])
    words = pack(codes, spec)["indices"][0, 0].tolist()
    assert [word & 0xFFFFFFFF for word in words] == [0xCDAB3412, 0x000001FF]


@pytest.mark.parametrize("storage", STORAGES)
def test_large_unsigned_values_survive(storage: str) -> None:
    spec = VPTQSpec(
        4, 40001, 4, 65536, 65536, 1, 1, 2, 65536, permuted=True, storage=storage
    )  # fmt: skip
    codes = random_vptq(spec)
    codes.indices[0, 0, :3] = torch.tensor([65535, 40000, 32768])
    codes.res_indices[0, 0, :3] = torch.tensor([65535, 32768, 65535])
    codes.outlier_indices[:, 0] = torch.tensor([40000, 65535])
    codes.perm = codes.perm.sort(descending=True).values
    tensors = pack(codes, spec)
    if storage == "packed":
        assert tensors["indices"][0, 0, 0] == -1
        assert tensors["perm"][0] == 40000 - 65536
    else:
        elements = tensors["indices"].view(torch.int16)[0, 0, :3].tolist()
        assert elements == [-1, 40000 - 65536, -32768]
    outliers = tensors["outlier_indices"].view(torch.int16)
    assert outliers.flatten().tolist() == [40000 - 65536, -1]
    check(tensors, spec, WHERE)
    same(unpack(tensors, spec), codes)


def test_float16_indices_may_look_like_nan() -> None:
    spec = VPTQSpec(4, 2, 4, 65536, storage="float16")
    codes = random_vptq(spec)
    codes.indices[0, 0] = torch.tensor([0x7E01, 0xFC00])
    tensors = pack(codes, spec)
    assert torch.isnan(tensors["indices"][0, 0, 0]) and torch.isinf(tensors["indices"][0, 0, 1])
    check(tensors, spec, WHERE)
    same(unpack(tensors, spec), codes)


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out_features": 0}, "out_features must be at least 1, got 0"),
        ({"in_features": 43.0}, "in_features must be an integer, got 43.0"),
        ({"vector_dim": True}, "vector_dim must be an integer, got True"),
        ({"vector_dim": 0}, r"vector_dim must be 1\.\.16, got 0"),
        ({"vector_dim": 17}, r"vector_dim must be 1\.\.16, got 17"),
        ({"num_centroids": 48}, r"num_centroids must be a power of two in 2\.\.65536, got 48"),
        ({"num_centroids": 1}, "num_centroids must be a power of two"),
        ({"num_centroids": 2**17}, "num_centroids must be a power of two"),
        ({"num_centroids": -4}, "num_centroids must be a power of two"),
        ({"num_res_centroids": -1}, r"num_res_centroids must be 0 .* or a power of two .*, got -1"),
        ({"num_res_centroids": 3}, "num_res_centroids must be 0"),
        ({"num_res_centroids": 2**17}, "num_res_centroids must be 0"),
        ({"num_groups": 3}, "num_groups must be a divisor of the 40 columns that are not outliers"),
        ({"num_groups": 0}, "num_groups must be a divisor"),
        ({"num_groups": 80}, "num_groups must be a divisor"),
        ({"outlier_columns": 43}, r"outlier_columns must be 0\.\.42, fewer than the columns, got"),
        ({"outlier_columns": -1}, r"outlier_columns must be 0\.\.42"),
        ({"outlier_vector_dim": 1}, r"outlier_vector_dim must be 0 .* or 2\.\.16, got 1"),
        ({"outlier_vector_dim": 17}, "outlier_vector_dim must be 0"),
        ({"outlier_vector_dim": 0}, "outlier_centroids must be 0 when outlier_vector_dim is 0"),
        ({"outlier_centroids": 0}, r"outlier_centroids must be a power of two .* is given, got 0"),
        ({"outlier_centroids": 12}, "outlier_centroids must be a power of two"),
        (
            {"outlier_vector_dim": 0, "outlier_centroids": 0},
            "outlier_columns must be 0 when outlier_vector_dim and outlier_centroids are 0, got 3",
        ),
        ({"norm": "both"}, 'norm must be "none", "columns" or "rows", got \'both\''),
        ({"permuted": 1}, "permuted must be true or false, got 1"),
        ({"permuted": True, "in_features": 65539}, "permuted must be false beyond 65536 columns"),
        ({"codebook_dtype": "int8"}, 'codebook_dtype must be "float16", "bfloat16" or "float32"'),
        ({"storage": "uint16"}, 'storage must be "packed", "int16" or "float16"'),
    ],
)
def test_impossible_specs(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SPEC, **changes)


def test_what_published_files_do_is_allowed() -> None:
    assert VPTQSpec(8, 8, 8, 65536).bits_per_weight > 16  # more centroids than vectors
    assert VPTQSpec(8, 8, 8, 65536, 65536).index_bits == 32
    unused = VPTQSpec(9, 8, 8, 2, outlier_vector_dim=4, outlier_centroids=16).layout()
    assert unused["outlier_indices"].shape == (1, 3, 0)
    assert unused["outlier_centroids.weight"].shape == (1, 64)
    assert VPTQSpec(8, 70000, 8, 2, permuted=True, storage="int16").layout()["perm"].dtype == (
        torch.int64
    )


Damage = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("storage", "damage", "message"),
    [
        ("packed", lambda t: t.pop("centroids.weight"), r"missing tensor 'centroids\.weight'"),
        ("packed", lambda t: t.update(weight=torch.zeros(1)), "unexpected tensor 'weight'"),
        (
            "packed",
            lambda t: t.update(indices=t["indices"][..., :-1]),
            r"'indices' has shape \(4, 4, 1\), expected \(4, 4, 2\)",
        ),
        (
            "packed",
            lambda t: t.update(weight_scale=t["weight_scale"].bfloat16()),
            "'weight_scale' has dtype torch.bfloat16, expected torch.float16",
        ),
        (
            "packed",
            lambda t: t["perm"][7].copy_(t["perm"][8]),
            r"'perm' is no permutation: it names 42 different columns from \d+ to \d+ of the 43",
        ),
        ("packed", lambda t: t["perm"][7].fill_(-1), r"to 65535 of the 43"),
        ("int16", lambda t: t["perm"][7].fill_(-1), r"from -1 to 42 of the 43"),
        ("int16", lambda t: t["perm"].add_(1), r"from 1 to 43 of the 43"),
        (
            "packed",
            lambda t: t["outlier_indices"][0, 2, 1].fill_(-1),
            r"1 of 24 elements of 'outlier_indices' point beyond the codebook of 16 centroids "
            r"\(first: group 0, row block 2, column 1, index 65535\)",
        ),
        (
            "int16",
            lambda t: t["indices"][3, 1, 9].fill_(32),
            r"1 of 160 elements of 'indices' .* 32 .*group 3, row block 1, column 9, index 32",
        ),
        ("int16", lambda t: t["res_indices"][1].fill_(2), "40 of 160 elements of 'res_indices'"),
        (
            "float16",
            lambda t: t["indices"].view(torch.int16)[0, 0].fill_(40000 - 65536),
            "10 of 160 elements of 'indices' .* index 40000",
        ),
        (
            "packed",
            lambda t: t["res_centroids.weight"][0, 0].fill_(float("nan")),
            r"'res_centroids\.weight' holds values that are not finite",
        ),
        ("float16", lambda t: t["weight_bias"][3].fill_(float("inf")), "'weight_bias' holds"),
    ],
)
def test_damaged_tensors(storage: str, damage: Damage, message: str) -> None:
    spec = dataclasses.replace(SPEC, storage=storage)
    tensors = pack(random_vptq(spec), spec)
    check(tensors, spec, WHERE)
    damage(tensors)
    with pytest.raises(FormatError, match=message) as caught:
        check(tensors, spec, WHERE)
    assert str(caught.value).startswith(f"{WHERE}: ")
    assert "quantize it again" in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "damage", "message"),
    [
        ("outliers", lambda c: c.indices[0, 0].fill_(32), r"indices spans \d+\.\.32, .* 0\.\.31"),
        ("outliers", lambda c: c.res_indices[0, 0].fill_(-1), r"res_indices spans -1\.\.1"),
        ("outliers", lambda c: c.outlier_indices[0].fill_(16), "outlier_indices spans"),
        ("outliers", lambda c: c.perm[0].fill_(43), r"perm spans 0\.\.43, allowed are 0\.\.42"),
        ("outliers", lambda c: c.perm[0].copy_(c.perm[1]), "perm is no permutation"),
        ("outliers", lambda c: c.centroids[0].fill_(7e4), "centroids holds .* in float16"),
        ("outliers", lambda c: c.scale.fill_(float("nan")), "scale holds values"),
        ("outliers", lambda c: setattr(c, "bias", None), "bias is missing from the codes"),
        ("outliers", lambda c: setattr(c, "res_indices", None), "res_indices is missing"),
        ("main", lambda c: setattr(c, "perm", torch.arange(37)), "perm is not part of"),
        (
            "main",
            lambda c: setattr(c, "indices", c.indices[..., 1:]),
            r"indices has shape \(1, 4, 36\), expected \(1, 4, 37\)",
        ),
        (
            "main",
            lambda c: setattr(c, "indices", c.indices.float()),
            "indices must be integers, got torch.float32",
        ),
    ],
)
def test_codes_that_do_not_fit_are_not_packed(
    spec: str, damage: Callable[[VPTQCodes], object], message: str
) -> None:
    codes = random_vptq(ODD_VPTQ[spec])
    damage(codes)
    with pytest.raises(ValueError, match=message):
        pack(codes, ODD_VPTQ[spec])
