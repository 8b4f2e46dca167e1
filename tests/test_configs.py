"""Configs refuse nonsense, survive copies, and keep what they do not know."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_vq.config_base import RUNTIME_FIELDS
from hf_vq.configs import GPTVQConfig
from hf_vq.formats import FORMATS

LAYERS = [{"modules": ["model.layers.0.mlp.up_proj"], "vector_dim": 2, "num_centroids": 16}]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 0.5}, "bits=0.5 must be a number from 1 to 8"),
        ({"bits": 9}, "from 1 to 8"),
        ({"bits": float("nan")}, "from 1 to 8"),
        ({"bits": "two"}, "from 1 to 8"),
        ({"bits": None}, "vector_dim, index_bits and group_size"),
        ({"vector_dim": 3}, "one of 1, 2, 4, 8"),
        ({"index_bits": 17}, "from 1 to 16"),
        ({"group_size": 4}, "from 8 to"),
        ({"group_columns": 0}, "from 1 to 65536"),
        ({"codebook_dtype": "fp8"}, "'int8', 'int4', 'float16'"),
        ({"scale_block": 4}, "from 8 to 256 or 0"),
        ({"scale_domain": "cubic"}, "'log', 'linear'"),
        ({"svd_rank": 1000}, "from 1 to 256"),
        ({"kmeans_init": "random"}, "'mahalanobis'"),
        ({"kmeans_iterations": -1}, "from 0 to 1000"),
        ({"damping": 1.5}, "from 0 to 1"),
        ({"refine_iterations": 101}, "from 0 to 100"),
        ({"codebook_update": 1}, "True or False"),
        ({"seed": -1}, "from 0"),
        ({"nsamples": 0}, "from 1"),
        ({"seqlen": 4}, "from 8"),
        ({"vector_dim": 2, "index_bits": 6}, "takes 3 bits per weight for the indices alone"),
        ({"vector_dim": 4, "group_columns": 66}, "multiple of vector_dim=4"),
        ({"vector_dim": 8, "scale_block": 12}, "multiple of vector_dim=8"),
        ({"vector_dim": 2, "svd_rank": 2}, "vector_dim=1"),
        ({"svd_rank": 2, "codebook_dtype": "int4"}, "int4"),
        ({"vector_dim": 1, "index_bits": 2, "svd_rank": 4}, "1 to 3"),
        ({"bit": 3}, "did you mean 'bits'"),
        ({"quant_method": "gptvq"}, "no field 'quant_method'"),
        ({"dataset": []}, "dataset is empty"),
        ({"dataset": ""}, "dataset is empty"),
        ({"dataset": 3}, "dataset=3"),
        ({"calibration_device": "tpu9"}, "no torch device"),
        ({"modules_to_not_convert": 3}, "list of names"),
        ({"modules_to_not_convert": ["re:("]}, "no regular expression"),
        ({"overrides": ["down_proj"]}, "must be a dict"),
        ({"overrides": {"re:(": {}}}, "no regular expression"),
        ({"overrides": {"down_proj": True}}, "False to leave"),
        ({"overrides": {"down_proj": {"bit": 3}}}, "did you mean 'bits'"),
        ({"overrides": {"down_proj": {"seed": 3}}}, "cannot differ between layers"),
        ({"overrides": {"down_proj": {"bits": 30}}}, "from 1 to 8"),
    ],
)
def test_refuses_where_it_is_written(fields, message):
    with pytest.raises(ValueError, match=message):
        GPTVQConfig(**fields)


def test_refuses_assignment_too():
    config = GPTVQConfig()
    with pytest.raises(ValueError, match="from 1 to 8"):
        config.bits = 99
    assert config.bits == 2.25


def test_deep_copies_share_runtime_fields_and_copy_the_rest():
    generator = (text for text in ["a", "b"])  # copy.deepcopy refuses these

    class Tokenizer:
        def __deepcopy__(self, memo):
            raise AssertionError("a tokenizer must not be copied")

    tokenizer = Tokenizer()
    config = GPTVQConfig(2.5, dataset=generator, tokenizer=tokenizer, overrides={"q": {"bits": 3}})
    for twin in (copy.deepcopy(config), copy.copy(config), copy.deepcopy({"a": config})["a"]):
        assert twin.dataset is generator
        assert twin.tokenizer is tokenizer
        assert twin == config
        twin.overrides["q"]["bits"] = 4
        assert config.overrides["q"]["bits"] == 3
    same = [config, config]
    assert len({id(c) for c in copy.deepcopy(same)}) == 1


def test_json_has_no_runtime_fields():
    config = GPTVQConfig(
        2.5,
        dataset=torch.zeros(2, 8, dtype=torch.long),
        tokenizer=object(),
        calibration_device="cpu",
        max_memory={0: "1GB"},
        offload_folder="/somewhere",
    )
    stored = config.to_dict()
    assert not set(stored) & set(RUNTIME_FIELDS)
    assert stored["quant_method"] == "gptvq"
    assert json.loads(json.dumps(stored)) == stored
    assert dict(config) == stored
    assert "/somewhere" not in repr(config)


@given(
    bits=st.floats(1, 8),
    seed=st.integers(0, 2**63 - 1),
    scale=st.sampled_from([None, 0, 8, 64]),
    names=st.none() | st.lists(st.sampled_from(["q_proj", "re:.*v_proj"]), max_size=2),
)
def test_round_trip(bits, seed, scale, names):
    config = GPTVQConfig(
        bits,
        seed=seed,
        scale_block=scale,
        modules_to_not_convert=names,
        overrides={"re:.*down_proj": {"vector_dim": 2, "bits": 3.0}, "up_proj": False},
    )
    assert GPTVQConfig.from_dict(json.loads(config.to_json_string())) == config


def test_recorded_fields_and_unknown_keys_survive():
    stored = GPTVQConfig(2.5).to_dict()
    stored.update(
        layers=LAYERS, format_version="1.7", base_model="org/name", permutation={"new": [1]}
    )
    config = GPTVQConfig.from_dict(copy.deepcopy(stored))
    assert config.is_quantized
    assert config.layers == LAYERS
    again = copy.deepcopy(config).to_dict()
    assert again["permutation"] == {"new": [1]}
    assert again["base_model"] == "org/name"
    assert again["format_version"] == FORMATS["gptvq"].version  # what this writer will write


def test_unknown_keys_of_a_request_are_typing_errors():
    with pytest.raises(ValueError, match="did you mean 'bits'"):
        GPTVQConfig.from_dict({"quant_method": "gptvq", "bit": 3})


@pytest.mark.parametrize("version", ["2.0", "99.1", "two", 1])
def test_unknown_format_version_is_refused(version):
    stored = {**GPTVQConfig().to_dict(), "layers": LAYERS, "format_version": version}
    with pytest.raises(ValueError, match=r"format.version"):
        GPTVQConfig.from_dict(stored)


def test_other_method_is_refused():
    with pytest.raises(ValueError, match="gptvq"):
        GPTVQConfig.from_dict({"quant_method": "vptq"})


def test_overrides_apply_in_order():
    config = GPTVQConfig(
        2.25,
        overrides={
            "mlp": {"bits": 3, "damping": 0.05},
            "re:.*down_proj": {"bits": 4},
            "layers.0": False,
            "layers.0.mlp.down_proj": {"vector_dim": 2},
        },
    )
    assert config.for_layer("model.layers.1.self_attn.q_proj") is config
    up = config.for_layer("model.layers.1.mlp.up_proj")
    assert (up.bits, up.damping) == (3, 0.05)
    down = config.for_layer("model.layers.1.mlp.down_proj")
    assert (down.bits, down.damping) == (4, 0.05)
    assert config.for_layer("model.layers.0.mlp.up_proj") is None
    # a later pattern brings it back, with what it says alone
    assert config.for_layer("model.layers.0.mlp.down_proj").vector_dim == 2
    assert config.bits == 2.25


def test_override_that_contradicts_the_config_names_the_layer():
    config = GPTVQConfig(2.25, index_bits=6, overrides={"down_proj": {"vector_dim": 2}})
    with pytest.raises(ValueError, match=r"overrides for a\.down_proj: vector_dim=2"):
        config.for_layer("a.down_proj")


def test_loading_attributes():
    assert GPTVQConfig(dequantize=True).get_loading_attributes() == {
        "dequantize": True,
        "backend": None,
        "asked_to_quantize": False,
    }
    assert GPTVQConfig().get_loading_attributes()["asked_to_quantize"]
    assert not GPTVQConfig(backend="torch").get_loading_attributes()["asked_to_quantize"]
