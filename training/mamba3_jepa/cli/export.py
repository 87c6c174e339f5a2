"""The commands `mamba3-jepa export` and `mamba3-jepa inspect`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from mamba3_jepa.cli import output
from mamba3_jepa.cli.output import printable
from mamba3_jepa.config import preset
from mamba3_jepa.overrides import flattened, keys, type_name, values_by_key
from mamba3_jepa.settings.export import ExportSettings, InspectSettings

_WIDEST = 100  # of a value on the screen; --json shows it whole


def export(settings: Annotated[ExportSettings, tyro.conf.arg(name="")]) -> None:
    """Write a checkpoint's weights as safetensors files, for readers in any language."""
    from mamba3_jepa.export.exporter import export_weights

    report = export_weights(settings)
    if settings.json:
        output.write_out(report)
        return
    console = Console()
    table = Table("file", _right("tensors"), _right("numbers"), _right("bytes"), box=box.SIMPLE)
    for file in report.files:
        table.add_row(file.path.name, f"{file.tensors}", f"{file.parameters:,}", f"{file.size:,}")
    console.print(table)
    golden = f", with inputs and outputs of {len(report.golden)} components in golden/" if report.golden else ""
    output.say(f"written to {settings.output}{golden}")
    if report.differences:
        columns = ("largest difference", "allowed", f"due to {settings.dtype}")
        table = Table("verified", *map(_right, columns if settings.dtype != "float32" else columns[:2]), box=box.SIMPLE)
        for difference in report.differences:
            numbers = (difference.largest, difference.allowed, difference.rounding)
            table.add_row(difference.output, *(f"{number:.3g}" for number in numbers[: len(table.columns) - 1]))
        console.print(table)


def inspect(settings: Annotated[InspectSettings, tyro.conf.arg(name="")]) -> None:
    """Say what a checkpoint or a safetensors file holds: phase, configuration, data, metrics, tensors, counts."""
    settings.check()
    if settings.environment:
        _show_environment(settings)
        return
    if settings.file is None:
        _show_preset(settings)
        return
    from mamba3_jepa.device import checked_device
    from mamba3_jepa.export.inspect import inspect_file

    checked_device(settings.device)
    found = inspect_file(settings.file)
    console = Console()
    if settings.json:
        output.write_out(found)
        return
    heading = f"{found['file']}: {found['kind']}, {found['bytes']:,} bytes"
    if found["kind"] == "checkpoint":
        heading += f", phase {found['phase']}, {'resumable' if found['resumable'] else 'weights only'}"
        if found["temperature"] is not None:
            heading += f", learned temperature {found['temperature']:.4g}"
    output.say(heading)
    descriptions = found.get("metadata", {}).get("tensors")  # golden files say what each tensor is
    if isinstance(descriptions, dict):
        del found["metadata"]["tensors"]
    else:
        descriptions = {}
    for name in ("metadata", "config", "data", "metrics", "run"):
        if found.get(name):
            console.print(_values(name, found[name]))
    if "tensors" in found:
        table = Table("tensor", "dtype", "shape", *(["what"] if descriptions else []), box=box.SIMPLE)
        for tensor in found["tensors"]:
            shape = " x ".join(map(str, tensor["shape"])) or "scalar"
            row = [tensor["name"], tensor["dtype"], shape, descriptions.get(tensor["name"], "")]
            table.add_row(*(Text(printable(str(cell))) for cell in row[: len(table.columns)]))
        console.print(table)
    counts = [(printable(name), f"{count:,}") for name, count in found["parameters"].items()]
    console.print(output.table(("component", "numbers"), counts))


def _show_preset(settings: InspectSettings) -> None:
    """Every key of a model configuration with its value and type, as `model` of the training commands takes it."""
    config = preset(settings.preset or "small")
    if settings.json:
        output.write_out(dataclasses.asdict(config))
        return
    types = keys()
    rows = [
        (key, str(value).lower() if isinstance(value, bool) else str(value))
        for key, value in values_by_key(config).items()
    ]
    table = Table(Column("key", no_wrap=True), "value", "takes", box=box.SIMPLE)
    for key, value in rows:
        table.add_row(key, Text("null" if value == "None" else value), type_name(types[key]))
    Console().print(table)


def _show_environment(settings: InspectSettings) -> None:
    """Versions, devices and kernels."""
    from mamba3_jepa.export.environment import environment

    found = environment()
    if settings.json:
        output.write_out(found)
        return
    for name, values in found.items():
        Console().print(_values(name, {key: "none" if value is None else value for key, value in values.items()}))


def _right(name: str) -> Column:
    return Column(name, justify="right")


def _values(name: str, values: Mapping[str, Any]) -> Table:
    """A table of nested values, each under its dotted name."""
    table = Table(name, "", box=box.SIMPLE)
    for key, value in flattened(values).items():
        text = printable(f"{value:.6g}" if isinstance(value, float) else str(value))
        short = text if len(text) <= _WIDEST else f"{text[:_WIDEST]}... ({len(text):,} characters)"
        table.add_row(Text(printable(key)), Text(short))
    return table
