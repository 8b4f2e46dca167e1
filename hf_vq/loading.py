"""From a packed checkpoint to packed layers, refusing a damaged one before reading it.

Transformers fills what a file lacks with random values and reports it in a table; 5.17 also takes
tensors of any shape for a quantized model. So the files' headers are compared with the specs first.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import nn

from hf_vq.configs import VQConfig
from hf_vq.formats import FORMATS, FormatError, LayerSpec
from hf_vq.layers import Packed, PackedLinear
from hf_vq.patterns import matches
from hf_vq.tying import empty_like, swap

logger = logging.getLogger(__name__)

_DTYPES = {
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float32": "F32",
}
_AGAIN = "download it or quantize the model again"


def packed_layers(model: nn.Module) -> dict[str, Any]:
    """Name -> packed linear layer or embedding, in the order of the model's definition.

    Without those that hold the tensors of another one.
    """
    return {n: m for n, m in model.named_modules() if isinstance(m, Packed) and not m.tied_to}


class Layers(NamedTuple):
    """What a config says about a model: live name -> (spec, has a bias), and names it has not."""

    found: dict[str, tuple[LayerSpec, bool]]
    absent: list[str]


def find_layers(model: nn.Module, config: VQConfig, dtype: str = "float16") -> Layers:
    """Match the layers that a config lists with the linear layers of a model that is not packed.

    Names are matched with and without the model's base prefix, because AutoModel's classes have
    none, and as older versions of Transformers had them. dtype: of codebooks, where neither the
    config nor a file says. Raises `FormatError` for a layer listed twice, of another kind, or with
    a bad description.
    """
    known = FORMATS[config.method]
    recorded = known.read_layers(config.recorded)
    shared = known.read_shared(config.recorded)
    if not recorded and not shared:
        raise FormatError(
            "config.json has a quantization_config but lists no packed layers in it: it is "
            f"damaged; {_AGAIN}"
        )
    live_name = _Names(model)
    entries: dict[str, tuple[str, dict[str, Any]]] = {}  # live name -> (name it is listed by, ...)
    absent = []
    for name, entry in recorded.items():
        here = live_name(name)
        if here is None:
            _refuse_fused(model, live_name, name)
            absent.append(name)
        elif here in entries:
            raise FormatError(f"{name}: config.json lists it twice, also as {entries[here][0]}")
        else:
            entries[here] = name, entry
    skip = config.modules_to_not_convert or ()
    for name, module in model.named_modules():
        entry = shared.get(name.rpartition(".")[2], {})
        if not entry or name in entries or type(module) is not nn.Linear:
            continue
        if not any(matches(pattern, name) for pattern in skip):
            entries[name] = name, entry
    found = {}
    for here, (name, entry) in entries.items():
        listed: Any = model.get_submodule(here)
        if type(listed) not in (nn.Linear, nn.Embedding):
            raise FormatError(
                f"{name}: config.json lists it as packed, but in {type(model).__name__} it is a "
                f"{type(listed).__name__}, not a linear layer; the config belongs to another model"
            )
        bias = getattr(listed, "bias", None) is not None
        rows, columns = listed.weight.shape
        spec = known.make_spec(rows, columns, entry, name, dtype)
        found[here] = spec, known.has_bias(entry, bias)
    if not found:
        raise FormatError(
            f"config.json lists {len(recorded) or len(shared)} packed layers (first: "
            f"{next(iter(recorded or shared))}) and {type(model).__name__} has none of them; load "
            "it with the class it was saved from"
        )
    return Layers(found, absent)


def _refuse_fused(model: nn.Module, names: _Names, name: str) -> None:
    """Without its weight, which is part of a larger parameter here, a model would be random."""
    parameter = names.renamed(name)
    if parameter in dict(model.named_parameters()):
        raise FormatError(
            f"{name}: it is packed, but this version of Transformers keeps its weight inside of "
            f"{parameter}, which {type(model).__name__} needs whole; such experts cannot be loaded"
        )


def swap_in_empty(model: nn.Module, config: VQConfig, compute_dtype: Any) -> None:
    """Replace the linear layers that a config lists by empty packed ones on the meta device.

    Raises `FormatError` as `find_layers` does.
    """
    dtype = str(compute_dtype).removeprefix("torch.") if compute_dtype else "float16"
    layers = find_layers(model, config, dtype)
    for name, (spec, bias) in layers.found.items():
        swap(model, name, empty_like(model.get_submodule(name), spec, bias, compute_dtype))
    if layers.absent:
        logger.warning(
            "%s has no %s and %d more of the packed layers in the checkpoint; they are not loaded",
            type(model).__name__,
            layers.absent[0],
            len(layers.absent) - 1,
        )


class _Names:
    """Name of a module in a checkpoint -> its name in a model, or None where there is none."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.live = {name for name, _ in model.named_modules()}
        self.rename: Callable[[str], str] | None = None

    def __call__(self, name: str) -> str | None:
        return next((c for c in self._candidates(name) if c in self.live), None)

    def _candidates(self, name: str) -> Iterator[str]:
        prefix = f"{getattr(self.model, 'base_model_prefix', '')}."
        yield from (name, name.removeprefix(prefix), prefix + name)
        yield self.renamed(name).removesuffix(".weight")

    def renamed(self, name: str) -> str:
        """The parameter of the model that Transformers makes of the module's weight."""
        if self.rename is None:  # takes a while, and few models need it
            from transformers.conversion_mapping import get_model_conversion_mapping

            self.rename = renames(self.model, get_model_conversion_mapping(self.model))  # type: ignore[arg-type]
        return self.rename(f"{name}.weight")


def renames(model: Any, conversions: list) -> Callable[[str], str]:
    """key in a file -> name in the model, by Transformers' own rules for this model."""
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    state = model.state_dict()
    prefix = model.base_model_prefix

    def rename(key: str) -> str:
        return rename_source_key(key, renamings, converters, prefix, state)[0]

    return rename


def verify_files(
    model: nn.Module, files: Iterable[str], rename: Callable[[str], str] = lambda key: key
) -> None:
    """Compare the headers of safetensors files with the packed layers of a model on meta.

    Layers whose codebooks have another dtype in the files than they were made with are made again.
    `rename` maps a key in a file to the model's name of that parameter. Raises `FormatError` naming
    layer, file and what to do: for an unreadable or truncated file, a missing or extra tensor, a
    wrong shape or dtype.
    """
    layers = packed_layers(model)
    format_names = {n for layer in layers.values() for n in layer.spec.layout()}
    dense = {n for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Embedding)}
    found: dict[str, dict[str, _Stored]] = {name: {} for name in layers}
    paths = [f for f in files if f.endswith(".safetensors")]
    if not paths:
        return
    for path in paths:
        where = os.path.basename(path)
        for key, shape, dtype in _header(path):
            for owner, leaf in _splits(rename(key)):
                if owner in layers:
                    found[owner][leaf] = _Stored(shape, dtype, where)
                elif leaf in format_names and owner in dense:
                    raise FormatError(
                        f"{owner}: {where} holds {leaf!r} for it, but config.json does not list it "
                        f"as packed; the files belong to different models; {_AGAIN}"
                    )
    for name, stored in found.items():
        layer = _as_stored(model, name, layers[name], stored)
        for leaf, entry in stored.items():
            _check_entry(name, leaf, entry, layer)
        bias = getattr(layer, "bias", None)
        wanted = [*layer.spec.layout(), *(["bias"] if bias is not None else [])]
        missing = [leaf for leaf in wanted if leaf not in stored]
        if missing:
            names = ", ".join(os.path.basename(p) for p in paths)
            raise FormatError(f"{name}: {missing[0]!r} is missing from {names}; {_AGAIN}")


class _Stored(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    where: str


def _splits(key: str) -> Iterator[tuple[str, str]]:
    """Every way to read a parameter's name as a layer and a tensor of it."""
    for at in (i for i, c in enumerate(key) if c == "."):
        yield key[:at], key[at + 1 :]


def _as_stored(model: nn.Module, name: str, layer: Any, stored: Mapping[str, _Stored]) -> Any:
    dtypes = {leaf: entry.dtype for leaf, entry in stored.items()}
    spec = FORMATS[layer.spec.method].as_stored(layer.spec, dtypes)
    if spec == layer.spec:
        return layer
    bias = getattr(layer, "bias", None) is not None
    swap(model, name, empty_like(layer, spec, bias, layer.compute_dtype))
    return model.get_submodule(name)


def _header(path: str) -> list[tuple[str, tuple[int, ...], str]]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = ((key, file.get_slice(key)) for key in file.keys())  # noqa: SIM118
            return [(key, tuple(s.get_shape()), s.get_dtype()) for key, s in slices]
    except OSError as error:
        reason = error.strerror or str(error).partition(":")[0]
        raise FormatError(f"{path} cannot be read ({reason}); {_AGAIN}") from None
    except SafetensorError as error:
        raise FormatError(f"{path} is no complete safetensors file ({error}); {_AGAIN}") from None


def _check_entry(name: str, leaf: str, stored: _Stored, layer: Any) -> None:
    if leaf == "bias" and getattr(layer, "bias", None) is not None:
        wanted_shape: tuple[int, ...] = (layer.out_features,)
        wanted_dtype = stored.dtype  # a bias takes the model's dtype
    elif leaf in layer.spec.layout():
        layout = layer.spec.layout()[leaf]
        wanted_shape, wanted_dtype = layout.shape, _DTYPES[str(layout.dtype)]
    else:
        raise FormatError(
            f"{name}: {stored.where} holds an extra tensor {leaf!r}, which is no part of a packed "
            f"layer; {_AGAIN}"
        )
    if stored.shape != wanted_shape or stored.dtype != wanted_dtype:
        raise FormatError(
            f"{name}: {leaf!r} in {stored.where} has shape {list(stored.shape)} and dtype "
            f"{stored.dtype}, but config.json describes {list(wanted_shape)} and {wanted_dtype}; "
            f"the files belong to different models or versions; {_AGAIN}"
        )


def finish(model: nn.Module) -> None:
    """Check the values that were loaded, bring old layouts up to date, and freeze everything.

    Transformers rebuilds every floating parameter as a trainable one, so codebooks and scales have
    to be frozen afterwards. Raises `FormatError` for values that cannot be decoded.
    """
    for name, layer in packed_layers(model).items():
        tensors = layer.packed()
        known = FORMATS[layer.spec.method]
        known.check(tensors, layer.spec, name)
        _modernize(model, name, layer)
        for tensor in tensors.values():
            tensor.requires_grad_(False)


def set_backend(model: nn.Module, name: str | None) -> None:
    """Force a backend of the operators for every packed layer of a model, or none."""
    if name is not None:
        for layer in model.modules():
            if isinstance(layer, Packed):
                layer.set_backend(name)


def _modernize(model: nn.Module, name: str, layer: Any) -> None:
    known, tensors = FORMATS[layer.spec.method], layer.packed()
    if known.is_current(layer.spec):
        return
    if any(t.is_meta for t in tensors.values()):
        raise FormatError(
            f"{name}: it is stored in an old layout that has to be converted in memory, and the "
            "device map offloads it; load the model without device_map, save it, and load that"
        )
    modern, spec = known.modernize(tensors, layer.spec)
    bias = None if layer.bias is None else layer.bias.detach()
    new: Any = PackedLinear.from_packed(spec, modern, bias, layer.compute_dtype, name)
    new.train(layer.training)
    if hasattr(layer, "_hf_hook"):  # it moves inputs to the layer's device
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, layer._hf_hook)
    model.set_submodule(name, new)


def describe(model: nn.Module, method: str) -> Any:
    """The packed layers of a model as the config of `method` lists them."""
    layers = packed_layers(model)
    return FORMATS[method].write_layers(
        {
            name: (layer.spec, getattr(layer, "bias", None) is not None)
            for name, layer in layers.items()
        }
    )
