"""The methods there are: one line each.

Everything that depends on the method goes through this table, so that adding one means adding a
line here and nowhere an `if`. The parts are named, not imported, so that asking for one (a config,
say) does not import the others.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def _load(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


@dataclass(frozen=True)
class Method:
    """Where the parts of a method live, as "module:attribute"."""

    name: str
    config_path: str
    spec_path: str
    choose_spec_path: str
    expected_error_path: str
    quantize_path: str
    options_path: str

    @property
    def config(self) -> type:
        """Subclass of `hf_vq.configs.VQConfig`."""
        return _load(self.config_path)

    @property
    def spec(self) -> type:
        """Subclass of `hf_vq.formats.base.LayerSpec`."""
        return _load(self.spec_path)

    @property
    def choose_spec(self) -> Callable[..., Any]:
        """(out_features, in_features, bits, overrides) -> spec."""
        return _load(self.choose_spec_path)

    @property
    def expected_error(self) -> Callable[..., float]:
        """spec -> error per weight, relative to the weights' energy; only ratios count."""
        return _load(self.expected_error_path)

    @property
    def quantize(self) -> Callable[..., Any]:
        """(weight, statistics, spec, options) -> a result: its codes, what they cost, notes.

        Where only the codes say how large they are, `result.spec` is theirs and takes the place of
        the one asked for, which is never smaller.
        """
        return _load(self.quantize_path)

    @property
    def options(self) -> type:
        """Dataclass of what `quantize` may be told; its fields are fields of the config too."""
        return _load(self.options_path)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "gptvq",
            "hf_vq.configs:GPTVQConfig",
            "hf_vq.formats.gptvq:GPTVQSpec",
            "hf_vq.methods.gptvq_spec:choose_spec",
            "hf_vq.methods.gptvq_spec:expected_error",
            "hf_vq.methods.gptvq:quantize",
            "hf_vq.methods.gptvq:GPTVQOptions",
        ),
        Method(
            "vptq",
            "hf_vq.configs:VPTQConfig",
            "hf_vq.formats.vptq:VPTQSpec",
            "hf_vq.methods.vptq_spec:choose_spec",
            "hf_vq.methods.vptq_spec:expected_error",
            "hf_vq.methods.vptq:quantize",
            "hf_vq.methods.vptq:VPTQOptions",
        ),
        Method(
            "cvxq",
            "hf_vq.configs:CVXQConfig",
            "hf_vq.formats.cvxq:CVXQSpec",
            "hf_vq.methods.cvxq_spec:choose_spec",
            "hf_vq.methods.cvxq_spec:expected_error",
            "hf_vq.methods.cvxq:quantize",
            "hf_vq.methods.cvxq:CVXQOptions",
        ),
    )
}


def get_method(name: str) -> Method:
    """The method called `name`; raises ValueError listing the known ones."""
    try:
        return METHODS[name]
    except KeyError:
        raise ValueError(f"unknown method {name!r}; hf_vq has {', '.join(METHODS)}") from None
