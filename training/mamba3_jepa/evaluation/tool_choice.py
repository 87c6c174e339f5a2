"""Whether the right tool is chosen.

Letters: N samples, T tools.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ToolReport:
    """Shares in [0, 1] of N samples for which the most probable tool is the right one.

    by_tool: for each right tool, most frequent first, its share and its number of samples; of these are the tools that
    the model does not know, which it cannot choose: n_unknown samples.
    """

    n_samples: int
    n_unknown: int
    accuracy: float
    by_tool: dict[str, tuple[float, int]]

    def metrics(self, prefix: str = "val") -> dict[str, float]:
        """`{prefix}/tool_samples`, `{prefix}/tool_accuracy` and, for each tool, `{prefix}/tool_accuracy_{name}`."""
        values: dict[str, float] = {f"{prefix}/tool_samples": self.n_samples, f"{prefix}/tool_accuracy": self.accuracy}
        return values | {f"{prefix}/tool_accuracy_{name}": share for name, (share, _) in self.by_tool.items()}

    def as_json(self) -> dict[str, Any]:
        """`samples`, `unknown`, `accuracy`, and for each tool in `tools` its `samples` and `accuracy`."""
        tools = {tool: {"samples": n, "accuracy": share} for tool, (share, n) in self.by_tool.items()}
        return {"samples": self.n_samples, "unknown": self.n_unknown, "accuracy": self.accuracy, "tools": tools}


def tool_accuracy(logits: Tensor, names: Sequence[str], right: Sequence[str]) -> ToolReport | None:
    """How often the tool with the greatest logit is the right one; None without samples. Of equal logits the first is
    chosen.

    Args:
        logits: (N, T).
        names: T tools.
        right: for each of the N samples the tool that is right, which need not be among the names.

    Raises:
        ValueError: lengths that differ, or a logit that is not a number.
    """
    if logits.shape != (len(right), len(names)):
        raise ValueError(f"logits of shape {tuple(logits.shape)} for {len(right)} samples and {len(names)} tools")
    if bool(logits.isnan().any()):
        raise ValueError("a logit is not a number")
    if not len(right):
        return None
    best = logits == logits.amax(dim=1, keepdim=True)
    chosen = [names[i] for i in torch.where(best, torch.arange(len(names)), len(names)).amin(dim=1).tolist()]
    samples = Counter(right)
    hits = Counter(tool for tool, said in zip(right, chosen, strict=True) if tool == said)
    return ToolReport(
        n_samples=len(right),
        n_unknown=sum(n for tool, n in samples.items() if tool not in names),
        accuracy=hits.total() / len(right),
        by_tool={tool: (hits[tool] / n, n) for tool, n in samples.most_common()},
    )
