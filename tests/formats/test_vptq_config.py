"""Entries of published configs: there and back, as others write them, and as nobody may."""

from __future__ import annotations

import pytest
from helpers_vptq import ODD_VPTQ, vptq_specs
from hypothesis import given
from hypothesis import strategies as st

from hf_vq.formats import FORMATS, FormatError, adopt, packed_settings
from hf_vq.formats.vptq import VPTQSpec
from hf_vq.formats.vptq_config import as_stored, read_entry, read_shared, write_entry, write_layers

OFFICIAL = {
    "in_features", "out_features", "vector_lens", "num_centroids", "num_res_centroids", "group_num",
    "group_size", "outlier_size", "enable_norm", "enable_perm", "bias", "is_indice_packed",
    "indices_as_float",
}  # fmt: skip
"""Arguments that the official package's layer has; it fails on any other."""
ENTRY = {
    "in_features": 96,
    "out_features": 50,
    "vector_lens": [-1, 8],
    "num_centroids": [-1, 256],
    "num_res_centroids": [-1, -1],
    "group_num": 1,
    "group_size": 96,
    "outlier_size": 0,
    "enable_norm": True,
    "enable_perm": False,
    "bias": False,
    "is_indice_packed": True,
    "indices_as_float": False,
}


def read(**changes):
    entry = {k: v for k, v in {**ENTRY, **changes}.items() if v != "absent"}
    return read_entry(50, 96, entry, "a.b")


@given(spec=vptq_specs(storages=("packed", "int16", "float16")), bias=st.booleans())
def test_there_and_back(spec, bias):
    entry = write_entry(spec, bias)
    assert set(entry) == OFFICIAL | ({"norm_dim"} if spec.norm == "rows" else set())
    shape = spec.out_features, spec.in_features
    assert read_entry(*shape, entry, "x", spec.codebook_dtype) == spec


def test_an_entry_by_hand():
    spec = read(
        vector_lens=[4, 12],
        num_centroids=[4096, 65536],
        num_res_centroids=[-1, 4096],
        outlier_size=16,
        group_num=4,
        group_size=20,
        enable_perm=True,
    )
    assert spec == VPTQSpec(50, 96, 12, 65536, 4096, 4, 16, 4, 4096, "columns", True)
    assert spec.index_bits == 28


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({}, {"norm": "columns"}),
        ({"enable_proxy_error": False, "vector_quant_dim": "out", "new": {}}, {}),
        ({"norm_dim": 1}, {"norm": "rows"}),
        ({"enable_norm": False, "norm_dim": 1}, {"norm": "none"}),
        ({"num_res_centroids": [-1, 0]}, {"num_res_centroids": 0}),
        ({"num_res_centroids": [0, 16]}, {"num_res_centroids": 16}),
        ({"vector_lens": [1, 8], "num_centroids": [16, 256]}, {"outlier_vector_dim": 0}),
        ({"vector_lens": [4, 8], "num_centroids": [0, 256]}, {"outlier_vector_dim": 0}),
        ({"is_indice_packed": False}, {"storage": "int16"}),
        ({"is_indice_packed": False, "indices_as_float": True}, {"storage": "float16"}),
        ({"indices_as_float": None}, {"storage": "packed"}),
        ({"indices_as_float": "absent", "is_indice_packed": "absent"}, {"storage": "packed"}),
        ({"group_size": -1, "group_num": 3}, {"num_groups": 3}),
        ({"in_features": "absent", "out_features": "absent", "group_size": "absent"}, {}),
    ],
)
def test_as_others_write_them(changes, fields):
    spec = read(**changes)
    assert {name: getattr(spec, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_num": 5, "group_size": -1}, "group_num=5 .* not the 96 columns"),
        ({"group_num": 3, "group_size": 31}, "group_size=31 are not the 96 columns"),
        ({"group_num": 0}, "group_num is 0"),
        ({"outlier_size": 96, "vector_lens": [4, 8], "num_centroids": [2, 2]}, "96 of the .* 96"),
        ({"outlier_size": 8}, "no outlier codebook"),
        ({"num_centroids": [-1, 48]}, "num_centroids must be a power of two .* got 48"),
        ({"num_res_centroids": [-1, 3]}, "num_res_centroids must be"),
        ({"num_res_centroids": [16, 16]}, "outliers have no residual"),
        ({"num_centroids": [-1, 2**17]}, "power of two in 2..65536"),
        ({"vector_lens": [-1, 17]}, "vector_dim must be 1..16"),
        ({"vector_lens": [-1, 0]}, "vector_dim must be 1..16"),
        ({"vector_lens": 8}, "vector_lens is 8, expected two integers"),
        ({"vector_lens": [8]}, "expected two integers"),
        ({"vector_lens": [-1, True]}, "expected two integers"),
        ({"vector_lens": "absent"}, "missing key 'vector_lens'"),
        ({"in_features": 64}, "in_features is 64, but the model's layer has 96"),
        ({"out_features": 51}, "out_features is 51, but the model's layer has 50"),
        ({"group_num": "1"}, "group_num is '1', expected an integer"),
        ({"enable_perm": 1}, "enable_perm is 1, expected true or false"),
        ({"norm_dim": 2}, "norm_dim is 2"),
        ({"vector_quant_dim": "in"}, "only 'out' exists"),
    ],
)
def test_what_describes_no_layer_is_refused_in_its_name(changes, message):
    with pytest.raises(FormatError, match=f"a.b: config.json does not describe a vptq.*{message}"):
        read(**changes)


@given(
    entry=st.dictionaries(
        st.sampled_from(sorted(ENTRY)),
        st.none() | st.booleans() | st.integers(-2, 300) | st.lists(st.integers(-2, 300)),
    )
)
def test_any_entry_is_a_spec_or_refused(entry):
    try:
        assert read(**entry).in_features == 96
    except FormatError as error:
        assert "a.b" in str(error)


def test_layers_of_a_model():
    specs = {name: (spec, False) for name, spec in ODD_VPTQ.items()}
    assert list(write_layers(specs)) == list(specs)
    known = FORMATS["vptq"]
    written = {"config_for_layers": write_layers(specs)}
    assert known.lists_layers(written)
    for name, entry in known.read_layers(written).items():
        spec = specs[name][0]
        assert (
            known.make_spec(spec.out_features, spec.in_features, entry, name, spec.codebook_dtype)
            == spec
        )
    assert not known.has_bias(entry, True) and known.has_bias({}, True)
    assert read_shared({"shared_layer_config": None}) == {}
    for broken in ([ENTRY], {"a.b": 3}):
        with pytest.raises(FormatError, match=r"config_for_layers must be|a\.b: its entry"):
            known.read_layers({"config_for_layers": broken})


def test_the_file_decides_about_the_codebooks_dtype():
    spec = ODD_VPTQ["main"]
    assert as_stored(spec, {"centroids.weight": "BF16"}).codebook_dtype == "bfloat16"
    assert as_stored(spec, {"centroids.weight": "F16"}) == spec
    assert as_stored(spec, {"centroids.weight": "I8"}) == as_stored(spec, {}) == spec


def test_oldest_layout():
    old = {"hidden_size": 3, "quant_config": {"a.b": ENTRY}}
    new = {"quant_method": "vptq", "config_for_layers": {"a.b": ENTRY}}
    assert adopt(old) == {"hidden_size": 3, "quantization_config": new}
    assert "quant_config" in old  # its owner's
    assert packed_settings(old) == new
    for other in (
        {"quant_config": {"a": 1}},
        {"quant_config": {"a": {"bits": 4}}},
        {"quant_config": {}},
        {"quant_config": {"a.b": ENTRY}, "quantization_config": {"quant_method": "gptq"}},
        {},
    ):
        assert adopt(other) is other
        assert packed_settings(other) is None


def test_settings_of_multimodal_models_are_with_the_text_model():
    stored = {"quant_method": "vptq", "config_for_layers": {"a.b": ENTRY}}
    assert packed_settings({"text_config": {"quantization_config": stored}}) == stored
    assert packed_settings({"text_config": None}) is None
    assert packed_settings({"quantization_config": {"quant_method": "vptq"}}) is None
