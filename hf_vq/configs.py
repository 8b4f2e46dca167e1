"""What a user may ask for, refused where it is written: one config class per method."""

from __future__ import annotations

from hf_vq.config_base import RECORDED_FIELDS, RUNTIME_FIELDS, VQConfig
from hf_vq.config_cvxq import CVXQConfig
from hf_vq.config_gptvq import GPTVQConfig
from hf_vq.config_vptq import VPTQConfig

__all__ = [
    "RECORDED_FIELDS",
    "RUNTIME_FIELDS",
    "CVXQConfig",
    "GPTVQConfig",
    "VPTQConfig",
    "VQConfig",
]
