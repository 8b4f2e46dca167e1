"""What a user may ask of VPTQ."""

from __future__ import annotations

from typing import Any, ClassVar

from hf_vq.config_base import SHARED_RULES, DefaultBits, VQConfig, given
from hf_vq.rules import Choice, Flag, Number, PowerOfTwo, Rule
from hf_vq.sizes import SizeRule

_BITS = DefaultBits(2.25)


class VPTQConfig(VQConfig):
    """VPTQ (arXiv 2409.17066): vectors of consecutive rows of one column, in the published format.

    Args:
        bits: all-in target over the quantized weights (indices, codebooks, outliers, norm and
            permutation together), 1 to 8. None: whatever `vector_dim` and `num_centroids`, then
            required, cost.
        size: of the saved files instead: "7.5GB" (GiB, MB, ...) or a number of bytes for all of the
            `*.safetensors` files, their index and config.json, or "fits:8GB" ("fits:8GB@4096") for
            what leaves room in 8 GB for the key-value cache of 4096 tokens, or as many as the model
            takes, and for activations. Never exceeded. None: `bits` decides.
        vector_dim: weights per vector, 2 to 16. None: chosen per matrix.
        num_centroids: vectors per codebook, a power of two from 2 to 65536.
        num_res_centroids: vectors per residual codebook, a power of two from 2 to num_centroids;
            0: no residual codebook.
        num_groups: bands of columns with codebooks of their own, 1 to 65536.
        outlier_percent: 0 to 50, share of the input columns (those with the largest activations)
            that get a codebook of their own; 0: none.
        outlier_vector_dim: weights per vector in those columns, 2 to 16.
        outlier_centroids: vectors in their codebook, a power of two from 2 to 65536.
        norm: "mean-std" or "min-max" scale and shift every input column before it is quantized;
            "none": stored without scales.
        permute: order columns by the size of their activations before quantizing them; stored.
        codebook_dtype: "float16" or "bfloat16", of everything stored but the indices.
        kmeans_iterations: 0 to 1000 Lloyd iterations per codebook.
        damping: 0 to 1, share of the Hessian's mean diagonal that is added to its diagonal.
        refine_iterations: 0 to 100 rounds of refining codes and codebooks after the sweep.
        codebook_update: solve for the codebooks once the codes are fixed.
        beam: 1 to 64 nearest main vectors for each of which the best residual one is looked up.
        error_feedback: let later columns make up for the error of earlier ones.
        true_sequential: q/k/v, o, gate/up and down one after another, each on inputs from already
            quantized layers; False: one pass per block.
        asymmetric_calibration: let every layer aim at what the original model computes, so that it
            also corrects what the layers before it have lost (GPTAQ, arXiv 2504.02692); costs a
            second walk through the model. False: aim at the layer's own weight.
        calibration_inputs: "quantized": a layer is calibrated on what the already quantized layers
            before it put out. "original": on the original model's activations, every layer by
            itself, as in the paper; true_sequential and asymmetric_calibration then mean nothing.
        finetune_steps: 0 to 100,000 gradient steps on the codebooks of every block against its
            original output; 0: none.
        finetune_lr: learning rate of those steps, 1e-8 to 1. None: chosen by the library.
        allocation: "measured": bits go where an error changes the model's predictions most, found
            out by one backward pass over a few thousand calibration tokens; "uniform": all weights
            count the same. `bits` holds for all matrices together either way.
        sensitivity: what an error is measured by. "loss": the divergence of the model's predictions
            from what they were; "hidden": the final hidden states (CVXQ's objective); "pca": their
            leading principal components (CVXQ section 3).
        reestimations: 0 to 10 times everything is measured again on the quantized model, and
            quantized again.
        quantize_embeddings: pack the token embeddings too; they share the target with the other
            matrices. Weights tied with them are packed once and stay tied.
        quantize_lm_head: pack the output head too; where it is tied, the embeddings with it.
        seed: 0 to 2**63-1, for the calibration windows and k-means++.
        nsamples: 1 to 1,000,000 calibration windows.
        seqlen: 8 to 1,048,576 tokens per window. None: the model's context, at most 2048.
        modules_to_not_convert: names or patterns of modules to leave dense.
        overrides: {pattern: {field: value}} or {pattern: False} (leave dense). A pattern is
            "re:<regular expression>" for the whole name, a glob, or a run of name components
            ("down_proj", "layers.0"). Later patterns win.
        dataset: calibration data (see `hf_vq.engine.calibration`). None: data-free. Runtime only.
        tokenizer: tokenizer, or the name of one. None: the model's own. Runtime only.
        calibration_device: where blocks are calibrated. None: a GPU if there is one. Runtime only.
        max_memory, offload_folder: for dispatching the packed model, as in `from_pretrained`,
            which does not hand its own on. Runtime only.
        dequantize: load a packed checkpoint as a dense model. Runtime only.
        backend: which implementation of the operators computes (docs/operators.md): "torch",
            "numba", "c", "triton"; None: the first that can. Runtime only, also for a packed
            checkpoint.
        measurement: file of the backward pass behind allocation="measured": written if there is
            none, used instead of another pass if there is. Runtime only.

    Raises:
        ValueError: a field is outside its range, or fields contradict each other.
    """

    method: ClassVar[str] = "vptq"
    rules: ClassVar[dict[str, Rule]] = {
        "bits": Number(1, 8, optional=True),
        "size": SizeRule(),
        "vector_dim": Number(2, 16, integer=True, optional=True),
        "num_centroids": PowerOfTwo(2, 65536, optional=True),
        "num_res_centroids": PowerOfTwo(2, 65536, optional=True, also=(0,)),
        "num_groups": Number(1, 65536, integer=True, optional=True),
        "outlier_percent": Number(0, 50, optional=True),
        "outlier_vector_dim": Number(2, 16, integer=True, optional=True),
        "outlier_centroids": PowerOfTwo(2, 65536, optional=True),
        "norm": Choice(("none", "mean-std", "min-max"), optional=True),
        "permute": Flag(optional=True),
        "codebook_dtype": Choice(("float16", "bfloat16")),
        "kmeans_iterations": Number(0, 1000, integer=True),
        "damping": Number(0, 1),
        "refine_iterations": Number(0, 100, integer=True),
        "codebook_update": Flag(),
        "beam": Number(1, 64, integer=True),
        "error_feedback": Flag(),
        "true_sequential": Flag(),
        "asymmetric_calibration": Flag(),
        "calibration_inputs": Choice(("quantized", "original")),
        "finetune_steps": Number(0, 100_000, integer=True),
        "finetune_lr": Number(1e-8, 1, optional=True),
        "allocation": Choice(("measured", "uniform")),
        **SHARED_RULES,
        "seed": Number(0, 2**63 - 1, integer=True),
        "nsamples": Number(1, 1_000_000, integer=True),
        "seqlen": Number(8, 1_048_576, integer=True, optional=True),
    }
    spec_fields: ClassVar[tuple[str, ...]] = (
        "vector_dim",
        "num_centroids",
        "num_res_centroids",
        "num_groups",
        "outlier_percent",
        "outlier_vector_dim",
        "outlier_centroids",
        "norm",
        "permute",
        "codebook_dtype",
    )
    layer_fields: ClassVar[frozenset[str]] = frozenset(rules) - {
        "true_sequential",
        "asymmetric_calibration",
        "calibration_inputs",
        "finetune_steps",
        "finetune_lr",
        "size",
        "allocation",
        *SHARED_RULES,
        "seed",
        "nsamples",
        "seqlen",
    }

    def __init__(
        self,
        bits: float | None = _BITS,
        *,
        size: str | int | None = None,
        vector_dim: int | None = None,
        num_centroids: int | None = None,
        num_res_centroids: int | None = None,
        num_groups: int | None = None,
        outlier_percent: float | None = None,
        outlier_vector_dim: int | None = None,
        outlier_centroids: int | None = None,
        norm: str | None = None,
        permute: bool | None = None,
        codebook_dtype: str = "float16",
        kmeans_iterations: int = 10,
        damping: float = 0.01,
        refine_iterations: int = 4,
        codebook_update: bool = True,
        beam: int = 8,
        error_feedback: bool = True,
        true_sequential: bool = True,
        asymmetric_calibration: bool = True,
        calibration_inputs: str = "quantized",
        finetune_steps: int = 0,
        finetune_lr: float | None = None,
        allocation: str = "measured",
        sensitivity: str = "loss",
        reestimations: int = 0,
        quantize_embeddings: bool = False,
        quantize_lm_head: bool = False,
        seed: int = 0,
        nsamples: int = 128,
        seqlen: int | None = None,
        modules_to_not_convert: list[str] | None = None,
        overrides: dict[str, Any] | None = None,
        dataset: Any = None,
        tokenizer: Any = None,
        calibration_device: Any = None,
        max_memory: dict | None = None,
        offload_folder: str | None = None,
        dequantize: bool = False,
        backend: str | None = None,
        measurement: Any = None,
        **unknown: Any,
    ) -> None:
        super().__init__(**given(locals()))

    vector_dim: int | None
    num_centroids: int | None
    num_res_centroids: int | None
    num_groups: int | None
    outlier_percent: float | None
    outlier_vector_dim: int | None
    outlier_centroids: int | None
    norm: str | None
    permute: bool | None
    codebook_dtype: str
    kmeans_iterations: int
    damping: float
    refine_iterations: int
    codebook_update: bool
    beam: int
    error_feedback: bool
    true_sequential: bool
    asymmetric_calibration: bool
    calibration_inputs: str
    finetune_steps: int
    finetune_lr: float | None

    def check(self) -> None:
        dim, main, res = self.vector_dim, self.num_centroids, self.num_res_centroids
        if self.bits is None and self.size is None and not (dim and main):
            raise ValueError(
                "bits=None leaves the size to the geometry: give vector_dim and num_centroids, or "
                "a target in bits from 1 to 8"
            )
        if main and res and res > main:
            raise ValueError(
                f"num_res_centroids={res} exceeds num_centroids={main}, which the official VPTQ "
                "package decodes wrongly; give the larger number to num_centroids"
            )
        if dim and main and self.bits is not None:
            index_bits = main.bit_length() - 1 + ((res or 1).bit_length() - 1)
            # outlier columns are indexed by another codebook, and at most this many are not
            cost = index_bits / dim * (1 - (self.outlier_percent or 0) / 100)
            if cost >= self.bits:
                raise ValueError(
                    f"vector_dim={dim} with num_centroids={main}"
                    f"{f' and num_res_centroids={res}' if res else ''} takes {cost:g} bits per "
                    f"weight for the indices alone, which leaves nothing of bits={self.bits:g} for "
                    "the codebooks; raise bits, take fewer centroids, or pass bits=None"
                )
        if self.outlier_percent == 0:
            for name in ("outlier_vector_dim", "outlier_centroids"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(self, name)} describes outlier columns, and "
                        "outlier_percent=0 asks for none; leave one of them out"
                    )
        elif self.outlier_percent and self.permute is False:
            raise ValueError(
                f"outlier_percent={self.outlier_percent:g} needs permute: outlier columns are the "
                "first ones of the permuted order; leave permute=False out"
            )
        if self.finetune_lr is not None and not self.finetune_steps:
            raise ValueError(
                f"finetune_lr={self.finetune_lr:g} does nothing without finetune_steps; give both"
            )
