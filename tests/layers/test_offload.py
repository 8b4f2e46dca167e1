"""Accelerate's offloading: weights live elsewhere and are there when a module is called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from helpers import ODD_SPECS, random_gptvq
from helpers_cvxq import ODD_CVXQ, random_cvxq
from helpers_vptq import ODD_VPTQ, random_vptq
from torch import nn

from hf_vq.formats import FORMATS, LayerSpec
from hf_vq.layers import PackedLinear

CODES = {"gptvq": random_gptvq, "vptq": random_vptq, "cvxq": random_cvxq}
SPECS = {
    "gptvq": ODD_SPECS["2d-int8-log"],
    "vptq": ODD_VPTQ["outliers"],
    "cvxq": ODD_CVXQ["log8-int8"],
    "vptq-bfloat16": ODD_VPTQ["residual-18-bits"],
}


class Holder(nn.Module):
    """A model around one packed layer."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        tensors = FORMATS[spec.method].pack(CODES[spec.method](spec), spec)
        bias = torch.linspace(-1, 1, spec.out_features)
        self.proj = PackedLinear.from_packed(spec, tensors, bias)
        self.norm = nn.LayerNorm(spec.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(x))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_layers_compute_the_same(name: str, where: str, tmp_path: Path) -> None:
    model = Holder(SPECS[name]).eval()
    x = torch.randn(3, SPECS[name].in_features)
    with torch.no_grad():
        expected = model(x)
        if where == "cpu":
            cpu_offload(model, execution_device=torch.device("cpu"))
        else:
            disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
        assert all(p.is_meta for p in model.parameters())
        for _ in range(2):  # hooks fetch and release again
            assert torch.equal(model(x), expected)
            assert all(p.is_meta for p in model.parameters())
    layout = SPECS[name].layout()
    assert {n: t.dtype for n, t in model.proj.packed().items()} == {
        n: t.dtype for n, t in layout.items()
    }
