"""Recursion on the predictor's pooled state: notice confusion, inject knowledge, look again.

Shape letters: B batch, D width of the pooled state, K length of a knowledge vector, M hidden width, S numbers of doubt.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba3_jepa.config import NO_FLOOR, RecursionConfig
from mamba3_jepa.errors import UserError
from mamba3_jepa.models.generation import N_DOUBTS

DEFAULT_THRESHOLD = 0.5


class ConfusionMonitor(nn.Module):
    """Pooled state -> probability that the model does not know: a perceptron with one hidden layer.

    With `hears_answer` it is told the decoder's doubt in its own answer too (`generation.doubt`, S = 2): what the
    pooled state shows least is that a picture and a question as ever are answered wrongly, and there the decoder
    hesitates (Malinin and Gales 2021, arXiv 2002.07650, compare such measures).

    `threshold` and `temperature` are chosen on validation data after training and travel with the weights.
    """

    threshold: Tensor
    temperature: Tensor

    def __init__(self, d_model: int, hidden_dim: int, ema_decay: float, hears_answer: bool = False) -> None:
        super().__init__()
        self.ema_decay, self.hears_answer = ema_decay, hears_answer
        self.norm = nn.LayerNorm(d_model)
        self.hidden = nn.Linear(d_model + (N_DOUBTS if hears_answer else 0), hidden_dim)
        self.linear = nn.Linear(hidden_dim, 1)
        self.register_buffer("threshold", torch.tensor(DEFAULT_THRESHOLD))
        self.register_buffer("temperature", torch.tensor(1.0))

    def forward(self, pooled: Tensor, doubt: Tensor | None = None) -> Tensor:
        """Pooled states (B, D) and, with `hears_answer`, doubt (B, S) -> logits of confusion (B,), before
        `temperature`; in the parameters' precision under autocast too."""
        if (doubt is not None) != self.hears_answer:
            raise ValueError(f"hears_answer is {self.hears_answer}, doubt was {'not ' * (doubt is None)}given")
        with torch.autocast(pooled.device.type, enabled=False):
            known = self.norm(pooled.to(self.linear.weight.dtype))
            if doubt is not None:
                known = torch.cat([known, doubt.to(known)], dim=-1)
            return self.linear(F.silu(self.hidden(known))).squeeze(-1)

    def score(self, pooled: Tensor, doubt: Tensor | None = None) -> Tensor:
        """As `forward`, -> P(confused) (B,) in float32."""
        return torch.sigmoid(self(pooled, doubt).float() / self.temperature)

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
        self.confusion_probe = ConfusionMonitor(d_model, config.hidden_dim, config.ema_decay, config.hears_answer)
        self.injector = StateInjector(knowledge_dim, d_model)
        self.register_buffer("memory_floor", torch.tensor(NO_FLOOR))
