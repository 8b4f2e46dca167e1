"""CVXQ's config refuses what the format or the method cannot do."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_vq.config_cvxq import CVXQConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 0.9}, "from 1 to 8"),
        ({"bits": None}, "give mean_depth"),
        ({"mean_depth": 0}, "from 0.03125 to 8"),
        ({"bits": 3, "mean_depth": 3}, "leaves nothing of bits=3"),
        ({"group_rows": 0}, "an integer from 1 to 65536"),
        ({"scale_dtype": "int8"}, "'log8', 'float16', 'float32'"),
        ({"location": "log8"}, "'none', 'int8', 'float16', 'float32'"),
        ({"levels": "gauss"}, "must be one of 'lloyd', 'laplace'"),
        ({"permuted": 1}, "True or False or None"),
        ({"distortion": "paper"}, "'measured', 'law'"),
        ({"reallocations": -1}, "from 0 to 100"),
        ({"fit_rounds": 0}, "from 1 to 100"),
        ({"damping": 2}, "from 0 to 1"),
        ({"bias_correction": None}, "True or False"),
        ({"calibration_inputs": "both"}, "'quantized', 'original'"),
        ({"vector_dim": 2}, "no field 'vector_dim'"),
        ({"overrides": {"q_proj": {"allocation": "uniform"}}}, "cannot differ between layers"),
    ],
)
def test_refuses_where_it_is_written(fields, message):
    with pytest.raises(ValueError, match=message):
        CVXQConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": None, "mean_depth": 3},
        {"bits": 3.2, "mean_depth": 3},
        {"group_rows": 512, "permuted": False},
        {"scale_dtype": "float16", "location": "float16", "levels": "laplace"},
        {"error_feedback": False, "distortion": "law", "refine_iterations": 0},
        {"bias_correction": True, "calibration_inputs": "original"},
    ],
)
def test_takes_what_the_paper_does(fields):
    config = CVXQConfig(**fields)
    assert {name: getattr(config, name) for name in fields} == fields


def test_the_papers_word_for_its_levels():
    assert CVXQConfig(levels="companding") == CVXQConfig(levels="laplace")
    layer = CVXQConfig(overrides={"down_proj": {"levels": "companding"}}).for_layer("down_proj")
    assert layer.levels == "laplace"


def test_override_that_contradicts_the_config_names_the_layer():
    config = CVXQConfig(3, overrides={"down_proj": {"mean_depth": 3.5}})
    with pytest.raises(ValueError, match=r"overrides for a\.down_proj: mean_depth=3\.5"):
        config.for_layer("a.down_proj")


@given(
    bits=st.floats(1, 8),
    location=st.sampled_from(["none", "int8", "float16", "float32"]),
    permuted=st.sampled_from([None, True, False]),
    group_rows=st.none() | st.integers(1, 65536),
)
def test_round_trip(bits, location, permuted, group_rows):
    config = CVXQConfig(bits, location=location, permuted=permuted, group_rows=group_rows)
    again = CVXQConfig.from_dict(json.loads(config.to_json_string()))
    assert again == config
    assert (again.location, again.permuted) == (location, permuted)
