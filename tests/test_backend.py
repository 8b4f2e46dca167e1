"""A config that forces a backend of the operators, and packed models in one compiled graph."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import hf_vq_kernels
import pytest
import torch
from hf_vq_kernels import dispatch
from transformers import AutoModelForCausalLM

from hf_vq import CVXQConfig, GPTVQConfig, VPTQConfig
from tests.models import packed

IDS = torch.arange(12)[None]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    packed("llama").save_pretrained(folder)
    return folder


def load(folder: Path, **fields: Any) -> Any:
    more = {"quantization_config": GPTVQConfig(**fields)} if fields else {}
    return AutoModelForCausalLM.from_pretrained(folder, **more)


def chosen(model: Any) -> set[str]:
    """Backends of all linear operators of one pass."""
    decisions = hf_vq_kernels.explain(model, IDS).decisions
    return {d.chosen for d in decisions if d.operator.endswith("_linear")}


def test_config_forces_a_backend(checkpoint: Path, tmp_path: Path) -> None:
    model = load(checkpoint, backend="torch")
    assert chosen(model) == {"torch (demanded)"}
    assert chosen(copy.deepcopy(model)) == {"torch (demanded)"}
    assert chosen(model.to(torch.bfloat16)) == {"torch (demanded)"}
    free = chosen(load(checkpoint))
    assert free and free != {"torch (demanded)"}  # it was this model's alone
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "backend" not in saved["quantization_config"]


def test_config_forces_a_backend_when_quantizing(checkpoint: Path, tmp_path: Path) -> None:
    load(checkpoint, dequantize=True).save_pretrained(tmp_path)
    config = GPTVQConfig(bits=3, dataset=None, backend="torch")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert chosen(model) == {"torch (demanded)"}


def test_environment_is_stronger(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(checkpoint, backend="triton")
    monkeypatch.setenv("HF_VQ_BACKEND", "torch")
    assert chosen(model) == {"torch (demanded)"}


def test_forced_one_that_cannot_is_one_error(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse = dispatch.Backend(
        "triton", "gptvq_linear", ("cuda",), lambda: None, lambda *_: None, lambda *_: IDS
    )
    entries = [dispatch._Entry(refuse), dispatch._Entry(dispatch._defaults["gptvq_linear"])]
    monkeypatch.setitem(dispatch._entries, "gptvq_linear", entries)
    model = load(checkpoint, backend="triton")
    with pytest.raises(RuntimeError, match=r"'triton' was demanded .*config.*not on cpu"):
        model(IDS)
    for layer in model.modules():
        if hasattr(layer, "set_backend"):
            layer.set_backend(None)
    model(IDS)


@pytest.mark.parametrize("config", [GPTVQConfig, VPTQConfig, CVXQConfig])
def test_names(config: Any) -> None:
    assert config(bits=3, backend="c").backend == "c"
    assert config(bits=3, backend="auto").backend is None
    assert "backend" not in config(bits=3, backend="c").to_dict()
    with pytest.raises(ValueError, match=r"backend: no backend is called 'fast'.*torch"):
        config(bits=3, backend="fast")


def test_demands_die_with_the_model(checkpoint: Path) -> None:
    before = len(dispatch._demanded)
    model = load(checkpoint, backend="torch")
    assert len(dispatch._demanded) > before
    del model
    assert len(dispatch._demanded) == before


@pytest.mark.parametrize("backend", [None, "torch"])
def test_one_graph(checkpoint: Path, backend: str | None) -> None:
    torch._dynamo.reset()
    model = load(checkpoint, backend=backend) if backend else load(checkpoint)
    assert model.hf_quantizer.is_compileable
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(IDS).logits
        torch.testing.assert_close(compiled(IDS).logits, expected)
        assert chosen(compiled) == chosen(model)


def test_max_autotune(checkpoint: Path) -> None:
    """Inductor's most thorough mode, which calls the operators as they are."""
    torch._dynamo.reset()
    block = load(checkpoint).model.layers[0].mlp
    compiled = torch.compile(block, fullgraph=True, mode="max-autotune-no-cudagraphs")
    x = torch.randn(2, 3, 172)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), block(x))
