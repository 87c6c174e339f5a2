"""Short runs, whose arguments a test may change: on the command line an option stands once."""

from __future__ import annotations

from collections.abc import Sequence

BENCH_LAYER = [
    "--d-model", "32", "--d-state", "8", "--headdim", "16", "--batch", "1", "--length", "20", "--rounds", "1",
    "--no-compiled", "--no-packages",
]  # fmt: skip
BENCH_DATA = [
    "--preset", "tiny", "--workers", "0", "--n-images", "8", "--batch-size", "8", "--seconds", "0.1", "--steps", "1",
]  # fmt: skip


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
