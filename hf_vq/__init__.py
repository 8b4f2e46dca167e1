"""hf_vq: extreme compression of language models, as a plugin for HuggingFace Transformers.

Importing it registers its methods with Transformers, so that `from_pretrained` quantizes with
`quantization_config=hf_vq.GPTVQConfig(...)` and loads what was packed before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "CVXQConfig",
    "GPTVQConfig",
    "PackedLinear",
    "Plan",
    "VPTQConfig",
    "__version__",
    "init_adapter_from_quantization_error",
    "make_plan",
    "make_trainable",
    "merge_and_requantize",
    "plan_model",
    "register",
    "store_trained",
    "tune",
    "tune_blocks",
]

# Name -> module; imported when asked for.
_LAZY = {
    "PackedLinear": "hf_vq.layers.linear",
    "Plan": "hf_vq.plan",
    "init_adapter_from_quantization_error": "hf_vq.tuning.initialize",
    "make_plan": "hf_vq.plan",
    "make_trainable": "hf_vq.tuning.codebooks",
    "merge_and_requantize": "hf_vq.tuning.merge",
    "plan_model": "hf_vq.hub.planning",
    "store_trained": "hf_vq.tuning.codebooks",
    "tune": "hf_vq.tuning.distill",
    "tune_blocks": "hf_vq.tuning.blockwise",
}

if TYPE_CHECKING:
    from hf_vq.hub.planning import plan_model
    from hf_vq.layers.linear import PackedLinear
    from hf_vq.plan import Plan, make_plan
    from hf_vq.tuning.blockwise import tune_blocks
    from hf_vq.tuning.codebooks import make_trainable, store_trained
    from hf_vq.tuning.distill import tune
    from hf_vq.tuning.initialize import init_adapter_from_quantization_error
    from hf_vq.tuning.merge import merge_and_requantize


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


from hf_vq.configs import CVXQConfig, GPTVQConfig, VPTQConfig  # noqa: E402
from hf_vq.registration import register  # noqa: E402

register()
