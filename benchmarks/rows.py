"""The rows of quality.py: which settings of ours stand beside which official row.

Settings and effort are at their default unless named.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Row(NamedTuple):
    """One of our configurations. official: the row it is compared with.

    kl, cpu: at most this share of the official KL and CPU time; None: no target.
    """

    method: str
    settings: dict[str, Any]
    official: str | None = None
    kl: float | None = None
    cpu: float | None = None


WHOLE = 2**31
"""group_size of one codebook per stripe."""

QUICK = {"kmeans_iterations": 3, "refine_iterations": 0}
SHORT = {"kmeans_iterations": 10, "refine_iterations": 2}
"""Less effort than the defaults, where a fifth of the official CPU time asks for it."""

VPTQ_SHORT: dict[str, dict[str, Any]] = {
    "vptq_v2_k16": {
        "bits": None,
        "vector_dim": 2,
        "num_centroids": 16,
        "kmeans_iterations": 5,
        "refine_iterations": 2,
    },
    "vptq_v2_k64": {"kmeans_iterations": 10, "refine_iterations": 0},
    "vptq_v6_k4096": {"kmeans_iterations": 3, "refine_iterations": 0, "codebook_update": False},
}
"""The same where a third of the official CPU time asks for it; the walk alone takes 8 s of 12."""

ASYMMETRIC_GPTQ = "gptq_2b_g64_asymmetric"
"""GPTQ with our calibration instead of its own; has no official counterpart."""


def _gptvq(dim: int, index_bits: int, size: int, columns: int, **more: Any) -> dict[str, Any]:
    geometry = {"vector_dim": dim, "index_bits": index_bits, "group_size": size}
    return {"bits": None, **geometry, "group_columns": columns, **more}


_GPTVQ: dict[str, dict[str, Any]] = {
    "gptvq_2d_2b_tensor": _gptvq(2, 4, WHOLE, 1024, **SHORT),
    "gptvq_4d_2b_tensor": _gptvq(4, 8, WHOLE, 1024),
    "gptvq_2d_2b_gs2048": _gptvq(2, 4, 2048, 64, **SHORT),
    "gptvq_1d_2b_gs256": _gptvq(1, 2, 1024, 64, scale_block=32, codebook_update=False, **QUICK),
    "gptvq_2d_2b_gs1024": _gptvq(2, 4, WHOLE, 1024, scale_block=16, kmeans_iterations=10),
    "gptvq_1d_3b_gs512": _gptvq(1, 3, 4096, 64, scale_block=32, **QUICK),
    "gptvq_2d_3b_gs4096": _gptvq(2, 6, 4096, 64),
}

ABLATED = "gptvq_2d_2b_gs1024"
_TAKEN_AWAY: dict[str, dict[str, Any]] = {
    "symmetric": {"asymmetric_calibration": False},
    "one_pass_per_block": {"true_sequential": False},
    "no_refinement": {"refine_iterations": 0, "codebook_update": False},
    "none_of_the_three": {
        "asymmetric_calibration": False,
        "true_sequential": False,
        "refine_iterations": 0,
        "codebook_update": False,
    },
}

_VPTQ_BITS = {
    "vptq_v2_k16": 2.151,
    "vptq_v4_k256_nonorm": 2.204,
    "vptq_v4_k256": 2.301,
    "vptq_v8_k256_r256": 2.768,
    "vptq_v2_k64": 3.165,
    "vptq_v4_k4096": 5.635,
    "vptq_v6_k4096": 5.897,
}
"""Official row -> its all-in bits: the target that the planner is given."""

TUNING = {"finetune_steps": 96}

_ADDED: list[tuple[str, dict[str, Any]]] = [
    ("no_feedback", {"error_feedback": False}),
    ("feedback", {"error_feedback": True}),
    ("residual", {"num_res_centroids": 16, "beam": 1}),
    ("beam", {"num_res_centroids": 16, "beam": 8}),
    ("refit", {"refine_iterations": 4, "codebook_update": True, "num_res_centroids": 16}),
    ("asymmetric", {"asymmetric_calibration": True}),
    ("tuned", TUNING),
]
"""What is added, step by step, to VPTQ as the paper has it."""
_BARE_VPTQ = {
    "bits": None,
    "vector_dim": 4,
    "num_centroids": 64,
    "num_res_centroids": 0,
    "norm": "none",
    "refine_iterations": 0,
    "codebook_update": False,
    "asymmetric_calibration": False,
}

_CVXQ_BITS = {"cvxq_2b": 2.189, "cvxq_3b": 3.189, "cvxq_4b": 4.189}
_CVXQ_AS_GPTQ = {"gptq_3b_g64": 3.297, "gptq_4b_g64": 4.312}
"""Official row -> its all-in bits."""

_PAPER_CVXQ = {
    "group_rows": 256,
    "permuted": True,
    "scale_dtype": "float16",
    "location": "float16",
    "levels": "laplace",
    "sensitivity": "hidden",
    "weight_energies": True,
    "reestimations": 4,
    "distortion": "law",
    "bias_correction": True,
    "error_feedback": False,
    "refine_iterations": 0,
    "asymmetric_calibration": False,
}
"""The paper's recipe: squared gradients of the final hidden states per weight, averaged over groups
of clustered rows, on the quantized model again and again; depths by its closed form; Laplace
compander, location and scale in 16 bits; bias correction. Its levels are looked up by the nearest,
and its rate is met exactly."""
_ADDED_CVXQ: list[tuple[str, dict[str, Any]]] = [
    ("paper", {}),
    ("lloyd", {"levels": "lloyd"}),
    ("distortion", {"distortion": "measured"}),
    (
        "side_information",
        {"group_rows": None, "permuted": None, "scale_dtype": "log8", "location": "none"},
    ),
    ("one_measurement", {"reestimations": 0}),
    ("feedback", {"error_feedback": True, "reallocations": 0, "weight_energies": False}),
    ("reallocation", {"reallocations": 1}),
    ("refinement", {"refine_iterations": 4}),
    ("asymmetric", {"asymmetric_calibration": True}),
    ("no_bias_correction", {"bias_correction": False}),
    ("loss", {"sensitivity": "loss"}),
]
"""What is changed, step by step, until it is ours."""
_CVXQ_OPTIONS: dict[str, dict[str, Any]] = {
    "uniform": {"allocation": "uniform"},
    "hidden": {"sensitivity": "hidden"},
    "pca": {"sensitivity": "pca"},
    "reestimated": {"reestimations": 1},
    "bias_correction": {"bias_correction": True},
}
"""Options that are not the default, at the official row's bits."""


def _cvxq_rows() -> dict[str, Row]:
    rows = {}
    for name, bits in _CVXQ_BITS.items():
        rows[name] = Row("cvxq", {"bits": bits}, name, None if bits > 4 else 0.5, 1.0)
    for name, bits in _CVXQ_AS_GPTQ.items():
        rows[f"cvxq_as_{name}"] = Row("cvxq", {"bits": bits}, name, 1.0)
    for bits in (2, 2.5, 3, 4):
        rows[f"cvxq_{float(bits):g}b_all_in"] = Row("cvxq", {"bits": bits})
    settings = {"bits": 2.189, **_PAPER_CVXQ}
    for step, (name, change) in enumerate(_ADDED_CVXQ):
        settings = {**settings, **change}
        rows[f"cvxq_ablation_{step}_{name}"] = Row("cvxq", settings)
    for name, bits in list(_CVXQ_BITS.items())[1:]:
        rows[f"{name}_paper"] = Row("cvxq", {"bits": bits, **_PAPER_CVXQ})
    for name, change in _CVXQ_OPTIONS.items():
        rows[f"cvxq_option_{name}"] = Row("cvxq", {"bits": 2.189, **change})
    return rows


def _rows() -> dict[str, Row]:
    rows = {}
    for name, settings in _GPTVQ.items():
        kl = 0.85 if "3b" in name else 0.90
        rows[name] = Row("gptvq", settings, name, kl, 0.20)
    for name, change in _TAKEN_AWAY.items():
        rows[f"ablation_{name}"] = Row("gptvq", {**_GPTVQ[ABLATED], **change})
    for name, bits in _VPTQ_BITS.items():
        settings = {"bits": bits, **VPTQ_SHORT.get(name, {})}
        rows[name] = Row("vptq", settings, name, 0.85, 1 / 3)
        rows[f"{name}_tuned"] = Row("vptq", {"bits": bits, **TUNING}, name, 0.70)
    for bits in (2, 2.25, 3, 4):
        rows[f"vptq_{bits}b"] = Row("vptq", {"bits": bits})
    for bits in (2, 3):
        rows[f"vptq_{bits}b_tuned"] = Row("vptq", {"bits": bits, **TUNING})
    for method in ("vptq", "gptvq"):
        for bits in (2.2, 3):
            for allocation in ("uniform", "measured"):
                settings = {"bits": bits, "allocation": allocation}
                rows[f"{method}_{bits}b_{allocation}"] = Row(method, settings)
    settings = _BARE_VPTQ
    for step, (name, change) in enumerate(_ADDED):
        settings = {**settings, **change}
        rows[f"vptq_ablation_{step}_{name}"] = Row("vptq", settings)
    return {**rows, **_cvxq_rows()}


ROWS: dict[str, Row] = _rows()
"""Name of the row -> what is run and what it has to reach."""

DETERMINISM: dict[str, tuple[str, dict[str, Any]]] = {
    "determinism_gptvq": ("gptvq", {}),
    "determinism_vptq": ("vptq", {"finetune_steps": 4}),
    "determinism_cvxq": ("cvxq", {}),
}
"""Name -> method and settings of what is quantized twice."""
