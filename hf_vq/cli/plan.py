"""`hf-vq plan`: what quantizing would make of a model, to the byte, before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_vq.cli.arguments import Dtype, Method, Model, NotConverted, Overrides, Revision
from hf_vq.cli.common import check_dtype, check_model, one_line_errors, stdout
from hf_vq.cli.options import config_class, parse_overrides, with_config_options
from hf_vq.formats.base import LayerSpec
from hf_vq.hub.planning import PlanGroup, group_rows, plan_model
from hf_vq.plan import Plan
from hf_vq.sizes import human


@with_config_options
@one_line_errors
def plan(
    model: Model,
    method: Method = "gptvq",
    modules_to_not_convert: NotConverted = None,
    overrides: Overrides = None,
    measurement: Annotated[
        Path | None,
        typer.Option(
            help="File of the backward pass that tells where bits matter: as "
            "`hf-vq quantize --measurement` wrote it."
        ),
    ] = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
    *,
    fields: dict[str, Any],
) -> None:
    """Print what every matrix of MODEL would become, and the sizes; loads no weights."""
    make_config = config_class(method, fields)
    check_dtype(dtype)
    check_model(model, revision)
    config = make_config(
        **fields,
        modules_to_not_convert=modules_to_not_convert or None,
        overrides=parse_overrides(overrides),
        measurement=measurement,
    )
    found = plan_model(model, config, dtype=dtype, revision=revision)
    if as_json:
        print(json.dumps(as_dict(found, config.to_dict()), indent=2))
    else:
        print_plan(found, method)
        aims = config.bits is not None or config.size is not None
        if config.allocation == "measured" and aims and found.gains is None:
            print(
                "With calibration data, quantizing moves bits between matrices to where an error "
                "matters most; the sum stays within the target. --allocation uniform keeps to this "
                "table."
            )


def as_dict(plan: Plan, settings: dict[str, Any]) -> dict[str, Any]:
    """The plan as plain JSON types."""
    groups = group_rows(plan)
    return {
        "settings": settings,
        "checked_against_files": plan.checked,
        "packed": [group.to_dict() for group in groups if group.spec is not None],
        "dense": [group.to_dict() for group in groups if group.spec is None],
        "totals": plan.ledger().to_dict(),
        **({} if plan.size is None else {"files": plan.size.to_dict()}),
    }


def print_plan(plan: Plan, method: str, console: Console | None = None) -> None:
    """Print the plan as tables."""
    console = console or stdout()
    groups = group_rows(plan)
    packed = Table(
        box=box.SIMPLE_HEAD,
        title=f"{len(plan.layers)} matrices to pack with {method}",
        title_justify="left",
    )
    _columns(packed, "bits")
    packed.add_column("geometry", overflow="fold")
    for group in groups:
        if group.spec is not None:
            packed.add_row(*_cells(group), f"{group.rows[0].bits:.3f}", _geometry(group.spec))
    console.print(packed)
    if plan.dense:
        dense = Table(box=box.SIMPLE_HEAD, title="left dense", title_justify="left")
        _columns(dense)
        dense.add_column("because", overflow="fold")
        for group in groups:
            if group.spec is None:
                dense.add_row(*_cells(group), escape(group.rows[0].reason))
        console.print(dense)
    ledger = plan.ledger()
    sizes = Table(box=box.SIMPLE_HEAD, title="size", title_justify="left")
    sizes.add_column("")
    for name in ("weights", "bytes now", "bytes then", "bits per weight"):
        sizes.add_column(name, justify="right")
    before = sum(row.dense_bytes for row in ledger.rows if not row.reason)
    sizes.add_row(
        "packed, everything counted",
        f"{ledger.packed_params:,}",
        f"{before:,}",
        f"{ledger.packed_bytes:,}",
        f"{ledger.decoder_bits:.3f}",
    )
    sizes.add_row(
        "whole model",
        f"{ledger.model_params:,}",
        f"{ledger.model_dense_bytes:,}",
        f"{ledger.model_bytes:,}",
        f"{ledger.model_bits:.3f}",
    )
    console.print(sizes)
    if plan.size is not None:
        parts = plan.size.to_dict()
        total = parts.pop("total")
        console.print(
            f"files: {total:,} bytes ({human(total)}): "
            + ", ".join(f"{name} {size:,}" for name, size in parts.items() if size)
            + "; config.json will also name the calibration data"
        )
    if not plan.checked:
        console.print("shapes are those of config.json; no weight file confirmed them")


def _columns(table: Table, *more: str) -> None:
    table.add_column("matrices", overflow="fold")
    for name in ("count", "shape", "bytes each", *more):
        table.add_column(name, justify="right", no_wrap=True)


def _cells(group: PlanGroup) -> list[str]:
    first = group.rows[0]
    shape = "x".join(map(str, first.shape))
    names = escape("\n".join(group.patterns))  # rich would take [a] for a style
    return [names, str(len(group.rows)), shape, f"{first.bytes:,}"]


def _geometry(spec: LayerSpec) -> str:
    """The fields that say something: those without a default, and those that differ from it."""
    defaults = {f.name: f.default for f in dataclasses.fields(spec)}
    said = {k: v for k, v in spec.to_dict().items() if v != defaults[k]}
    return " ".join(f"{name}={value}" for name, value in said.items())
