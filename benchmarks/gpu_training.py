"""The training sections of benchmarks/gpu.py: LoRA steps, and the gradients of codebooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_cases import FORMATS
from gpu_model import LLAMA_8B, TINY, Size
from gpu_report import DEVICE, GPU, Report, peak_memory
from hf_vq_kernels.dispatch import use_backend
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Linear = Callable[[Tensor], Tensor]
TRAINED_OVER = ("gptvq 4-D k256", "vptq v8 k65536", "cvxq 3 bits")


class Trainable:
    """Blocks of a Llama whose linear layers are frozen, each with a LoRA, and checkpointed."""

    def __init__(self, make: Callable[[int, int], Linear], size: Size, report: Report) -> None:
        self.size, self.parameters = size, []
        self.blocks = [
            [self._adapted(make(*shape), *shape, report.sizes.rank) for shape in size.shapes]
            for _ in range(report.sizes.training_blocks)
        ]
        self.norm = torch.ones(size.hidden, dtype=torch.bfloat16, device=DEVICE)

    def _adapted(self, base: Linear, rows: int, columns: int, rank: int) -> Linear:
        def parameter(*shape: int) -> Tensor:
            new = torch.randn(shape, device=DEVICE) * 0.01
            self.parameters.append(new.bfloat16().requires_grad_())
            return self.parameters[-1]

        down, up = parameter(rank, columns), parameter(rows, rank)
        return lambda x: base(x) + F.linear(F.linear(x, down), up)

    def _block(self, x: Tensor, layers: list[Linear]) -> Tensor:
        q, k, v, o, gate, up, down = layers
        size, tokens = self.size, x.shape[0]

        def heads(y: Tensor, count: int) -> Tensor:
            return y.view(1, tokens, count, size.head_dim).transpose(1, 2)

        h = F.rms_norm(x, (size.hidden,), self.norm)
        mixed = F.scaled_dot_product_attention(
            heads(q(h), size.heads), heads(k(h), size.kv_heads), heads(v(h), size.kv_heads),
            is_causal=True, enable_gqa=True,
        )  # fmt: skip
        x = x + o(mixed.transpose(1, 2).reshape(tokens, -1))
        h = F.rms_norm(x, (size.hidden,), self.norm)
        return x + down(F.silu(gate(h)) * up(h))

    def step(self, x: Tensor) -> None:
        """One forward and backward pass."""
        for layers in self.blocks:
            x = checkpoint(self._block, x, layers, use_reentrant=False)
        x.float().square().mean().backward()
        for parameter in self.parameters:
            parameter.grad = None


def _bitsandbytes() -> Callable[[int, int], Linear]:
    from bitsandbytes.nn import Linear4bit

    def make(rows: int, columns: int) -> Linear:
        layer = Linear4bit(
            columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        ).to(DEVICE)
        return layer.requires_grad_(False)

    return make


def lora(report: Report) -> None:
    """Time and peak memory of a LoRA step over dense, packed and (if installed) NF4 layers."""
    size = TINY if report.dry else LLAMA_8B
    tokens, blocks = report.sizes.training_tokens, report.sizes.training_blocks
    report.say(
        f"## LoRA step, {blocks} blocks of Llama-8B's shape, rank {report.sizes.rank}, {tokens} "
        "tokens, activations checkpointed per block\n"
    )
    report.say(
        "| layers | weights, MB | peak beyond them, MB | ms | of dense |\n" + "|---" * 5 + "|"
    )

    def dense(rows: int, columns: int) -> Linear:
        weight = torch.empty(rows, columns, device=DEVICE, dtype=torch.bfloat16).normal_(0, 0.02)
        return lambda x: F.linear(x, weight)

    def packed(name: str) -> Callable[[int, int], Linear]:
        return lambda rows, columns: FORMATS[name](rows, columns, DEVICE).linear

    makers: dict[str, Callable[[], Callable[[int, int], Linear]]] = {"dense bf16": lambda: dense}
    for name in report.formats(dict.fromkeys(TRAINED_OVER)):
        makers[name] = lambda name=name: packed(name)
    makers["bitsandbytes NF4"] = _bitsandbytes
    before = None
    for name, maker in makers.items():
        if not report.has(30, f"LoRA over {name}"):
            continue
        try:
            make = maker()
            weights, model = peak_memory(lambda make=make: Trainable(make, size, report))
            x = torch.randn(tokens, size.hidden, device=DEVICE).bfloat16().requires_grad_()
            model.step(x)  # compile and tune
            peak, _ = peak_memory(lambda model=model, x=x: model.step(x))
            seconds = report.eager_seconds(lambda model=model, x=x: model.step(x))
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            report.not_measured.append(f"LoRA over {name}: {text}")
            continue
        before = before or seconds
        report.say(
            f"| {name} | {weights / 1e6:.0f} | {peak / 1e6:.0f} | {1e3 * seconds:.1f} "
            f"| {seconds / before:.2f} |"
        )
        del model
        if GPU:
            torch.cuda.empty_cache()
    report.say()


def packed_gradients(report: Report) -> None:
    """Gradients of codebooks and scales: Triton's kernels beside torch's dense gradient."""
    rows, columns = report.sizes.main[0]
    tokens = report.sizes.training_tokens
    report.say(f"## Gradients of codebooks and scales, {rows} x {columns}, {tokens} tokens\n")
    report.say("| format | triton, ms | torch, ms | peak, MB | torch's, MB | twice the same |")
    report.say("|---" * 6 + "|")
    for name, make in report.formats(FORMATS).items():
        if not report.has(15, f"gradients of {name}"):
            continue
        case = make(rows, columns, DEVICE).trainable()
        x = torch.randn(tokens, columns, device=DEVICE).bfloat16()
        grad = torch.randn(tokens, rows, device=DEVICE).bfloat16()
        times: list[float] = []
        peaks: list[float] = []
        found: list[Any] = []
        for backend in ("triton", "torch"):
            with use_backend(backend):
                run = lambda case=case, grad=grad, x=x: case.packed_gradients(grad, x)  # noqa: E731
                found.append(run())
                peak, _ = peak_memory(run)
                peaks.append(peak)
                times.append(report.eager_seconds(run))
                if backend == "triton":
                    same = all(map(torch.equal, found[0], run()))
        report.say(
            f"| {name} | {1e3 * times[0]:.2f} | {1e3 * times[1]:.2f} | {peaks[0] / 1e6:.1f} "
            f"| {peaks[1] / 1e6:.1f} | {'yes' if same else 'NO'} |"
        )
    report.say()
