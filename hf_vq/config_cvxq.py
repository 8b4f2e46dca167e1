"""What a user may ask of CVXQ."""

from __future__ import annotations

from typing import Any, ClassVar

from hf_vq.config_base import SHARED_RULES, DefaultBits, VQConfig, given
from hf_vq.rules import Choice, Flag, Number, Rule
from hf_vq.sizes import SizeRule

_BITS = DefaultBits(3.0)


class CVXQConfig(VQConfig):
    """CVXQ (arXiv 2409.02026): scalar codes, with a bit depth for every small group of weights.

    Args:
        bits: all-in target over the quantized weights (codes, depths, scales, locations, row
            permutation and added biases together), 1 to 8. None: whatever `mean_depth`, then
            required, costs.
        size: of the saved files instead: "7.5GB" (GiB, MB, ...) or a number of bytes for all of the
            `*.safetensors` files, their index and config.json, or "fits:8GB" ("fits:8GB@4096") for
            what leaves room in 8 GB for the key-value cache of 4096 tokens, or as many as the model
            takes, and for activations. Never exceeded. None: `bits` decides.
        mean_depth: 1/32 to 8 bits per weight for the codes alone (the paper's R). None: what
            `bits` leaves.
        group_rows: 1 to 65536 rows that share a depth and a scale in every column; more than a
            matrix has: all of them. None: chosen per matrix.
        scale_dtype: "log8" (8-bit codes on a logarithmic grid per cluster of rows), "float16" or
            "float32".
        location: "none": groups are centred on 0. "int8", "float16" or "float32": each has a
            location of its own, stored so.
        levels: "lloyd": the best ones for Gaussian weights. "laplace" (or "companding"): those of
            the paper's compander.
        permuted: cluster rows by size and sensitivity and store their order. None: where it pays.
        error_feedback: let later columns make up for the error of earlier ones, and allocate depths
            by what that leaves; False: the paper's recipe.
        distortion: "measured": depths are allocated by what the quantizer really loses at a depth.
            "law": by the paper's 2^-2B.
        reallocations: 0 to 100 times depths are allocated anew, by the weights as error feedback
            made them, as long as that helps.
        refine_iterations: 0 to 100 rounds of refining scales and codes after the sweep.
        fit_rounds: 1 to 100 rounds of fitting a group's scale and its codes to each other.
        damping: 0 to 1, share of the Hessian's mean diagonal that is added to its diagonal.
        bias_correction: let biases make up for the mean error of the outputs (section 7); layers
            without one get one, counted in `bits`.
        true_sequential: q/k/v, o, gate/up and down one after another, each on inputs from already
            quantized layers; False: one pass per block.
        asymmetric_calibration: let every layer aim at what the original model computes, so that it
            also corrects what the layers before it have lost (GPTAQ, arXiv 2504.02692); costs a
            second walk through the model. False: aim at the layer's own weight.
        calibration_inputs: "quantized": a layer is calibrated on what the already quantized layers
            before it put out. "original": on the original model's activations, every layer by
            itself, as in the paper; true_sequential and asymmetric_calibration then mean nothing.
        allocation: "measured": bits go to the matrices, and inside of them to the rows, where an
            error changes the model's predictions most, found out by one backward pass over a few
            thousand calibration tokens; "uniform": all weights count the same. `bits` holds for all
            matrices together either way.
        sensitivity: what an error is measured by. "loss": the divergence of the model's predictions
            from what they were; "hidden": the final hidden states (CVXQ's objective); "pca": their
            leading principal components (CVXQ section 3).
        weight_energies: square gradients weight by weight, as the paper does, which takes 4 bytes
            per weight; False: row by row, and by the inputs' second moments in the columns.
        reestimations: 0 to 10 times everything is measured again on the quantized model, and
            quantized again.
        quantize_embeddings: pack the token embeddings too; they share the target with the other
            matrices. Weights tied with them are packed once and stay tied.
        quantize_lm_head: pack the output head too; where it is tied, the embeddings with it.
        seed: 0 to 2**63-1, for the calibration windows.
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

    method: ClassVar[str] = "cvxq"
    rules: ClassVar[dict[str, Rule]] = {
        "bits": Number(1, 8, optional=True),
        "size": SizeRule(),
        "mean_depth": Number(1 / 32, 8, optional=True),
        "group_rows": Number(1, 65536, integer=True, optional=True),
        "scale_dtype": Choice(("log8", "float16", "float32")),
        "location": Choice(("none", "int8", "float16", "float32")),
        "levels": Choice(("lloyd", "laplace"), aliases=(("companding", "laplace"),)),
        "permuted": Flag(optional=True),
        "error_feedback": Flag(),
        "distortion": Choice(("measured", "law")),
        "reallocations": Number(0, 100, integer=True),
        "refine_iterations": Number(0, 100, integer=True),
        "fit_rounds": Number(1, 100, integer=True),
        "damping": Number(0, 1),
        "bias_correction": Flag(),
        "true_sequential": Flag(),
        "asymmetric_calibration": Flag(),
        "calibration_inputs": Choice(("quantized", "original")),
        "allocation": Choice(("measured", "uniform")),
        **SHARED_RULES,
        "weight_energies": Flag(),
        "seed": Number(0, 2**63 - 1, integer=True),
        "nsamples": Number(1, 1_000_000, integer=True),
        "seqlen": Number(8, 1_048_576, integer=True, optional=True),
    }
    spec_fields: ClassVar[tuple[str, ...]] = (
        "mean_depth",
        "group_rows",
        "scale_dtype",
        "location",
        "levels",
        "permuted",
    )
    layer_fields: ClassVar[frozenset[str]] = frozenset(rules) - {
        "true_sequential",
        "asymmetric_calibration",
        "calibration_inputs",
        "size",
        "allocation",
        *SHARED_RULES,
        "weight_energies",
        "seed",
        "nsamples",
        "seqlen",
    }

    def __init__(
        self,
        bits: float | None = _BITS,
        *,
        size: str | int | None = None,
        mean_depth: float | None = None,
        group_rows: int | None = None,
        scale_dtype: str = "log8",
        location: str = "none",
        levels: str = "lloyd",
        permuted: bool | None = None,
        error_feedback: bool = True,
        distortion: str = "measured",
        reallocations: int = 1,
        refine_iterations: int = 4,
        fit_rounds: int = 3,
        damping: float = 0.01,
        bias_correction: bool = False,
        true_sequential: bool = True,
        asymmetric_calibration: bool = True,
        calibration_inputs: str = "quantized",
        allocation: str = "measured",
        sensitivity: str = "loss",
        weight_energies: bool = False,
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

    mean_depth: float | None
    group_rows: int | None
    scale_dtype: str
    location: str
    levels: str
    permuted: bool | None
    error_feedback: bool
    distortion: str
    reallocations: int
    refine_iterations: int
    fit_rounds: int
    damping: float
    bias_correction: bool
    true_sequential: bool
    asymmetric_calibration: bool

    def check(self) -> None:
        if self.bits is None and self.size is None and self.mean_depth is None:
            raise ValueError(
                "bits=None leaves the size to the depths: give mean_depth, or a target in bits "
                "from 1 to 8"
            )
        if self.bits is not None and self.mean_depth is not None and self.mean_depth >= self.bits:
            raise ValueError(
                f"mean_depth={self.mean_depth:g} leaves nothing of bits={self.bits:g} for depths "
                "and scales; raise bits, lower mean_depth, or pass bits=None"
            )
