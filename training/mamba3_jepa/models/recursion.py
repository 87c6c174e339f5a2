"""Recursion on the predictor's pooled state: notice confusion, inject knowledge, look again.

Shape letters: B batch, D width of the pooled state, K length of a knowledge vector, M hidden width, E embedding width,
R width of the retriever, S length of what an episode is found by.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba3_jepa.config import NO_FLOOR, SHUT, RecursionConfig
from mamba3_jepa.errors import UserError
from mamba3_jepa.models.episodes import episode_scores
from mamba3_jepa.models.generation import N_DOUBTS

DEFAULT_THRESHOLD = 0.5
RMS_EPS = 1e-12  # of an embedding of unit length the mean square is one over its length


class ConfusionMonitor(nn.Module):
    """Pooled state -> probability that the model does not know: a perceptron with one hidden layer.

    With `hears_answer` it is told the decoder's doubt in its own answer too (`generation.doubt`, two numbers): what the
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
        """Pooled states (B, D) and, with `hears_answer`, doubt (B, 2) -> logits of confusion (B,), before
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
        """Exponential moving average of scores (B,) over the turns of B questions; `previous` None starts it."""
        if previous is None:
            return score
        return self.ema_decay * previous + (1 - self.ema_decay) * score


class StateInjector(nn.Module):
    """h' = h + W k: knowledge added to the pooled state.

    With `hidden_dim`, h' = h + W k + V silu(U [LayerNorm(h); k / rms(k)] + b): what a sentence adds then depends on
    what was asked, so that "the circle is red" adds nothing where the star was asked about.
    """

    def __init__(self, knowledge_dim: int, d_model: int, hidden_dim: int | None = None) -> None:
        super().__init__()
        self.projection = nn.Linear(knowledge_dim, d_model, bias=False)
        nn.init.zeros_(self.projection.weight)  # before training, knowledge changes nothing
        self.sees_state = hidden_dim is not None
        if hidden_dim is not None:
            self.norm = nn.LayerNorm(d_model)
            self.hidden = nn.Linear(d_model + knowledge_dim, hidden_dim)
            self.output = nn.Linear(hidden_dim, d_model, bias=False)
            nn.init.zeros_(self.output.weight)

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
        told = pooled + self.projection(knowledge)
        if self.sees_state:
            both = torch.cat([self.norm(pooled), root_mean_square_normed(knowledge)], dim=-1)
            told = told + self.output(F.silu(self.hidden(both)))
        return told


class KnowledgeProbe(nn.Module):
    """Pooled state and what was told -> whether that answers what was asked: a perceptron with one hidden layer.

    What is false answers too: who is confused cannot know better.
    """

    def __init__(self, knowledge_dim: int, d_model: int, hidden_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.hidden = nn.Linear(d_model + knowledge_dim, hidden_dim)
        self.linear = nn.Linear(hidden_dim, 1)

    def forward(self, pooled: Tensor, knowledge: Tensor) -> Tensor:
        """Pooled states (B, D), as they were before, and knowledge (B, K) -> logits (B,)."""
        both = torch.cat([self.norm(pooled), root_mean_square_normed(knowledge)], dim=-1)
        return self.linear(F.silu(self.hidden(both))).squeeze(-1)

    def score(self, pooled: Tensor, knowledge: Tensor) -> Tensor:
        """As `forward`, -> P(what was told answers) (B,) in float32."""
        return torch.sigmoid(self(pooled, knowledge).float())


class ToolSelector(nn.Module):
    """Pooled state -> which of T tools to call: a perceptron with one hidden layer."""

    def __init__(self, d_model: int, hidden_dim: int, n_tools: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.hidden = nn.Linear(d_model, hidden_dim)
        self.linear = nn.Linear(hidden_dim, n_tools)

    def forward(self, pooled: Tensor) -> Tensor:
        """Pooled states (B, D) -> logits (B, T), in the order of `RecursionConfig.tools`."""
        return self.linear(F.silu(self.hidden(self.norm(pooled))))

    def score(self, pooled: Tensor) -> Tensor:
        """As `forward`, -> probabilities (B, T) in float32."""
        return torch.softmax(self(pooled).float(), dim=-1)


class KnowledgeRetriever(nn.Module):
    """Finds the texts of a memory that answer a question: two perceptrons, whose outputs are compared by cosine.

    What is looked up with is the question's own embedding by the Y-Encoder: what the model predicts is what is wrong
    where it is confused. (Two encoders with one space: Karpukhin et al. 2020, arXiv 2004.04906.)
    """

    def __init__(self, embed_dim: int, hidden_dim: int, retriever_dim: int) -> None:
        super().__init__()
        self.question = _Tower(embed_dim, hidden_dim, retriever_dim)
        self.text = _Tower(embed_dim, hidden_dim, retriever_dim)


class _Tower(nn.Module):
    """Embeddings (..., E) -> unit vectors (..., R)."""

    def __init__(self, embed_dim: int, hidden_dim: int, retriever_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(embed_dim, hidden_dim)
        self.output = nn.Linear(hidden_dim, retriever_dim)

    def forward(self, embedding: Tensor) -> Tensor:
        return F.normalize(self.output(F.silu(self.hidden(root_mean_square_normed(embedding)))), dim=-1)


def root_mean_square_normed(x: Tensor) -> Tensor:
    """Vectors (..., K) with elements of root mean square 1; zeros stay zeros."""
    return F.rms_norm(x, x.shape[-1:], eps=RMS_EPS)


class Recursion(nn.Module):
    """What phase 3 trains, `confusion_probe` and `injector` and, as configured, `knowledge_probe`, `tool_selector` and
    `retriever`; and `memory_floor`.

    The memory's nearest text is injected when its cosine is at least `memory_floor`: its retriever's vector's to the
    question's or, without a retriever (None), its embedding's to the predicted one. `NO_FLOOR`, the lowest cosine there
    is, lets every text through.

    With `episodes` there are `episode_blend`, `episode_floor` and `state_mean` (D,) or, with `episode_key` "picture",
    `picture_mean` (S,) as well, for `models.episodes`: chosen in validation, and until then `episode_floor` is `SHUT`,
    which lets no episode through.
    """

    memory_floor: Tensor
    episode_blend: Tensor
    episode_floor: Tensor

    def __init__(
        self, d_model: int, embed_dim: int, knowledge_dim: int, config: RecursionConfig, episode_dim: int | None = None
    ) -> None:
        """`episode_dim`: S, what an episode is found by; D by default."""
        super().__init__()
        self.config = config
        self.confusion_probe = ConfusionMonitor(d_model, config.hidden_dim, config.ema_decay, config.hears_answer)
        self.injector = StateInjector(knowledge_dim, d_model, config.hidden_dim if config.injector_sees_state else None)
        self.knowledge_probe: KnowledgeProbe | None = None
        if config.weighs_knowledge:
            self.knowledge_probe = KnowledgeProbe(knowledge_dim, d_model, config.hidden_dim)
        self.tool_selector: ToolSelector | None = None
        if config.tools:
            self.tool_selector = ToolSelector(d_model, config.hidden_dim, len(config.tools))
        self.retriever: KnowledgeRetriever | None = None
        if config.retriever_dim:
            self.retriever = KnowledgeRetriever(embed_dim, config.hidden_dim, config.retriever_dim)
        self.register_buffer("memory_floor", torch.tensor(NO_FLOOR))
        if config.episodes:
            self.register_buffer("episode_blend", torch.tensor(0.5))
            self.register_buffer("episode_floor", torch.tensor(SHUT))
            self.register_buffer(f"{config.episode_key}_mean", torch.zeros(episode_dim or d_model))

    @property
    def episode_mean(self) -> Tensor:
        """(S,) what is taken from what is seen before it is compared."""
        return getattr(self, f"{self.config.episode_key}_mean")

    def episode_key(self, pooled: Tensor, picture: Tensor) -> Tensor:
        """What an episode is found by (B, S): pooled states (B, D) or `picture_keys`, as it is configured."""
        return picture if self.config.episode_key == "picture" else pooled

    def episode_scores(self, seen: Tensor, asked: Tensor, keys: Tensor, questions: Tensor) -> Tensor:
        """`models.episodes.episode_scores` with the model's own mean and blend, on the arguments' device."""
        mean, blend = self.episode_mean.to(seen.device), self.episode_blend.to(seen.device)
        return episode_scores(seen, asked, keys, questions, mean=mean.float(), blend=blend.float())

    @property
    def recalls_episodes(self) -> bool:
        """Whether an episode can be near enough: none is where validation had nothing to learn from."""
        return self.config.episodes and float(self.episode_floor) < SHUT
