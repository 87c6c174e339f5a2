"""Recursion on the predictor's pooled state: notice confusion, inject knowledge, look again.

Shape letters: B batch, D width of the pooled state, K length of a knowledge vector, M hidden width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba3_jepa.config import NO_FLOOR, RecursionConfig
from mamba3_jepa.errors import UserError

DEFAULT_THRESHOLD = 0.5


class ConfusionMonitor(nn.Module):
    """Pooled state -> probability that the model does not know: a perceptron with one hidden layer.

    `threshold` and `temperature` are chosen on validation data after training and travel with the weights.
    """

    threshold: Tensor
    temperature: Tensor

    def __init__(self, d_model: int, hidden_dim: int, ema_decay: float) -> None:
        super().__init__()
        self.ema_decay = ema_decay
        self.norm = nn.LayerNorm(d_model)
        self.hidden = nn.Linear(d_model, hidden_dim)
        self.linear = nn.Linear(hidden_dim, 1)
        self.register_buffer("threshold", torch.tensor(DEFAULT_THRESHOLD))
        self.register_buffer("temperature", torch.tensor(1.0))

    def forward(self, pooled: Tensor) -> Tensor:
        """Pooled states (B, D) -> logits of confusion (B,), before `temperature`; in the parameters' precision under
        autocast too."""
        with torch.autocast(pooled.device.type, enabled=False):
            pooled = pooled.to(self.linear.weight.dtype)
            return self.linear(F.silu(self.hidden(self.norm(pooled)))).squeeze(-1)

    def score(self, pooled: Tensor) -> Tensor:
        """Pooled states (B, D) -> P(confused) (B,) in float32."""
        return torch.sigmoid(self(pooled).float() / self.temperature)

    def smooth(self, score: Tensor, previous: Tensor | None) -> Tensor:
        """Exponential moving average of scores (B,) over the turns of B conversations; `previous` None starts it."""
        if previous is None:
            return score
        return self.ema_decay * previous + (1 - self.ema_decay) * score


class StateInjector(nn.Module):
    """h' = h + W k: knowledge added to the pooled state."""

    def __init__(self, knowledge_dim: int, d_model: int) -> None:
        super().__init__()
        self.projection = nn.Linear(knowledge_dim, d_model, bias=False)
        nn.init.zeros_(self.projection.weight)  # before training, knowledge changes nothing

    def forward(self, pooled: Tensor, knowledge: Tensor) -> Tensor:
        """Pooled states (B, D) and knowledge (B, K) -> pooled states (B, D).

        Raises:
            UserError: the knowledge vectors have another length than the injector was built for.
        """
        expected = self.projection.in_features
        if knowledge.shape[-1] != expected:
            raise UserError(
                f"knowledge vector of length {knowledge.shape[-1]}, but this model takes {expected} "
                "(its knowledge_dim): embed a text with the model's own Y-Encoder, or train with that `knowledge_dim`"
            )
        return pooled + self.projection(knowledge)


class Recursion(nn.Module):
    """What phase 3 trains, `confusion_probe` and `injector`, and `memory_floor`.

    The memory's nearest text is injected when its cosine to the predicted embedding is at least `memory_floor`;
    `NO_FLOOR`, the lowest cosine there is, lets every text through.
    """

    memory_floor: Tensor

    def __init__(self, d_model: int, knowledge_dim: int, config: RecursionConfig) -> None:
        super().__init__()
        self.config = config
        self.confusion_probe = ConfusionMonitor(d_model, config.hidden_dim, config.ema_decay)
        self.injector = StateInjector(knowledge_dim, d_model)
        self.register_buffer("memory_floor", torch.tensor(NO_FLOOR))
