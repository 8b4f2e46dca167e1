"""The chosen geometry never costs more than asked, comes close, and honours what is given."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vq.formats.vptq import VPTQSpec
from hf_vq.methods import vptq_spec
from hf_vq.methods.vptq_spec import GAUSSIAN_BITS, GAUSSIAN_FACTOR, VECTOR_DIMS, choose_spec

SMALL = [(256, 256), (704, 256), (256, 704)]
LARGE = [(4096, 4096), (1024, 4096), (11008, 4096), (4096, 14336), (8192, 28672), (28672, 8192)]


@settings(max_examples=150, deadline=None)
@given(rows=st.integers(1, 600), columns=st.integers(1, 600), bits=st.floats(1, 8))
def test_never_above_the_target(rows, columns, bits):
    try:
        spec = choose_spec(rows, columns, bits, {})
    except ValueError as error:
        assert "reachable" in str(error)
        assert rows * columns < 2**14
        return
    assert isinstance(spec, VPTQSpec)
    assert (spec.out_features, spec.in_features) == (rows, columns)
    assert spec.bits_per_weight <= bits * (1 + 1e-9)
    assert spec.vector_dim in VECTOR_DIMS
    assert spec.outlier_columns == 0
    vectors = spec.num_row_blocks * spec.group_columns
    assert spec.num_centroids == 2 or vectors >= 4 * max(spec.num_centroids, spec.num_res_centroids)
    assert spec.num_res_centroids <= spec.num_centroids


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1000, 30000), columns=st.integers(1000, 30000), bits=st.floats(1, 5))
def test_close_to_the_target_on_large_matrices(rows, columns, bits):
    # the codes come in steps of at most 1/6 bit up to 30 bits for 6 weights; beyond, the codebooks
    # of longer codes cost a matrix of a million weights more than what is left of a step
    assert bits - 0.2 <= choose_spec(rows, columns, bits, {}).bits_per_weight <= bits * (1 + 1e-9)


@pytest.mark.parametrize("bits", [1, 1.5, 2, 2.25, 3, 3.5, 4, 5])
@pytest.mark.parametrize("shape", LARGE)
def test_very_close_on_usual_shapes(shape, bits):
    assert bits - 0.12 <= choose_spec(*shape, bits, {}).bits_per_weight <= bits


@pytest.mark.parametrize("bits", [1, 2, 2.25, 4, 8])
@pytest.mark.parametrize("shape", [(128, 128), *SMALL, *LARGE])
def test_every_target_is_in_reach_of_ordinary_matrices(shape, bits):
    assert bits - 0.27 <= choose_spec(*shape, bits, {}).bits_per_weight <= bits


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_codebooks_are_sized_to_the_matrix(bits):
    for shape in SMALL:
        assert choose_spec(*shape, bits, {}).num_centroids <= 2048
    sizes = {choose_spec(8192, 28672, b, {}).num_centroids for b in (1, 2, 2.25, 3, 4)}
    assert max(sizes) > 4096
    for spec in (choose_spec(*shape, bits, {}) for shape in LARGE):
        if spec.num_centroids > 4096:
            vectors = spec.num_row_blocks * spec.group_columns
            assert vectors >= 64 * spec.num_centroids


def test_the_small_models_matrices_get_small_codebooks_of_short_vectors():
    for shape in SMALL:
        spec = choose_spec(*shape, 2.25, {})
        assert spec.vector_dim <= 6 and spec.num_centroids <= 512


FIELDS = {
    "vector_dim": ("vector_dim", [2, 3, 4, 8]),
    "num_centroids": ("num_centroids", [16, 64, 256]),
    "num_res_centroids": ("num_res_centroids", [0, 4, 16]),
    "num_groups": ("num_groups", [1, 2, 4]),
    "codebook_dtype": ("codebook_dtype", ["float16", "bfloat16", "float32"]),
    "permute": ("permuted", [True, False]),
}


@settings(max_examples=150, deadline=None)
@given(
    shape=st.sampled_from([(704, 256), (512, 1024), (1536, 700)]),
    overrides=st.fixed_dictionaries(
        {}, optional={name: st.sampled_from(values) for name, (_, values) in FIELDS.items()}
    ),
    norm=st.sampled_from([None, "none", "mean-std", "min-max"]),
)
def test_overrides_hold(shape, overrides, norm):
    try:
        spec = choose_spec(*shape, 6.0, {**overrides, "norm": norm})
    except ValueError as error:
        assert "reachable" in str(error)
        return
    for name, value in overrides.items():
        assert getattr(spec, FIELDS[name][0]) == value
    if norm is not None:
        assert spec.norm == ("none" if norm == "none" else "columns")
    assert spec.bits_per_weight <= 6


@pytest.mark.parametrize("groups", [None, 1, 3, 4])
@pytest.mark.parametrize("percent", [0.5, 1, 5])
def test_outliers_where_asked(percent, groups):
    spec = choose_spec(1024, 1000, 3.0, {"outlier_percent": percent, "num_groups": groups})
    least = -(-percent * 1000 // 100)
    assert least <= spec.outlier_columns < least + spec.num_groups
    assert groups in (None, spec.num_groups)
    assert spec.permuted and spec.vector_dim % spec.outlier_vector_dim == 0
    assert 4 * spec.outlier_centroids <= spec.num_outlier_row_blocks * spec.outlier_columns
    assert choose_spec(1024, 1000, 3.0, {"outlier_percent": 0}).outlier_columns == 0


def test_outliers_as_in_the_paper():
    """VPTQ table 8: 1 % outliers of 4 rows with 8192 centroids, v12 4096 + 4096, 4 groups."""
    fields = {
        "vector_dim": 12,
        "num_centroids": 4096,
        "num_res_centroids": 4096,
        "num_groups": 4,
        "outlier_percent": 1,
        "outlier_vector_dim": 4,
        "outlier_centroids": 8192,
    }
    spec = choose_spec(4096, 4096, None, fields)
    assert (spec.outlier_columns, spec.outlier_vector_dim, spec.outlier_centroids) == (44, 4, 8192)
    assert spec.permuted and spec.norm == "none" and spec.num_groups == 4
    geometry = {k: v for k, v in fields.items() if k.startswith("outlier_") and "percent" not in k}
    assert choose_spec(4096, 4096, 2.3, geometry).outlier_columns > 0


def test_without_a_target_the_fields_are_all_there_is():
    spec = choose_spec(300, 256, None, {"vector_dim": 6, "num_centroids": 4096})
    assert spec == VPTQSpec(300, 256, 6, 4096)
    with pytest.raises(ValueError, match="vector_dim and num_centroids"):
        choose_spec(300, 256, None, {"vector_dim": 6})


@pytest.mark.parametrize(
    ("shape", "bits", "fields", "message"),
    [
        ((8, 16), 1.0, {}, r"8 x 16 matrix; reachable: [\d.]+ to"),
        ((64, 64), 2.0, {"vector_dim": 8, "num_centroids": 512}, "vector_dim=8.*reachable"),
        ((64, 64), 2.0, {"num_groups": 3}, "num_groups=3 does not divide the 64 columns"),
        ((64, 64), 2.0, {"num_centroids": 48}, "power of two"),
    ],
)
def test_refusals(shape, bits, fields, message):
    with pytest.raises(ValueError, match=message):
        choose_spec(*shape, bits, fields)


@pytest.mark.parametrize("shape", [(8, 16), (128, 256), (64, 172)])
def test_the_range_named_is_the_range(shape):
    """Asking for the ends of what the error says works."""
    fields = {"vector_dim": 2, "num_centroids": 16}
    with pytest.raises(ValueError, match="reachable") as caught:
        choose_spec(*shape, 1.0, fields)
    low, high = map(float, str(caught.value).split("reachable: ")[1].split()[:3:2])
    assert abs(choose_spec(*shape, low + 0.001, fields).bits_per_weight - low) <= 0.001
    assert choose_spec(*shape, max(low, high) + 0.001, fields).bits_per_weight <= high + 0.001


def test_the_choice_is_deterministic():
    first = choose_spec(8192, 28672, 4.1, {})
    vptq_spec._choose.cache_clear()
    assert choose_spec(8192, 28672, 4.1, {"vector_dim": None}) == first


def test_the_search_is_short():
    # about 2 microseconds each
    assert sum(1 for _ in vptq_spec._candidates(8192, 28672, 8.0, {})) < 50_000


def test_the_table_of_factors_is_complete_and_sensible():
    for row in GAUSSIAN_FACTOR.values():
        assert len(row) == len(GAUSSIAN_BITS)
    assert set(VECTOR_DIMS) <= set(GAUSSIAN_FACTOR)
    for low, high in itertools.pairwise(VECTOR_DIMS):
        assert all(
            a > b > 1 for a, b in zip(GAUSSIAN_FACTOR[low], GAUSSIAN_FACTOR[high], strict=True)
        )
    values = [vptq_spec._gaussian(4, b) for b in range(1, 17)]
    assert values[0] == 1.20 and values[-1] == 1.55 and values[6] == pytest.approx(1.505)


@pytest.mark.parametrize("bits", [None, 3])
@pytest.mark.parametrize("field", ["num_centroids", "num_res_centroids"])
def test_more_centroids_than_vectors_are_refused(bits, field):
    given = {"vector_dim": 8, "num_centroids": 16, field: 1024}
    with pytest.raises(ValueError, match=f"{field}=1024 is more than the 600 vectors.*at most 512"):
        choose_spec(33, 120, bits, given)
    given[field] = 512
    assert choose_spec(33, 120, None, given).num_weights == 33 * 120


@pytest.mark.parametrize("bits", [None, 3])
def test_groups_that_do_not_come_out_even_are_refused(bits):
    given = {"vector_dim": 4, "num_centroids": 16, "num_groups": 7}
    with pytest.raises(ValueError, match="num_groups=7 does not divide the 120 columns"):
        choose_spec(64, 120, bits, given)
