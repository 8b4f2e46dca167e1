"""Tiny packed models of every method, their dense twins, and adapters to train over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_vq.configs import CVXQConfig, VPTQConfig
from hf_vq.formats import FORMATS
from hf_vq.formats.cvxq import CVXQSpec
from hf_vq.formats.vptq import VPTQSpec
from hf_vq.layers import PackedLinear
from hf_vq.loading import packed_layers
from hf_vq.quantizer import VQHfQuantizer, record
from tests.helpers_cvxq import random_cvxq, with_depths
from tests.helpers_vptq import random_vptq
from tests.models import packed as packed_gptvq
from tests.models import tiny, tokens

METHODS = ("cvxq", "gptvq", "vptq")
TOKENS = tokens(4, 24, seed=3)


def _vptq(rows: int, columns: int) -> tuple[VPTQSpec, Any]:
    spec = VPTQSpec(rows, columns, 4, 16, 4, norm="columns", permuted=True)
    codes = random_vptq(spec)
    codes.centroids, codes.res_centroids = codes.centroids / 32, codes.res_centroids / 64
    codes.scale, codes.bias = torch.ones_like(codes.scale), codes.bias / 256
    return spec, codes


def _cvxq(rows: int, columns: int) -> tuple[CVXQSpec, Any]:
    spec = with_depths(rows, columns, 7, location="int8")
    codes = random_cvxq(spec)
    codes.scale_grid = codes.scale_grid - torch.tensor([[5.0], [0.0]])
    return spec, codes


def packed(method: str, dtype: torch.dtype = torch.float32) -> Any:
    """The tiny llama with random codes, as `from_pretrained(dtype=...)` would return it."""
    if method == "gptvq":
        model = packed_gptvq("llama")
    else:
        model = tiny("llama")
        config = {"vptq": VPTQConfig, "cvxq": CVXQConfig}[method]()
        quantizer = VQHfQuantizer(config, pre_quantized=False)
        for name, linear in list(model.named_modules()):
            if isinstance(linear, nn.Linear) and "layers" in name:
                make = {"vptq": _vptq, "cvxq": _cvxq}[method]
                spec, codes = make(linear.out_features, linear.in_features)
                tensors = FORMATS[method].pack(codes, spec)
                model.set_submodule(
                    name, PackedLinear.from_packed(spec, tensors, None, model.dtype)
                )
        record(config, model, None, [])
        quantizer.pre_quantized = True
        model.hf_quantizer = quantizer
        model.is_quantized = True
        model.quantization_method = method
        model.config.quantization_config = config
    model.hqq_quantized = True  # as the quantizer does it
    tables = {name: buffer.clone() for name, buffer in model.named_buffers()}
    nn.Module.to(model, dtype)
    for name, buffer in tables.items():  # rotary ones, which loading computes in float32
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer)
    model.config.dtype = dtype
    return model


def decoded(model: Any) -> Any:
    """The packed layers of `model` replaced by dense ones of the same weights, in place."""
    for name, layer in packed_layers(model).items():
        model.set_submodule(name, layer.to_linear())
    model.hf_quantizer.forget_if_dense(model)
    return model


def adapters() -> dict[str, Any]:
    """Name -> a fresh PEFT config. 172 and 100 columns: blocks of 4."""
    from peft import IA3Config, LoraConfig, OFTConfig, VeraConfig

    common = {"task_type": "CAUSAL_LM"}
    return {
        "lora": LoraConfig(r=4, target_modules="all-linear", **common),
        "dora": LoraConfig(r=4, target_modules="all-linear", use_dora=True, **common),
        "ia3": IA3Config(
            target_modules=["q_proj", "up_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            **common,
        ),
        "vera": VeraConfig(r=16, target_modules=["q_proj", "o_proj"], **common),
        "oft": OFTConfig(oft_block_size=4, target_modules="all-linear", **common),
    }


def train(model: Any, steps: int = 4, rate: float = 0.02) -> list[float]:
    """Loss before every step, and after the last one."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    losses = []
    for step in range(steps + 1):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        losses.append(loss.item())
        if step < steps:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return losses


def logits(model: Any) -> torch.Tensor:
    """Of `TOKENS`, in evaluation mode, float32."""
    model.eval()
    with torch.no_grad():
        return model(input_ids=TOKENS).logits.float()
