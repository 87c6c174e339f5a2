"""What a preset implies where the command line is silent."""

from __future__ import annotations

from typing import Any

PHASE1_DEFAULTS: dict[str, dict[str, Any]] = {
    "small": {"epochs": 50, "batch_size": 64, "lr": 3e-4, "synthetic_scenes": 20_000, "val_samples": 2048},
    "mini": {"epochs": 10, "batch_size": 64, "lr": 1e-3, "synthetic_scenes": 8_000, "val_samples": 2048},
    "tiny": {"epochs": 2, "batch_size": 16, "lr": 2e-3, "synthetic_scenes": 64, "val_samples": 96, "workers": 0},
}

PHASE2_DEFAULTS: dict[str, dict[str, Any]] = {
    "small": {"epochs": 20, "batch_size": 32, "lr": 1e-4, "synthetic_scenes": 20_000, "val_samples": 2048},
    "mini": {"epochs": 18, "batch_size": 64, "lr": 1e-3, "synthetic_scenes": 8_000, "val_samples": 2048},
    "tiny": {"epochs": 4, "batch_size": 16, "lr": 5e-3, "synthetic_scenes": 64, "val_samples": 96, "workers": 0},
}

PHASE3_DEFAULTS: dict[str, dict[str, Any]] = {
    "small": {"epochs": 10, "batch_size": 16, "lr": 5e-5, "synthetic_scenes": 20_000, "val_samples": 2048},
    "mini": {"epochs": 10, "batch_size": 128, "lr": 2e-3, "synthetic_scenes": 8_000, "val_samples": 2048},
    "tiny": {"epochs": 2, "batch_size": 16, "lr": 3e-3, "synthetic_scenes": 64, "val_samples": 160, "workers": 0},
}
