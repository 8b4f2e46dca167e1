"""How large the files of a packed model will be, before it is packed, to the byte.

Counted are the `*.safetensors` files, their index and `config.json`. Transformers' own steps are
taken on a copy of the model without values: its layers are replaced by empty packed ones, and what
`save_pretrained` does to names, tied weights and shards is done to them. Only the header of a
safetensors file, which cannot be had without the file, is written here after its specification.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_vq import loading
from hf_vq.config_base import VQConfig
from hf_vq.formats.base import LayerSpec
from hf_vq.tying import empty_like, swap

SHARD_SIZE = "5GB"
"""Largest file of `hf-vq quantize` unless told; larger ones take fewer bytes for headers."""

# In the order by which safetensors sorts tensors, from the last to the first.
_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_RANK = {dtype: rank for rank, dtype in enumerate(_DTYPES)}


class SavedSize(NamedTuple):
    """Bytes of a saved model, by what they hold."""

    tensors: int
    headers: int
    index_file: int
    config: int

    @property
    def total(self) -> int:
        """What a target size means."""
        return sum(self)

    def to_dict(self) -> dict[str, int]:
        """As plain JSON values."""
        return {
            "tensors": self.tensors,
            "headers": self.headers,
            "index": self.index_file,
            "config": self.config,
            "total": self.total,
        }


class Footprint:
    """The files of one model, whatever becomes of its layers.

    model: a Transformers model on any device, also while it is being loaded; it stays as it is.
    config: how it is quantized. recorded: what `config.json` will say about the result beside the
    layers (`hf_vq.origin.provenance`).
    """

    def __init__(self, model: Any, config: VQConfig, recorded: Mapping[str, Any]) -> None:
        self._outline = _without_values(model)
        self._config = config
        self._recorded = dict(recorded)
        self._linears = {
            name: (module.weight.dtype, getattr(module, "bias", None) is not None)
            for name, module in self._outline.named_modules()
            if isinstance(module, (nn.Linear, nn.Embedding))
        }

    def dense(self, max_shard_size: int | str = SHARD_SIZE) -> SavedSize:
        """Of the model that nothing has been packed of; ask before `packed`."""
        return self._size(None, max_shard_size)

    def packed(
        self, layers: Mapping[str, LayerSpec], max_shard_size: int | str = SHARD_SIZE
    ) -> SavedSize:
        """Of the model with `layers` packed: always the same ones, in whatever geometry."""
        for name, spec in layers.items():
            dtype, bias = self._linears[name]
            layer = self._config.for_layer(name)
            bias = bias or getattr(layer, "bias_correction", False)  # which gives them one
            old = self._outline.get_submodule(name)
            swap(self._outline, name, empty_like(old, spec, bias, dtype))
        config = copy.copy(self._config)
        config.recorded = copy.deepcopy(self._recorded)
        config.layers = loading.describe(self._outline, config.method)
        return self._size(config, max_shard_size)

    def _size(self, config: VQConfig | None, max_shard_size: int | str) -> SavedSize:
        from huggingface_hub import split_state_dict_into_shards_factory

        tensors = self._state_dict()
        split = split_state_dict_into_shards_factory(
            tensors,
            # experts taken out of one fused parameter share its storage, and so a file; the Hub's
            # own functions cannot tell on the meta device
            get_storage_id=lambda tensor: tensor.untyped_storage()._cdata,
            get_storage_size=lambda tensor: tensor.untyped_storage().nbytes(),
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
        shards = [{n: tensors[n] for n in names} for names in split.filename_to_tensors.values()]
        index = 0
        if split.is_sharded:
            parameters = self._outline.num_parameters()
            metadata = {"total_parameters": parameters, **split.metadata}
            content = {"metadata": metadata, "weight_map": split.tensor_to_filename}
            index = len(json.dumps(content, indent=2, sort_keys=True)) + 1
        return SavedSize(
            sum(_nbytes(t) for t in tensors.values()),
            sum(map(header_bytes, shards)),
            index,
            self._config_bytes(config),
        )

    def _state_dict(self) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

        model = self._outline
        tensors = model.state_dict()
        for name in model._keys_to_ignore_on_save or ():
            tensors.pop(name, None)
        tensors = remove_tied_weights_from_state_dict(tensors, model)
        return revert_weight_conversion(model, tensors)

    def _config_bytes(self, config: VQConfig | None) -> int:
        written = copy.deepcopy(self._outline.config)
        for name in ("quantization_config", "transformers_weights"):
            written.__dict__.pop(name, None)
        if config is not None:
            written.quantization_config = config
        written.dtype = str(self._outline.dtype).removeprefix("torch.")
        written.architectures = [type(self._outline).__name__.removeprefix("FSDP")]
        return len(written.to_json_string().encode())


def header_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that safetensors writes before the first tensor of a file.

    A length of 8 bytes, then JSON without spaces, filled up to a multiple of 8. Tensors are in the
    order of their dtypes, the widest first, and of their names within one.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, t in sorted(tensors.items(), key=lambda item: (-_RANK[item[1].dtype], item[0])):
        end = at + _nbytes(t)
        header[name] = {
            "dtype": _DTYPES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    return 8 + math.ceil(len(text.encode()) / 8) * 8


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _without_values(model: Any) -> Any:
    """A copy on the meta device, with the weights tied that are going to be."""
    memo: dict[int, Any] = {id(getattr(model, "hf_quantizer", None)): None}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    outline = copy.deepcopy(model, memo)
    # while Transformers loads a model, tied weights still stand apart
    keys = getattr(outline, "all_tied_weights_keys", None) or {}
    for target, source in keys.items():
        owner, _, leaf = target.rpartition(".")
        try:
            setattr(outline.get_submodule(owner), leaf, outline.get_parameter(source))
        except AttributeError:  # neither a parameter of this model, nor stored
            continue
    return outline
