"""The HfQuantizer: Transformers' hooks, each a few lines that call a room of the package.

Quantize-on-load calibrates in the last hook, on a model that was loaded on the CPU whatever device
map was asked for: its weights are then memory-mapped views of the files, read block by block, and a
dispatched model could not be calibrated anyway. The packed model is dispatched afterwards.
"""

from __future__ import annotations

import copy
import json
import logging
import os
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer

from hf_vq import dispatch, loading
from hf_vq.configs import VQConfig
from hf_vq.origin import provenance
from hf_vq.registry import get_method
from hf_vq.tying import make_dense

logger = logging.getLogger(__name__)

REPORT_NAME = "quantization_report.json"
EVALUATION_NAME = "evaluation.json"
"""What `hf-vq eval` measured, and of which weights."""


class VQHfQuantizer(HfQuantizer):
    """Quantizes on load, or loads what was packed, for every method in `hf_vq.registry`."""

    # True would make Transformers refuse models that are not packed yet
    requires_calibration = False

    quantization_config: VQConfig

    def __init__(self, quantization_config: VQConfig, **kwargs: Any) -> None:
        if not isinstance(quantization_config, VQConfig):
            theirs, method = type(quantization_config), quantization_config.quant_method
            method = getattr(method, "value", method)
            ours = f"hf_vq.{get_method(method).config.__name__}"
            raise ValueError(
                f"{theirs.__module__.partition('.')[0]}.{theirs.__name__} cannot quantize a model; "
                f"pass {ours}(...) instead"
            )
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            # the user's own object stays as it is, and can quantize the next model too
            self.quantization_config = copy.deepcopy(quantization_config)
        self.compute_dtype: torch.dtype | None = None
        self.report: dict[str, Any] | None = None
        self.evaluation: dict[str, Any] | None = None
        # set by `hf_vq.saving` while it saves
        self.report_folder: str | None = None
        self.state_dict: dict[str, Any] | None = None
        self._device_map: Any = None
        self._files: list[str] = []
        self._model: nn.Module | None = None
        self._plan: Any = None
        self._samples: torch.Tensor | None = None
        # whether `hf_vq.tuning.codebooks` has made the codebooks trainable
        self.trains_codebooks = False

    # -- before the weights -------------------------------------------------------------

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        config = self.quantization_config
        dispatch.check_devices("device_map", device_map)
        if self.pre_quantized:
            if getattr(config, "asked_to_quantize", False):
                raise ValueError(
                    "this model is already quantized (its config.json says "
                    f"{config.method}). To use it, load it without quantization_config; to "
                    "quantize it differently, start from the original model"
                    f"{f' ({base})' if (base := config.recorded.get('base_model')) else ''}"
                )
            return
        if config.dequantize:
            raise ValueError(
                "dequantize=True is for loading a packed model, and this one is not packed; leave "
                "it out to quantize"
            )
        if dispatch.needs_offload_folder(device_map) and config.offload_folder is None:
            raise ValueError(
                "this device_map keeps modules on disk: name a folder for them with "
                f"{type(config).__name__}(offload_folder=...)"
            )
        dispatch.check_devices("calibration_device", config.calibration_device)
        _refuse_sharded_loading()

    def update_device_map(self, device_map: Any) -> Any:
        if self.pre_quantized:
            return device_map
        self._device_map = device_map
        return {"": "cpu"}

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self.compute_dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        self._files = list(checkpoint_files or [])
        if self.pre_quantized:
            loading.swap_in_empty(model, self.quantization_config, self.compute_dtype)
            self._model = model
        else:
            self._prepare(model)
        return model

    def update_weight_conversions(self, weight_conversions: list, model: Any = None) -> list:
        # 5.17 does not pass the model; both call this after the packed layers are in place
        if self._model is not None:
            loading.verify_files(
                self._model, self._files, loading.renames(self._model, weight_conversions)
            )
            self._model = None
        return weight_conversions

    # -- after the weights --------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            return self._quantize(model)
        loading.finish(model)
        _prepare_for_peft(model)
        _forget_nested_config(model.config)
        self.report = _read_beside(self._files, REPORT_NAME)
        self.evaluation = _read_beside(self._files, EVALUATION_NAME)
        loading.set_backend(model, self.quantization_config.backend)
        if self.quantization_config.dequantize:
            return self._dequantize(model, self.compute_dtype)
        return model

    def _prepare(self, model: Any) -> None:
        """Find out what would go wrong before an hour is spent on loading and calibrating."""
        from hf_vq.engine.calibration import load_calibration
        from hf_vq.engine.measurement import stored
        from hf_vq.plan import make_plan

        with torch.device("cpu"):  # Transformers builds the model under a meta device context
            self._plan = make_plan(model, self.quantization_config)
            text = model.config.get_text_config()
            _warn_of_dense_matrices(model, self._plan)
            self._samples = load_calibration(
                self.quantization_config,
                model.name_or_path,
                getattr(text, "max_position_embeddings", None),
                getattr(text, "vocab_size", None),
            )
            check_sample_size(self._samples, self._plan)
            if self.quantization_config.size is not None:
                # to the byte, now that it is known how the calibration will be described
                recorded = self._provenance(model)
                self._plan = make_plan(model, self.quantization_config, recorded=recorded)
            config = self.quantization_config
            asked = (config.sensitivity, config.weight_energies)
            stored(config.measurement, self._plan.layers, asked=asked)

    def _provenance(self, model: Any) -> dict[str, Any]:
        return provenance(self.quantization_config, model.name_or_path, self._samples, self._files)

    def _quantize(self, model: Any) -> Any:
        from hf_vq.engine.whole import quantize_whole

        config, samples = self.quantization_config, self._samples
        recorded, planned = self._provenance(model), self._plan
        self._plan = self._samples = None
        plan, reporter = quantize_whole(model, config, samples, planned, recorded)
        record(config, model, samples, self._files)
        self.report = {**reporter.to_dict(), "ledger": plan.ledger().to_dict(), "dense": plan.dense}
        if plan.gains is not None:
            self.report["gains"] = dict(plan.gains)
        self.pre_quantized = True
        _prepare_for_peft(model)
        loading.set_backend(model, config.backend)
        dispatch.dispatch(model, self._device_map, config.max_memory, config.offload_folder)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        from accelerate.utils import align_module_device

        # saving a model leaves the dtype's name in its config
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for name, layer in loading.packed_layers(model).items():
            with ExitStack() as stack:
                for part in layer.modules():  # brings offloaded tensors back for the moment
                    stack.enter_context(align_module_device(part))
                make_dense(model, name, wanted)
        model.__dict__.pop("hqq_quantized", None)
        _warn_of_added_biases(model, self.quantization_config)
        return model

    def forget_if_dense(self, model: Any) -> None:
        """Make `model` an ordinary one if its last packed layer has been replaced."""
        if not loading.packed_layers(model):
            self.dequantize(model)

    # -- saving -------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict | None, dict[str, str]]:
        """Called before the config is written: make it describe the layers as they are now.

        What it returns replaces the caller's own `state_dict`, so that has to be handed through.
        """
        config = self.quantization_config
        config.layers = loading.describe(model, config.method)
        if not config.layers:  # everything was merged or dequantized
            model.config.__dict__.pop("quantization_config", None)
            return self.state_dict, {}
        model.config.quantization_config = config
        kept = {REPORT_NAME: self.report, EVALUATION_NAME: self.evaluation}
        for name, content in kept.items():
            if content is not None and self.report_folder is not None:
                with open(os.path.join(self.report_folder, name), "w", encoding="utf-8") as file:
                    json.dump(content, file, indent=2)
                    file.write("\n")
        # no metadata for the files: safetensors writes several entries in random order, and the
        # same model must give the same bytes
        return self.state_dict, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return self.trains_codebooks

    @property
    def is_compileable(self) -> bool:
        return True


def record(config: VQConfig, model: Any, samples: torch.Tensor | None, files: list[str]) -> None:
    """Write into `config` what the packed model is, where it comes from and what calibrated it."""
    config.recorded = provenance(config, model.name_or_path, samples, files)
    config.layers = loading.describe(model, config.method)
    # done with; and a model whose config holds a generator could not be pickled
    config.dataset = config.tokenizer = None


def check_sample_size(samples: torch.Tensor | None, plan: Any) -> None:
    """Raise ValueError if there are fewer tokens than some matrix has inputs.

    Its Hessian would be singular, and the codes fitted to the few directions that were seen.
    """
    if samples is None:
        return
    name, spec = max(plan.layers.items(), key=lambda item: item[1].in_features)
    if samples.numel() < spec.in_features:
        raise ValueError(
            f"{samples.numel()} calibration tokens ({samples.shape[0]} x {samples.shape[1]}) are "
            f"too few for the Hessian of {name}, which has {spec.in_features} inputs: give at "
            f"least {spec.in_features} tokens, better 100 times as many, or dataset=None"
        )


def _warn_of_dense_matrices(model: Any, plan: Any) -> None:
    """Say that a good part of the model cannot be packed, if so: its files stay large."""
    rows = plan.surprises()
    weights, total = sum(row.params for row in rows), plan.ledger().model_params
    if 100 * weights > total:
        first = max(rows, key=lambda row: row.params)
        logger.warning(
            "%d matrices with %.0f %% of the weights of this %s stay dense, first of all %s: %s; "
            "`hf-vq plan` lists every one with its reason",
            len(rows),
            100 * weights / total,
            type(model).__name__,
            first.name,
            first.reason,
        )


def _warn_of_added_biases(model: Any, config: VQConfig) -> None:
    """Biases that quantization has added have no place in the model's own files: say so."""
    if not config.bias_correction:
        return
    architecture = copy.deepcopy(model.config)
    architecture.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        plain = type(model)(architecture)
    known = {name for name, _ in plain.named_parameters()}
    added = [n for n, _ in model.named_parameters() if n.endswith(".bias") and n not in known]
    if added:
        logger.warning(
            "%d layers of this dense model (first: %s) have biases from bias_correction that %s "
            "has no place for: saved and loaded again it loses them; keep the packed files",
            len(added),
            added[0].removesuffix(".bias"),
            type(model).__name__,
        )


def _prepare_for_peft(model: Any) -> None:
    """Let `prepare_model_for_kbit_training` take the model for a quantized one.

    PEFT knows quantized models by a list of names, and of any other casts all 16-bit parameters to
    float32, codebooks too, and leaves gradient checkpointing off. This is the one of its flags that
    is looked at nowhere else.
    """
    model.hqq_quantized = True


def _forget_nested_config(config: Any) -> None:
    """A multimodal model may keep its quantization_config with its text model: one is enough.

    Transformers has put it into the model's own config by now, and would save both.
    """
    text = config.get_text_config(decoder=True)
    if text is not config:
        text.__dict__.pop("quantization_config", None)


def _refuse_sharded_loading() -> None:
    from transformers.integrations import is_deepspeed_zero3_enabled
    from transformers.integrations.fsdp import is_fsdp_enabled

    if is_fsdp_enabled() or is_deepspeed_zero3_enabled():
        raise ValueError(
            "quantizing while loading needs the whole model in one process, and FSDP or DeepSpeed "
            "ZeRO-3 loads pieces of it; quantize and save first, then load the packed model"
        )


def _read_beside(files: list[str], name: str) -> dict[str, Any] | None:
    """The JSON object `name` in the folder of these files; None where there is none."""
    path = os.path.join(os.path.dirname(files[0]), name) if files else ""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
