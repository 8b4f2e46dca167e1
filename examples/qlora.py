"""LoRA over a packed model: quantize to 2 bits, train on another domain, save, reload, merge.

Trains on one half of CPython's reference text and evaluates on the other. A few minutes on one CPU
core. Needs peft:  pip install peft

    python examples/qlora.py [--steps 150] [--out qlora-output]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.utils import logging

import hf_vq
from hf_vq.evaluation import perplexity, windows

MODEL = Path(__file__).resolve().parent / "docs-llama-4m"
SEQLEN = 256


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path("qlora-output"))
    parser.add_argument("--windows", type=int, default=64, help="to quantize and to evaluate with")
    parser.add_argument("--model", type=Path, default=MODEL)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # the model is so small that threads would mostly wait

    tokenizer = AutoTokenizer.from_pretrained(arguments.model, model_max_length=10**9)
    names = sorted(topics)
    texts = ["\n\n".join(topics[name] for name in names[part::2]) for part in (0, 1)]
    train, test = (windows(torch.tensor(tokenizer(t)["input_ids"]), SEQLEN) for t in texts)
    test = test[: arguments.windows]

    config = hf_vq.VPTQConfig(bits=2, dataset=train, nsamples=arguments.windows, seqlen=SEQLEN)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, quantization_config=config, dtype=torch.float32
    )
    model.save_pretrained(arguments.out / "packed")
    model = AutoModelForCausalLM.from_pretrained(arguments.out / "packed", dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    print(f"original: perplexity {perplexity(dense, test, SEQLEN):.2f}")
    print(f"2 bits: perplexity {perplexity(model, test, SEQLEN):.2f}")

    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    hf_vq.init_adapter_from_quantization_error(model, train[:32], base_model=arguments.model)
    print(f"corrected by the adapter: perplexity {perplexity(model, test, SEQLEN):.2f}")

    options = TrainingArguments(
        str(arguments.out / "trainer"),
        max_steps=arguments.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        logging_steps=50,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in train]
    Trainer(model=model, args=options, train_dataset=rows).train()
    print(f"trained: perplexity {perplexity(model, test, SEQLEN):.2f}")
    model.save_pretrained(arguments.out / "adapter")  # the adapter alone

    base = AutoModelForCausalLM.from_pretrained(arguments.out / "packed", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, arguments.out / "adapter")
    print(f"reloaded: perplexity {perplexity(model, test, SEQLEN):.2f}")

    model = hf_vq.merge_and_requantize(model, train, nsamples=arguments.windows, seqlen=SEQLEN)
    print(f"merged, at 2 bits again: perplexity {perplexity(model, test, SEQLEN):.2f}")
    model.save_pretrained(arguments.out / "merged")  # no adapter, no original needed any more


if __name__ == "__main__":
    main()
