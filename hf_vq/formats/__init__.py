"""Codes <-> tensors on disk: pure functions, one file per format, one table of them all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from hf_vq.formats import gptvq, vptq
from hf_vq.formats.base import LayerSpec, TensorLayout
from hf_vq.formats.validation import FormatError, check_layout, check_version

__all__ = [
    "FORMATS",
    "Format",
    "FormatError",
    "LayerSpec",
    "TensorLayout",
    "check_layout",
    "check_version",
]


@dataclasses.dataclass(frozen=True)
class Format:
    """How one method's matrices are stored.

    pack(codes, spec) -> the tensors of spec.layout(); unpack(tensors, spec) -> codes;
    check(tensors, spec, where) raises `FormatError` naming layer `where`.
    """

    spec_class: type[LayerSpec]
    version: str
    pack: Callable[[Any, Any], dict[str, Tensor]]
    unpack: Callable[[Mapping[str, Tensor], Any], Any]
    check: Callable[[Mapping[str, Tensor], Any, str], None]

    def make_spec(
        self, out_features: int, in_features: int, fields: Mapping[str, Any], where: str
    ) -> LayerSpec:
        """The spec of one layer from its `config.json` entry (without "modules").

        A field this version does not know would change how the layer is decoded, so it is refused
        like a missing or impossible one: `FormatError` naming layer `where`.
        """
        known = {f.name: f for f in dataclasses.fields(self.spec_class)}
        del known["out_features"], known["in_features"]
        problems = [f"unknown field {name!r}" for name in fields if name not in known]
        problems += [
            f"missing field {name!r}"
            for name, field in known.items()
            if name not in fields and field.default is dataclasses.MISSING
        ]
        if not problems:
            try:
                return self.spec_class(out_features=out_features, in_features=in_features, **fields)
            except (ValueError, TypeError) as error:
                problems.append(str(error))
        raise FormatError(
            f"{where}: config.json does not describe a {self.spec_class.method} layer: "
            f"{'; '.join(problems)}."
        )


FORMATS: dict[str, Format] = {
    "gptvq": Format(gptvq.GPTVQSpec, gptvq.FORMAT_VERSION, gptvq.pack, gptvq.unpack, gptvq.check),
    "vptq": Format(vptq.VPTQSpec, vptq.FORMAT_VERSION, vptq.pack, vptq.unpack, vptq.check),
}
