"""A model configuration changed key by key, as `model predictor.n_layers=8` does, or read whole from a JSON file.

A key is the dotted path of a field of `ModelConfig`. What is not a key, or has not its type, is an error that says what
is nearest to it.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from mamba3_jepa.config import ModelConfig, preset
from mamba3_jepa.errors import UserError

# Keys that something else decides, and what.
_DECIDED = {
    "preset": "`preset` chooses it",
    "vision.pretrained": "it tells where the weights come from",
    "recursion.tools": 'the data names them, as "tool_used"',
}


def values_by_key(config: ModelConfig) -> dict[str, Any]:
    """Every key of a configuration with its value, in order."""
    return flattened(asdict(config))


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by their dotted keys, in order."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flattened(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def with_overrides(config: ModelConfig, assignments: Sequence[str], among: Sequence[str] | None = None) -> ModelConfig:
    """`config` with some keys set.

    Args:
        assignments: KEY=VALUE each; a value is read as JSON (8, 0.5, true, null), or else as the text it is.
        among: keys, or the beginnings of keys with their dot, that may be set; None: all.

    Raises:
        UserError: no assignment, an unknown key, a value of the wrong type, or sizes that do not go together.
    """
    if isinstance(assignments, str):
        raise UserError(f"`model` {assignments!r}: expected a list of KEY=VALUE texts, found one text")
    values = config.to_dict()
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise UserError(f"`model` {assignment}: expected KEY=VALUE, such as predictor.n_layers=8")
        _demand_key(key, f"`model` {assignment}")
        if key in _DECIDED:
            raise UserError(f"`model` {assignment}: {key} cannot be set: {_DECIDED[key]}")
        _demand_among(key, among, f"`model` {assignment}")
        *path, last = key.split(".")
        part = values
        for name in path:
            part = part[name]
        part[last] = _value(key, text, f"`model` {assignment}")
    return ModelConfig.from_json(json.dumps(values), source="`model`") if assignments else config


def with_file(config: ModelConfig, path: Path, among: Sequence[str], later: Sequence[str] = ()) -> ModelConfig:
    """`config` with the keys that `among` names taken from a file (see `read_model_config`).

    Otherwise the file agrees with `config`, but for the keys that `later` names.

    Raises:
        UserError: it does not agree in another key, or cannot be read.
    """
    ours, theirs = values_by_key(config), values_by_key(read_model_config(path))
    for key, value in theirs.items():
        if value == ours[key] or key in (*_DECIDED, "vocab_size") or _is_among(key, later):
            continue
        _demand_among(key, among, f"`model_config` {path}: {key} is {value}, the checkpoint has {ours[key]}")
    chosen = [
        f"{key}={json.dumps(value)}" for key, value in theirs.items() if _is_among(key, among) and key not in _DECIDED
    ]
    return with_overrides(config, chosen, among)


def read_model_config(path: Path) -> ModelConfig:
    """A whole configuration from a JSON file: as `inspect --preset mini --json` prints one, or the `config.json` of a
    run or of an export, whose "model" is taken; its vocabulary was learned there, so that the limit counts that was set
    there, or its preset's.

    Raises:
        UserError: the file cannot be read, or is not a valid configuration; names the key.
    """
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"`model_config` {path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"`model_config` {path}: not JSON: {error}") from error
    run = values if isinstance(values, dict) and isinstance(values.get("model"), dict) else None
    if run is not None:
        values = run["model"]
    if not isinstance(values, dict):
        raise UserError(f"`model_config` {path}: expected a JSON object, found {type(values).__name__}")
    for key in flattened(values):
        _demand_key(key, f"`model_config` {path}")
    config = ModelConfig.from_json(json.dumps(values), source=f"`model_config` {path}")
    return config if run is None else _with_limit(config, run)


def _with_limit(config: ModelConfig, run: Mapping[str, Any]) -> ModelConfig:
    """`config` with the largest vocabulary that `run`, the content of its `config.json`, allowed."""
    settings = run.get("settings")
    given = settings.get("model") if isinstance(settings, dict) else None
    limits = [each for each in given or () if isinstance(each, str) and each.startswith("vocab_size=")]
    return with_overrides(config.replace(vocab_size=preset(config.preset).vocab_size), limits)


def keys(kind: Any = ModelConfig, prefix: str = "") -> dict[str, Any]:
    """The type of each key, in order."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        is_part = hasattr(hint, "__dataclass_fields__")
        found |= keys(hint, f"{prefix}{name}.") if is_part else {f"{prefix}{name}": hint}
    return found


def type_name(hint: Any) -> str:
    """What a key takes, in words: int, "heavy_tail or softplus", "int or null"."""
    choices = get_args(hint)
    if not choices:
        return str(getattr(hint, "__name__", hint))
    return " or ".join("null" if each is type(None) else getattr(each, "__name__", str(each)) for each in choices)


def _demand_key(key: str, where: str) -> None:
    """Raise UserError for a key that there is not, with the nearest that there are."""
    known = list(keys())
    if key in known:
        return
    if inside := [name for name in known if name.startswith(f"{key}.")]:
        raise UserError(f"{where}: {key} has keys of its own: {', '.join(inside)}")
    names = difflib.get_close_matches(key.rpartition(".")[2], {name.rpartition(".")[2] for name in known}, n=1)
    of_name = [name for name in known if name.rpartition(".")[2] in names]
    near = difflib.get_close_matches(key, of_name or known, n=3, cutoff=0.0 if of_name else 0.6)
    meant = f"; did you mean {' or '.join(near)}?" if near else "; `inspect --preset mini` shows all keys"
    raise UserError(f"{where}: there is no {key}{meant}")


def _demand_among(key: str, among: Sequence[str] | None, where: str) -> None:
    if among is not None and not _is_among(key, among):
        built = " and ".join(name.strip(".") for name in among)
        raise UserError(f"{where}: another phase decides {key}; this one builds {built}")


def _is_among(key: str, among: Sequence[str]) -> bool:
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in among)


def _value(key: str, text: str, where: str) -> Any:
    """The value that a text stands for, if the key takes its type."""
    hint = keys()[key]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    if hint is str and not isinstance(value, str):
        value = text
    try:
        return TypeAdapter(hint).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        choices = [each for each in get_args(hint) if isinstance(each, str)]
        choices += ["true", "false"] if hint is bool else []
        choices += ["null"] if type(None) in get_args(hint) else []
        near = difflib.get_close_matches("null" if text == "None" else text.lower(), choices, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{where}: {key} takes {type_name(hint)}, found {text}{meant}") from error
