"""A target in bits for all matrices together."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vq.budget import UnreachableError, Wanted, choose_specs
from hf_vq.configs import CVXQConfig, GPTVQConfig, VPTQConfig
from hf_vq.registry import METHODS

CONFIGS = {"gptvq": GPTVQConfig, "vptq": VPTQConfig, "cvxq": CVXQConfig}


def wanted(config, *shapes):
    return {f"m{i}": Wanted(shape, config) for i, shape in enumerate(shapes)}


def total_bits(specs):
    return 8 * sum(s.nbytes for s in specs.values()) / sum(s.num_weights for s in specs.values())


def total_error(method, specs):
    return sum(method.expected_error(s) * s.num_weights for s in specs.values())


SHAPES = st.tuples(st.integers(48, 400), st.integers(48, 400))


@settings(max_examples=15, deadline=None)
@given(
    method=st.sampled_from(list(CONFIGS)),
    shapes=st.lists(SHAPES, min_size=1, max_size=4),
    bits=st.sampled_from([2.5, 3.0, 4.0]),
)
def test_the_target_holds_for_all_together_and_none_could_do_better_alone(method, shapes, bits):
    config = CONFIGS[method](bits)
    try:
        specs = choose_specs(METHODS[method], wanted(config, *shapes))
    except UnreachableError:
        return
    assert total_bits(specs) <= bits
    fields = {f: getattr(config, f) for f in config.spec_fields}
    alone = {
        n: METHODS[method].choose_spec(*w.shape, bits, fields)
        for n, w in wanted(config, *shapes).items()
    }
    assert total_error(METHODS[method], specs) <= total_error(METHODS[method], alone) * (1 + 1e-9)


@pytest.mark.parametrize("method", list(CONFIGS))
def test_many_matrices_come_closer_to_the_target_than_one(method):
    config = CONFIGS[method](2.3)
    specs = choose_specs(METHODS[method], wanted(config, *[(256, 256), (128, 256), (704, 256)] * 4))
    assert 2.29 < total_bits(specs) <= 2.3


def test_targets_of_their_own_are_met_apart():
    low, high = GPTVQConfig(2.25), GPTVQConfig(4.0)
    both = {**wanted(low, (128, 128), (64, 256)), "own": Wanted((128, 128), high)}
    specs = choose_specs(METHODS["gptvq"], both)
    own = specs.pop("own")
    assert 3.5 < own.bits_per_weight <= 4.0 and total_bits(specs) <= 2.25


def test_without_a_target_the_fields_decide():
    config = VPTQConfig(None, vector_dim=4, num_centroids=16)
    specs = choose_specs(METHODS["vptq"], wanted(config, (64, 64), (128, 32)))
    assert {s.num_centroids for s in specs.values()} == {16}


def test_a_matrix_out_of_reach_is_named():
    with pytest.raises(UnreachableError, match="m1: bits=2 is out of reach") as caught:
        choose_specs(METHODS["gptvq"], wanted(GPTVQConfig(2.0), (256, 256), (4, 8)))
    assert caught.value.name == "m1"


def test_equal_matrices_cost_one_search(monkeypatch):
    calls = []

    def choose(rows, columns, bits, fields):
        calls.append((rows, columns, bits))
        return METHODS["gptvq"].choose_spec(rows, columns, bits, fields)

    method = SimpleNamespace(choose_spec=choose, expected_error=METHODS["gptvq"].expected_error)
    choose_specs(method, wanted(GPTVQConfig(3.0), *[(64, 64)] * 10))
    around = [bits for _, _, bits in calls if bits != 3.0]
    assert len(around) > 10 and len(around) == len(set(around))
