"""Registering is idempotent and cheap, and without it nothing is silently wrong for long."""

from __future__ import annotations

import copy
import importlib
import logging
import os
import subprocess
import sys

import pytest
import transformers.quantizers.auto as auto
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

import hf_vq
import hf_vq.registration
from hf_vq.configs import GPTVQConfig
from hf_vq.quantizer import VQHfQuantizer
from hf_vq.registry import METHODS


def tables():
    return (
        dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING),
        dict(auto.AUTO_QUANTIZER_MAPPING),
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES,
        PreTrainedModel.save_pretrained,
        PreTrainedConfig.from_dict.__func__,
    )


def test_registered_by_import():
    for name, method in METHODS.items():
        assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING[name] is method.config
        assert auto.AUTO_QUANTIZER_MAPPING[name] is VQHfQuantizer
        assert method.config in auto.LOADING_ATTRIBUTES_CONFIG_TYPES


def test_registering_again_changes_nothing():
    before = tables()
    hf_vq.register()
    hf_vq.register()
    assert tables() == before


def test_reloading_the_module_does_not_wrap_twice():
    before = tables()[-2:]
    importlib.reload(hf_vq.registration).register()
    assert tables()[-2:] == before
    assert auto.LOADING_ATTRIBUTES_CONFIG_TYPES.count(GPTVQConfig) == 1


def test_another_librarys_method_is_replaced_with_a_warning(monkeypatch, caplog):
    class Foreign:
        pass

    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "gptvq", Foreign)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    logger = hf_vq.registration.logger
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level(logging.WARNING, logger=logger.name):
        hf_vq.register()
    assert "Foreign" in caplog.text
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["gptvq"] is GPTVQConfig


def run(script: str, **variables: str) -> subprocess.CompletedProcess:
    env = {**os.environ, **variables}
    return subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, env=env
    )


def test_transformers_own_vptq_is_replaced_quietly():
    script = (
        "import hf_vq, transformers.quantizers.auto as auto;"
        " print(auto.AUTO_QUANTIZATION_CONFIG_MAPPING['vptq'].__module__)"
    )
    done = run(script)
    assert done.stdout.split() == ["hf_vq.config_vptq"]
    assert "replaces" not in done.stderr
    verbose = "import logging; logging.basicConfig(level=logging.INFO); " + script
    assert "hf_vq replaces" in run(verbose).stderr


def test_transformers_own_vptq_can_be_kept():
    done = run(
        "import hf_vq, transformers.quantizers.auto as auto;"
        " print(auto.AUTO_QUANTIZATION_CONFIG_MAPPING['vptq'].__module__,"
        " auto.AUTO_QUANTIZER_MAPPING['vptq'].__module__,"
        " auto.AUTO_QUANTIZATION_CONFIG_MAPPING['gptvq'].__module__)",
        HF_VQ_OVERRIDE_VPTQ="0",
    )
    vptq, quantizer, gptvq = done.stdout.split()
    assert vptq.startswith("transformers.") and quantizer.startswith("transformers.")
    assert gptvq == "hf_vq.config_gptvq"


def test_other_configs_are_read_as_before():
    """`from_dict` is wrapped for checkpoints of an old layout; the rest must not notice."""
    given = {"hidden_size": 64, "quant_config": {"a": 1}, "quantization_config": {"b": 2}}
    config = LlamaConfig.from_dict(given)
    assert type(config) is LlamaConfig and config.hidden_size == 64
    assert config.quant_config == {"a": 1} and config.quantization_config == {"b": 2}
    config, rest = LlamaConfig.from_dict(given, return_unused_kwargs=True, vocab_size=5, x=1)
    assert config.vocab_size == 5 and rest == {"x": 1}


@pytest.mark.parametrize("nested", [False, True])
def test_no_quantization_config_of_one_s_own_leaves_the_model_s(nested):
    """What the Auto classes do with `quantization_config=None`."""
    stored = {**GPTVQConfig(3.0).to_dict(), "layers": [{"modules": ["a"]}]}
    place = {"quantization_config": stored}
    given = {"text_config": place} if nested else place
    config, rest = PreTrainedConfig.from_dict(
        given, quantization_config=None, return_unused_kwargs=True
    )
    found = config.text_config if nested else config.to_dict()
    assert found["quantization_config"] == stored and not rest
    wish = {"quantization_config": GPTVQConfig(3.0).to_dict()}  # nothing of it is packed
    for other in (wish, {"quantization_config": {"quant_method": "awq", "bits": 4}}):
        config = PreTrainedConfig.from_dict(other, quantization_config=None)
        assert config.quantization_config is None


def test_config_from_dict_is_ours():
    stored = GPTVQConfig(3.0).to_dict()
    assert isinstance(auto.AutoQuantizationConfig.from_dict(copy.deepcopy(stored)), GPTVQConfig)


def test_import_is_cheap():
    """No tuner, no data library, no numba or Triton, no engine, no card templates."""
    script = (
        "import sys, hf_vq; heavy = {'peft', 'datasets', 'numba', 'triton', 'typer', 'jinja2',"
        " 'hf_vq.engine.calibration', 'hf_vq.methods.gptvq', 'accelerate', 'sklearn'};"
        " import transformers.quantizers.auto;"
        " print(sorted(heavy & set(sys.modules)))"
    )
    alone = "import sys, transformers.quantizers.auto; from transformers import PreTrainedModel;"
    alone += " print(sorted({'accelerate', 'jinja2', 'sklearn', 'triton'} & set(sys.modules)))"
    loaded, before = (
        eval(subprocess.run([sys.executable, "-c", s], check=True, capture_output=True).stdout)
        for s in (script, alone)
    )
    assert set(loaded) <= set(before)  # what Transformers loads is not ours to save


@pytest.mark.parametrize("name", hf_vq.__all__)
def test_public_names_exist(name):
    assert getattr(hf_vq, name) is not None
    assert name in dir(hf_vq)


def test_unknown_names_do_not():
    with pytest.raises(AttributeError, match="no attribute 'VPTQConfg'"):
        hf_vq.VPTQConfg  # noqa: B018
