"""How every row is measured: the data, the clock, perplexity and KL. See README.md beside this."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

import hf_vq
from hf_vq.engine.whole import quantize_whole
from hf_vq.evaluation import compare, perplexity
from hf_vq.formats.cvxq import CVXQSpec
from hf_vq.formats.gptvq import GPTVQSpec
from hf_vq.formats.vptq import VPTQSpec
from hf_vq.loading import packed_layers
from hf_vq.methods import cvxq, gptvq, vptq
from hf_vq.methods.statistics import Statistics
from hf_vq.registry import get_method
from hf_vq.tying import make_dense

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent.parent / "shared"
SEQLEN, CALIBRATION_ROWS, KL_WINDOWS = 512, 128, 100


def official() -> dict[str, Any]:
    """What the official implementations reach, measured by the same protocol."""
    return json.loads((HERE / "official.json").read_text())


def environment(device: str = "one thread") -> str:
    """One line about where and with what the numbers were measured."""
    return (
        f"{date.today().isoformat()}, {device} of a {platform.machine()} CPU, hf_vq "
        f"{hf_vq.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}"
    )


@dataclass
class Result:
    """One quantized model. bits: all-in per quantized weight. cpu: seconds of one thread."""

    bits: float
    cpu: float
    perplexity: float = math.nan
    kl: float = math.nan


class Protocol:
    """The model and the tokens; `quantize` and `scalar` give measured rows."""

    def __init__(self, model: Path, data: Path):
        self.path = model
        self.calibration = _tokens(data / "docs_calibration_1024x512.npy")[:CALIBRATION_ROWS]
        self.test = hf_vq.evaluation.windows(_tokens(data / "docs_test.npy"), SEQLEN)
        self.dense = self.load(torch.float32)

    def load(self, dtype: torch.dtype | str = "auto") -> Any:
        """The original model; "auto" keeps the dtype its file has."""
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=dtype).eval()

    def quantize(self, method: str, **settings: Any) -> Result:
        """`method` with these settings; the clock runs from the loaded to the packed model."""
        model = self.load()
        config = get_method(method).config(seqlen=SEQLEN, **settings)
        began = time.process_time()
        plan = hf_vq.make_plan(model, config)
        plan, _ = quantize_whole(model, config, self.calibration, plan)
        result = Result(plan.ledger().decoder_bits, time.process_time() - began)
        for name in packed_layers(model):
            make_dense(model, name, torch.float32)
        return self.measure(model, result)

    def scalar(self, walk: Callable[[nn.Module, dict], float]) -> Result:
        """A baseline: walk(model, layers) quantizes in place and returns the bits per weight."""
        model = self.load()
        plan = hf_vq.make_plan(model, hf_vq.GPTVQConfig(bits=4))
        began = time.process_time()
        bits = walk(model, plan.layers)
        return self.measure(model, Result(bits, time.process_time() - began))

    def measure(self, model: Any, result: Result) -> Result:
        """Perplexity over all test windows and mean KL over the first ones, in float32."""
        model = model.float()
        first, rest = self.test[:KL_WINDOWS], self.test[KL_WINDOWS:]
        comparison = compare(self.dense, model, first)
        losses = [(math.log(comparison.perplexity_quantized), len(first))]
        if len(rest):
            losses.append((math.log(perplexity(model, rest, SEQLEN)), len(rest)))
        result.kl = comparison.kl
        # every window has as many predictions, so the mean loss is the windows' mean
        result.perplexity = math.exp(sum(x * n for x, n in losses) / len(self.test))
        return result


def warm_up() -> None:
    """Compile what numba compiles on first use (one to ten seconds, then cached on disk)."""
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    statistics = Statistics(torch.eye(16), 16)
    for dim in (1, 2, 4):
        gptvq.quantize(weight, statistics, GPTVQSpec(8, 16, dim, 4, 8, 16))
    for residual in (0, 2):
        vptq.quantize(weight, statistics, VPTQSpec(8, 16, 2, 4, residual))
    cvxq.quantize(weight, statistics, CVXQSpec(8, 16, 8, 12))


def _tokens(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.load(path).astype(np.int64))
