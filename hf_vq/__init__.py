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
    "make_plan",
    "plan_model",
    "register",
]

# Name -> module; imported when asked for.
_LAZY = {
    "PackedLinear": "hf_vq.layers.linear",
    "Plan": "hf_vq.plan",
    "make_plan": "hf_vq.plan",
    "plan_model": "hf_vq.hub.planning",
}

if TYPE_CHECKING:
    from hf_vq.hub.planning import plan_model
    from hf_vq.layers.linear import PackedLinear
    from hf_vq.plan import Plan, make_plan


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
