"""docs/format.md on VPTQ, read by a stranger: a numpy decoder that knows nothing of hf_vq.

What the official package decodes is compared with as well, and so are the mistakes that are easily
made: a permutation in the wrong direction, scales in the stored order, signed words and indices.
"""

from __future__ import annotations

import dataclasses
import json
import re
from math import ceil
from pathlib import Path
from typing import Any

import hf_vq_kernels.vptq_reference as reference
import numpy as np
import pytest
import torch
from helpers_vptq import ODD_VPTQ, random_vptq, vptq_specs
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hf_vq.formats.vptq import VPTQCodes, VPTQSpec, modernize, pack
from hf_vq.layers import PackedLinear

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "format.md"
FIXTURES = ROOT.parent / "shared" / "fixtures" / "vptq"


# ------------------------------------------------- written from docs/format.md alone: numpy only


def read_stream(words: np.ndarray, width: int, count: int) -> np.ndarray:
    """int32 (..., words) -> (..., count) codes: via single bits, as the page defines them."""
    words = words.astype(np.int64) & 0xFFFFFFFF
    stream = (words[..., None] >> np.arange(32)) & 1
    stream = stream.reshape(*words.shape[:-1], -1)[..., : count * width]
    codes = stream.reshape(*words.shape[:-1], count, width)
    return (codes << np.arange(width)).sum(-1)


def unsigned(stored: np.ndarray) -> np.ndarray:
    """16-bit elements, whatever their dtype, as 0..65535."""
    return stored.view(np.uint16).astype(np.int64)


def decode(tensors: dict[str, np.ndarray], entry: dict[str, Any]) -> np.ndarray:
    """The float32 weight. Codebooks, scales and biases come as float32."""
    O, I = entry["out_features"], entry["in_features"]  # noqa: E741
    (v0, v), (K0, K), (_, R) = (
        entry[key] for key in ("vector_lens", "num_centroids", "num_res_centroids")
    )
    G, N0 = entry["group_num"], entry["outlier_size"]
    W, R = (I - N0) // G, max(R, 0)
    B = ceil(O / v)
    ib, rb = K.bit_length() - 1, max(R.bit_length() - 1, 0)

    books = tensors["centroids.weight"].reshape(G, K, v)
    if entry["is_indice_packed"]:
        code = read_stream(tensors["indices"], ib + rb, W)
        main, res = code % K, code // K
        perm = unsigned(tensors["perm"]) if entry["enable_perm"] else np.arange(I)
    else:
        main = unsigned(tensors["indices"])
        res = unsigned(tensors["res_indices"]) if R else None
        perm = tensors["perm"] if entry["enable_perm"] else np.arange(I)
    assert main.shape == (G, B, W) and main.max() < K
    if R:
        res_books = tensors["res_centroids.weight"].reshape(G, R, v)
    if v0 > 1 and K0 > 0:
        outliers = unsigned(tensors["outlier_indices"])
        assert outliers.shape == (1, ceil(O / v0), N0)
        outlier_book = tensors["outlier_centroids.weight"].reshape(K0, v0)

    weight = np.full((O, I), np.nan, dtype=np.float32)
    i = np.arange(O)
    for p in range(I):
        j = perm[p]
        if p < N0:
            c = outlier_book[outliers[0, i // v0, p], i % v0]
        else:
            g, q = divmod(p - N0, W)
            c = books[g, main[g, i // v, q], i % v]
            if R:
                c = c + res_books[g, res[g, i // v, q], i % v]
        if entry["enable_norm"]:
            at = i if entry.get("norm_dim", 0) == 1 else j
            c = c * tensors["weight_scale"][at] + tensors["weight_bias"][at]
        assert c.dtype == np.float32
        weight[:, j] = c
    return weight


# --------------------------------------------------------------------------------------- the tests


def entry_of(spec: VPTQSpec) -> dict[str, Any]:
    """A published entry, as JSON would return it."""
    outliers = spec.outlier_vector_dim > 0
    entry = {
        "in_features": spec.in_features,
        "out_features": spec.out_features,
        "vector_lens": [spec.outlier_vector_dim if outliers else -1, spec.vector_dim],
        "num_centroids": [spec.outlier_centroids if outliers else -1, spec.num_centroids],
        "num_res_centroids": [-1, spec.num_res_centroids or -1],
        "group_num": spec.num_groups,
        "group_size": spec.group_columns,
        "outlier_size": spec.outlier_columns,
        "enable_norm": spec.norm != "none",
        "norm_dim": int(spec.norm == "rows"),
        "enable_perm": spec.permuted,
        "bias": False,
        "is_indice_packed": spec.storage == "packed",
        "indices_as_float": spec.storage == "float16",
    }
    return json.loads(json.dumps(entry))


def spec_of(entry: dict[str, Any], codebook_dtype: str) -> VPTQSpec:
    (v0, v), (K0, K), (_, R) = (
        entry[key] for key in ("vector_lens", "num_centroids", "num_res_centroids")
    )
    norm = ("columns", "rows")[entry.get("norm_dim", 0)] if entry["enable_norm"] else "none"
    return VPTQSpec(
        entry["out_features"], entry["in_features"], v, K, max(R, 0), entry["group_num"],
        entry["outlier_size"], max(v0, 0), max(K0, 0), norm, entry["enable_perm"], codebook_dtype,
    )  # fmt: skip


def to_numpy(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {
        name: (t.float() if t.is_floating_point() and "indices" not in name else t).numpy()
        for name, t in tensors.items()
    }


def both(codes: VPTQCodes, spec: VPTQSpec) -> np.ndarray:
    """The weight by the stranger, after the library was found to agree bit for bit."""
    tensors = pack(codes, spec)
    weight = decode(to_numpy(tensors), entry_of(spec))
    modern, modern_spec = modernize(tensors, spec)
    layer = PackedLinear.from_packed(modern_spec, modern)
    assert np.array_equal(weight, layer.dequantize(torch.float32).numpy())
    return weight


@settings(deadline=None, max_examples=150)
@given(vptq_specs(("packed", "packed", "int16", "float16")), st.integers(0, 2**32))
def test_stranger_and_library_decode_the_same(spec: VPTQSpec, seed: int) -> None:
    both(random_vptq(spec, seed), spec)


@pytest.mark.parametrize("name", ODD_VPTQ)
def test_readable_reference_decodes_the_same(name: str) -> None:
    spec = ODD_VPTQ[name]
    codes = random_vptq(spec)
    tensors = pack(codes, spec)
    names = (
        "indices", "centroids.weight", "res_centroids.weight", "outlier_indices",
        "outlier_centroids.weight", "perm", "weight_scale", "weight_bias",
    )  # fmt: skip
    ours = reference.vptq_dequantize(
        *(tensors.get(name) for name in names), spec.in_features, spec.out_features,
        spec.vector_dim, spec.outlier_vector_dim, spec.norm == "rows",
    )  # fmt: skip
    assert np.array_equal(both(codes, spec), ours.numpy())


@pytest.mark.parametrize("name", ["layer_a", "layer_a2", "layer_b", "layer_d"])
def test_decodes_like_the_official_package(name: str) -> None:
    folder = FIXTURES / name
    if not folder.is_dir():
        pytest.skip("needs the checkpoints in ../shared/fixtures, which are not in this checkout")
    entry = json.loads((folder / "config.json").read_text())["constructor"]
    tensors = load_file(folder / "model.safetensors")
    expected = load_file(folder / "expected.safetensors")
    bias = tensors.pop("bias", None)
    spec = spec_of(entry, str(tensors["centroids.weight"].dtype).removeprefix("torch."))
    layer = PackedLinear.from_packed(spec, tensors, bias, torch.float32)

    assert torch.equal(layer.dequantize(), expected["weight"])
    assert np.array_equal(decode(to_numpy(tensors), entry), expected["weight"].numpy())
    torch.testing.assert_close(layer(expected["x"]), expected["y"], rtol=1e-5, atol=1e-5)
    native = expected["weight_native"]  # there, every step was rounded to 16 bits
    torch.testing.assert_close(layer.dequantize(native.dtype), native, rtol=2e-2, atol=2e-2)


def test_example_of_the_page() -> None:
    example = PAGE.read_text().split("## Example of VPTQ")[1].split("## Older")[0]
    entry = json.loads(re.search(r"```json\n(.*?)```", example, re.S)[1])
    values = {n: json.loads(v) for n, v in re.findall(r"\| `([\w.]+)` \| `(\[.*?\])` \|", example)}
    printed = example.split("```")[-2]
    expected = np.array([[float(x) for x in row.split()] for row in printed.strip().splitlines()])

    spec = spec_of(entry, "float16")
    layout = spec.layout()
    assert set(values) == set(layout)
    tensors = {n: torch.tensor(v, dtype=layout[n].dtype) for n, v in values.items()}
    layer = PackedLinear.from_packed(spec, tensors)
    assert np.array_equal(decode(to_numpy(tensors), entry), expected)
    assert np.array_equal(layer.dequantize(torch.float32).numpy(), expected)


def test_page_names_every_key_and_tensor() -> None:
    page = PAGE.read_text().split("# The VPTQ format")[1]
    tensors = {name for spec in ODD_VPTQ.values() for name in spec.layout()}
    for name in tensors | (entry_of(ODD_VPTQ["main"]).keys() - {"in_features", "out_features"}):
        assert f"| `{name}` |" in page, name
    assert "`in_features`, `out_features`" in page and "`res_indices`" in page


# ----------------------------------------------------------------------------- easily made mistakes


def test_direction_of_the_permutation() -> None:
    # no involution: only a cycle tells W[:, perm] = stored from W = stored[:, perm]
    spec = VPTQSpec(2, 3, 2, 4, permuted=True)
    codes = random_vptq(spec)
    codes.indices = torch.tensor([[[0, 1, 2]]])
    codes.centroids = torch.tensor([[[0.0, 10.0], [1.0, 11.0], [2.0, 12.0], [3.0, 13.0]]])
    codes.perm = torch.tensor([1, 2, 0])
    # stored columns 0, 1, 2 are columns 1, 2, 0 of the matrix
    assert both(codes, spec).tolist() == [[2, 0, 1], [12, 10, 11]]


def test_scales_are_in_the_order_of_the_matrix() -> None:
    spec = VPTQSpec(1, 3, 1, 2, norm="columns", permuted=True)
    codes = random_vptq(spec)
    codes.indices = torch.tensor([[[0, 1, 1]]])
    codes.centroids = torch.tensor([[[1.0], [2.0]]])
    codes.perm = torch.tensor([1, 2, 0])
    codes.scale, codes.bias = torch.tensor([1.0, 10, 100]), torch.tensor([0.25, 0.5, 0.75])
    # 2 * 1 + .25, 1 * 10 + .5, 2 * 100 + .75
    assert both(codes, spec).tolist() == [[2.25, 10.5, 200.75]]


def test_scales_of_rows() -> None:
    spec = VPTQSpec(3, 2, 2, 2, norm="rows")
    codes = random_vptq(spec)
    codes.indices = torch.tensor([[[0, 1], [1, 0]]])
    codes.centroids = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    codes.scale, codes.bias = torch.tensor([1.0, 10, 100]), torch.tensor([0.25, 0.5, 0.75])
    assert both(codes, spec).tolist() == [[1.25, 3.25], [20.5, 40.5], [300.75, 100.75]]


@pytest.mark.parametrize("storage", ["packed", "int16", "float16"])
def test_unsigned_values_of_16_bits(storage: str) -> None:
    # index 65535 and 40000, residual 65535, outlier index 40000, column 40000 of 40001
    spec = VPTQSpec(
        2, 40001, 2, 65536, 65536, 1, 1, 2, 65536, "none", True, "float32", storage
    )  # fmt: skip
    codes = random_vptq(spec)
    codes.perm = torch.arange(40001).flip(0)
    codes.outlier_indices[0, 0] = 40000
    codes.indices[0, 0, :2] = torch.tensor([65535, 40000])
    codes.res_indices[0, 0, :2] = torch.tensor([32768, 65535])
    codes.centroids = torch.arange(131072.0).view(1, 65536, 2)
    codes.res_centroids = torch.arange(131072.0).view(1, 65536, 2) / 4
    codes.outlier_centroids = torch.arange(131072.0).view(65536, 2)
    weight = both(codes, spec)
    assert weight[0, 40000] == 80000  # the outlier column
    assert weight[0, 39999] == 131070 + 65536 / 4 and weight[1, 39998] == 80001 + 131071 / 4


def test_codes_whose_top_bit_is_the_sign_of_a_word() -> None:
    # codes of 18 bits cross words; those of 32 fill them
    for spec in (VPTQSpec(16, 37, 8, 4096, 64), VPTQSpec(16, 37, 8, 65536, 65536)):
        codes = random_vptq(spec)
        codes.indices.fill_(spec.num_centroids - 1)
        codes.res_indices.fill_(spec.num_res_centroids - 1)
        assert (pack(codes, spec)["indices"] < 0).any()
        last = codes.centroids[0, -1] + codes.res_centroids[0, -1]
        assert np.array_equal(both(codes, spec), np.tile(last[:, None].numpy(), (2, 37)))


def test_more_bits_for_the_residual_than_for_the_centroid() -> None:
    # a decoder that masks the residual index with the centroids' bits loses its upper part
    spec = ODD_VPTQ["more-residual-bits"]
    codes = random_vptq(spec)
    assert spec.res_bits > spec.main_bits
    weight = both(codes, spec)
    masked = dataclasses.replace(codes, res_indices=codes.res_indices & (spec.num_centroids - 1))
    assert not np.array_equal(both(masked, spec), weight)


def test_a_residual_codebook_of_one_zero_changes_nothing() -> None:
    spec = ODD_VPTQ["one-residual"]
    codes = random_vptq(spec)
    codes.res_centroids.zero_()
    plain = dataclasses.replace(spec, num_res_centroids=0)
    alone = dataclasses.replace(codes, res_indices=None, res_centroids=None)
    assert plain.index_bits == spec.index_bits
    assert np.array_equal(both(codes, spec), both(alone, plain))


def test_one_input_column_is_one_column_of_codes() -> None:
    spec = VPTQSpec(30, 37, 8, 16)
    codes = random_vptq(spec)
    before = both(codes, spec)
    codes.indices[:, :, 11] = (codes.indices[:, :, 11] + 1) % 16
    changed = (both(codes, spec) != before).any(0)
    assert changed.nonzero()[0].tolist() == [11]
