"""Imports run one way: down the list of folders, and never in a circle between files."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "mamba3_jepa"
# From the ground up: a folder, or a file beside the folders, imports from itself and from what stands before it.
FLOORS = [
    "errors", "addresses", "contract", "stop_signals", "config", "overrides", "device", "count_report", "settings",
    "files", "data", "models", "evaluation", "inference", "export", "training", "bench", "cli",
]  # fmt: skip
LIGHT = ("errors", "addresses", "contract", "stop_signals", "config", "overrides", "settings")
HEAVY = ("torch", "numpy", "transformers", "tokenizers", "PIL", "matplotlib", "accelerate", "torchmetrics", "sacrebleu")


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere in it, those for type checkers too; of `from m import n` both m and m.n."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name without the package's, but for the `__init__` files."""
    paths = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in paths}


def arrows() -> dict[str, set[str]]:
    """For each module the modules of the package that it imports."""
    known = modules()
    inside = {name: {each.removeprefix("mamba3_jepa.") for each in imports(path)} for name, path in known.items()}
    return {name: {each for each in found if each in known} for name, found in inside.items()}


def test_every_folder_has_its_floor() -> None:
    assert {name.partition(".")[0] for name in modules()} == set(FLOORS)


def test_imports_run_downwards() -> None:
    floor = {name: number for number, name in enumerate(FLOORS)}
    upwards = [
        f"{name} imports {other}"
        for name, others in arrows().items()
        for other in sorted(others)
        if floor[other.partition(".")[0]] > floor[name.partition(".")[0]]
    ]
    assert not upwards


def test_no_two_files_import_each_other() -> None:
    left = arrows()
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert not left, "in a circle, or above one"


def test_settings_import_nothing_heavy() -> None:
    for name, path in modules().items():
        if name.partition(".")[0] in LIGHT:
            assert not {each.partition(".")[0] for each in imports(path)} & set(HEAVY), name
