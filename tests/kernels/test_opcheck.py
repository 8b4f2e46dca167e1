"""torch's own checks of every operator, over every backend that has it.

`torch.library.opcheck` compares what an operator does with its schema (nothing is changed in place,
results share no memory with arguments), its shape inference, and its gradients, eagerly and
through AOTAutograd with dynamic shapes. Triton runs in its interpreter here where there is no GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import ODD_SPECS
from helpers_cvxq import ODD_CVXQ
from helpers_triton import DEVICE
from helpers_vptq import VPTQSpec
from hf_vq_kernels import cpu_build
from hf_vq_kernels.dispatch import backends, use_backend
from torch import Tensor

from tests.kernels import test_cvxq_ops, test_ops, test_vptq_ops

OPERATORS = ("linear", "dequantize", "input_gradient", "packed_gradients", "embedding")
ARGUMENTS: dict[str, Any] = {
    "gptvq": test_ops.arguments(ODD_SPECS["8d-float16-log"]),
    "vptq": test_vptq_ops.arguments(
        VPTQSpec(13, 21, 4, 8, 2, 1, 3, 4, 16, norm="columns", permuted=True)
    ),
    "cvxq": test_cvxq_ops.arguments(ODD_CVXQ["float16-float16"]),
}
IN_FEATURES = {"gptvq": 43, "vptq": 21, "cvxq": 36}
OUT_FEATURES = {"gptvq": 5, "vptq": 13, "cvxq": 19}
TRAINED = {
    "gptvq": ("codebooks",),
    "vptq": test_vptq_ops.TRAINED,
    "cvxq": test_cvxq_ops.TRAINED,
}


def call(method: str, operator: str) -> tuple[Any, ...]:
    """Arguments of `hf_vq::{method}_{operator}`, with gradients where it has them."""
    packed, geometry = ARGUMENTS[method]
    columns, rows = IN_FEATURES[method], OUT_FEATURES[method]
    differentiable = operator in ("linear", "dequantize")
    tensors: list[Tensor | None] = []
    for name, tensor in packed.items():
        if tensor is not None:
            tensor = tensor.detach().clone().to(DEVICE)
            if differentiable and name in TRAINED[method]:
                tensor.requires_grad_()
        tensors.append(tensor)
    x = torch.randn((2, columns), device=DEVICE)
    grad = torch.randn((2, rows), device=DEVICE)
    if operator == "linear":
        bias = torch.randn(rows, device=DEVICE, requires_grad=True)
        return (x.requires_grad_(), *tensors, bias, *geometry)
    if operator == "dequantize":
        return (*tensors, columns, *geometry, torch.bfloat16)
    if operator == "input_gradient":
        return (grad.requires_grad_(), *tensors, columns, *geometry)
    if operator == "packed_gradients":
        needed = [name in TRAINED[method] and t is not None for name, t in packed.items()]
        return (grad, *tensors, x, *geometry, needed)
    ids = torch.tensor([[3, 1], [0, 3]], device=DEVICE)
    return (ids, *tensors, columns, *geometry, torch.bfloat16)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("method", ARGUMENTS)
@pytest.mark.parametrize("backend", ["torch", "c", "triton"])
def test_opcheck(method: str, operator: str, backend: str) -> None:
    name = f"{method}_{operator}"
    if backend not in backends(name):
        assert backend == "c" and operator not in ("linear", "dequantize")
        return  # its gradients and rows are computed by torch, whose case is another one
    if backend == "c" and (reason := cpu_build.unavailable()):
        pytest.skip(reason)
    arguments = call(method, operator)
    with use_backend(backend):
        torch.library.opcheck(getattr(torch.ops.hf_vq, name).default, arguments)
