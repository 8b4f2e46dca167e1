"""One evaluation of a quantized model, beside its original where that is at hand."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from hf_vq.evaluation.generation import NEW_TOKENS, check, continuations, prompts_of
from hf_vq.evaluation.metrics import (
    compare,
    generate_sample,
    perplexity,
    stored_bytes,
    windows,
)
from hf_vq.evaluation.teacher import Teacher


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and under which protocol (see `hf_vq.evaluation.metrics`).

    Attributes:
        seqlen: tokens per window; windows do not overlap.
        windows: number of windows, the same ones for every figure.
        perplexity: of the quantized model, over windows * (seqlen - 1) predictions.
        bytes: size of the quantized model's stored tensors (parameters and persistent buffers).
        perplexity_dense, bytes_dense: the same of the original, or None without one.
        kl: mean KL(original || quantized) in nats per position, or None without an original.
        kl_median, kl_p99: median and 99th percentile over the positions, or None.
        top1: share of positions with the same most likely token, 0..1, or None.
        generation: what `hf_vq.evaluation.generation.check` found, or None.
        speed: what `hf_vq.evaluation.generation.speed` found, or None.
        prompt, sample, sample_dense: a prompt and both models' greedy continuations, or None.
    """

    seqlen: int
    windows: int
    perplexity: float
    bytes: int
    perplexity_dense: float | None = None
    bytes_dense: int | None = None
    kl: float | None = None
    kl_median: float | None = None
    kl_p99: float | None = None
    top1: float | None = None
    generation: dict[str, Any] | None = None
    speed: dict[str, Any] | None = None
    prompt: str | None = None
    sample: str | None = None
    sample_dense: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; figures that were not measured are left out."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def evaluate(
    model: nn.Module,
    tokens: Tensor,
    seqlen: int,
    *,
    dense: nn.Module | Teacher | None = None,
    tokenizer: Any = None,
    prompt: str | None = None,
    max_new_tokens: int = 40,
    generate: bool = False,
    speed: dict[str, Any] | None = None,
) -> Evaluation:
    """Measure perplexity and, beside the original, KL and top-1 agreement.

    Args:
        model: the quantized causal language model.
        tokens: integers, shape (N,) or (n, seqlen), held out from calibration.
        seqlen: window length in tokens.
        dense: the original model, or what it said (`Teacher`), or None.
        tokenizer: needed for a sample only.
        prompt: text that both models continue greedily; None for no sample.
        max_new_tokens: length of the sample.
        generate: continue the beginnings of some windows greedily too.
        speed: what `hf_vq.evaluation.generation.speed` measured of the model.

    Raises:
        ValueError: as `perplexity` and `compare`; or a prompt without a tokenizer.
    """
    if prompt is not None and tokenizer is None:
        raise ValueError("a sample needs the model's tokenizer; pass tokenizer= or prompt=None")
    cut = windows(tokens, seqlen)
    figures: dict[str, Any] = {}
    if dense is None:
        own = perplexity(model, cut, seqlen)
    else:
        comparison = compare(dense, model, cut)
        own = comparison.perplexity_quantized
        figures = {
            "perplexity_dense": comparison.perplexity_dense,
            "bytes_dense": dense.bytes if isinstance(dense, Teacher) else stored_bytes(dense),
            "kl": comparison.kl,
            "kl_median": comparison.kl_median,
            "kl_p99": comparison.kl_p99,
            "top1": comparison.top1,
        }
    if generate:
        figures["generation"] = check(model, cut, _continued(dense, cut))
    if speed is not None:
        figures["speed"] = speed
    if prompt is not None:
        figures["prompt"] = prompt
        figures["sample"] = generate_sample(model, tokenizer, prompt, max_new_tokens)
        if isinstance(dense, nn.Module):
            figures["sample_dense"] = generate_sample(dense, tokenizer, prompt, max_new_tokens)
    return Evaluation(
        seqlen=seqlen,
        windows=cut.shape[0],
        perplexity=own,
        bytes=stored_bytes(model),
        **figures,
    )


def _continued(dense: nn.Module | Teacher | None, cut: Tensor) -> Tensor | None:
    if dense is None:
        return None
    prompts = prompts_of(cut)
    if isinstance(dense, Teacher):
        return dense.continuations(prompts, NEW_TOKENS)
    return continuations(dense, prompts, NEW_TOKENS)


def print_evaluation(evaluation: Evaluation, console: Console | None = None) -> None:
    """Print the before/after table and the samples."""
    console = console or Console()
    e = evaluation
    table = Table(
        box=box.SIMPLE_HEAD, title=f"{e.windows} windows of {e.seqlen} tokens", title_justify="left"
    )
    table.add_column("")
    both = e.perplexity_dense is not None
    if both:
        table.add_column("original", justify="right")
    table.add_column("quantized", justify="right")

    def row(name: str, before: str, after: str) -> None:
        table.add_row(name, before, after) if both else table.add_row(name, after)

    row("perplexity", _number(e.perplexity_dense), _number(e.perplexity))
    if both:
        row("KL to the original (nats/token)", _number(0.0), _number(e.kl))
        row("KL, median", _number(0.0), _number(e.kl_median))
        row("KL, 99th percentile", _number(0.0), _number(e.kl_p99))
        row("same most likely token", "100.0 %", f"{100 * (e.top1 or 0):.1f} %")
    g = e.generation
    if g is not None:
        row("repeated 4-grams", _percent(g.get("repetition_dense")), _percent(g["repetition"]))
        if "divergence" in g:
            row(f"greedy tokens in common, of {g['new_tokens']}", "", f"{g['divergence']:.1f}")
    if e.speed is not None:
        row("tokens per second", "", f"{e.speed['tokens_per_second']:.1f}")
    row("bytes", _integer(e.bytes_dense), _integer(e.bytes))
    console.print(table)
    if e.prompt is not None:
        for name, sample in (("original", e.sample_dense), ("quantized", e.sample)):
            if sample is not None:
                flat = escape(" ".join(sample.split()))  # small models like empty lines
                console.print(f"[bold]{name}[/bold]: {escape(e.prompt)} [dim]{flat}[/dim]")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _integer(value: int | None) -> str:
    return "" if value is None else f"{value:,}"
