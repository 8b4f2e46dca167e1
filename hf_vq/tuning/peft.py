"""PEFT over packed layers: merging that gives dense layers, and refusals that name a way out.

A packed layer is an `nn.Linear` without a `weight`, and PEFT's adapters train over it as they are.
What they cannot do is merge. Here a tuner's `merge` gets a float32 `nn.Linear` in the place of the
packed layer, to do with as it always does; the packed layer waits, and `unmerge` puts it back bit
for bit. Nothing is quantized again, which would cost more quality than the adapter brought
(`hf_vq.merge_and_requantize` does that, with calibration).

Two places of PEFT are wrapped, once for all of its methods: `BaseTuner.inject_adapter` and
`BaseTuner._unload_and_optionally_merge`; and `merge` and `unmerge` of those classes of adapters
that are put on packed layers. Everything else passes through.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from hf_vq.layers import PackedLinear

_PACKED = "_hf_vq_packed"
"""Attribute of an adapter's layer that holds the packed layer while a merged one is in its place;
no submodule, so that it is in no state dict."""

_WAY_OUT = (
    "use LoRA (also with use_dora or use_rslora), IA3, VeRA or OFT, or load the model with "
    "dequantize=True in its quantization_config"
)
# Methods that are put on a packed layer without complaint and fail in the first forward pass.
_READ_THE_WEIGHT = frozenset({"HIRA", "HRA", "LOKR", "PEANUT"})
# Ways to begin LoRA that take the base weight apart, or change it.
_DENSE_INITS = ("pissa", "olora", "corda", "loftq", "orthogonal", "lora_ga")


def install() -> None:
    """Wrap PEFT, which must have been imported. Calling it again changes nothing."""
    from peft.tuners.tuners_utils import BaseTuner

    _wrap(BaseTuner, "inject_adapter", _inject_adapter)
    _wrap(BaseTuner, "_unload_and_optionally_merge", _unload)


def has_adapters(model: nn.Module) -> bool:
    """Whether any layer has an adapter now: a config stays behind when PEFT 0.18 unloads one."""
    if "peft" not in sys.modules:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, Any, PackedLinear]]:
    """(name, adapter's layer, packed layer under it), for unmerged adapters on packed layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            base = getattr(module, "base_layer", None)
            if isinstance(base, PackedLinear):
                yield name, module, base


def merged_layers(model: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    """(name, packed layer that a merged one has taken the place of)."""
    for name, module in model.named_modules():
        if _PACKED in module.__dict__:
            yield name, module.__dict__[_PACKED]


def _wrap(owner: type, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace `owner.name` by `wrapper(original, self, ...)`, once."""
    original = getattr(owner, name)
    if getattr(original, "_hf_vq_wrapped", False):
        return

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    wrapped._hf_vq_wrapped = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


# -- injection -------------------------------------------------------------------------


def _inject_adapter(
    original: Callable[..., Any],
    tuner: Any,
    model: nn.Module,
    adapter_name: str,
    *args: Any,
    **kw: Any,
) -> Any:
    packed = [name for name, m in model.named_modules() if isinstance(m, PackedLinear)]
    if not packed:
        return original(tuner, model, adapter_name, *args, **kw)
    config = tuner.peft_config[adapter_name]
    _refuse_what_needs_the_weight(tuner, config, packed)
    try:
        result = original(tuner, model, adapter_name, *args, **kw)
    except (AttributeError, TypeError) as error:
        if "NoneType" not in str(error):
            raise
        raise ValueError(
            f"PEFT's {_method(config)} reads or changes the weight of a layer, and a packed layer "
            f"({packed[0]}) has none: {_WAY_OUT}"
        ) from error
    _keep_from_ddp(model)
    for cls in {type(module) for _, module, _ in adapter_layers(model)}:
        for name, wrapper in (("merge", _merge), ("unmerge", _unmerge)):
            owner = next(c for c in cls.__mro__ if name in c.__dict__)
            _wrap(owner, name, wrapper)
    return result


def _keep_from_ddp(model: nn.Module) -> None:
    """Spare DistributedDataParallel what neither gloo nor NCCL can send: 16-bit integers.

    It broadcasts everything once, although every process has loaded the same file. Its list holds
    names in the module that it wraps: `model`, or the PeftModel around it.
    """
    names = [name for name, p in model.named_parameters() if p.dtype == torch.int16]
    kept = [prefix + name for prefix in ("", "base_model.model.") for name in names]
    model._ddp_params_and_buffers_to_ignore = kept  # type: ignore[assignment]


def _method(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _refuse_what_needs_the_weight(tuner: Any, config: Any, packed: list[str]) -> None:
    """Raise ValueError before anything is changed."""
    init = getattr(config, "init_lora_weights", None)
    dense_init = isinstance(init, str) and init.startswith(_DENSE_INITS)
    if _method(config) not in _READ_THE_WEIGHT and not dense_init:
        return
    wanted = getattr(config, "target_modules", None)
    every = wanted is None or wanted == "all-linear"
    name = next((n for n in packed if every or tuner._check_target_module_exists(config, n)), None)
    if name is None:
        return
    if dense_init:
        raise ValueError(
            f"init_lora_weights={init!r} takes a dense weight apart, and {name} is packed: leave "
            "it out, and call hf_vq.init_adapter_from_quantization_error(model, ...) to begin with "
            'what quantization lost; "gaussian" and "eva" work as well'
        )
    raise ValueError(
        f"PEFT's {_method(config)} reads the weight of a layer, and {name}, being packed, has "
        f"none: {_WAY_OUT}"
    )


# -- merging ---------------------------------------------------------------------------


def _merge(original: Callable[..., Any], layer: Any, *args: Any, **kwargs: Any) -> Any:
    packed = layer.base_layer
    if not isinstance(packed, PackedLinear):
        return original(layer, *args, **kwargs)
    dense = packed.to_linear(torch.float32).requires_grad_(False)
    layer.base_layer = dense
    try:
        result = original(layer, *args, **kwargs)
    finally:
        merged = bool(layer.merged_adapters)
        if not merged:  # nothing was active, or the adapter was refused
            layer.base_layer = packed
    if merged:
        # rounded once, after the sum
        dense.to(packed.compute_dtype)
        if hasattr(packed, "_hf_hook"):  # it moves inputs to the layer's device
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(dense, packed._hf_hook)
        object.__setattr__(layer, _PACKED, packed)
    return result


def _unmerge(original: Callable[..., Any], layer: Any) -> Any:
    packed = layer.__dict__.get(_PACKED)
    if packed is None:
        return original(layer)
    with warnings.catch_warnings():
        # of results that are not exact; this one will not be used
        warnings.simplefilter("ignore")
        result = original(layer)
    if not layer.merged_adapters:
        device = layer.base_layer.weight.device
        object.__delattr__(layer, _PACKED)
        layer.base_layer = packed.to(device).train(layer.training)
    return result


def _unload(original: Callable[..., Any], tuner: Any, *args: Any, **kwargs: Any) -> Any:
    """A model without packed layers is a dense one, for whoever looks at it or saves it."""
    model = original(tuner, *args, **kwargs)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if hasattr(quantizer, "forget_if_dense"):
        quantizer.forget_if_dense(model)
    return model
