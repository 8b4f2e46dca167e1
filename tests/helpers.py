"""Random packed matrices, for tests that do not care how codes were found."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from hf_vq.formats.gptvq import GPTVQCodes, GPTVQSpec


def random_gptvq(spec: GPTVQSpec, seed: int = 0) -> GPTVQCodes:
    """Codes that use the whole range of what `spec` can store; weights come out near 1."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    groups = (spec.num_stripes, spec.num_row_groups)
    codes = GPTVQCodes(integers(0, spec.num_centroids - 1, spec.out_features, spec.num_vectors))
    stored = (
        (*groups, spec.svd_rank)
        if spec.svd_rank
        else (*groups, spec.num_centroids, spec.vector_dim)
    )
    if spec.codebook_dtype == "float32":
        books = normal(*stored)
    elif spec.codebook_dtype == "float16":
        books = normal(*stored).half().float()
    else:
        top = {"int8": 127, "int4": 7}[spec.codebook_dtype]
        books = integers(-top - 1, top, *stored)
        codes.codebook_scales = ((0.5 + normal(*groups).abs()) / top).bfloat16().float()
    if spec.svd_rank:
        codes.codebook_factors = books
        codes.codebook_basis = normal(spec.svd_rank, spec.num_centroids).half().float()
    else:
        codes.codebooks = books
    if spec.scale_block:
        blocks = spec.num_scale_blocks
        codes.scale_codes = integers(0, 15, spec.out_features, blocks).to(torch.uint8)
        offset, step = normal(blocks), normal(blocks).abs() * 0.1
        codes.scale_grid = torch.stack([offset, step]).bfloat16().float()
    return codes


# One of each kind, none of whose sizes divide evenly: (id, spec).
ODD_SPECS: dict[str, GPTVQSpec] = {
    "2d-int8": GPTVQSpec(30, 172, 2, 16, 7, 64),
    "2d-int8-log": GPTVQSpec(30, 172, 2, 16, 7, 64, scale_block=16),
    "4d-int4-linear": GPTVQSpec(13, 50, 4, 37, 5, 20, "int4", 8, "linear"),
    "8d-float16": GPTVQSpec(9, 172, 8, 200, 9, 176, "float16"),
    "8d-float16-log": GPTVQSpec(5, 43, 8, 9, 2, 16, "float16", 16),
    "1d-one-row": GPTVQSpec(11, 172, 1, 5, 1, 86),
    "1d-svd-int8": GPTVQSpec(11, 70, 1, 8, 1, 33, svd_rank=3),
    "2d-float32": GPTVQSpec(30, 41, 2, 16, 7, 20, "float32"),
    "1d-svd-float16-log": GPTVQSpec(11, 70, 1, 7, 4, 33, "float16", 5, "log", 2),
    "one-weight": GPTVQSpec(1, 1, 1, 2, 1, 1),
}


@st.composite
def gptvq_specs(draw: st.DrawFn) -> GPTVQSpec:
    """Any valid spec of a small matrix."""
    vector_dim = draw(st.sampled_from([1, 2, 4, 8]))
    svd = vector_dim == 1 and draw(st.booleans())
    num_centroids = draw(st.integers(2, 70) | st.sampled_from([256, 257]))
    return GPTVQSpec(
        out_features=draw(st.integers(1, 20)),
        in_features=draw(st.integers(1, 90)),
        vector_dim=vector_dim,
        num_centroids=num_centroids,
        group_rows=draw(st.integers(1, 24)),
        group_columns=vector_dim * draw(st.integers(1, 30)),
        codebook_dtype=draw(st.sampled_from(["int8", "float16", "float32"] + ["int4"] * (not svd))),
        scale_block=vector_dim * draw(st.integers(0, 16)),
        scale_domain=draw(st.sampled_from(["log", "linear"])),
        svd_rank=draw(st.integers(1, min(num_centroids, 6))) if svd else 0,
    )
