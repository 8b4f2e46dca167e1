"""Random VPTQ matrices, for tests that do not care how codes were found."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from hf_vq.formats.vptq import FLOATS, VPTQCodes, VPTQSpec


def random_vptq(spec: VPTQSpec, seed: int = 0) -> VPTQCodes:
    """Codes that use the whole range of what `spec` can store; weights come out near 1."""
    generator = torch.Generator().manual_seed(seed)

    def integers(above: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, above, shape, generator=generator)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(FLOATS[spec.codebook_dtype]).float()

    groups, v = spec.num_groups, spec.vector_dim
    vectors = (groups, spec.num_row_blocks, spec.group_columns)
    codes = VPTQCodes(integers(spec.num_centroids, *vectors), normal(groups, spec.num_centroids, v))
    codes.indices[0, 0, 0] = spec.num_centroids - 1
    if spec.num_res_centroids:
        codes.res_indices = integers(spec.num_res_centroids, *vectors)
        codes.res_indices[0, 0, 0] = spec.num_res_centroids - 1
        codes.res_centroids = normal(groups, spec.num_res_centroids, v)
    if spec.outlier_vector_dim:
        shape = (spec.num_outlier_row_blocks, spec.outlier_columns)
        codes.outlier_indices = integers(spec.outlier_centroids, *shape)
        codes.outlier_indices[:1, :1] = spec.outlier_centroids - 1
        codes.outlier_centroids = normal(spec.outlier_centroids, spec.outlier_vector_dim)
    if spec.permuted:
        codes.perm = torch.randperm(spec.in_features, generator=generator)
    if spec.norm != "none":
        length = spec.in_features if spec.norm == "columns" else spec.out_features
        codes.scale, codes.bias = normal(length), normal(length)
    return codes


# One of each kind, none of whose sizes divide evenly: (id, spec).
ODD_VPTQ: dict[str, VPTQSpec] = {
    "main": VPTQSpec(30, 37, 8, 16),
    "residual-18-bits": VPTQSpec(25, 37, 6, 4096, 64, codebook_dtype="bfloat16"),
    "residual-32-bits": VPTQSpec(17, 9, 4, 65536, 65536, permuted=True),
    "more-residual-bits": VPTQSpec(11, 23, 3, 4, 256, norm="columns", codebook_dtype="float32"),
    "one-residual": VPTQSpec(20, 12, 2, 32, 1),
    "groups": VPTQSpec(19, 36, 3, 8, 4, 4, norm="columns", permuted=True),
    "outliers": VPTQSpec(29, 43, 8, 32, 2, 4, 3, 4, 16, "columns", True),
    "outliers-rows": VPTQSpec(50, 21, 5, 64, 0, 1, 1, 3, 256, "rows", codebook_dtype="bfloat16"),
    "no-outlier-column": VPTQSpec(9, 10, 4, 4, outlier_vector_dim=2, outlier_centroids=8),
    "wide-perm": VPTQSpec(7, 40001, 16, 2, 2, permuted=True),
    "one-weight": VPTQSpec(1, 1, 1, 2),
}


@st.composite
def vptq_specs(draw: st.DrawFn, storages: tuple[str, ...] = ("packed",)) -> VPTQSpec:
    """Any valid spec of a small matrix."""
    groups = draw(st.integers(1, 4))
    outliers = draw(st.integers(0, 5))
    outlier_book = outliers > 0 or draw(st.integers(0, 9)) == 0
    big = st.sampled_from([2**12, 2**16])
    return VPTQSpec(
        out_features=draw(st.integers(1, 40)),
        in_features=outliers + groups * draw(st.integers(1, 40)),
        vector_dim=draw(st.integers(1, 16)),
        num_centroids=draw(st.integers(1, 9).map(lambda b: 2**b) | big),
        num_res_centroids=draw(st.just(0) | st.integers(0, 9).map(lambda b: 2**b) | big),
        num_groups=groups,
        outlier_columns=outliers,
        outlier_vector_dim=draw(st.integers(2, 16)) if outlier_book else 0,
        outlier_centroids=draw(st.integers(1, 9).map(lambda b: 2**b) | big) if outlier_book else 0,
        norm=draw(st.sampled_from(["none", "columns", "rows"])),
        permuted=draw(st.booleans()),
        codebook_dtype=draw(st.sampled_from(["float16", "bfloat16", "float32"])),
        storage=draw(st.sampled_from(storages)),
    )
