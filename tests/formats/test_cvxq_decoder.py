"""docs/format.md on CVXQ, read by a stranger: a numpy decoder that knows nothing of hf_vq."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_cvxq import ODD_CVXQ, cvxq_specs, random_cvxq, with_depths
from helpers_levels import laplace, lloyd_max
from hypothesis import given, settings

from hf_vq.formats import FORMATS
from hf_vq.formats.cvxq import CVXQCodes, CVXQSpec, pack
from hf_vq.layers import PackedLinear

PAGE = Path(__file__).resolve().parents[2] / "docs" / "format.md"


# ------------------------------------------------- written from docs/format.md alone: numpy only


def read_stream(words: np.ndarray, width: int, count: int) -> np.ndarray:
    """int32 (words,) -> (count,) codes: via single bits, as the page defines them."""
    words = words.astype(np.int64) & 0xFFFFFFFF
    stream = ((words[:, None] >> np.arange(32)) & 1).reshape(-1)[: count * width]
    return (stream.reshape(count, width) << np.arange(width)).sum(-1)


@functools.cache
def levels(kind: str, depth: int) -> np.ndarray:
    if depth == 0:
        return np.zeros(1, np.float32)
    upper = {"lloyd": lloyd_max, "laplace": laplace}[kind](depth).astype(np.float32)
    return np.concatenate([-upper[::-1], upper])


def decode(tensors: dict[str, np.ndarray], entry: dict[str, Any], O: int, I: int) -> np.ndarray:  # noqa: E741
    """The float32 weight."""
    g = entry["group_rows"]
    M = ceil(O / g)
    perm = np.arange(O)
    if entry.get("permuted", False):
        perm = tensors["row_perm"].astype(np.int64)
        perm = np.where((perm < 0) & (tensors["row_perm"].dtype == np.int16), perm + 65536, perm)
    weight = np.full((O, I), np.nan, dtype=np.float32)
    at = 0
    for m in range(M):
        depths = read_stream(tensors["depths"][m], 4, I)
        rows = perm[m * g : (m + 1) * g]
        for j, B in enumerate(depths.tolist()):
            n = ceil(B * g / 32)
            q = read_stream(tensors["words"][at : at + n], B, g) if B else np.zeros(g, np.int64)
            at += n
            if entry.get("scale_dtype", "log8") == "log8":
                offset, step = tensors["scale_grid"][:, m].astype(np.float64)
                s = np.float32(2.0 ** (offset + step * float(tensors["scale_codes"][m, j])))
            else:
                s = np.float32(tensors["scales"][m, j])
            u = np.float32(0)
            if entry.get("location", "none") == "int8":
                u = np.float32(tensors["location"][m, j] / 64) * s
            elif entry.get("location", "none") != "none":
                u = np.float32(tensors["location"][m, j])
            values = s * levels(entry.get("levels", "lloyd"), B)[q] + u
            assert values.dtype == np.float32
            weight[rows, j] = values[: len(rows)]
    assert at == len(tensors["words"])
    return weight


# --------------------------------------------------------------------------------------- the tests


def entry_of(spec: CVXQSpec) -> dict[str, Any]:
    """An entry, as JSON would return it."""
    (entry,) = FORMATS["cvxq"].write_layers({"example": (spec, False)})
    return json.loads(json.dumps(entry))


def both(codes: CVXQCodes, spec: CVXQSpec) -> np.ndarray:
    """The weight by the stranger, after the library was found to agree bit for bit."""
    tensors = pack(codes, spec)
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    weight = decode(arrays, entry_of(spec), spec.out_features, spec.in_features)
    layer = PackedLinear.from_packed(spec, tensors, compute_dtype=torch.float32)
    assert np.array_equal(weight, layer.dequantize().numpy())
    return weight


@settings(deadline=None, max_examples=150)
@given(cvxq_specs())
def test_stranger_and_library_decode_the_same(drawn: tuple[CVXQSpec, int]) -> None:
    spec, seed = drawn
    both(random_cvxq(spec, seed), spec)


@pytest.mark.parametrize("name", ODD_CVXQ)
def test_odd_shapes(name: str) -> None:
    both(random_cvxq(ODD_CVXQ[name]), ODD_CVXQ[name])


def test_example_of_the_page() -> None:
    example = PAGE.read_text().split("## Example of CVXQ")[1]
    entry = json.loads(re.search(r"```json\n(.*?)```", example, re.S)[1])
    values = {n: json.loads(v) for n, v in re.findall(r"\| `([\w.]+)` \| `(\[.*?\])` \|", example)}
    printed = example.split("```")[-2]
    expected = np.array(
        [[float(x) for x in row.split()] for row in printed.strip().splitlines()], dtype=np.float32
    )
    known = FORMATS["cvxq"]
    fields = known.read_layers({"layers": [entry]})["example"]
    spec = known.make_spec(3, 3, fields, "example")
    assert not known.has_bias(fields, True)
    layout = spec.layout()
    assert set(values) == set(layout)
    tensors = {n: torch.tensor(v, dtype=layout[n].dtype) for n, v in values.items()}
    layer = PackedLinear.from_packed(spec, tensors, compute_dtype=torch.float32)
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    assert np.array_equal(decode(arrays, entry, 3, 3), expected)
    assert np.array_equal(layer.dequantize().numpy(), expected)


def test_page_names_every_field_tensor_and_level() -> None:
    page = PAGE.read_text().split("# The CVXQ format")[1]
    tensors = {name for spec in ODD_CVXQ.values() for name in spec.layout()}
    for name in tensors | entry_of(ODD_CVXQ["log8"]).keys():
        assert f"| `{name}` |" in page, name
    assert f'`"{FORMATS["cvxq"].version}"`' in page
    for field in dataclasses.fields(CVXQSpec):
        if isinstance(field.default, str):
            assert f'default `"{field.default}"`' in page, field.name
    rows = re.findall(r"^\| (\d) \| ([\d. ]+) \|$", page, re.M)
    assert [int(depth) for depth, _ in rows] == [1, 2, 3, 4]
    for depth, row in rows:
        printed = np.array([float(x) for x in row.split()], dtype=np.float32)
        assert np.array_equal(printed, levels("lloyd", int(depth))[2 ** int(depth) // 2 :])


# ----------------------------------------------------------------------------- easily made mistakes


def test_direction_of_the_permutation() -> None:
    # no involution: only a cycle tells W[perm] = clustered from W = clustered[perm]
    spec = CVXQSpec(3, 1, 1, 0, "float16", "float16", permuted=True)
    codes = random_cvxq(spec)
    codes.location = torch.tensor([[10.0], [20.0], [30.0]])
    codes.row_perm = torch.tensor([1, 2, 0])
    # rows 0, 1, 2 of the clusters are rows 1, 2, 0 of the matrix
    assert both(codes, spec).tolist() == [[30], [10], [20]]


def test_a_group_is_one_column_of_one_cluster() -> None:
    spec = with_depths(29, 17, 8)
    codes = random_cvxq(spec)
    before = both(codes, spec)
    cluster, column = (codes.depths >= 4).nonzero()[5].tolist()
    codes.codes[cluster, column, :5] ^= 5
    changed = np.argwhere(both(codes, spec) != before)
    assert set(changed[:, 1]) == {column}
    assert changed[:, 0].tolist() == list(range(8 * cluster, 8 * cluster + 5))


def test_depth_is_not_shared_and_groups_start_in_words() -> None:
    # 5 rows of 7 bits are 35 bits, two words; without padding the next group would start at bit 3
    spec = CVXQSpec(5, 2, 5, 3, "float32")
    codes = CVXQCodes(
        torch.tensor([[7, 1]], dtype=torch.uint8),
        torch.tensor([[[127] * 5, [1, 0, 1, 0, 1]]]),
        torch.ones(1, 2),
    )
    weight = both(codes, spec)
    assert (weight[:, 0] == levels("lloyd", 7)[-1]).all()
    assert (weight[:, 1] > 0).tolist() == [True, False, True, False, True]
    assert pack(codes, spec)["words"].tolist() == [-1, 7, 21]
