"""The only file that writes into other libraries' tables; nothing but `hf_vq` imports it."""

from __future__ import annotations

import functools
import inspect
import os
from typing import Any

import torch
import transformers.quantizers.auto as auto
from transformers.utils import logging

from hf_vq import formats
from hf_vq.layers.packed import Packed, PackedTable
from hf_vq.quantizer import VQHfQuantizer
from hf_vq.registry import METHODS
from hf_vq.tuning.hook import wrap_peft

logger = logging.get_logger(__name__)


def register() -> None:
    """Make Transformers know the methods of `hf_vq.registry`. Calling it again changes nothing.

    A method that something else has registered is taken over, Transformers' own "vptq" among them,
    which loads no real model. HF_VQ_OVERRIDE_VPTQ=0 (and so on) leaves it alone.
    """
    for name, method in METHODS.items():
        config = method.config
        present = auto.AUTO_QUANTIZATION_CONFIG_MAPPING.get(name)
        if present is not None and not present.__module__.startswith("hf_vq."):
            if os.environ.get(f"HF_VQ_OVERRIDE_{name.upper()}") == "0":
                continue
            # of Transformers' own it is known what is lost
            expected = present.__module__.startswith("transformers.")
            say = logger.info if expected else logger.warning
            say("hf_vq replaces %s as the quantization method %r", present, name)
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[name] = config
        auto.AUTO_QUANTIZER_MAPPING[name] = VQHfQuantizer
        # a closed tuple that is read when a packed model is loaded with a config of its own
        others = tuple(
            c
            for c in auto.LOADING_ATTRIBUTES_CONFIG_TYPES
            if (c.__module__, c.__qualname__) != (config.__module__, config.__qualname__)
        )
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*others, config)  # type: ignore[assignment]
    _wrap_save_pretrained()
    _wrap_push_to_hub()
    _wrap_config_from_dict()
    _wrap_dtype()
    wrap_peft()


def _wrap_dtype() -> None:
    """Let a model whose embedding is packed have the dtype it computes in.

    Transformers takes the first floating parameter's, which would be that of a scale; every model
    without packed layers has the one it had.
    """
    from transformers.modeling_utils import ModuleUtilsMixin

    original: Any = ModuleUtilsMixin.dtype
    if getattr(original.fget, "_hf_vq_wrapped", False):
        return

    def dtype(self: Any) -> torch.dtype:
        for module in self.modules():
            if not isinstance(module, (Packed, PackedTable)):
                for parameter in module._parameters.values():
                    if parameter is not None and parameter.is_floating_point():
                        return parameter.dtype
        return original.fget(self)

    dtype._hf_vq_wrapped = True  # type: ignore[attr-defined]
    ModuleUtilsMixin.dtype = property(dtype, doc=original.__doc__)  # type: ignore[assignment,method-assign]


def _wrap_config_from_dict() -> None:
    """Keep Transformers from taking a packed model for a dense one, to be filled at random.

    Read are configs that say in an older format's words that their model is packed, where
    Transformers looks for `quantization_config` alone. And `quantization_config=None`, given
    explicitly, means none of the caller's own: the Auto classes hand it to `from_dict`, which would
    write it over the model's. Any other config is handed on as it is.
    """
    from transformers import PreTrainedConfig

    original = PreTrainedConfig.from_dict.__func__  # type: ignore[attr-defined]
    if getattr(original, "_hf_vq_wrapped", False):
        return

    @functools.wraps(original)
    def from_dict(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        today = formats.adopt(config_dict)
        if kwargs.get("quantization_config", cls) is None and formats.packed_settings(today):
            del kwargs["quantization_config"]
        return original(cls, today, **kwargs)

    from_dict._hf_vq_wrapped = True  # type: ignore[attr-defined]
    PreTrainedConfig.from_dict = classmethod(from_dict)  # type: ignore[method-assign,assignment]


def _wrap_save_pretrained() -> None:
    """Let packed models be saved by `hf_vq.saving`; every other model as before.

    The class is wrapped, not the instances, because those are deep-copied.
    """
    from transformers import PreTrainedModel

    original = PreTrainedModel.save_pretrained
    if getattr(original, "_hf_vq_wrapped", False):
        return

    names = list(inspect.signature(original).parameters)[2:]  # after self and save_directory

    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        from hf_vq.saving import save_atomically

        options = {**dict(zip(names, args, strict=False)), **kwargs}
        if not _saves_here(self, save_directory, options):
            return original(self, save_directory, *args, **kwargs)
        return save_atomically(original, self, save_directory, **options)

    save_pretrained._hf_vq_wrapped = True  # type: ignore[attr-defined]
    PreTrainedModel.save_pretrained = save_pretrained  # type: ignore[method-assign]


def _wrap_push_to_hub() -> None:
    """Let packed models be published by `hf_vq.hub.push`; every other model as before.

    Transformers writes a card of its own over whatever `save_pretrained` has written.
    """
    from transformers import PreTrainedModel

    original = PreTrainedModel.push_to_hub
    if getattr(original, "_hf_vq_wrapped", False):
        return

    @functools.wraps(original)
    def push_to_hub(self: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        if args or not _saves_here(self, "", kwargs):
            return original(self, repo_id, *args, **kwargs)
        from hf_vq.hub.push import push_model

        tags = [*(self.model_tags or ()), *(kwargs.pop("tags", None) or ())]
        return push_model(self, repo_id, tags=tags, **kwargs)

    push_to_hub._hf_vq_wrapped = True  # type: ignore[attr-defined]
    PreTrainedModel.push_to_hub = push_to_hub  # type: ignore[method-assign,assignment]


def _saves_here(model: Any, save_directory: Any, kwargs: dict[str, Any]) -> bool:
    """Whether this call writes a whole packed model from this process alone."""
    return (
        isinstance(getattr(model, "hf_quantizer", None), VQHfQuantizer)
        and not getattr(model, "_hf_peft_config_loaded", False)
        and kwargs.get("is_main_process", True)
        and not kwargs.get("distributed_checkpoint", False)
        and not os.path.isfile(save_directory)
    )
