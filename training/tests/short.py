"""Short runs whose arguments a test changes: on the command line an option stands once."""

from __future__ import annotations

from collections.abc import Sequence


def changed(short: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """`short`, which has a value behind each option but flags, without what `arguments` says; then these."""
    said = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
    kept: list[str] = []
    name = ""
    for argument in short:
        if argument.startswith("--"):
            name = argument
        if name not in said:
            kept.append(argument)
    return [*kept, *arguments]
