"""What phase 3 minimises.

Letters: B local batch, L lessons, M other texts, D width of the pooled state, E embedding width, K length of a
knowledge vector, S numbers of doubt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mamba3_jepa.models.losses import confusion_loss, injection_error, knowledge_loss, lookup_loss, tool_loss
from mamba3_jepa.models.predictor import Predictor
from mamba3_jepa.models.recursion import KnowledgeProbe, Recursion
from mamba3_jepa.training.task import StepOutput

_OTHERS_TOLD = 4  # texts that do not answer and are no lessons, of which the knowledge probe learns


@dataclass(frozen=True, kw_only=True)
class Phase3Batch:
    """One rank's share of one global batch: B samples and L lessons about them.

    pooled: (B, D) states of the frozen model; doubt: (B, S) of its answers; confused: (B,) bool.
    about: (L,) int64, which of the B each lesson is about; knowledge: (L, K); goal: (L, E), what should be predicted
    then; share: (L,), one over the number of lessons about the same sample, foreign texts not counted; answers: (L,)
    bool, whether it answers.
    question: (B, E) embeddings, and right: (B, E) of a text that answers, zeros where `asks` (B,) bool is False;
    others: (B, M, E) of texts that do not answer, where `is_other` (B, M) bool.
    tool: (B,) int64, the place of the tool that is needed; negative where none is.
    """

    pooled: Tensor
    doubt: Tensor
    confused: Tensor
    about: Tensor
    knowledge: Tensor
    goal: Tensor
    share: Tensor
    answers: Tensor
    question: Tensor
    right: Tensor
    asks: Tensor
    others: Tensor
    is_other: Tensor
    tool: Tensor

    def __len__(self) -> int:
        return len(self.pooled)

    def to(self, device: torch.device | str) -> Phase3Batch:
        """A copy with all tensors on `device`."""
        return Phase3Batch(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})


class Phase3Objective(nn.Module):
    """Binary cross-entropy of the confusion monitor, the squared error of the embedding predicted after injection, and,
    as the recursion is configured, the losses of looking up what answers a question, of seeing whether what was told
    answers it, and of choosing a tool.

    All are means over all samples of the batch, one without lessons counting as an error of zero: batches of equal
    size then weigh alike, over micro-batches and ranks.
    """

    def __init__(self, recursion: Recursion, predictor: Predictor, injection_weight: float) -> None:
        """`predictor` is frozen: only its head is used, and gradients pass through it."""
        super().__init__()
        self.recursion, self.predictor = recursion, predictor
        self.injection_weight = injection_weight

    def train(self, mode: bool = True) -> Phase3Objective:
        """As ever, but what is frozen stays in eval mode."""
        super().train(mode)
        self.predictor.eval()
        return self

    def forward(self, batch: Phase3Batch) -> StepOutput:
        """Loss of one batch, with the scalars worth logging."""
        logits = confusion_logits(self.recursion, batch)
        confusion = confusion_loss(logits, batch.confused)
        told = self.recursion.injector(batch.pooled[batch.about], batch.knowledge)
        error = injection_error(self.predictor.embed(told), batch.goal) * batch.share
        loss = confusion + self.injection_weight * error.sum() / len(batch)
        logged = {
            "confusion_loss": confusion.detach(),
            "injection_loss": error.detach().sum() / batch.share.sum().clamp(min=1),
            "confusion_accuracy": ((logits.detach() > 0) == batch.confused).float().mean(),
        }
        retriever = self.recursion.retriever
        if retriever is not None:
            question = retriever.question(batch.question)
            right = (question * retriever.text(batch.right)).sum(dim=-1)
            others = (question.unsqueeze(1) * retriever.text(batch.others)).sum(dim=-1)
            lookup = lookup_loss(right, others, batch.is_other) * batch.asks
            loss = loss + lookup.sum() / len(batch)
            logged["lookup_loss"] = lookup.detach().sum() / batch.asks.sum().clamp(min=1)
        if self.recursion.knowledge_probe is not None:
            judged = self._knowledge(self.recursion.knowledge_probe, batch)
            loss = loss + judged.sum() / len(batch)
            logged["knowledge_loss"] = judged.detach().sum() / batch.share.sum().clamp(min=1)
        if self.recursion.tool_selector is not None:
            choice = tool_loss(self.recursion.tool_selector(batch.pooled), batch.tool)
            loss = loss + choice.sum() / len(batch)
            logged["tool_loss"] = choice.detach().sum() / (batch.tool >= 0).sum().clamp(min=1)
        return StepOutput(loss, logged)

    def _knowledge(self, probe: KnowledgeProbe, batch: Phase3Batch) -> Tensor:
        """What the lessons' cross-entropies and those of a few other texts come to, for each of the B samples."""
        of_lessons = knowledge_loss(probe(batch.pooled[batch.about], batch.knowledge), batch.answers) * batch.share
        total = of_lessons.new_zeros(len(batch)).index_add(0, batch.about, of_lessons)
        if batch.knowledge.shape[1] == batch.others.shape[2]:  # texts can be told
            others, is_other = batch.others[:, :_OTHERS_TOLD], batch.is_other[:, :_OTHERS_TOLD]
            logits = probe(batch.pooled.unsqueeze(1).expand(-1, others.shape[1], -1), others)
            of_others = knowledge_loss(logits, torch.zeros_like(is_other)) * is_other
            total = total + of_others.sum(dim=1) / _OTHERS_TOLD
        return total


def confusion_logits(recursion: Recursion, batch: Phase3Batch) -> Tensor:
    """The confusion monitor's, of a batch: (B,) float32."""
    probe = recursion.confusion_probe
    return probe(batch.pooled, batch.doubt if probe.hears_answer else None).float()
