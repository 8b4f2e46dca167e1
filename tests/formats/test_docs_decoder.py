"""docs/format.md, read by a stranger: a numpy decoder that knows nothing of hf_vq."""

from __future__ import annotations

import dataclasses
import json
import re
from math import ceil
from pathlib import Path
from typing import Any

import hf_vq_kernels.reference as reference
import numpy as np
import torch
from helpers import ODD_SPECS, gptvq_specs, random_gptvq
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vq.formats import FORMATS
from hf_vq.formats.gptvq import GPTVQSpec, pack, unpack
from hf_vq.layers import PackedLinear

PAGE = Path(__file__).resolve().parents[2] / "docs" / "format.md"


# ------------------------------------------------- written from docs/format.md alone: numpy only


def read_stream(words: np.ndarray, width: int, count: int) -> np.ndarray:
    """int32 (..., words) -> (..., count) codes: via single bits, as the page defines them."""
    words = words.astype(np.int64) & 0xFFFFFFFF
    stream = (words[..., None] >> np.arange(32)) & 1
    stream = stream.reshape(*words.shape[:-1], -1)[..., : count * width]
    codes = stream.reshape(*words.shape[:-1], count, width)
    return (codes << np.arange(width)).sum(-1)


def decode(
    tensors: dict[str, np.ndarray], entry: dict[str, Any], R: int, C: int
) -> tuple[np.ndarray, np.ndarray]:
    """The float32 weight and the indices. bfloat16 tensors come as their uint16 bit patterns."""

    def bfloat16(name: str) -> np.ndarray:
        return (tensors[name].astype(np.uint32) << 16).view(np.float32).astype(np.float64)

    d, k, GR, GC = (
        entry[f] for f in ("vector_dim", "num_centroids", "group_rows", "group_columns")
    )
    precision, B = entry.get("codebook_dtype", "int8"), entry.get("scale_block", 0)
    V, S, G = ceil(C / d), ceil(C / GC), ceil(R / GR)
    indices = read_stream(tensors["indices"], int(k - 1).bit_length(), V)
    assert indices.max() < k

    if entry.get("svd_rank", 0):
        factors = tensors["codebook_factors"].astype(np.float64)
        basis = tensors["codebook_basis"].astype(np.float64)
        books = np.einsum("sgr,rm->sgm", factors, basis)[..., None]
    elif precision == "int4":
        nibbles = read_stream(tensors["codebooks"], 4, k * d).reshape(S, G, k, d)
        books = np.where(nibbles > 7, nibbles - 16, nibbles).astype(np.float64)
    else:
        books = tensors["codebooks"].astype(np.float64)
    if precision in ("int8", "int4"):
        books = books * bfloat16("codebook_scales")[:, :, None, None]
    books = books.astype(np.float32)

    i, j = np.arange(R)[:, None], np.arange(C)[None, :]
    weight = books[j // GC, i // GR, indices[i, j // d], j % d]
    if B:
        codes = read_stream(tensors["scale_codes"], 4, ceil(C / B))
        offset, step = bfloat16("scale_grid")
        scales = offset + step * codes
        if entry.get("scale_domain", "log") == "log":
            scales = 2.0**scales
        weight = weight * scales.astype(np.float32)[i, j // B]
    assert weight.dtype == np.float32
    return weight, indices


# --------------------------------------------------------------------------------------- the tests


def to_numpy(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {
        name: t.view(torch.int16).numpy().view(np.uint16)
        if t.dtype == torch.bfloat16
        else t.numpy()
        for name, t in tensors.items()
    }


@settings(deadline=None, max_examples=150)
@given(gptvq_specs(), st.integers(0, 2**32))
def test_stranger_and_library_decode_the_same(spec: GPTVQSpec, seed: int) -> None:
    tensors = pack(random_gptvq(spec, seed), spec)
    entry = json.loads(json.dumps(spec.to_dict()))
    weight, indices = decode(to_numpy(tensors), entry, spec.out_features, spec.in_features)

    assert np.array_equal(indices, unpack(tensors, spec).indices.numpy())
    layer = PackedLinear.from_packed(spec, tensors)
    assert np.array_equal(weight, layer.dequantize(torch.float32).numpy())


def test_readable_reference_decodes_the_same() -> None:
    for name, spec in ODD_SPECS.items():
        tensors = pack(random_gptvq(spec), spec)
        weight, _ = decode(to_numpy(tensors), spec.to_dict(), spec.out_features, spec.in_features)
        books = tensors.get("codebook_factors", tensors.get("codebooks"))
        ours = reference.gptvq_dequantize(
            tensors["indices"], books, tensors.get("codebook_scales"),
            tensors.get("codebook_basis"), tensors.get("scale_codes"), tensors.get("scale_grid"),
            spec.in_features, spec.vector_dim, spec.num_centroids, spec.group_rows,
            spec.group_columns, spec.scale_block, spec.scale_domain == "log",
        )  # fmt: skip
        assert np.array_equal(weight, ours.numpy()), name


def test_example_of_the_page() -> None:
    example = PAGE.read_text().split("## Example")[1].split("## Size")[0]
    entry = json.loads(re.search(r"```json\n(.*?)```", example, re.S)[1])
    assert entry.pop("modules") == ["example"]
    values = {n: json.loads(v) for n, v in re.findall(r"\| `(\w+)` \| `(\[.*?\])` \|", example)}
    printed = example.split("```")[-2]
    expected = np.array([[float(x) for x in row.split()] for row in printed.strip().splitlines()])

    spec = FORMATS["gptvq"].make_spec(2, 5, entry, "example")
    layout = spec.layout()
    assert set(values) == set(layout)
    tensors = {n: torch.tensor(v, dtype=layout[n].dtype) for n, v in values.items()}
    layer = PackedLinear.from_packed(spec, tensors)
    for weight in (
        decode(to_numpy(tensors), entry, 2, 5)[0],
        layer.dequantize(torch.float32).numpy(),
    ):
        np.testing.assert_allclose(weight, expected, rtol=5e-8)
    assert torch.equal(pack(unpack(tensors, spec), spec)["indices"], tensors["indices"])


def test_page_names_every_spec_field_and_tensor() -> None:
    page = PAGE.read_text()
    fields = {f.name for f in dataclasses.fields(GPTVQSpec)} - {"out_features", "in_features"}
    tensors = {name for spec in ODD_SPECS.values() for name in spec.layout()}
    for name in fields | tensors:
        assert f"| `{name}` |" in page, name
    assert f'`"{FORMATS["gptvq"].version}"`' in page
