"""VPTQ on single matrices: what it promises, and the pitfalls of the method as numbers.

The pitfalls are those of implementations of VPTQ: each test says which mistake it would catch.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vq.formats.vptq import VPTQCodes, VPTQSpec
from hf_vq.methods import statistics, vptq
from hf_vq.methods.feedback import factorize
from hf_vq.methods.statistics import Statistics
from hf_vq.methods.vptq import VPTQOptions, quantize
from tests.problems import hessian_of, normal

BARE = VPTQOptions(refine_iterations=0, codebook_update=False)
"""k-means and one sweep per codebook, as the paper has it."""


def statistics_of(h: torch.Tensor) -> Statistics:
    return Statistics(h.clone(), tokens=4096)


def decode(codes: VPTQCodes, spec: VPTQSpec) -> torch.Tensor:
    """The dense weight, straight from the description of the format."""
    blocks = codes.centroids[torch.arange(spec.num_groups)[:, None, None], codes.indices]
    if codes.res_indices is not None:
        groups = torch.arange(spec.num_groups)[:, None, None]
        blocks = blocks + codes.res_centroids[groups, codes.res_indices]
    parts = [g.transpose(1, 2).reshape(-1, g.shape[1])[: spec.out_features] for g in blocks]
    if spec.outlier_columns:
        first = codes.outlier_centroids[codes.outlier_indices].transpose(1, 2)
        parts.insert(0, first.reshape(-1, spec.outlier_columns)[: spec.out_features])
    ordered = torch.cat(parts, 1)
    weight = ordered
    if codes.perm is not None:
        weight = torch.empty_like(ordered)
        weight[:, codes.perm] = ordered
    return weight if codes.scale is None else weight * codes.scale + codes.bias


def relative(weight: torch.Tensor, h: torch.Tensor, quantized: torch.Tensor) -> float:
    error = (weight - quantized).double()
    size = ((weight.double() @ h.double()) * weight).sum()
    return float(((error @ h.double()) * error).sum() / size)


FULL = VPTQOptions()


def run(weight, h, options=FULL, **fields):
    spec = VPTQSpec(*weight.shape, **fields)
    result = quantize(weight, statistics_of(h), spec, options)
    return result, decode(result.codes, spec)


# -- what it promises ----------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 37),
    width=st.integers(1, 9),
    groups=st.integers(1, 3),
    v=st.integers(2, 8),
    main=st.integers(1, 4),
    res=st.integers(0, 3),
    outliers=st.integers(0, 3),
    norm=st.sampled_from(["none", "columns"]),
    permuted=st.booleans(),
)
def test_every_geometry_decodes_to_the_error_it_reports(
    rows, width, groups, v, main, res, outliers, norm, permuted
):
    columns = width * groups + outliers
    weight, h = normal(rows, columns, seed=1), hessian_of(columns, seed=2)
    result, dense = run(
        weight,
        h,
        replace(VPTQOptions(), refine_iterations=1, kmeans_iterations=3),
        vector_dim=v,
        num_centroids=2**main,
        num_res_centroids=2**res if res else 0,
        num_groups=groups,
        outlier_columns=outliers,
        outlier_vector_dim=2 if outliers else 0,
        outlier_centroids=4 if outliers else 0,
        norm=norm,
        permuted=permuted,
    )
    assert result.relative_error == pytest.approx(relative(weight, h, dense), rel=2e-3, abs=1e-5)


def test_the_same_matrix_gives_the_same_codes():
    weight, h = normal(40, 48), hessian_of(48)
    fields = {"vector_dim": 4, "num_centroids": 16, "num_res_centroids": 8, "norm": "columns"}
    (first, _), (second, _) = run(weight, h, **fields), run(weight, h, **fields)
    for name, value in vars(first.codes).items():
        other = getattr(second.codes, name)
        assert (value is None and other is None) or torch.equal(value, other), name


def test_the_inputs_are_left_alone():
    weight, h = normal(12, 24), hessian_of(24)
    given_weight, given_h = weight.clone(), h.clone()
    quantize(weight, Statistics(given_h, 100), VPTQSpec(12, 24, vector_dim=4, num_centroids=8))
    assert torch.equal(weight, given_weight) and torch.equal(given_h, h)


def test_without_statistics_every_input_counts_the_same():
    weight = normal(32, 16)
    spec = VPTQSpec(32, 16, vector_dim=4, num_centroids=16)
    result = quantize(weight, None, spec)
    error = weight - decode(result.codes, spec)
    assert result.relative_error == pytest.approx(
        float(error.square().sum() / weight.square().sum()), rel=1e-3
    )


@pytest.mark.parametrize("res", [0, 8])
@pytest.mark.parametrize("norm", ["none", "columns"])
def test_every_step_of_the_refinement_pays(res, norm):
    weight, h = normal(128, 96, seed=3) * (1 + normal(96, seed=4).abs()), hessian_of(96, seed=5)
    fields = {"vector_dim": 4, "num_centroids": 32, "num_res_centroids": res, "norm": norm}
    bare = run(weight, h, BARE, **fields)[0].relative_error
    fitted = run(weight, h, replace(BARE, codebook_update=True), **fields)[0].relative_error
    both = run(weight, h, **fields)[0].relative_error
    assert both < fitted < bare
    without = replace(BARE, error_feedback=False)
    assert bare < 0.8 * run(weight, h, without, **fields)[0].relative_error


def test_a_wider_beam_finds_better_pairs():
    weight, h = normal(128, 96, seed=3), hessian_of(96, seed=5)
    fields = {"vector_dim": 4, "num_centroids": 16, "num_res_centroids": 16}
    greedy, beam = (run(weight, h, VPTQOptions(beam=b), **fields)[0].relative_error for b in (1, 8))
    assert beam < 0.9 * greedy


def test_outlier_columns_pay_where_a_few_columns_matter_most():
    size = torch.ones(64)
    size[::8] = 12.0
    weight, h = normal(256, 64, seed=6) * size, torch.diag(size**2) + 0.1 * hessian_of(64)
    fields = {"vector_dim": 4, "num_centroids": 32, "permuted": True}
    plain = run(weight, h, **fields)[0].relative_error
    outliers = {"outlier_columns": 8, "outlier_vector_dim": 2, "outlier_centroids": 32}
    assert run(weight, h, **fields, **outliers)[0].relative_error < 0.8 * plain


def test_groups_pay_where_columns_differ_in_size():
    size = torch.ones(64)
    size[::2] = 8.0  # as important as the others: their inputs are as much smaller
    weight, h = normal(256, 64, seed=6) * size, hessian_of(64) / size / size[:, None]
    fields = {"vector_dim": 4, "num_centroids": 32, "permuted": True}
    plain, grouped = (run(weight, h, **fields, num_groups=g)[0].relative_error for g in (1, 2))
    assert grouped < 0.9 * plain


def test_rows_that_pad_the_last_vector_have_no_say():
    weight, h = normal(18, 24, seed=7), hessian_of(24)
    spec = VPTQSpec(18, 24, vector_dim=8, num_centroids=128, codebook_dtype="float32")
    # as many centroids as vectors: every one can be met, short ones included
    result = quantize(weight, statistics_of(h), spec)
    assert result.relative_error < 1e-6


# -- pitfalls ------------------------------------------------------------------------------------


def test_pitfall_1_the_hessian_moves_into_the_normalised_space():
    """Scaling a column and its input against each other changes nothing but the scale."""
    weight, h = normal(64, 32, seed=8), hessian_of(32, seed=9)
    size = 2.0 ** torch.randint(-3, 4, (32,), generator=torch.Generator().manual_seed(1))
    scaled, squeezed = weight * size, h / size[:, None] / size
    fields = {"vector_dim": 4, "num_centroids": 16, "norm": "columns"}
    fields["codebook_dtype"] = "float32"
    spec = VPTQSpec(64, 32, **fields)
    # damping is relative to the mean diagonal, which the scaling changes: none here. And the order
    # of the columns is that of the raw diagonal: keep it as it is
    options = VPTQOptions(damping=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "descending_order", lambda h: torch.arange(32))
        first = quantize(weight, statistics_of(h), spec, options)
        second = quantize(scaled, statistics_of(squeezed), spec, options)
    assert torch.equal(first.codes.indices, second.codes.indices)
    torch.testing.assert_close(first.codes.scale * size, second.codes.scale)
    assert first.relative_error == pytest.approx(second.relative_error, rel=1e-3)


def test_pitfall_2_the_factor_is_triangular_in_the_order_of_the_sweep():
    h = hessian_of(48, seed=10)
    order = h.diagonal().argsort(descending=True)
    factor = factorize(h[order][:, order])
    assert torch.equal(factor.upper, factor.upper.triu())
    inverse = torch.linalg.inv(factor.upper.double())
    identity = inverse.T @ inverse @ factor.hessian.double()
    assert float((identity - torch.eye(48)).abs().max()) < 1e-3


def test_pitfall_3_a_vector_lies_in_one_input_column():
    """Another input column changes its own column of codes and no other."""
    weight, h = normal(32, 24, seed=11), torch.eye(24)
    other = weight.clone()
    other[:, 5] = 0
    spec = VPTQSpec(32, 24, vector_dim=4, num_centroids=16)
    books = normal(1, 1, 16, 4, seed=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vptq._Part, "_codebooks", lambda self, aim, k: books)
        first, second = (
            quantize(w, statistics_of(h), spec, BARE).codes.indices[0] for w in (weight, other)
        )
    assert (first != second).any(0).nonzero().flatten().tolist() == [5]


def test_pitfall_8_the_residual_pass_starts_again_from_the_weights():
    """A residual codebook of nothing but zero leaves the first pass as it was."""
    weight, h = normal(64, 48, seed=13), hessian_of(48, seed=14)
    fields = {"vector_dim": 4, "num_centroids": 16}
    single = run(weight, h, BARE, **fields)[0]
    fit = vptq._Part._codebooks

    def codebooks(self, aim, k):
        return fit(self, aim, k) if k == 16 else torch.zeros(1, 1, k, 4)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vptq._Part, "_codebooks", codebooks)
        double = run(weight, h, replace(BARE, beam=1), **fields, num_res_centroids=2)[0]
    assert torch.equal(single.codes.indices, double.codes.indices)
    assert single.relative_error == pytest.approx(double.relative_error)


def test_pitfall_8_the_error_falls_as_the_reference_log_has_it():
    """x0.66 for feedback and x0.32 for eight more bits per eight weights, for a large model."""
    weight, h = normal(256, 128, seed=15), hessian_of(128, seed=16)
    fields = {"vector_dim": 8, "num_centroids": 256}
    kmeans = run(weight, h, replace(BARE, error_feedback=False), **fields)[0].relative_error
    swept = run(weight, h, BARE, **fields)[0].relative_error
    residual = run(weight, h, replace(BARE, beam=1), **fields, num_res_centroids=256)[0]
    assert swept < 0.75 * kmeans
    assert residual.relative_error < 0.4 * swept


def test_pitfall_9_columns_go_in_order_of_descending_importance():
    weight, h = normal(128, 96, seed=17), hessian_of(96, seed=18)
    ascending = h.diagonal().argsort()
    fields = {"vector_dim": 4, "num_centroids": 64}
    descending = run(weight, h, BARE, **fields)[0].relative_error
    found = []
    for order in (torch.arange(96), ascending):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(statistics, "descending_order", lambda h, order=order: order)
            found.append(run(weight, h, BARE, **fields)[0].relative_error)
    assert descending < 0.95 * found[0] and found[0] < 0.95 * found[1]


def test_pitfall_9_kmeans_is_weighted():
    weight, h = normal(128, 96, seed=17), torch.diag(hessian_of(96, seed=18).diagonal() ** 2)
    fields = {"vector_dim": 4, "num_centroids": 64}
    weighted = run(weight, h, BARE, **fields)[0].relative_error
    plain = quantize(weight, None, VPTQSpec(128, 96, **fields), BARE)
    dense = decode(plain.codes, VPTQSpec(128, 96, **fields))
    assert weighted < 0.8 * relative(weight, h, dense)


@pytest.mark.parametrize("dtype, decibel", [("bfloat16", -45), ("float16", -60)])
def test_pitfall_10_codebooks_of_low_precision_are_centred(dtype, decibel):
    """With as many centroids as vectors only the rounding of codebook and norm is left."""
    weight = 0.02 * normal(32, 16, seed=19) + 0.01
    _, dense = run(
        weight,
        torch.eye(16),
        vector_dim=4,
        num_centroids=128,
        norm="columns",
        codebook_dtype=dtype,
    )
    error = float((weight - dense).square().sum() / weight.var(0, correction=0).sum() / 32)
    assert 10 * torch.tensor(error).log10() < decibel


def test_a_norm_over_rows_is_refused():
    with pytest.raises(ValueError, match="norm over rows can be read"):
        quantize(normal(8, 8), None, VPTQSpec(8, 8, vector_dim=2, num_centroids=4, norm="rows"))
