"""The state of a matrix: what it decodes to, and how it is cut into panels and chunks of rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vq.methods import lookup, refine
from hf_vq.methods.lookup import diagonal_blocks
from tests.problems import hessian_of, normal, random_lookup, slow_decode


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 4),
    rows_per_group=st.integers(1, 5),
    vectors=st.integers(1, 12),
    per_stripe=st.integers(1, 14),
    d=st.sampled_from([1, 2, 4, 8]),
    scaled=st.booleans(),
    limit=st.integers(1, 300),
)
def test_decode_in_chunks_of_rows(groups, rows_per_group, vectors, per_stripe, d, scaled, limit):
    rows = groups * rows_per_group
    state = random_lookup(
        rows, vectors * d, d, 5, groups=groups, stripe=per_stripe * d, scaled=scaled
    )
    expected = slow_decode(state)
    torch.testing.assert_close(state.decode().double(), expected)
    other = normal(*state.codebooks.shape, seed=99)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(lookup._CHUNK, "cpu", limit)
        for here, which, part in state.row_chunks():
            torch.testing.assert_close(part.decode().double(), expected[here])
            swapped = state.decode(other)[here]
            torch.testing.assert_close(part.decode(other[:, which]), swapped)
            assert len(part.index) == 1 or part.index.numel() * d <= limit
            assert part.index.data_ptr() == state.index[here].data_ptr()  # a view: writes count
            seen += range(here.start, here.stop)
    assert seen == list(range(rows))


@pytest.mark.parametrize("limit", [1, 50, 400])
def test_chunks_do_not_show_in_refinement(monkeypatch, limit):
    weight, h = normal(15, 24, seed=5), hessian_of(24)
    found = []
    for size in (1 << 20, limit):
        monkeypatch.setitem(lookup._CHUNK, "cpu", size)
        state = random_lookup(15, 24, 2, 6, groups=3, stripe=10, scaled=True, padded_rows=2)
        refine.reassign(weight, h, state)
        mass = refine.importance(h, state)
        refine.fit_codebooks(weight, h, state, iterations=10)
        found.append((state.index, mass, state.codebooks, refine.loss(weight, h, state)))
    for whole, chunked in zip(*found, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    vectors=st.integers(1, 60),
    per_stripe=st.integers(1, 70),
    d=st.sampled_from([1, 2, 4, 8]),
    width=st.integers(1, 130),
)
def test_panels_cover_the_columns_and_respect_stripes(vectors, per_stripe, d, width):
    state = random_lookup(1, vectors * d, d, 2, stripe=per_stripe * d)
    panels = state.panels(width)
    covered = [c for a, b in panels for c in range(a, b)]
    assert covered == list(range(vectors * d))
    for a, b in panels:
        assert a % d == 0 and b % d == 0
        assert a // (per_stripe * d) == (b - 1) // (per_stripe * d)
        assert b - a <= max(width, d)


@pytest.mark.parametrize("d", [1, 2, 4])
def test_diagonal_blocks(d):
    matrix = normal(12, 12)
    blocks = diagonal_blocks(matrix, d)
    assert blocks.shape == (12 // d, d, d)
    for i, block in enumerate(blocks):
        assert torch.equal(block, matrix[i * d : (i + 1) * d, i * d : (i + 1) * d])
