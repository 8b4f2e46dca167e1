"""The chosen geometry never costs more than asked, comes close, and covers the matrix."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vq.formats.gptvq import GPTVQSpec
from hf_vq.methods.gptvq_spec import choose_spec

ROWS = st.integers(1, 600)
BITS = st.floats(1, 8)


@settings(max_examples=200, deadline=None)
@given(rows=ROWS, columns=st.integers(1, 600), bits=BITS)
def test_never_above_the_target(rows, columns, bits):
    try:
        spec = choose_spec(rows, columns, bits, {})
    except ValueError as error:
        assert "reachable" in str(error)
        return
    assert (spec.out_features, spec.in_features) == (rows, columns)
    assert spec.bits_per_weight <= bits * (1 + 1e-9)
    assert spec.group_columns % spec.vector_dim == 0
    assert 1 <= spec.group_rows <= rows


@pytest.mark.parametrize("bits", [1.25, 1.5, 2.0, 2.1, 2.25, 2.5, 3.1, 3.25, 4.25])
@pytest.mark.parametrize(
    "shape",
    [(256, 704), (704, 256), (896, 896), (4864, 896), (1024, 4096), (4096, 4096), (172, 688)],
)
def test_close_to_the_target(shape, bits):
    spec = choose_spec(*shape, bits, {})
    assert 0.92 * bits <= spec.bits_per_weight <= bits


@pytest.mark.parametrize("bits", [2.25, 3.1])
def test_very_close_on_large_matrices(bits):
    assert choose_spec(4096, 11008, bits, {}).bits_per_weight >= 0.985 * bits


@pytest.mark.parametrize(
    ("columns", "width"), [(4096, 128), (11008, 128), (896, 112), (4864, 128), (704, 176)]
)
def test_stripes_divide_the_columns_where_they_can(columns, width):
    spec = choose_spec(2048, columns, 2.25, {"vector_dim": 4, "index_bits": 8})
    assert columns % spec.group_columns == 0
    assert 64 <= spec.group_columns <= 256
    assert abs(spec.group_columns - width) <= 64


def test_a_prime_number_of_columns_gets_narrow_stripes_too():
    spec = choose_spec(4096, 11003, 2.25, {})
    assert spec.group_columns <= 256
    assert spec.bits_per_weight >= 0.98 * 2.25


def test_vectors_grow_with_the_matrix_and_shrink_with_the_bits():
    assert choose_spec(4096, 4096, 2.25, {}).vector_dim == 4
    assert choose_spec(128, 256, 2.25, {}).vector_dim == 2  # a 4-D codebook costs 0.25 bits there
    assert choose_spec(4096, 4096, 3.1, {}).vector_dim == 2
    assert choose_spec(4096, 4096, 6, {}).vector_dim == 1


@pytest.mark.parametrize("dim", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", ["int8", "int4", "float16"])
def test_overrides_hold(dim, dtype):
    spec = choose_spec(
        344, 172, 2.6, {"vector_dim": dim, "codebook_dtype": dtype, "scale_block": 16}
    )
    assert (spec.vector_dim, spec.codebook_dtype, spec.scale_block) == (dim, dtype, 16)
    assert spec.bits_per_weight <= 2.6


def test_paper_geometry_by_group_size():
    """GPTVQ table 7, 2.25 bits: 1-D 1x128, 2-D 4x256 (1024 weights), 4-D 128x256."""
    geometry = {"group_columns": 256}
    for dim, index_bits, size, rows in ((1, 2, 128, 1), (2, 4, 1024, 4), (4, 8, 32768, 128)):
        fields = {"vector_dim": dim, "index_bits": index_bits, "group_size": size}
        extra = geometry if size >= 256 else {}
        spec = choose_spec(512, 1024, None, {**fields, **extra})
        assert (spec.group_rows, spec.group_rows * spec.group_columns) == (rows, size)
        # the paper counts 2.25; the codebooks' scales come on top
        assert spec.bits_per_weight == pytest.approx(2.25 + 16 / size)


def test_svd_means_one_dimension():
    spec = choose_spec(256, 256, 3.0, {"svd_rank": 2})
    assert (spec.vector_dim, spec.svd_rank) == (1, 2)
    assert spec.num_centroids > 2


def test_group_columns_beyond_the_matrix_become_one_stripe():
    spec = choose_spec(64, 172, 2.5, {"group_columns": 256, "vector_dim": 4})
    assert spec.num_stripes == 1
    assert spec.group_columns == 172


def test_fields_that_fit_no_vector_dim_leave_others():
    assert choose_spec(256, 256, 2.5, {"group_columns": 86}).vector_dim in (1, 2)


@pytest.mark.parametrize(
    ("shape", "bits", "fields", "message"),
    [
        ((8, 16), 1.0, {}, r"8 x 16 matrix; reachable: 2\.250 to"),
        ((64, 64), 2.0, {"vector_dim": 8, "index_bits": 12}, "vector_dim=8.*reachable"),
        ((64, 64), 2.0, {"vector_dim": 8, "group_columns": 12}, "exclude each other"),
    ],
)
def test_out_of_reach_names_the_range(shape, bits, fields, message):
    with pytest.raises(ValueError, match=message):
        choose_spec(*shape, bits, fields)


@pytest.mark.parametrize("shape", [(8, 16), (128, 256), (64, 172)])
def test_the_range_named_is_the_range(shape):
    """Asking for the lower end of what the error says works."""
    with pytest.raises(ValueError, match="reachable") as caught:
        choose_spec(*shape, 1.0, {"vector_dim": 2, "index_bits": 4})
    low = float(str(caught.value).split("reachable: ")[1].split()[0])
    spec = choose_spec(*shape, low + 0.001, {"vector_dim": 2, "index_bits": 4})
    assert isinstance(spec, GPTVQSpec)


def test_the_choice_is_deterministic():
    first = choose_spec(300, 172, 2.3, {"scale_block": 8})
    assert choose_spec(300, 172, 2.3, {"scale_block": 8, "vector_dim": None}) == first
