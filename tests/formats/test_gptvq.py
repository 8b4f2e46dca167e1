"""The gptvq format: what a spec admits, packing, and what `check` refuses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from helpers import ODD_SPECS, gptvq_specs, random_gptvq
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_vq.formats import FORMATS, FormatError
from hf_vq.formats.gptvq import GPTVQCodes, GPTVQSpec, check, pack, unpack

SPEC = ODD_SPECS["4d-int4-linear"]  # 37 centroids: indices may be out of range
WHERE = "model.layers.3.mlp.up_proj"


def same(a: GPTVQCodes, b: GPTVQCodes) -> None:
    for field in dataclasses.fields(GPTVQCodes):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert (x is None) == (y is None), field.name
        assert x is None or torch.equal(x.double(), y.double()), field.name


@settings(deadline=None)
@given(gptvq_specs(), st.integers(0, 2**32))
def test_round_trip(spec: GPTVQSpec, seed: int) -> None:
    codes = random_gptvq(spec, seed)
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
        assert torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize("name", ODD_SPECS)
def test_meta_layout_equals_real(name: str) -> None:
    spec = ODD_SPECS[name]
    codes = random_gptvq(spec)
    for field in dataclasses.fields(codes):
        if (value := getattr(codes, field.name)) is not None:
            setattr(codes, field.name, value.to("meta"))
    tensors = pack(codes, spec)
    assert all(t.is_meta for t in tensors.values())
    check(tensors, spec, WHERE)
    assert unpack(tensors, spec).indices.shape == (spec.out_features, spec.num_vectors)


def test_packed_tensors_share_no_memory_with_the_codes() -> None:
    spec = ODD_SPECS["2d-int8-log"]
    codes = random_gptvq(spec)
    codes.codebooks = codes.codebooks.to(torch.int8)
    codes.codebook_scales = codes.codebook_scales.bfloat16()
    tensors = pack(codes, spec)
    tensors["codebooks"].zero_()
    tensors["codebook_scales"].zero_()
    assert codes.codebooks.any() and codes.codebook_scales.any()
    unpack(tensors, spec).codebooks.fill_(1)
    assert not tensors["codebooks"].any()


def test_bits_per_weight_by_hand() -> None:
    # 256 x 256, 2-D, 16 centroids, blocks of 16 x 128 = 2048 weights, scales every 32 columns
    spec = GPTVQSpec(256, 256, 2, 16, 16, 128, scale_block=32)
    blocks = 2 * 16
    bits = 256 * 128 * 4 + blocks * (16 * 2 * 8 + 16) + 256 * 8 * 4 + 2 * 8 * 16
    assert spec.bits_per_weight == bits / 256**2


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out_features": 0}, "out_features must be at least 1, got 0"),
        ({"in_features": 2.0}, "in_features must be an integer, got 2.0"),
        ({"vector_dim": 3}, "vector_dim must be 1, 2, 4 or 8, got 3"),
        ({"vector_dim": True}, "vector_dim must be an integer, got True"),
        ({"num_centroids": 1}, r"num_centroids must be 2\.\.65536, got 1"),
        ({"num_centroids": 65537}, r"num_centroids must be 2\.\.65536, got 65537"),
        ({"group_rows": 0}, "group_rows must be at least 1"),
        ({"group_columns": 22}, r"group_columns must be a positive multiple of vector_dim \(4\)"),
        ({"group_columns": 0}, "group_columns must be a positive multiple"),
        ({"scale_block": 6}, r"scale_block must be 0 .* multiple of vector_dim \(4\), got 6"),
        ({"scale_block": -4}, "scale_block must be 0"),
        ({"codebook_dtype": "int2"}, 'codebook_dtype must be "int8", "int4", "float16"'),
        ({"scale_domain": "sqrt"}, 'scale_domain must be "log" or "linear"'),
        ({"svd_rank": 38}, r"svd_rank must be 0 .*\.\.num_centroids \(37\), got 38"),
        ({"svd_rank": 2}, "vector_dim must be 1 when svd_rank is used, got 4"),
        ({"svd_rank": 2, "vector_dim": 1}, 'codebook_dtype must be "int8", .* when svd'),
    ],
)
def test_impossible_specs(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SPEC, **changes)


Damage = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("codebooks"), "missing tensor 'codebooks'"),
        (lambda t: t.update(weight=torch.zeros(1)), "unexpected tensor 'weight'"),
        (
            lambda t: t.update(indices=t["indices"][:, :-1]),
            r"'indices' has shape \(13, 2\), expected \(13, 3\)",
        ),
        (
            lambda t: t.update(codebook_scales=t["codebook_scales"].half()),
            "'codebook_scales' has dtype torch.float16, expected torch.bfloat16",
        ),
        (
            lambda t: t["indices"][4].fill_(-1),
            r"13 of 169 indices point beyond the codebook of 37 .*row 4, vector 0, index 63",
        ),
        (
            lambda t: t["codebook_scales"][0, 0].fill_(float("nan")),
            "'codebook_scales' holds values that are not finite",
        ),
    ],
)
def test_damaged_tensors(damage: Damage, message: str) -> None:
    tensors = pack(random_gptvq(SPEC), SPEC)
    check(tensors, SPEC, WHERE)
    damage(tensors)
    with pytest.raises(FormatError, match=message) as caught:
        check(tensors, SPEC, WHERE)
    assert str(caught.value).startswith(f"{WHERE}: ")
    assert "quantize it again" in str(caught.value)


def test_all_layout_problems_come_in_one_error() -> None:
    tensors = pack(random_gptvq(SPEC), SPEC)
    del tensors["codebooks"], tensors["indices"]
    with pytest.raises(FormatError, match=r"missing tensor 'indices'; missing tensor 'codebooks'"):
        check(tensors, SPEC, WHERE)


def test_overflowing_scale_grid() -> None:
    spec = dataclasses.replace(SPEC, scale_domain="log")
    tensors = pack(random_gptvq(spec), spec)
    tensors["scale_grid"][:, 2] = torch.tensor([8.0, 10.0])  # 8 + 15 * 10
    with pytest.raises(FormatError, match=r"scales up to 2\*\*158, beyond float32"):
        check(tensors, spec, WHERE)


@pytest.mark.parametrize(
    ("spec", "damage", "message"),
    [
        ("2d-int8", lambda c: c.indices[3, 3].fill_(16), r"indices spans 0\.\.16, .* 0\.\.15"),
        ("2d-int8", lambda c: c.indices[3, 3].fill_(-1), r"indices spans -1\.\."),
        ("2d-int8", lambda c: c.codebooks[0, 0, 0].fill_(128), r"128, allowed are -128\.\.127"),
        ("4d-int4-linear", lambda c: c.codebooks[0, 0, 0].fill_(8), r"allowed are -8\.\.7"),
        ("1d-svd-int8", lambda c: c.codebook_factors[0, 0].fill_(-129), "codebook_factors spans"),
        ("2d-int8-log", lambda c: c.scale_codes[0].fill_(16), "scale_codes spans"),
        ("8d-float16", lambda c: c.codebooks[0, 0, 0].fill_(7e4), "finite in torch.float16"),
        ("2d-int8", lambda c: c.codebook_scales.fill_(float("inf")), "codebook_scales holds"),
        ("2d-int8", lambda c: setattr(c, "codebook_scales", None), "codebook_scales is missing"),
        ("2d-int8", lambda c: setattr(c, "scale_grid", torch.ones(2, 1)), "grid is not part of"),
        ("2d-int8", lambda c: setattr(c, "indices", c.indices[:, 1:]), "indices has shape"),
        (
            "2d-int8",
            lambda c: setattr(c, "codebooks", c.codebooks + 0.5),
            "codebooks must be whole numbers",
        ),
    ],
)
def test_codes_that_do_not_fit_are_not_packed(
    spec: str, damage: Callable[[GPTVQCodes], object], message: str
) -> None:
    codes = random_gptvq(ODD_SPECS[spec])
    damage(codes)
    with pytest.raises(ValueError, match=message):
        pack(codes, ODD_SPECS[spec])


# ---------------------------------------------------------------------------------- the table entry


@pytest.mark.parametrize("name", ODD_SPECS)
def test_spec_survives_its_config_entry(name: str) -> None:
    spec = ODD_SPECS[name]
    fields = spec.to_dict()
    assert "out_features" not in fields and "in_features" not in fields
    made = FORMATS["gptvq"].make_spec(spec.out_features, spec.in_features, fields, WHERE)
    assert made == spec


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotation": "hadamard"}, "unknown field 'rotation'"),
        ({"group_rows": None}, "group_rows must be an integer, got None"),
        ({"num_centroids": 2**17}, r"num_centroids must be 2\.\.65536"),
    ],
)
def test_bad_config_entries_name_the_layer(changes: dict[str, object], message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        FORMATS["gptvq"].make_spec(13, 50, SPEC.to_dict() | changes, WHERE)
    assert str(caught.value).startswith(f"{WHERE}: ")


def test_config_entry_without_a_needed_field() -> None:
    fields = SPEC.to_dict()
    del fields["vector_dim"]
    with pytest.raises(FormatError, match="missing field 'vector_dim'"):
        FORMATS["gptvq"].make_spec(13, 50, fields, WHERE)
