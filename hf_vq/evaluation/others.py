"""Quantizers of other libraries, to be compared with: hqq, optimum-quanto, bitsandbytes.

What they make is decoded at once: the comparison is of weights, not of kernels, and some of these
libraries compute on GPUs alone, or compile something on first use.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

GROUP = 128
"""Weights that share a scale and a zero of 16 bits each, where a library lets one choose."""


class Unavailable(Exception):
    """A method that cannot run here at this size, and why."""


@dataclass(frozen=True)
class Other:
    """A library: its package, the bits that it has, and (model, linear layers, bits) -> result.

    The result is name -> (decoded weight, bytes stored for it); `model` is a folder or Hub id.
    """

    package: str
    bits: tuple[int, ...]
    quantize: Callable[[str, list[str], int], dict[str, tuple[Tensor, int]]]


def quantize_other(model: str, method: str, bits: int) -> tuple[nn.Module, float]:
    """`model` in float32 with the decoder's linear layers as `method` leaves them; its bits.

    They quantize the model in its own dtype, which their scales take too. Returns (model, all-in
    bits per weight of these layers, biases left out). Raises `Unavailable` where the library is
    missing or has no such bits, else what the library raises.
    """
    from transformers import AutoModelForCausalLM

    from hf_vq.configs import GPTVQConfig
    from hf_vq.hub.planning import plan_model

    other = OTHERS[method]
    if bits not in other.bits:
        raise Unavailable(f"{method} has no {bits} bits")
    if not installed(other.package):
        raise Unavailable(f"{other.package} is not installed")
    layers = plan_model(model, GPTVQConfig(bits=4)).layers
    found = other.quantize(model, list(layers), bits)
    dense = AutoModelForCausalLM.from_pretrained(model).float()
    for name, (weight, _) in found.items():
        linear: Any = dense.get_submodule(name)
        linear.weight = nn.Parameter(weight.float().cpu(), requires_grad=False)
    stored = sum(size for _, size in found.values())
    return dense, 8 * stored / sum(layers[name].num_weights for name in found)


def installed(package: str) -> bool:
    """Whether a package, possibly within another one ("optimum.quanto"), can be found."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _hqq(model: str, names: list[str], bits: int) -> dict[str, tuple[Tensor, int]]:
    # its own interface: Transformers 5 says of HqqConfig that it is not available yet
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(model)
    found = {}
    for name in names:
        linear: Any = dense.get_submodule(name)
        layer = HQQLinear(
            linear,
            BaseQuantizeConfig(nbits=bits, group_size=GROUP),
            del_orig=False,
            compute_dtype=linear.weight.dtype,
            device=str(linear.weight.device),
        )
        stored = (layer.W_q, layer.meta["scale"], layer.meta["zero"])
        found[name] = layer.dequantize(), sum(map(_bytes, stored))
    return found


def _quanto(model: str, names: list[str], bits: int) -> dict[str, tuple[Tensor, int]]:
    from transformers import AutoModelForCausalLM, QuantoConfig

    config = QuantoConfig(weights=f"int{bits}")  # its groups are of 128 where these fit
    quantized = AutoModelForCausalLM.from_pretrained(model, quantization_config=config)
    found = {}
    for name in names:
        weight: Any = quantized.get_submodule(name).weight
        if "TinyGemm" in type(weight).__name__:  # laid out for a kernel: back to what is saved
            weight = weight.weight_qbits_tensor()
        size, words = _bytes_within(weight), weight._data
        if bits < 8:  # unpacked here: it would compile an extension for that
            shifts = range(0, 8, bits)
            parts = [(words._data >> shift) & (2**bits - 1) for shift in shifts]
            weight._data = torch.cat(parts)[: words.shape[0]]
        found[name] = weight.dequantize(), size
    return found


def _bnb(model: str, names: list[str], bits: int) -> dict[str, tuple[Tensor, int]]:
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    quantized = AutoModelForCausalLM.from_pretrained(model, quantization_config=config)
    found = {}
    for name in names:
        layer: Any = quantized.get_submodule(name)
        tensors = layer.state_dict()
        size = sum(_bytes(value) for key, value in tensors.items() if key != "bias")
        found[name] = dequantize_4bit(layer.weight.data, layer.weight.quant_state), size
    return found


OTHERS = {
    "hqq": Other("hqq", (1, 2, 3, 4, 8), _hqq),
    "quanto": Other("optimum.quanto", (2, 4, 8), _quanto),
    "bnb": Other("bitsandbytes", (4,), _bnb),
}


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes_within(tensor: Any) -> int:
    """Bytes of a tensor, or of those that a tensor of another library is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes_within(getattr(tensor, part)) for part in tensor.__tensor_flatten__()[0])
    return _bytes(tensor)
