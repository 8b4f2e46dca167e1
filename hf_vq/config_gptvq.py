"""What a user may ask of GPTVQ."""

from __future__ import annotations

from typing import Any, ClassVar

from hf_vq.config_base import SHARED_RULES, DefaultBits, VQConfig, given
from hf_vq.rules import Choice, Flag, Number, Rule
from hf_vq.sizes import SizeRule

_BITS = DefaultBits(2.25)


class GPTVQConfig(VQConfig):
    """GPTVQ (arXiv 2402.15319): codebooks of vectors of consecutive input columns, error feedback.

    Args:
        bits: all-in target over the quantized weights (codes, codebooks and scales together), 1 to
            8. None: whatever `vector_dim`, `index_bits` and `group_size`, then all required, cost.
        size: of the saved files instead: "7.5GB" (GiB, MB, ...) or a number of bytes for all of the
            `*.safetensors` files, their index and config.json, or "fits:8GB" ("fits:8GB@4096") for
            what leaves room in 8 GB for the key-value cache of 4096 tokens, or as many as the model
            takes, and for activations. Never exceeded. None: `bits` decides.
        vector_dim: weights per vector, 1, 2, 4 or 8. None: chosen per matrix.
        index_bits: bits per vector's index, 1 to 16; a codebook has 2**index_bits vectors.
        group_size: weights that share one codebook, 8 to 2**31.
        group_columns: width of a stripe of columns, 1 to 65536; a multiple of vector_dim.
        codebook_dtype: "int8", "int4" or "float16".
        scale_block: columns that share one 4-bit scale in a row, 0 (no scales) or 8 to 256.
        scale_domain: "log" or "linear" spacing of those scales.
        svd_rank: rank of the factors that 1-D codebooks are stored as, 1 to 256; 0 or None: none.
        kmeans_init: "mahalanobis" or "kmeans++".
        kmeans_iterations: 0 to 1000 Lloyd iterations per codebook.
        damping: 0 to 1, share of the Hessian's mean diagonal that is added to its diagonal.
        refine_iterations: 0 to 100 rounds of refining codes and codebooks after the sweep.
        codebook_update: solve for the codebooks once the codes are fixed.
        true_sequential: q/k/v, o, gate/up and down one after another, each on inputs from already
            quantized layers; False: one pass per block.
        asymmetric_calibration: let every layer aim at what the original model computes, so that it
            also corrects what the layers before it have lost (GPTAQ, arXiv 2504.02692); costs a
            second walk through the model. False: aim at the layer's own weight.
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

    method: ClassVar[str] = "gptvq"
    rules: ClassVar[dict[str, Rule]] = {
        "bits": Number(1, 8, optional=True),
        "size": SizeRule(),
        "vector_dim": Choice((1, 2, 4, 8), optional=True),
        "index_bits": Number(1, 16, integer=True, optional=True),
        "group_size": Number(8, 2**31, integer=True, optional=True),
        "group_columns": Number(1, 65536, integer=True, optional=True),
        "codebook_dtype": Choice(("int8", "int4", "float16")),
        "scale_block": Number(8, 256, integer=True, optional=True, also=(0,)),
        "scale_domain": Choice(("log", "linear")),
        "svd_rank": Number(1, 256, integer=True, optional=True, also=(0,)),
        "kmeans_init": Choice(("mahalanobis", "kmeans++")),
        "kmeans_iterations": Number(0, 1000, integer=True),
        "damping": Number(0, 1),
        "refine_iterations": Number(0, 100, integer=True),
        "codebook_update": Flag(),
        "true_sequential": Flag(),
        "asymmetric_calibration": Flag(),
        "allocation": Choice(("measured", "uniform")),
        **SHARED_RULES,
        "seed": Number(0, 2**63 - 1, integer=True),
        "nsamples": Number(1, 1_000_000, integer=True),
        "seqlen": Number(8, 1_048_576, integer=True, optional=True),
    }
    spec_fields: ClassVar[tuple[str, ...]] = (
        "vector_dim",
        "index_bits",
        "group_size",
        "group_columns",
        "codebook_dtype",
        "scale_block",
        "scale_domain",
        "svd_rank",
    )
    layer_fields: ClassVar[frozenset[str]] = frozenset(rules) - {
        "true_sequential",
        "asymmetric_calibration",
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
        index_bits: int | None = None,
        group_size: int | None = None,
        group_columns: int | None = None,
        codebook_dtype: str = "int8",
        scale_block: int | None = None,
        scale_domain: str = "log",
        svd_rank: int | None = None,
        kmeans_init: str = "kmeans++",
        kmeans_iterations: int = 30,
        damping: float = 0.01,
        refine_iterations: int = 4,
        codebook_update: bool = True,
        true_sequential: bool = True,
        asymmetric_calibration: bool = True,
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
    index_bits: int | None
    group_size: int | None
    group_columns: int | None
    codebook_dtype: str
    scale_block: int | None
    scale_domain: str
    svd_rank: int | None
    kmeans_init: str
    kmeans_iterations: int
    damping: float
    refine_iterations: int
    codebook_update: bool
    true_sequential: bool
    asymmetric_calibration: bool

    def check(self) -> None:
        dim, index_bits = self.vector_dim, self.index_bits
        if self.bits is None and self.size is None and not (dim and index_bits and self.group_size):
            raise ValueError(
                "bits=None leaves the size to the geometry: give vector_dim, index_bits and "
                "group_size, or a target in bits from 1 to 8"
            )
        if dim and index_bits and self.bits is not None and index_bits / dim >= self.bits:
            raise ValueError(
                f"vector_dim={dim} with index_bits={index_bits} takes {index_bits / dim:g} bits "
                "per weight for the indices alone, which leaves nothing of "
                f"bits={self.bits:g} for the codebooks; raise bits, lower index_bits, or pass "
                "bits=None"
            )
        if dim:
            for name in ("group_columns", "scale_block", "group_size"):
                value = getattr(self, name)
                if value and value % dim:
                    raise ValueError(
                        f"{name}={value} must be a multiple of vector_dim={dim}, because a vector "
                        "cannot lie in two groups"
                    )
        if self.svd_rank:
            if dim not in (None, 1):
                raise ValueError(f"svd_rank needs vector_dim=1, not {dim}")
            if self.codebook_dtype == "int4":
                raise ValueError('svd_rank needs codebook_dtype "int8" or "float16", not "int4"')
            if index_bits and self.svd_rank >= 2**index_bits:
                raise ValueError(
                    f"svd_rank={self.svd_rank} saves nothing with {2**index_bits} centroids; the "
                    f"range is 1 to {2**index_bits - 1}"
                )
