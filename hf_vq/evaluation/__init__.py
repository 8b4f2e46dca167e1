"""Measuring a model: perplexity, KL to the original, top-1 agreement, a generated sample."""

from hf_vq.evaluation.metrics import (
    Comparison,
    compare,
    generate_sample,
    perplexity,
    stored_bytes,
    windows,
)
from hf_vq.evaluation.report import Evaluation, evaluate, print_evaluation
from hf_vq.evaluation.teacher import Teacher

__all__ = [
    "Comparison",
    "Evaluation",
    "Teacher",
    "compare",
    "evaluate",
    "generate_sample",
    "perplexity",
    "print_evaluation",
    "stored_bytes",
    "windows",
]
