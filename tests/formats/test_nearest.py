"""Codes chosen again come nearer to what was wished, and only as many as allowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_vq.formats import FORMATS, gptvq
from hf_vq.formats.gptvq import GPTVQSpec
from hf_vq.formats.nearest import best, closer
from tests.formats.test_trainable import dense
from tests.helpers import ODD_SPECS, random_gptvq
from tests.helpers_cvxq import ODD_CVXQ, random_cvxq
from tests.helpers_vptq import ODD_VPTQ, random_vptq

_LARGE = ("residual-32-bits", "wide-perm", "wider-perm")
SPECS: dict[str, Any] = {
    f"{spec.method}-{name}": spec
    for specs in (ODD_SPECS, ODD_CVXQ, ODD_VPTQ)
    for name, spec in specs.items()  # type: ignore[attr-defined]
    if name not in _LARGE
}
_RANDOM: dict[str, Any] = {"gptvq": random_gptvq, "cvxq": random_cvxq, "vptq": random_vptq}


def wide(name: str) -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
    spec = SPECS[name]
    tensors = FORMATS[spec.method].pack(_RANDOM[spec.method](spec), spec)
    tensors, spec = FORMATS[spec.method].widen(tensors, spec)
    return spec, tensors, dense(spec, tensors)


def again(
    spec: Any, tensors: dict[str, torch.Tensor], target: torch.Tensor, most: float
) -> tuple[dict[str, torch.Tensor], int]:
    nearest = FORMATS[spec.method].nearest
    assert nearest is not None
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    changed, count = nearest(target, tensors, spec, most)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)  # left alone
    out = {**tensors, **changed}
    FORMATS[spec.method].check(out, spec, "again")
    return out, count


def error(spec: Any, tensors: dict[str, torch.Tensor], target: torch.Tensor) -> float:
    difference = (dense(spec, tensors) - target).double()
    if getattr(spec, "norm", "") == "rows":  # distances are those of the normalised weights
        scale = tensors["weight_scale"].double()
        difference = difference / torch.where(scale.abs() < 1e-30, 1, scale)[:, None]
    return float(difference.square().sum())


@pytest.mark.parametrize("name", SPECS)
def test_weights_that_are_there_already_change_nothing(name: str) -> None:
    spec, tensors, weight = wide(name)
    out, _ = again(spec, tensors, weight, 1.0)
    # equal centroids may be exchanged
    assert torch.allclose(dense(spec, out), weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("most", [0.0, 0.1])
@pytest.mark.parametrize("name", SPECS)
def test_more_changes_come_nearer(name: str, most: float) -> None:
    spec, tensors, weight = wide(name)
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    target = weight + noise
    before = error(spec, tensors, target)
    some, few = again(spec, tensors, target, most)
    every, many = again(spec, tensors, target, 1.0)
    assert few <= many
    assert few <= most * 2 * weight.numel() + 1  # padding has codes as well
    slack = 1e-3 * before
    assert error(spec, every, target) <= error(spec, some, target) + slack
    assert error(spec, some, target) <= before + slack
    if most == 0:
        assert few == 0


def test_codes_are_found_again() -> None:
    spec = GPTVQSpec(24, 64, 2, 16, 8, 32, "float32", 16)
    codes = random_gptvq(spec)
    tensors = gptvq.pack(codes, spec)
    target = dense(spec, tensors)
    wanted = codes.indices.clone()
    generator = torch.Generator().manual_seed(5)
    codes.indices = torch.randint(0, 16, wanted.shape, generator=generator)
    shuffled = gptvq.pack(codes, spec)
    assert error(spec, shuffled, target) > 1
    out, count = again(spec, shuffled, target, 1.0)
    assert count == int((wanted != codes.indices).sum())
    assert torch.equal(gptvq.unpack(out, spec).indices, wanted)
    out, count = again(spec, shuffled, target, 0.25)
    assert count == int(0.25 * wanted.numel())
    assert 0 < error(spec, out, target) < error(spec, shuffled, target)


@pytest.mark.parametrize(("books", "k", "d", "seed"), [(1, 2, 1, 0), (3, 9, 5, 1), (2, 6, 2, 2)])
def test_closer_finds_the_nearest(books: int, k: int, d: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    centroids = torch.randn(books, k, d, generator=generator)
    vectors = torch.randn(50, d, generator=generator)
    book = torch.randint(0, books, (50,), generator=generator)
    codes = torch.randint(0, k, (50,), generator=generator)
    found, gains = closer(vectors, centroids, book, codes)
    distances = (vectors[:, None] - centroids[book]).square().sum(-1)
    rows = torch.arange(50)
    assert torch.allclose(distances[rows, found], distances.amin(-1))
    assert torch.allclose(gains, distances[rows, codes] - distances[rows, found], atol=1e-5)


def test_best_are_the_largest() -> None:
    gains = torch.tensor([0.0, 3.0, 1.0, 2.0])
    assert best(gains, 0.5).tolist() == [False, True, False, True]
    assert best(gains, 1.0).tolist() == [False, True, True, True]
    assert not best(gains, 0.2).any()
