"""`tune` on adapters over packed layers; on codebooks it is in test_codebooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="needs peft")

from peft import LoraConfig, PeftModel, get_peft_model

import hf_vq
from hf_vq.loading import packed_layers
from hf_vq.tuning.teacher import LiveTeacher
from tests.models import tokens
from tests.tuning.packing import METHODS, decoded, logits, packed

pytestmark = pytest.mark.filterwarnings("ignore")

# The windows that decide are among those that are trained on: random tokens teach nothing else.
DATA = tokens(4, 32).repeat(6, 1)
OPTIONS = {"steps": 20, "tokens_per_step": 256, "nsamples": 24, "learning_rate": 0.01}


def student(method: str = "gptvq", dtype: torch.dtype = torch.float32) -> Any:
    """With a head that is not as good as indifferent to what the blocks say."""
    model = packed(method, dtype)
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    return model


def louder() -> Any:
    """A dense teacher, the blocks of which say more than any packed model's."""
    teacher = decoded(student())
    with torch.no_grad():
        for block in teacher.model.layers:
            block.self_attn.o_proj.weight.mul_(3)
            block.mlp.down_proj.weight.mul_(3)
    return teacher


def with_lora(method: str = "gptvq", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    settings = {"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    return get_peft_model(student(method, dtype), LoraConfig(**settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_is_tuned_and_nothing_else(
    method: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    teacher, model = louder(), with_lora(method, dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    found = hf_vq.tune(model, teacher, DATA, **OPTIONS)
    assert found.kl < 0.8 * found.kl_before
    assert found.trained == sum(before[name].numel() for name in trained)
    after = dict(model.named_parameters())
    assert {name for name, p in after.items() if p.requires_grad} == trained
    assert {n: p.dtype for n, p in after.items()} == {n: p.dtype for n, p in before.items()}
    assert {name for name, p in after.items() if not torch.equal(p, before[name])} == trained
    # what it says is true of what is saved
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(student(method, dtype), tmp_path)
    assert torch.equal(logits(again), logits(model))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()[:2]
    with torch.no_grad():
        log_q = again(input_ids=DATA[order]).logits.float().log_softmax(-1)
    kl = float(LiveTeacher(teacher, DATA).divergence(order, log_q))
    assert kl == pytest.approx(found.kl, rel=0.1 if dtype == torch.bfloat16 else 1e-4)


def test_answers_on_disk_serve_adapters_too(tmp_path: Path) -> None:
    file = str(tmp_path / "answers.safetensors")
    found = [
        hf_vq.tune(with_lora(), teacher, DATA, teacher_logits=file, **OPTIONS)
        for teacher in (louder(), None)  # the second time nobody needs the teacher
    ]
    assert found[0] == found[1]
    assert found[0].kl < 0.8 * found[0].kl_before


def test_codebooks_can_be_tuned_under_an_adapter_that_was_unloaded() -> None:
    model = with_lora()
    with pytest.raises(ValueError, match="has an adapter"):
        hf_vq.tune(model, louder(), DATA, reassign=0.01)
    codes = {name: layer.qweight.clone() for name, layer in packed_layers(model.unload()).items()}
    base = model.base_model.model
    found = hf_vq.tune(base, louder(), DATA, **OPTIONS)
    assert found.kl < found.kl_before
    after = packed_layers(base)
    assert all(torch.equal(codes[name], layer.qweight) for name, layer in after.items())


def test_adapters_that_cannot_be_tuned() -> None:
    model = with_lora()
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        hf_vq.tune(model, louder(), DATA)
    model = with_lora()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="is_trainable"):
        hf_vq.tune(model, louder(), DATA)
    with pytest.raises(ValueError, match="no packed layer"):
        hf_vq.tune(with_lora(target_modules=["lm_head"]), louder(), DATA)
