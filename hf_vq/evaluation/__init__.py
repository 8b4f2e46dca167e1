"""Measuring a model: perplexity, KL to the original, top-1 agreement, a generated sample."""

from hf_vq.evaluation.metrics import Comparison, compare, generate_sample, perplexity, windows
from hf_vq.evaluation.report import Evaluation, evaluate, print_evaluation, stored_bytes

__all__ = [
    "Comparison",
    "Evaluation",
    "compare",
    "evaluate",
    "generate_sample",
    "perplexity",
    "print_evaluation",
    "stored_bytes",
    "windows",
]
