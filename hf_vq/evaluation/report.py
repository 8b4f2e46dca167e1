"""One evaluation of a quantized model, beside its original where that is at hand."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from hf_vq.evaluation.metrics import compare, generate_sample, perplexity, windows


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
        top1: share of positions with the same most likely token, 0..1, or None.
        prompt, sample, sample_dense: a prompt and both models' greedy continuations, or None.
    """

    seqlen: int
    windows: int
    perplexity: float
    bytes: int
    perplexity_dense: float | None = None
    bytes_dense: int | None = None
    kl: float | None = None
    top1: float | None = None
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
    dense: nn.Module | None = None,
    tokenizer: Any = None,
    prompt: str | None = None,
    max_new_tokens: int = 40,
) -> Evaluation:
    """Measure perplexity and, beside the original, KL and top-1 agreement.

    Args:
        model: the quantized causal language model.
        tokens: integers, shape (N,) or (n, seqlen), held out from calibration.
        seqlen: window length in tokens.
        dense: the original model, or None.
        tokenizer: needed for a sample only.
        prompt: text that both models continue greedily; None for no sample.
        max_new_tokens: length of the sample.

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
            "bytes_dense": stored_bytes(dense),
            "kl": comparison.kl,
            "top1": comparison.top1,
        }
    if prompt is not None:
        figures["prompt"] = prompt
        figures["sample"] = generate_sample(model, tokenizer, prompt, max_new_tokens)
        if dense is not None:
            figures["sample_dense"] = generate_sample(dense, tokenizer, prompt, max_new_tokens)
    return Evaluation(
        seqlen=seqlen,
        windows=cut.shape[0],
        perplexity=own,
        bytes=stored_bytes(model),
        **figures,
    )


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the tensors a checkpoint of this model holds; tied parameters count once."""
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


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
        row("same most likely token", "100.0 %", f"{100 * (e.top1 or 0):.1f} %")
    row("bytes", _integer(e.bytes_dense), _integer(e.bytes))
    console.print(table)
    if e.prompt is not None:
        for name, sample in (("original", e.sample_dense), ("quantized", e.sample)):
            if sample is not None:
                flat = escape(" ".join(sample.split()))  # small models like empty lines
                console.print(f"[bold]{name}[/bold]: {escape(e.prompt)} [dim]{flat}[/dim]")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _integer(value: int | None) -> str:
    return "" if value is None else f"{value:,}"
