"""TRL's SFTTrainer over packed models; skipped, saying so, where TRL is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="needs peft")
pytest.importorskip("trl", reason="needs trl: pip install trl")

from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from hf_vq.loading import packed_layers
from tests.tuning.packing import METHODS, TOKENS, logits, packed

TOKENIZER = Path(__file__).resolve().parents[2] / "examples" / "docs-llama-4m"

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("method", METHODS)
def test_sft_trains_an_adapter_over_packed_layers(method: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    model = packed(method)
    kept = {name: layer.qweight.clone() for name, layer in packed_layers(model).items()}
    arguments = SFTConfig(
        str(tmp_path / "trainer"),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=2e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        dataset_num_proc=None,
        dataloader_pin_memory=False,
    )
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": TOKENS.tolist()}),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 1e-3, losses
    trained = trainer.model
    layers = packed_layers(trained)
    assert len(layers) == len(kept)
    for name, layer in layers.items():
        short = name.removeprefix("base_model.model.").removesuffix(".base_layer")
        assert torch.equal(kept[short], layer.qweight), name
    trainer.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(packed(method), tmp_path / "adapter")
    assert torch.allclose(logits(again), logits(trained), atol=1e-6)
