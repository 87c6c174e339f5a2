"""The variants of themselves that Triton's kernels have chosen, so that another process can make the same choice.

A kernel under `triton.autotune` tries its variants when it first meets a key (sizes and types) and takes the fastest.
Which one that is changes from time to time, and with it how sums are rounded.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)

_MODULES = "mamba_ssm.ops.triton.mamba3."
_PLAIN = (str, int, float, bool, type(None))
Chosen = dict[str, list[tuple[list[Any], dict[str, Any]]]]


def chosen(modules: str = _MODULES) -> Chosen:
    """For each tuned kernel in the modules whose names begin so, by name: its keys, and the variant taken for each."""
    found: Chosen = {}
    for name, tuner in _tuners(modules).items():
        pairs = [(list(key), _variant(config)) for key, config in tuner.cache.items() if _is_plain(key)]
        if pairs:
            found[name] = pairs
    return found


def choose(given: Mapping[str, Any], modules: str = _MODULES) -> None:
    """Let the kernels take the variants that `chosen` gave; one that they do not have any more is chosen anew."""
    tuners = _tuners(modules)
    for name, pairs in given.items():
        for key, variant in pairs:
            config = next((each for each in _candidates(tuners.get(name)) if _variant(each) == variant), None)
            if config is None:
                logger.warning("kernel %s no longer has the variant %s: it is tuned anew", name, variant)
            else:
                tuners[name].cache[tuple(key)] = config


def restrict(num_warps: int, most_stages: int, modules: str = _MODULES) -> None:
    """Let kernels try only variants of so many warps, at most so many stages and any registers: to begin sooner, a
    little slower. One that has no such variant keeps them all."""
    for tuner in _tuners(modules).values():
        few = [
            each
            for each in tuner.configs
            if each.num_warps == num_warps and each.num_stages <= most_stages and each.maxnreg is None
        ]
        tuner.configs = few or tuner.configs


def _tuners(modules: str) -> dict[str, Any]:
    """Triton's autotuners in the modules that are loaded, by module and name."""
    triton = sys.modules.get("triton.runtime.autotuner")
    if triton is None:
        return {}
    return {
        f"{module_name}.{name}": value
        for module_name, module in sorted(sys.modules.items())
        if module_name.startswith(modules)
        for name, value in vars(module).items()
        if isinstance(value, triton.Autotuner)
    }


def _candidates(tuner: Any) -> list[Any]:
    return [] if tuner is None else tuner.configs


def _variant(config: Any) -> dict[str, Any]:
    """What tells a `triton.Config` from the others of its kernel."""
    values = {**vars(config), "kwargs": dict(config.kwargs)}
    return {name: value for name, value in values.items() if isinstance(value, (*_PLAIN, dict))}


def _is_plain(key: tuple[Any, ...]) -> bool:
    return all(isinstance(each, _PLAIN) for each in key)
