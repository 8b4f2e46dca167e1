"""What `make_trainable` trains and `store_trained` stores; tuning end to end."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import hf_vq
from hf_vq.loading import packed_layers
from hf_vq.tuning.codebooks import make_trainable, norms, store_trained
from hf_vq.tuning.teacher import LiveTeacher, StoredTeacher, open_teacher
from tests.models import load, tiny, tokens
from tests.tuning.packing import METHODS, TOKENS, logits, packed, train

pytestmark = pytest.mark.filterwarnings("ignore")


def layouts(model: nn.Module) -> dict[str, torch.dtype]:
    return {
        f"{name}.{key}": tensor.dtype
        for name, layer in packed_layers(model).items()
        for key, tensor in layer.packed().items()
    }


def codes(model: nn.Module) -> dict[str, torch.Tensor]:
    names = ("indices", "words", "depths", "perm")
    return {
        f"{name}.{key}": tensor.clone()
        for name, layer in packed_layers(model).items()
        for key, tensor in layer.packed().items()
        if key in names
    }


def louder(model: nn.Module) -> nn.Module:
    """A teacher whose norms are larger than the student's: something that can be put right."""
    with torch.no_grad():
        for parameter in norms(model).values():
            parameter.mul_(1.5)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_untrained_it_stores_what_was_there(method: str) -> None:
    model = packed(method)
    before, wanted = logits(model), layouts(model)
    names = make_trainable(model)
    assert model.hf_quantizer.is_qat_trainable
    assert torch.equal(logits(model), before)
    assert any("norm" in name for name in names)
    assert not any("embed" in name or "lm_head" in name for name in names)
    assert make_trainable(model) == names  # again: nothing new
    store_trained(model)
    assert not model.hf_quantizer.is_qat_trainable
    assert torch.equal(logits(model), before)
    assert layouts(model) == wanted
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_trained_codebooks_save_in_the_same_format(method: str, tmp_path: Path) -> None:
    model = packed(method)
    before, kept = layouts(model), codes(model)
    make_trainable(model)
    losses = train(model, 5, 0.005)
    assert losses[-1] < losses[0]
    trained = logits(model)
    model.save_pretrained(tmp_path / "unrounded")  # as a checkpoint of Trainer's
    assert torch.equal(logits(load(tmp_path / "unrounded", dtype=torch.float32)), trained)
    store_trained(model)
    assert layouts(model) == before
    after = codes(model)
    assert all(torch.equal(kept[key], after[key]) for key in kept)
    # what is stored is near to what was trained: much nearer than where it began
    moved = (trained - logits(packed(method))).norm()
    assert (logits(model) - trained).norm() < 0.5 * moved
    model.save_pretrained(tmp_path / "stored")
    again = load(tmp_path / "stored", dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))


def test_dense_models_are_refused() -> None:
    with pytest.raises(ValueError, match="no packed layers"):
        make_trainable(tiny("llama"))


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = TOKENS[index % len(TOKENS)]
        return {"input_ids": row, "labels": row}


def trainer(model: nn.Module, folder: Path, **options: object) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        max_steps=6,
        logging_steps=1,
        learning_rate=5e-3,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,  # type: ignore[arg-type]
    )
    return Trainer(model=model, args=arguments, train_dataset=Rows())


def test_trainer_trains_codebooks(tmp_path: Path) -> None:
    model = packed("vptq")
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(model, tmp_path)
    make_trainable(model)
    run = trainer(model, tmp_path)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_trainer_trains_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(packed("gptvq"), config)
    run = trainer(model, tmp_path, gradient_checkpointing=True, gradient_accumulation_steps=2)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_tuning_lowers_the_divergence_of_what_is_stored(
    method: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    teacher, model = louder(packed(method)), packed(method, dtype)
    before, kept = layouts(model), codes(model)
    untouched = model.model.embed_tokens.weight.clone()
    data = tokens(24, 32)
    found = hf_vq.tune(
        model, teacher, data, steps=20, tokens_per_step=256, learning_rate=0.02, nsamples=24
    )
    assert found.kl < 0.9 * found.kl_before
    assert layouts(model) == before
    assert all(torch.equal(kept[key], value) for key, value in codes(model).items())
    assert torch.equal(model.model.embed_tokens.weight, untouched)
    assert {p.dtype for p in (model.model.norm.weight, model.lm_head.weight)} == {dtype}
    # what it says is true of what is saved
    model.save_pretrained(tmp_path)
    again = load(tmp_path, dtype=torch.float32)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()
    judges = LiveTeacher(teacher, data)
    with torch.no_grad():
        log_q = again(input_ids=data[order[:2]]).logits.float().log_softmax(-1)
        kl = float(judges.divergence(order[:2], log_q))
    assert kl == pytest.approx(found.kl, rel=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_tuning_changes_codes_where_asked(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher, model = louder(packed(method)), packed(method, torch.bfloat16)
    before, kept, data = layouts(model), codes(model), tokens(24, 32)
    options = {"steps": 24, "tokens_per_step": 256, "nsamples": 24, "learning_rate": 0.02}
    found = hf_vq.tune(model, teacher, data, reassign=0.01, **options)
    assert found.kl < 0.95 * found.kl_before
    assert layouts(model) == before
    after = codes(model)
    fixed = ("depths", "perm")
    assert all(torch.equal(kept[key], after[key]) for key in kept if key.endswith(fixed))
    changed = sum(int((kept[key] != after[key]).sum()) for key in kept)
    assert 0 < changed <= found.reassigned
    assert {type(layer).__name__ for layer in packed_layers(model).values()} == {"PackedLinear"}
    model.save_pretrained(tmp_path)
    again = load(tmp_path, dtype=torch.float32)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        log_q = again(input_ids=data[order[:2]]).logits.float().log_softmax(-1)
        kl = float(LiveTeacher(teacher, data).divergence(order[:2], log_q))
    assert kl == pytest.approx(found.kl, rel=0.02)


def test_the_seed_decides_which_codes_change() -> None:
    torch.manual_seed(0)
    teacher, found = louder(packed("gptvq")), []
    for _ in range(2):
        model = packed("gptvq")
        options = {"steps": 8, "tokens_per_step": 128, "nsamples": 8, "learning_rate": 0.02}
        tuned = hf_vq.tune(model, teacher, tokens(8, 32), reassign=0.01, **options)
        found.append((tuned, codes(model)))
    assert found[0][0] == found[1][0]
    assert found[0][0].reassigned > 0
    assert all(torch.equal(found[0][1][key], value) for key, value in found[1][1].items())


def test_tuning_that_gains_nothing_changes_nothing() -> None:
    model = packed("gptvq")
    before = logits(model)
    found = hf_vq.tune(model, packed("gptvq"), tokens(4, 16), steps=2, nsamples=4)
    assert found.kl <= found.kl_before < 1e-6
    assert torch.allclose(logits(model), before, atol=1e-6)


def test_stored_answers_of_the_teacher(tmp_path: Path) -> None:
    teacher, student, data = tiny("llama", torch.float32), packed("gptvq"), tokens(3, 16)
    file = str(tmp_path / "answers.safetensors")
    stored = open_teacher(teacher, student, data, file)
    assert isinstance(stored, StoredTeacher)
    again = open_teacher(None, student, data, file)  # needs no teacher any more
    with torch.no_grad():
        log_q = student(input_ids=data).logits.log_softmax(-1)
        whole = float(LiveTeacher(teacher, data).divergence([0, 1, 2], log_q))
        coarse = float(again.divergence([0, 1, 2], log_q))
    assert 0 < coarse <= whole * 1.001
    with pytest.raises(ValueError, match="other windows"):
        open_teacher(teacher, student, tokens(3, 16, seed=9), file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": None}, "dataset is missing"),
        ({"dataset": tokens(1, 16)}, "two windows"),
        ({"dataset": tokens(4, 16), "steps": 0}, "steps=0"),
        ({"dataset": tokens(4, 16), "reassign": 1.5}, "reassign=1.5"),
        ({"dataset": tokens(4, 16), "teacher": None}, "does not name its original"),
    ],
)
def test_refusals(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message), warnings.catch_warnings():
        hf_vq.tune(packed("gptvq"), **arguments)


@pytest.mark.parametrize("method", METHODS)
def test_tuning_block_by_block(method: str) -> None:
    teacher, model = louder(packed(method)), packed(method)
    teacher.model.norm.weight = model.model.norm.weight  # is in no block
    before, kept = layouts(model), codes(model)
    distance = (logits(model) - logits(teacher)).norm()
    ratios = hf_vq.tune_blocks(model, teacher, tokens(16, 32), steps=12, learning_rate=0.02)
    assert list(ratios) == ["model.layers.0", "model.layers.1"]
    assert max(ratios.values()) < 0.9
    assert (logits(model) - logits(teacher)).norm() < 0.95 * distance
    assert layouts(model) == before
    assert all(torch.equal(kept[key], value) for key, value in codes(model).items())


def test_blocks_of_another_model_are_refused() -> None:
    other = tiny("llama", torch.float32)
    del other.model.layers[1:]
    with pytest.raises(ValueError, match="1 blocks"):
        hf_vq.tune_blocks(packed("gptvq"), other, tokens(4, 16))
