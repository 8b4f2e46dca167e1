"""VPTQ's config refuses what the format or the method cannot do."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_vq.config_vptq import VPTQConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 0.9}, "from 1 to 8"),
        ({"bits": None}, "give vector_dim and num_centroids"),
        ({"bits": None, "vector_dim": 6}, "give vector_dim and num_centroids"),
        ({"vector_dim": 1}, "an integer from 2 to 16"),
        ({"vector_dim": 17}, "an integer from 2 to 16"),
        ({"num_centroids": 48}, "num_centroids=48 must be a power of two from 2 to 65536"),
        ({"num_centroids": 131072}, "power of two"),
        ({"num_res_centroids": 1}, "from 2 to 65536 or 0 or None"),
        ({"num_groups": 0}, "from 1 to 65536"),
        ({"outlier_percent": 51}, "from 0 to 50"),
        ({"outlier_vector_dim": 32}, "from 2 to 16"),
        ({"outlier_centroids": 0}, "power of two"),
        ({"norm": "max"}, "'none', 'mean-std', 'min-max' or None"),
        ({"permute": 1}, "True or False or None"),
        ({"codebook_dtype": "int8"}, "'float16', 'bfloat16'"),
        ({"beam": 0}, "from 1 to 64"),
        ({"error_feedback": None}, "True or False"),
        ({"calibration_inputs": "both"}, "'quantized', 'original'"),
        ({"finetune_steps": -1}, "from 0 to 100000"),
        ({"finetune_steps": 1, "finetune_lr": 0}, "from 1e-08 to 1"),
        ({"vector_dim": 4, "num_centroids": 512}, "takes 2.25 bits .* nothing of bits=2.25"),
        (
            {"bits": 2, "vector_dim": 8, "num_centroids": 256, "num_res_centroids": 256},
            "num_centroids=256 and num_res_centroids=256 takes 2 bits",
        ),
        ({"num_centroids": 16, "num_res_centroids": 64}, "exceeds num_centroids=16"),
        ({"outlier_percent": 0, "outlier_vector_dim": 4}, "outlier_percent=0 asks for none"),
        ({"outlier_percent": 0, "outlier_centroids": 16}, "outlier_percent=0 asks for none"),
        ({"outlier_percent": 1, "permute": False}, "needs permute"),
        ({"finetune_lr": 1e-4}, "nothing without finetune_steps"),
        ({"index_bits": 8}, "no field 'index_bits'"),
        ({"overrides": {"q_proj": {"finetune_steps": 3}}}, "cannot differ between layers"),
        ({"overrides": {"q_proj": {"calibration_inputs": "original"}}}, "cannot differ"),
    ],
)
def test_refuses_where_it_is_written(fields, message):
    with pytest.raises(ValueError, match=message):
        VPTQConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": None, "vector_dim": 6, "num_centroids": 4096},
        {"bits": 2, "vector_dim": 8, "num_centroids": 65536, "outlier_percent": 1},
        {"num_centroids": 64, "num_res_centroids": 0},
        {"outlier_percent": None, "outlier_vector_dim": 4, "outlier_centroids": 4096},
        {"norm": "none", "permute": False},
        {"finetune_steps": 100, "finetune_lr": 1e-4},
        {"calibration_inputs": "original"},
    ],
)
def test_takes_what_the_paper_does(fields):
    config = VPTQConfig(**fields)
    assert {name: getattr(config, name) for name in fields} == fields


def test_override_that_contradicts_the_config_names_the_layer():
    config = VPTQConfig(2.25, vector_dim=4, overrides={"down_proj": {"num_centroids": 512}})
    with pytest.raises(ValueError, match=r"overrides for a\.down_proj: vector_dim=4"):
        config.for_layer("a.down_proj")
    layer = VPTQConfig(overrides={"down_proj": {"norm": "none", "beam": 1}}).for_layer("down_proj")
    assert (layer.norm, layer.beam) == ("none", 1)


@given(
    bits=st.floats(1, 8),
    norm=st.sampled_from([None, "none", "mean-std", "min-max"]),
    permute=st.sampled_from([None, True, False]),
    res=st.sampled_from([None, 0, 2, 65536]),
)
def test_round_trip(bits, norm, permute, res):
    config = VPTQConfig(bits, norm=norm, permute=permute, num_res_centroids=res)
    again = VPTQConfig.from_dict(json.loads(config.to_json_string()))
    assert again == config
    assert (again.norm, again.permute) == (norm, permute)
