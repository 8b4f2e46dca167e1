"""GPTVQ on shapes that nothing divides, on bad data, and against numbers known from theory."""

from __future__ import annotations

from math import ceil, log2

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vq.formats import FORMATS
from hf_vq.formats.gptvq import GPTVQSpec
from hf_vq.layers import PackedLinear
from hf_vq.methods import gptvq
from hf_vq.methods.feedback import correction, factorize
from hf_vq.methods.gptvq import GPTVQOptions, quantize
from hf_vq.methods.kmeans import kmeans
from hf_vq.methods.statistics import Statistics
from tests.helpers import gptvq_specs
from tests.problems import exact_loss, hessian_of, normal

QUICK = GPTVQOptions(kmeans_iterations=8, refine_iterations=1)
SWEEP = GPTVQOptions(refine_iterations=0, codebook_update=False)


def dequantized(codes, spec):
    """The dense matrix as whoever loads the file sees it, float32."""
    tensors = FORMATS["gptvq"].pack(codes, spec)
    FORMATS["gptvq"].check(tensors, spec, "test")
    return PackedLinear.from_packed(spec, tensors, None, torch.float32).dequantize(torch.float32)


def relative(weight, hessian, quantized):
    return exact_loss(weight, hessian, quantized) / exact_loss(weight, hessian, 0 * weight)


# -- pitfall 9: shapes ------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        GPTVQSpec(24, 64, 2, 32, 12, 32),  # 2.5 bits
        GPTVQSpec(24, 64, 2, 37, 12, 32),  # no whole number of bits
        GPTVQSpec(20, 172, 2, 16, 20, 128),
        GPTVQSpec(20, 172, 8, 64, 20, 128),  # 172 = 21.5 * 8
        GPTVQSpec(21, 43, 4, 16, 8, 20),  # neither columns nor rows divide
        GPTVQSpec(16, 896, 2, 16, 16, 256),  # the last stripe is half as wide
        GPTVQSpec(16, 896, 2, 16, 5, 256, scale_block=64),
        GPTVQSpec(9, 172, 1, 4, 1, 172),  # a codebook per row
        GPTVQSpec(9, 172, 2, 8, 1, 64, scale_block=24),  # scale blocks across stripes
        GPTVQSpec(3, 7, 1, 4, 100, 1000),  # groups larger than the matrix
    ],
    ids=lambda s: f"{s.out_features}x{s.in_features}-d{s.vector_dim}-k{s.num_centroids}",
)
def test_odd_shapes(spec):
    weight = normal(spec.out_features, spec.in_features, seed=1)
    h = hessian_of(spec.in_features, seed=2)
    result = quantize(weight, Statistics(h.clone(), 100), spec, QUICK)
    quantized = dequantized(result.codes, spec)
    assert quantized.shape == weight.shape
    assert result.notes == []
    error = relative(weight, h, quantized)
    assert result.relative_error == pytest.approx(error, rel=1e-2, abs=1e-6)
    # far better than rounding to codebooks without feedback, 2 ** -(2 bits)
    assert error < 2.0 ** (-2 * log2(spec.num_centroids) / spec.vector_dim)
    every_row = (weight - quantized).square().mean(1)
    assert float(every_row.max()) < 4 * float(every_row.mean())  # the ragged end is no worse
    columns = (weight - quantized)[:, -spec.vector_dim :].square().mean()
    assert float(columns) < 5 * float((weight - quantized).square().mean())


@settings(max_examples=25, deadline=None)
@given(spec=gptvq_specs(), seed=st.integers(0, 99), known=st.booleans())
def test_any_spec(spec, seed, known):
    weight = normal(spec.out_features, spec.in_features, seed=seed)
    h = hessian_of(spec.in_features, seed) if known else torch.eye(spec.in_features)
    statistics = Statistics(h.clone(), 100) if known else None
    result = quantize(weight, statistics, spec, QUICK)
    error = relative(weight, h, dequantized(result.codes, spec))
    assert result.relative_error == pytest.approx(error, rel=5e-2, abs=1e-5)
    assert error < 1.0


# -- pitfall 10: bits -------------------------------------------------------


@pytest.mark.parametrize(
    ("d", "bits", "size", "block", "expected"),
    [
        # the paper's 2.125 and 3.125 bits (its table 7), plus what it does not count: 16 bits per
        # codebook for its scale, 32 bits per column of blocks for the grid of the scales
        (1, 2, 256, 0, 2.125 + 16 / 256),
        (2, 2, 2048, 0, 2.125 + 16 / 2048),
        (4, 2, 65536, 0, 2.125 + 16 / 65536),
        (1, 3, 512, 0, 3.125 + 16 / 512),
        (2, 3, 8192, 0, 3.125 + 16 / 8192),
        (2, 2.5, 4096, 0, 2.5 + 32 * 2 * 8 / 4096 + 16 / 4096),
        (2, 2, 4096, 64, 2.125 + 16 / 4096 + 32 / (64 * 256)),
    ],
)
def test_bits_on_disk_are_the_formula(d, bits, size, block, expected):
    spec = GPTVQSpec(256, 512, d, round(2 ** (bits * d)), size // 256, 256, scale_block=block)
    codes = quantize(
        normal(256, 512), None, spec, GPTVQOptions(kmeans_iterations=1, refine_iterations=0)
    ).codes
    tensors = FORMATS["gptvq"].pack(codes, spec)
    on_disk = 8 * sum(t.numel() * t.element_size() for t in tensors.values()) / (256 * 512)
    assert on_disk == spec.bits_per_weight
    assert on_disk == pytest.approx(expected, rel=1e-9)


def test_bits_of_ragged_ends_are_counted():
    spec = GPTVQSpec(30, 172, 2, 32, 7, 64, scale_block=24)
    codes = quantize(normal(30, 172), None, spec, QUICK).codes
    tensors = FORMATS["gptvq"].pack(codes, spec)
    stripes, groups, blocks = ceil(172 / 64), ceil(30 / 7), ceil(172 / 24)
    words = 30 * ceil(86 * 5 / 32) + 30 * ceil(blocks * 4 / 32)
    expected = 4 * words + stripes * groups * (32 * 2 + 2) + 2 * blocks * 2
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == expected == spec.nbytes


# -- numeric sanity ---------------------------------------------------------

# Mean squared error of the best quantizer of a unit Gaussian: Lloyd (1982), Max (1960) for
# numbers, measured in long runs for pairs.
GAUSSIAN = [(1, 4, 0.1175), (1, 8, 0.03454), (1, 16, 0.009497), (2, 16, 0.1065)]


@pytest.mark.parametrize(("d", "k", "best"), GAUSSIAN)
def test_kmeans_reaches_the_best_quantizer_of_a_gaussian(d, k, best):
    points = normal(1, 60000, d)
    book = kmeans(
        points, torch.ones_like(points), k, iterations=150, init="kmeans++", tolerance=1e-6
    )
    error = float(torch.cdist(points[0], book[0]).min(1).values.square().mean()) / d
    assert error == pytest.approx(best, rel=0.02)


@pytest.mark.parametrize(("d", "k", "best"), GAUSSIAN)
def test_quantizing_a_gaussian(monkeypatch, d, k, best):
    monkeypatch.setattr(gptvq, "_POINTS_PER_CENTROID", 1 << 20)
    weight = normal(256, 256)
    spec = GPTVQSpec(256, 256, d, k, 256, 256)
    # k-means finds a local optimum: the best of three starts stands for the global one
    error = min(
        quantize(
            weight,
            None,
            spec,
            GPTVQOptions(kmeans_iterations=100, refine_iterations=8, seed=seed),
        ).relative_error
        for seed in range(3)
    )
    assert error == pytest.approx(best, rel=0.02)
    assert error > k ** (-2 / d)  # the rate-distortion bound


@pytest.mark.parametrize(("d", "k", "best"), [g for g in GAUSSIAN if g[1] < 16 or g[0] > 1])
def test_defaults_come_close_to_the_best_quantizer(d, k, best):
    spec = GPTVQSpec(256, 256, d, k, 256, 256)
    error = quantize(normal(256, 256), None, spec).relative_error
    assert 0.98 * best < error < 1.06 * best


# -- bad data ---------------------------------------------------------------


@pytest.mark.parametrize("scale_block", [0, 8])
@pytest.mark.parametrize("dtype", ["int8", "int4", "float16"])
def test_all_zero_weights(dtype, scale_block):
    spec = GPTVQSpec(12, 24, 2, 8, 5, 16, dtype, scale_block)
    result = quantize(torch.zeros(12, 24), Statistics(hessian_of(24), 100), spec)
    assert result.relative_error == 0
    assert float(dequantized(result.codes, spec).abs().max()) < 1e-20


@pytest.mark.parametrize("domain", ["log", "linear"])
def test_zero_rows_beside_others(domain):
    spec = GPTVQSpec(12, 24, 2, 8, 4, 16, scale_block=8, scale_domain=domain)
    weight = normal(12, 24)
    weight[[0, 1, 2, 3, 7]] = 0
    result = quantize(weight, Statistics(hessian_of(24), 100), spec)
    quantized = dequantized(result.codes, spec)
    assert bool(torch.isfinite(quantized).all())
    assert float(quantized[:4].abs().max()) < 0.05
    assert result.relative_error < 0.1


def test_dead_and_constant_channels():
    h = hessian_of(32)
    dead = [3, 4, 5, 20]
    h[dead] = 0
    h[:, dead] = 0
    spec = GPTVQSpec(16, 32, 2, 8, 16, 16)
    weight = normal(16, 32)
    plain = quantize(weight, Statistics(h.clone(), 100), spec)
    assert plain.notes == ["4 dead input channels"]
    weight[:, dead] *= 3
    loud = quantize(weight, Statistics(h.clone(), 100), spec)
    # weights that no input reaches cost the others next to nothing
    assert loud.relative_error < 1.5 * plain.relative_error < 0.2


@pytest.mark.parametrize(
    ("hessian", "note"),
    [
        (torch.full((24, 24), float("nan")), "non-finite Hessian: identity used"),
        (torch.zeros(24, 24), "all-zero Hessian: identity used"),
        # 0.2 of the identity is left under the damping of 1.1, so that every weight counts
        (torch.ones(24, 24) * 2 - 0.9 * torch.eye(24), "damping raised to 1"),
        (torch.ones(24, 24) * 9 - 8 * torch.eye(24), "not positive definite: its diagonal used"),
    ],
    ids=["nan", "zero", "indefinite", "hopeless"],
)
def test_bad_hessians_are_noted_and_survived(hessian, note):
    spec = GPTVQSpec(12, 24, 2, 16, 12, 24)
    result = quantize(normal(12, 24), Statistics(hessian.clone(), 100), spec)
    assert any(note in n for n in result.notes)
    quantized = dequantized(result.codes, spec)
    assert relative(normal(12, 24), torch.eye(24), quantized) < 0.5


@pytest.mark.parametrize("tokens", [1, 3, 12])
def test_fewer_tokens_than_channels(tokens):
    spec = GPTVQSpec(24, 48, 2, 16, 24, 24)
    weight, h = normal(24, 48), hessian_of(48, tokens=tokens)
    result = quantize(weight, Statistics(h.clone(), tokens), spec)
    error = relative(weight, h, dequantized(result.codes, spec))
    blind = relative(weight, h, dequantized(quantize(weight, None, spec).codes, spec))
    assert error < 0.5 * blind


@pytest.mark.parametrize("magnitude", [1e-7, 1e-3, 1e4])
@pytest.mark.parametrize("scale_block", [0, 8])
def test_magnitudes_of_weights_and_inputs_do_not_matter(magnitude, scale_block):
    spec = GPTVQSpec(16, 32, 2, 16, 16, 16, scale_block=scale_block)
    weight, h = normal(16, 32), hessian_of(32)
    plain = quantize(weight, Statistics(h.clone(), 100), spec).relative_error
    scaled = quantize(weight * magnitude, Statistics(h / magnitude, 100), spec).relative_error
    assert scaled == pytest.approx(plain, rel=0.15)


# -- the function -----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_stay_as_they_are(dtype):
    spec = GPTVQSpec(13, 27, 4, 8, 5, 12)
    weight, h = normal(13, 27).to(dtype), hessian_of(27)
    shift = 0.01 * normal(27, 27)
    kept = weight.clone(), h.clone(), shift.clone()
    quantize(weight, Statistics(h, 100, shift), spec, QUICK)
    for now, before in zip((weight, h, shift), kept, strict=True):
        assert torch.equal(now, before)


def test_shared_statistics_give_the_same_as_fresh_ones():
    # q, k and v share a Hessian, which may be damped in place for one and measured with by another
    spec = GPTVQSpec(13, 26, 2, 8, 13, 26)
    h = hessian_of(26)
    shared = Statistics(h.clone(), 100, owned=True)
    for seed, damping in ((1, 0.01), (2, 0.01), (3, 0.2), (4, 0.01)):
        options = GPTVQOptions(damping=damping)
        found = quantize(normal(13, 26, seed=seed), shared, spec, options)
        fresh = quantize(normal(13, 26, seed=seed), Statistics(h.clone(), 100), spec, options)
        assert found.relative_error == pytest.approx(fresh.relative_error, rel=1e-3)
        assert (found.codes.indices == fresh.codes.indices).float().mean() > 0.95


@pytest.mark.parametrize("init", ["mahalanobis", "kmeans++"])
def test_same_seed_same_codes(monkeypatch, init):
    monkeypatch.setattr(gptvq, "_POINTS_PER_CENTROID", 8)  # so that points are drawn
    spec = GPTVQSpec(40, 40, 2, 8, 20, 20, scale_block=10)
    weight, h = normal(40, 40), hessian_of(40)
    found = []
    for seed in (0, 0, 1):
        torch.rand(3)  # nobody else's random numbers matter
        options = GPTVQOptions(kmeans_init=init, seed=seed)
        found.append(quantize(weight, Statistics(h.clone(), 100), spec, options).codes)
    assert torch.equal(found[0].indices, found[1].indices)
    assert torch.equal(found[0].codebooks, found[1].codebooks)
    assert torch.equal(found[0].scale_codes, found[1].scale_codes)
    assert not torch.equal(found[0].indices, found[2].indices)


def test_corrected_target_makes_the_quantized_layer_do_what_the_dense_model_did():
    # what reaches the layer is a distorted copy of what reached it in the original model
    columns, tokens = 32, 2000
    dense = normal(tokens, columns, seed=1) @ (normal(columns, columns, seed=2) / 6 + torch.eye(32))
    x = dense + 0.4 * normal(tokens, columns, seed=3)
    weight, spec = normal(48, columns, seed=4), GPTVQSpec(48, columns, 2, 16, 48, columns)
    h, shift = x.T @ x / tokens, (dense - x).T @ x / tokens
    wanted = dense @ weight.T
    aim = weight + correction(weight @ shift, factorize(h, 0.01))
    missed = []
    for target in (weight, aim):
        result = quantize(target, Statistics(h.clone(), tokens), spec)
        missed.append(float((wanted - x @ dequantized(result.codes, spec).T).square().mean()))
    assert missed[1] < 0.9 * missed[0]
    # and the error that is reported is the distance to what was aimed at
    lost = exact_loss(aim, h, dequantized(result.codes, spec)) / exact_loss(aim, h, 0 * aim)
    assert result.relative_error == pytest.approx(lost, rel=1e-2)
