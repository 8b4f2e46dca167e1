"""The CVXQ format: what a spec admits, packing, its config entries, and what `check` refuses."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers_cvxq import ODD_CVXQ, cvxq_specs, random_cvxq, with_depths
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_vq.formats import FORMATS, FormatError
from hf_vq.formats.cvxq import (
    CVXQCodes,
    CVXQSpec,
    check,
    count_words,
    group_words,
    pack,
    unpack,
    widen,
)
from hf_vq.layers import PackedLinear

SPEC = ODD_CVXQ["log8-int8"]
WHERE = "model.layers.3.mlp.up_proj"


def same(a: CVXQCodes, b: CVXQCodes) -> None:
    for field in dataclasses.fields(CVXQCodes):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert (x is None) == (y is None), field.name
        assert x is None or (x.dtype == y.dtype and torch.equal(x, y)), field.name


@settings(deadline=None)
@given(cvxq_specs())
def test_round_trip(drawn: tuple[CVXQSpec, int]) -> None:
    spec, seed = drawn
    codes = random_cvxq(spec, seed)
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


@settings(deadline=None)
@given(cvxq_specs())
def test_widened_matrices_decode_to_the_same_weights(drawn: tuple[CVXQSpec, int]) -> None:
    spec, seed = drawn
    tensors = pack(random_cvxq(spec, seed), spec)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    wide, wide_spec = widen(tensors, spec)
    assert wide_spec.scale_dtype == "float32"
    assert wide_spec.location == ("none" if spec.location == "none" else "float32")
    weights = [
        PackedLinear.from_packed(s, t, compute_dtype=torch.float32).dequantize()
        for s, t in ((spec, tensors), (wide_spec, wide))
    ]
    assert torch.equal(*weights)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("name", ODD_CVXQ)
def test_trainable_is_the_same_matrix_after_a_cast(name: str) -> None:
    spec = ODD_CVXQ[name]
    trainable = spec.trainable
    if spec.scale_dtype == "log8":  # casting its codes would make other scales of them
        assert trainable is None
        return
    assert trainable is not None and trainable.scale_dtype == "float32"
    assert trainable.trainable == trainable
    tensors = pack(random_cvxq(spec), spec)
    cast = {n: tensors[n].to(stored.dtype) for n, stored in trainable.layout().items()}
    check(cast, trainable, WHERE)
    weights = [
        PackedLinear.from_packed(s, t, compute_dtype=torch.float32).dequantize()
        for s, t in ((spec, tensors), (trainable, cast))
    ]
    assert torch.equal(*weights)


@pytest.mark.parametrize("name", ODD_CVXQ)
def test_meta_layout_equals_real(name: str) -> None:
    spec = ODD_CVXQ[name]
    codes = random_cvxq(spec)
    for field in dataclasses.fields(codes):
        if (value := getattr(codes, field.name)) is not None:
            setattr(codes, field.name, value.to("meta"))
    tensors = pack(codes, spec)
    assert all(t.is_meta for t in tensors.values())
    check(tensors, spec, WHERE)
    shape = (spec.num_clusters, spec.in_features, spec.group_rows)
    assert unpack(tensors, spec).codes.shape == shape


@pytest.mark.parametrize("name", ["float32-float32", "log8-int8", "wider-perm"])
def test_packed_tensors_share_no_memory_with_the_codes(name: str) -> None:
    spec = ODD_CVXQ[name]
    codes = random_cvxq(spec)
    before = copy.deepcopy(codes)
    tensors = pack(codes, spec)
    held = {n: tensor.clone() for n, tensor in tensors.items()}
    for tensor in pack(codes, spec).values():
        tensor.zero_()
    same(codes, before)
    unpacked = unpack(tensors, spec)
    for field in dataclasses.fields(unpacked):
        if (value := getattr(unpacked, field.name)) is not None:
            value.zero_()
    for n, tensor in tensors.items():
        assert torch.equal(tensor, held[n]), n


def test_other_dtypes_and_gradients_can_be_packed() -> None:
    spec = ODD_CVXQ["float16-float16"]
    codes = random_cvxq(spec)
    tensors = pack(codes, spec)
    codes.codes, codes.depths = codes.codes.to(torch.uint8), codes.depths.long()
    codes.row_perm = codes.row_perm.int()
    codes.scales = codes.scales.double().requires_grad_()
    for name, tensor in pack(codes, spec).items():
        assert not tensor.requires_grad and torch.equal(tensor, tensors[name]), name


def test_bits_per_weight_by_hand() -> None:
    # 4096 x 4100 in clusters of 250 rows: 17, the last of 96; 3 bits everywhere need 24 words
    depths = torch.full((17, 4100), 3)
    assert group_words(depths, 250).unique().tolist() == [24]
    words = count_words(depths, 250)
    spec = CVXQSpec(4096, 4100, 250, words, "log8", "int8", "lloyd", True)
    total = 32 * 17 * 4100 * 24
    total += 17 * 32 * 513  # depths: 4100 * 4 bits are 512.5 words
    total += 17 * 4100 * 16 + 2 * 17 * 16 + 4096 * 16
    assert spec.bits_per_weight == total / (4096 * 4100)
    plain = dataclasses.replace(spec, scale_dtype="float16", location="none", permuted=False)
    assert spec.nbytes - plain.nbytes == 2 * 17 * 2 + 4096 * 2


def test_words_by_python_integers() -> None:
    # groups of 7 rows: 0, 1, 2, 1 and 2 words of 0, 3, 8, 4 and 5 bits
    spec = CVXQSpec(13, 5, 7, 12)
    codes = random_cvxq(dataclasses.replace(spec, num_words=12))
    codes.depths = torch.tensor([[0, 3, 8, 4, 5], [5, 4, 8, 3, 0]], dtype=torch.uint8)
    codes.codes = (1 << codes.depths[..., None].long()) - 1 - torch.arange(7) % 2
    codes.codes = codes.codes.clamp(min=0)
    codes.codes[1, :, 6] = 0  # row 13 of 13
    words = pack(codes, spec)["words"]
    expected = []
    for cluster in range(2):
        for column in range(5):
            depth = int(codes.depths[cluster, column])
            group = codes.codes[cluster, column].tolist()
            number = sum(code << (r * depth) for r, code in enumerate(group))
            for word in range(-(-7 * depth // 32)):
                expected.append((number >> (32 * word)) & 0xFFFFFFFF)
    assert [word & 0xFFFFFFFF for word in words.tolist()] == expected
    assert (words < 0).any()  # or a signed reading would not be noticed


def test_rows_beyond_16_bits() -> None:
    for name, dtype in (("wide-perm", torch.int16), ("wider-perm", torch.int32)):
        spec = ODD_CVXQ[name]
        codes = random_cvxq(spec)
        codes.row_perm = torch.arange(spec.out_features).flip(0)
        tensors = pack(codes, spec)
        assert tensors["row_perm"].dtype == dtype
        check(tensors, spec, WHERE)
        same(unpack(tensors, spec), codes)


# -------------------------------------------------------------------------------------- config.json


def test_spec_is_what_its_entry_says() -> None:
    for spec in ODD_CVXQ.values():
        fields = json.loads(json.dumps(spec.to_dict()))
        shape = spec.out_features, spec.in_features
        made = FORMATS["cvxq"].make_spec(*shape, {**fields, "bias": True}, WHERE)
        assert made == spec and hash(made) == hash(spec)


def test_layers_of_one_geometry_share_an_entry() -> None:
    known = FORMATS["cvxq"]
    other = dataclasses.replace(SPEC, num_words=SPEC.num_words - 1)
    layers: dict[str, Any] = {
        "a": (SPEC, True),
        "b": (ODD_CVXQ["log8"], True),
        "c": (other, True),
        "d": (SPEC, False),
    }
    written = json.loads(json.dumps(known.write_layers(layers)))
    assert [entry["modules"] for entry in written] == [
        {"a": SPEC.num_words, "c": other.num_words},
        {"b": ODD_CVXQ["log8"].num_words},
        {"d": SPEC.num_words},
    ]
    assert "num_words" not in written[0]
    stored = {"quant_method": "cvxq", "layers": written}
    assert known.lists_layers(stored) and not known.lists_layers({"layers": []})
    read = known.read_layers(stored)
    assert read.keys() == layers.keys()
    for name, (spec, bias) in layers.items():
        made = known.make_spec(spec.out_features, spec.in_features, read[name], name)
        assert made == spec
        for model_has in (True, False):  # the file decides
            assert known.has_bias(read[name], model_has) == bias
    del read["a"]["bias"]
    assert [known.has_bias(read["a"], has) for has in (True, False)] == [True, False]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"a": {}}, "layers must be a list of entries"),
        (["a"], "layers must be a list of entries"),
        ([{"modules": ["a"]}], r"must be a dict of name: number of words, not \['a'\]"),
        ([{"modules": {"a": 1}}, {"modules": {"a": 1}}], "a: config.json lists it twice"),
    ],
)
def test_bad_lists(layers: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        FORMATS["cvxq"].read_layers({"layers": layers})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": 1}, "bias must be true or false, got 1"),
        ({"depth": 3}, "unknown field 'depth'"),
        ({"num_words": None}, "num_words must be an integer, got None"),
        ({"num_words": 10**6}, r"num_words must be 0\.\.336, that of 8 bits, got 1000000"),
        ({"levels": "gauss"}, 'levels must be "lloyd" or "laplace"'),
    ],
)
def test_bad_entries(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        FORMATS["cvxq"].make_spec(50, 21, {**SPEC.to_dict(), **changes}, WHERE)
    assert str(caught.value).startswith(f"{WHERE}: config.json does not describe a cvxq layer")
    fields = SPEC.to_dict()
    del fields["num_words"]
    with pytest.raises(FormatError, match="missing field 'num_words'"):
        FORMATS["cvxq"].make_spec(50, 21, fields, WHERE)


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out_features": 0}, "out_features must be at least 1, got 0"),
        ({"in_features": 0}, "in_features must be at least 1, got 0"),
        ({"in_features": 21.0}, "in_features must be an integer, got 21.0"),
        ({"group_rows": True}, "group_rows must be an integer, got True"),
        ({"group_rows": 0}, r"group_rows must be 1\.\.50, got 0"),
        ({"group_rows": 51}, r"group_rows must be 1\.\.50, got 51"),
        ({"num_words": -1}, r"num_words must be 0\.\.336, that of 8 bits, got -1"),
        ({"num_words": 337}, r"num_words must be 0\.\.336"),
        ({"scale_dtype": "bfloat16"}, 'scale_dtype must be "log8", "float16" or "float32"'),
        ({"location": "log8"}, 'location must be "none", "int8", "float16" or "float32", got'),
        ({"levels": "uniform"}, 'levels must be "lloyd" or "laplace", got \'uniform\''),
        ({"permuted": 1}, "permuted must be true or false, got 1"),
        ({"group_rows": 50}, "permuted must be false where all rows are one cluster, got True"),
    ],
)
def test_impossible_specs(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SPEC, **changes)


Damage = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("log8-int8", lambda t: t.pop("scale_grid"), "missing tensor 'scale_grid'"),
        ("log8-int8", lambda t: t.update(scales=torch.zeros(1)), "unexpected tensor 'scales'"),
        (
            "log8-int8",
            lambda t: t.update(words=t["words"][:-1]),
            r"'words' has shape \(192,\), expected \(193,\)",
        ),
        (
            "log8-int8",
            lambda t: t.update(location=t["location"].float()),
            "'location' has dtype torch.float32, expected torch.int8",
        ),
        (
            "log8-int8",
            lambda t: t["depths"][1, 1].copy_(t["depths"][1, 1] & ~0xF0 | 0x90),
            r"1 of 42 depths are beyond 8 bits \(first: cluster 1, column 9, 9 bits\)",
        ),
        (
            "log8-int8",
            lambda t: t["depths"][0, 0].copy_(t["depths"][0, 0] & ~0xF),
            "'depths' ask for 185 words of codes, but there are 193",
        ),
        (
            "log8-int8",
            lambda t: t["row_perm"][7].copy_(t["row_perm"][8]),
            r"'row_perm' is no permutation: it names 49 different rows from \d+ to \d+ of the 50",
        ),
        ("log8-int8", lambda t: t["row_perm"][7].fill_(-1), r"to 65535 of the 50"),
        ("wider-perm", lambda t: t["row_perm"][7].fill_(-1), r"from -1 to 65536 of the 65537"),
        (
            "log8-int8",
            lambda t: t["scale_grid"][1, 1].fill_(1),
            r"'scale_grid' asks for scales up to 2\*\*2\d\d(\.\d+)?, beyond those of float32",
        ),
        ("log8-int8", lambda t: t["scale_grid"][0, 0].fill_(float("inf")), "'scale_grid' holds"),
        ("float16", lambda t: t["scales"][0, 3].fill_(float("nan")), "'scales' holds values that"),
        ("float16-float16", lambda t: t["location"][1, 3].fill_(float("inf")), "'location' holds"),
    ],
)
def test_damaged_tensors(name: str, damage: Damage, message: str) -> None:
    spec = ODD_CVXQ[name]
    tensors = pack(random_cvxq(spec), spec)
    check(tensors, spec, WHERE)
    damage(tensors)
    with pytest.raises(FormatError, match=message) as caught:
        check(tensors, spec, WHERE)
    assert str(caught.value).startswith(f"{WHERE}: ")
    assert "quantize it again" in str(caught.value)


def test_bits_after_the_last_code_are_ignored() -> None:
    spec = with_depths(13, 5, 7)
    tensors = pack(random_cvxq(spec), spec)
    tensors["depths"][:, 0] |= ~0xFFFFF  # 5 columns are 20 bits
    check(tensors, spec, WHERE)
    same(unpack(tensors, spec), random_cvxq(spec))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("log8-int8", lambda c: c.codes[0, 0].fill_(256), "codes of 8 bits span .*256, allowed"),
        ("log8-int8", lambda c: c.codes[0].fill_(-1), r"codes of \d bits span -1\.\."),
        ("log8-int8", lambda c: c.codes[-1, -1, 0].fill_(1), r"codes of 0 bits span 0\.\.1"),
        ("log8-int8", lambda c: c.codes[1, 0, 31].fill_(1), "rows beyond the last one"),
        (
            "log8-int8",
            lambda c: c.depths[0, 0].fill_(9),
            r"depths spans 0\.\.9, allowed are 0\.\.8",
        ),
        ("log8-int8", lambda c: c.depths[0, 0].fill_(7), "ask for 192 words, but num_words is 193"),
        ("log8-int8", lambda c: c.row_perm[0].fill_(50), r"row_perm spans \d\.\.50, .* 0\.\.49"),
        ("log8-int8", lambda c: c.row_perm[0].copy_(c.row_perm[1]), "row_perm is no permutation"),
        ("log8-int8", lambda c: setattr(c, "scale_grid", None), "scale_grid is missing from"),
        ("log8-int8", lambda c: setattr(c, "scales", c.codes[..., 0].half()), "scales is not part"),
        ("log8-int8", lambda c: c.scale_grid[1].fill_(1), r"scales up to 2\*\*2\d\d"),
        ("log8-int8", lambda c: c.scale_grid[1].fill_(1e6), "scale_grid holds .* in torch.float16"),
        (
            "log8-int8",
            lambda c: setattr(c, "location", c.location.long() * 2),
            r"location spans -\d+\.\.\d+, allowed are -128\.\.127",
        ),
        (
            "log8-int8",
            lambda c: setattr(c, "location", c.location.float()),
            "location must be integers, got torch.float32",
        ),
        (
            "float16",
            lambda c: c.scales[0].fill_(7e4),
            "scales holds .* not finite in torch.float16",
        ),
        ("float16-float16", lambda c: c.location[0].fill_(float("nan")), "location holds"),
        (
            "float16",
            lambda c: setattr(c, "codes", c.codes[..., 1:]),
            r"codes has shape \(1, 10, 28\), expected \(1, 10, 29\)",
        ),
        ("float16", lambda c: setattr(c, "codes", c.codes.float()), "codes must be integers, got"),
    ],
)
def test_codes_that_do_not_fit_are_not_packed(
    name: str, damage: Callable[[CVXQCodes], object], message: str
) -> None:
    codes = random_cvxq(ODD_CVXQ[name])
    damage(codes)
    with pytest.raises(ValueError, match=message):
        pack(codes, ODD_CVXQ[name])


@given(st.integers(1, 5000), st.integers(0, 8))
def test_words_of_a_group(rows: int, depth: int) -> None:
    words = int(group_words(torch.tensor(depth), rows))
    assert 32 * (words - 1) < rows * depth <= 32 * words
