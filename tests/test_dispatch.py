"""Device maps: before and after quantizing, in this process and in a fresh one."""

from __future__ import annotations

import gc
import logging
import os
import re
import subprocess
import sys

import pytest
import torch

from hf_vq.configs import GPTVQConfig
from tests.models import DISK, PROMPT, QUICK, load, logits, tiny, tokens

pytestmark = pytest.mark.smoke

FRESH = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
import hf_vq
from transformers import AutoModelForCausalLM
prompt = torch.load(sys.argv[1])
disk = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu",
        "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
for path, out in zip(sys.argv[2::2], sys.argv[3::2]):
    found = {}
    for name, kwargs in {"none": {}, "cpu": {"device_map": "cpu"}, "auto": {"device_map": "auto"},
                         "disk": {"device_map": disk, "offload_folder": out + ".offload"}}.items():
        with torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
            found[name] = model(prompt).logits
        if name == "disk":
            assert model.model.layers[1].mlp.up_proj.indices.is_meta
            model.save_pretrained(out + ".resaved")
    torch.save(found, out)
"""


def test_fresh_process_and_device_maps_give_identical_logits(quantized, tmp_path):
    models = {kind: quantized(kind) for kind in ("llama-bias", "llama-tied")}
    torch.save(PROMPT, tmp_path / "prompt")
    script = [sys.executable, "-c", FRESH, tmp_path / "prompt"]
    for kind, (_, path) in models.items():
        script += [path, tmp_path / kind]
    subprocess.run(script, check=True, capture_output=True)
    for kind, (model, _) in models.items():
        found = torch.load(tmp_path / kind)
        assert set(found) == {"none", "cpu", "auto", "disk"}
        for name, value in found.items():
            assert torch.equal(value, logits(model)), (kind, name)
        assert torch.equal(logits(load(tmp_path / f"{kind}.resaved")), logits(model))


@pytest.mark.parametrize(
    ("device_map", "max_memory"),
    [
        ("cpu", None),
        ("auto", None),
        ("sequential", None),
        (DISK, None),
        ("auto", {"cpu": "170KB"}),
        ("auto", {"cpu": "9KB"}),
    ],
    ids=["cpu", "auto", "sequential", "disk", "auto-disk", "auto-all-disk"],
)
def test_quantizing_with_a_device_map(device_map, max_memory, dense, quantized, tmp_path):
    config = GPTVQConfig(
        2.6, dataset=tokens(8), offload_folder=str(tmp_path), max_memory=max_memory, **QUICK
    )
    model = load(dense("llama"), quantization_config=config, device_map=device_map)
    reference = quantized("llama")[0]
    if device_map is DISK or max_memory:
        assert "disk" in model.hf_device_map.values()
        assert any(p.is_meta for p in model.parameters())
    assert torch.equal(logits(model), logits(reference))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(reference))


def test_offloading_twice_into_one_folder(dense, tmp_path):
    """Accelerate would read the first model's weights again."""
    for seed in (0, 1):
        config = GPTVQConfig(2.6, dataset=tokens(8), offload_folder=str(tmp_path), **QUICK)
        tiny(seed=seed).save_pretrained(tmp_path / f"dense{seed}")
        path = tmp_path / f"dense{seed}"
        model = load(path, quantization_config=config, device_map=DISK)
        config.offload_folder = None
        assert torch.equal(logits(model), logits(load(path, quantization_config=config)))


def test_overflow_to_disk_without_a_folder_is_temporary(dense, caplog):
    config = GPTVQConfig(2.6, dataset=tokens(8), max_memory={"cpu": "170KB"}, **QUICK)
    with caplog.at_level(logging.WARNING):
        model = load(dense("llama"), quantization_config=config, device_map="auto")
    folder = re.search(r"kept in (\S+)", caplog.text)[1]
    assert os.path.isdir(folder)
    del model
    gc.collect()
    assert not os.path.exists(folder)


def test_offload_without_a_folder_is_refused_before_any_work(dense):
    config = GPTVQConfig(2.6, dataset=tokens(8))
    with pytest.raises(ValueError, match="offload_folder="):
        load(dense("llama"), quantization_config=config, device_map=DISK)
