"""Random CVXQ matrices, for tests that do not care how codes were found."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from hypothesis import strategies as st

from hf_vq.formats.cvxq import CVXQCodes, CVXQSpec, count_words


def random_cvxq(spec: CVXQSpec, seed: int = 0) -> CVXQCodes:
    """Codes that use the whole range of what `spec` can store; weights come out near 1.

    The depths are those that `with_depths` draws with the same seed, or 0 where there are no words.
    """
    generator = torch.Generator().manual_seed(seed)
    depths = _depths(spec, seed) * (spec.num_words > 0)
    groups, rows = (spec.num_clusters, spec.in_features), spec.group_rows
    codes = torch.randint(0, 256, (*groups, rows), generator=generator)
    codes &= (1 << depths[..., None].long()) - 1
    beyond = spec.num_clusters * rows - spec.out_features
    codes[-1, :, rows - beyond :] = 0
    out = CVXQCodes(depths, codes)
    if spec.scale_dtype == "log8":
        out.scale_codes = torch.randint(0, 256, groups, generator=generator).to(torch.uint8)
        grid = torch.randn((2, spec.num_clusters), generator=generator)
        out.scale_grid = (grid * torch.tensor([[1.0], [0.005]])).half().float()
    else:
        scales = 0.5 + torch.randn(groups, generator=generator).abs()
        out.scales = scales.to(getattr(torch, spec.scale_dtype)).float()
    if spec.location == "int8":
        out.location = torch.randint(-128, 128, groups, generator=generator).to(torch.int8)
    elif spec.location != "none":
        location = torch.randn(groups, generator=generator)
        out.location = location.to(getattr(torch, spec.location)).float()
    if spec.permuted:
        out.row_perm = torch.randperm(spec.out_features, generator=generator)
    return out


def with_depths(*args: Any, seed: int = 0, **kwargs: Any) -> CVXQSpec:
    """CVXQSpec(out_features, in_features, group_rows, ...) of random depths 0..8."""
    out_features, in_features, group_rows, *others = args
    spec = CVXQSpec(out_features, in_features, group_rows, 0, *others, **kwargs)
    words = count_words(_depths(spec, seed), group_rows)
    return dataclasses.replace(spec, num_words=words)


def _depths(spec: CVXQSpec, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    depths = torch.randint(0, 9, (spec.num_clusters, spec.in_features), generator=generator)
    if depths.numel() > 2:  # the extremes, and nothing at the end
        depths[0, 0] = 8
        depths[-1, -1] = 0
    return depths.to(torch.uint8)


# One of each kind, none of whose sizes divide evenly: (id, spec).
ODD_CVXQ: dict[str, CVXQSpec] = {
    "log8": with_depths(30, 37, 7),
    "log8-int8": with_depths(50, 21, 32, "log8", "int8", "lloyd", True),
    "log8-float16-laplace": with_depths(33, 43, 16, "log8", "float16", "laplace", True),
    "float16": with_depths(29, 10, 29, "float16"),
    "float16-int8": with_depths(25, 18, 8, "float16", "int8", "laplace"),
    "float16-float16": with_depths(19, 36, 3, "float16", "float16", permuted=True),
    "float32-float32": with_depths(64, 12, 32, "float32", "float32", permuted=True),
    "one-row-clusters": with_depths(11, 23, 1, "log8", "int8", permuted=True),
    "wide-perm": with_depths(40001, 2, 20000, permuted=True),
    "wider-perm": with_depths(65537, 1, 65536, permuted=True),
    "no-codes": CVXQSpec(9, 2, 4, 0, "float16", "float16"),
    "one-weight": CVXQSpec(1, 1, 1, 1),
}


@st.composite
def cvxq_specs(draw: st.DrawFn) -> tuple[CVXQSpec, int]:
    """Any valid spec of a small matrix, and the seed that gives `random_cvxq` its depths."""
    seed = draw(st.integers(0, 2**32))
    rows = draw(st.integers(1, 70))
    group_rows = draw(st.integers(1, rows) | st.sampled_from([min(8, rows), min(32, rows)]))
    spec = with_depths(
        rows,
        draw(st.integers(1, 40)),
        group_rows,
        draw(st.sampled_from(["log8", "float16", "float32"])),
        draw(st.sampled_from(["none", "int8", "float16", "float32"])),
        draw(st.sampled_from(["lloyd", "laplace"])),
        permuted=group_rows < rows and draw(st.booleans()),
        seed=seed,
    )
    return spec, seed
