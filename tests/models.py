"""Tiny models with odd shapes, and packed ones that no engine had to run for."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hf_vq.configs import GPTVQConfig
from hf_vq.formats import FORMATS
from hf_vq.layers.linear import PackedLinear
from hf_vq.plan import make_plan
from hf_vq.quantizer import VQHfQuantizer, record
from tests.helpers import random_gptvq

VOCAB = 300


def _llama(**changes: Any) -> LlamaConfig:
    # 172 and 100 are multiples of 4 but of no usual group size
    fields = {
        "hidden_size": 172,
        "intermediate_size": 100,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 22,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**{**fields, **changes})


def _build(kind: str) -> PreTrainedModel:
    if kind == "llama":
        return LlamaForCausalLM(_llama())
    if kind == "llama-tied":
        return LlamaForCausalLM(_llama(tie_word_embeddings=True))
    if kind == "llama-bias":
        return LlamaForCausalLM(_llama(attention_bias=True, mlp_bias=True))
    if kind == "qwen2":
        return Qwen2ForCausalLM(
            Qwen2Config(
                hidden_size=56,
                intermediate_size=75,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=1,
                vocab_size=VOCAB,
                max_position_embeddings=128,
                tie_word_embeddings=True,
            )
        )
    if kind == "opt":
        return OPTForCausalLM(
            OPTConfig(
                hidden_size=60,
                ffn_dim=90,
                num_hidden_layers=2,
                num_attention_heads=4,
                vocab_size=VOCAB,
                max_position_embeddings=128,
                word_embed_proj_dim=36,
            )
        )
    if kind == "mixtral":
        return MixtralForCausalLM(
            MixtralConfig(
                hidden_size=64,
                intermediate_size=56,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=VOCAB,
                max_position_embeddings=128,
                num_local_experts=4,
            )
        )
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                n_embd=64,
                n_layer=2,
                n_head=4,
                vocab_size=VOCAB,
                n_positions=128,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    raise KeyError(kind)


def tiny(kind: str = "llama", dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Any:
    """A randomly initialised model; biases too, or a lost one would not show."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _build(kind)
        with torch.no_grad():
            for name, param in model.named_parameters():
                if name.endswith(".bias"):
                    param.normal_(std=0.02)
                # not model.to(dtype), which would round the rotary tables that loading computes
                param.data = param.data.to(dtype)
    return model.eval()


def on_meta(kind: str = "llama") -> Any:
    """The same model without weights."""
    with torch.device("meta"):
        return _build(kind)


def tokens(rows: int = 6, length: int = 64, seed: int = 0) -> torch.Tensor:
    """Random token ids (rows, length)."""
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def packed(kind: str = "llama", config: GPTVQConfig | None = None, seed: int = 0) -> Any:
    """A model with random codes in place of its weights, as `from_pretrained` would return it."""
    model = tiny(kind, seed=seed)
    config = config or GPTVQConfig(2.6)
    quantizer = VQHfQuantizer(config, pre_quantized=False)
    for name, spec in make_plan(model, config).layers.items():
        dense = model.get_submodule(name)
        codes = random_gptvq(spec, seed)
        # weights of random codes are near 1, which would saturate the attention
        codes.codebook_scales = codes.codebook_scales / 32
        tensors = FORMATS[config.method].pack(codes, spec)
        bias = None if dense.bias is None else dense.bias.data
        model.set_submodule(name, PackedLinear.from_packed(spec, tensors, bias, model.dtype, name))
    record(config, model, None, [])
    quantizer.pre_quantized = True
    quantizer.report = {"bits": config.bits}
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = config.method
    model.config.quantization_config = config
    return model


PROMPT = tokens(2, 16, seed=1)
QUICK = {"kmeans_iterations": 2, "refine_iterations": 0, "codebook_update": False}
"""Fields of a config for tests that do not care how good the codes are."""
DISK = {
    "model.embed_tokens": "cpu",
    "lm_head": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
}
"""A device map of the llamas that leaves a layer on disk."""


def logits(model: Any) -> torch.Tensor:
    """Of `PROMPT`."""
    with torch.no_grad():
        return model(PROMPT).logits


def load(path: Any, cls: Any = AutoModelForCausalLM, **kwargs: Any) -> Any:
    """`from_pretrained` without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls.from_pretrained(path, **kwargs)
