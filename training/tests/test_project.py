"""What the project's files say of versions and checks, each in one place: the others agree with it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import yaml

import mamba3_jepa
from mamba3_jepa.export.environment import OPTIONAL, PACKAGES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest needs there

ROOT = Path(__file__).parents[2]
BOUND = re.compile(r"([\w-]+)>=([\d.]+)")


def toml(path: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / path).read_text(encoding="utf-8"))


def text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def yaml_of(path: str) -> Any:
    return yaml.safe_load(text(path))


def bounds(requirements: list[str]) -> dict[str, str]:
    """Lower bounds by name; every requirement has one, and nothing else."""
    matches = [BOUND.fullmatch(each) for each in requirements]
    assert None not in matches, requirements
    return {match[1]: match[2] for match in matches if match}


def pinned(path: str) -> dict[str, str]:
    """Versions by name of a file of `name==version` lines."""
    lines = [line for line in text(path).splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


PROJECT = toml("training/pyproject.toml")["project"]
REQUIRED = bounds(PROJECT["dependencies"])
EXTRAS = {name: bounds(requirements) for name, requirements in PROJECT["optional-dependencies"].items()}


def test_the_lowest_versions_are_the_declared_bounds() -> None:
    declared = REQUIRED | {
        name: version for extra, of in EXTRAS.items() if extra != "cuda" for name, version in of.items()
    }
    assert pinned("training/constraints-lowest.txt") == declared


def test_requirements_are_what_the_package_declares() -> None:
    lines = text("training/requirements.txt").splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == ["-e ."]


def test_the_pinned_versions_are_within_the_bounds() -> None:
    pins = pinned("training/constraints.txt")
    for name, lowest in {**REQUIRED, **EXTRAS["dev"], **EXTRAS["easy-vqa"], **EXTRAS["tensorboard"]}.items():
        assert [int(part) for part in pins[name].split(".")] >= [int(part) for part in lowest.split(".")], name


def test_the_environment_names_every_dependency() -> None:
    assert set(PACKAGES) == set(REQUIRED)
    assert {name for extra, of in EXTRAS.items() if extra != "dev" for name in of} <= set(OPTIONAL)


def test_versions_stand_in_the_documents() -> None:
    python, msrv = PROJECT["requires-python"].removeprefix(">="), toml("rust/Cargo.toml")["package"]["rust-version"]
    readme = text("README.md")
    assert f"Python {python}+, torch {REQUIRED['torch']}+" in readme
    assert f"Rust {msrv}+" in readme
    assert f"Python {python} or later and Rust {msrv} or later" in text("CONTRIBUTING.md")
    assert f"Rust {msrv} or later" in text("rust/README.md")
    version = PROJECT["version"]
    assert version == mamba3_jepa.__version__ == toml("rust/Cargo.toml")["package"]["version"]
    assert yaml_of("CITATION.cff")["version"] == version
    assert f"## [{version}]" in text("CHANGELOG.md")


def test_the_workflow_runs_what_is_supported() -> None:
    jobs = yaml_of(".github/workflows/ci.yml")["jobs"]
    matrix = jobs["python"]["strategy"]["matrix"]
    assert matrix["python"][0] == PROJECT["requires-python"].removeprefix(">=")
    assert {each["python"] for each in matrix["include"]} == set(matrix["python"])
    assert jobs["rust"]["strategy"]["matrix"]["rust"] == [toml("rust/Cargo.toml")["package"]["rust-version"], "stable"]
    targets = set(re.findall(r"^([\w-]+):", text("Makefile"), re.MULTILINE))
    steps = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    called = {target for run in steps for target in re.findall(r"make ([\w-]+)", run)}
    assert called == {"lint", "test-python", "test-lowest", "test-rust"}
    assert called <= targets


def test_hooks_are_the_checks_of_make_lint_and_make_test() -> None:
    recipes = re.findall(r"^lint-(?:python|rust):.*\n((?:\t.*\n)+)", text("Makefile"), re.MULTILINE)
    variables = {"$(BIN)": "../.venv/bin", "$(CARGO)": "cargo", "$(CRATE)": "--manifest-path rust/Cargo.toml --locked"}
    expected = set()
    for command in re.split(r"\n|&&", "\n".join(recipes)):
        for name, value in variables.items():
            command = command.replace(name, value)
        expected.add(command.strip())
    *hooks, before_a_push = yaml_of(".pre-commit-config.yaml")["repos"][0]["hooks"]
    assert (before_a_push["entry"], before_a_push["stages"]) == ("make test", ["pre-push"])
    entries = [re.sub(r"^sh -c '(?:cd training && )?(.*)'$", r"\1", hook["entry"]) for hook in hooks]
    assert set(entries) == expected - {"", "cd training"}
    assert len(entries) == 6
