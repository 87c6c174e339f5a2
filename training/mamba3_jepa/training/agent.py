"""Phase 3's objective and task.

Letters: N samples, B local batch, D width of the pooled state, E embedding width, K length of a knowledge vector.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba3_jepa.data.confusion import CONFUSION_KINDS
from mamba3_jepa.data.loader import BatchPlan
from mamba3_jepa.data.sample import Sample
from mamba3_jepa.evaluation.confusion import ConfusionReport, evaluate_confusion
from mamba3_jepa.evaluation.confusion_plots import plot_confusion, plot_injection, plot_memory_floor
from mamba3_jepa.evaluation.injection import InjectionReport, InjectionSamples, InjectionTrial, gallery
from mamba3_jepa.evaluation.memory_floor import MemoryFloor, choose_memory_floor
from mamba3_jepa.evaluation.retrieval import distinct
from mamba3_jepa.models.predictor import Predictor
from mamba3_jepa.models.recursion import Recursion
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.training import Phase3Settings
from mamba3_jepa.training.agent_data import AgentData, knowledge_text
from mamba3_jepa.training.distributed import rank, world_size
from mamba3_jepa.training.task import StepOutput, Validation, demand_one_batch

logger = logging.getLogger(__name__)

_TOGETHER = 4096  # validation samples computed at once


@dataclass(frozen=True, kw_only=True)
class AgentBatch:
    """One rank's share of one global batch.

    pooled: (B, D) states of the frozen model; confused: (B,) bool; knowledge: (B, K) and target: (B, E), zeros where
    `injected` (B,) bool is False.
    """

    pooled: Tensor
    confused: Tensor
    knowledge: Tensor
    target: Tensor
    injected: Tensor

    def __len__(self) -> int:
        return len(self.pooled)

    def to(self, device: torch.device | str) -> AgentBatch:
        """A copy with all tensors on `device`."""
        return AgentBatch(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})


class AgentObjective(nn.Module):
    """Binary cross-entropy of the confusion monitor, and the squared error of the embedding predicted from h + W k.

    Both are means over all samples of the batch, one without knowledge counting as an error of zero: batches of equal
    size then weigh alike, over micro-batches and ranks.
    """

    def __init__(self, recursion: Recursion, predictor: Predictor, injection_weight: float) -> None:
        """`predictor` is frozen: only its head is used, and gradients pass through it."""
        super().__init__()
        self.recursion, self.predictor = recursion, predictor
        self.injection_weight = injection_weight

    def train(self, mode: bool = True) -> AgentObjective:
        """As ever, but what is frozen stays in eval mode."""
        super().train(mode)
        self.predictor.eval()
        return self

    def forward(self, batch: AgentBatch) -> StepOutput:
        """Loss of one batch, with the scalars worth logging."""
        logits = self.recursion.confusion_probe(batch.pooled).float()
        confusion = F.binary_cross_entropy_with_logits(logits, batch.confused.float())
        # Where nothing is injected the knowledge is zero: every sample takes part, so every weight has a gradient.
        predicted = self.predictor.embed(self.recursion.injector(batch.pooled, batch.knowledge))
        error = (predicted - batch.target).float().square().mean(dim=-1) * batch.injected
        loss = confusion + self.injection_weight * error.sum() / len(batch)
        logged = {
            "confusion_loss": confusion.detach(),
            "injection_loss": error.detach().sum() / batch.injected.sum().clamp(min=1),
            "confusion_accuracy": ((logits.detach() > 0) == batch.confused).float().mean(),
        }
        return StepOutput(loss, logged)


class AgentTask:
    """Phase 3 as the loop sees it (see `training.task.Task`)."""

    phase = 3

    def __init__(
        self,
        model: Mamba3Jepa,
        train: AgentData,
        val: AgentData,
        settings: Phase3Settings,
        provenance: dict[str, Any],
    ) -> None:
        """`provenance`: what the checkpoint says about the data.

        Raises:
            UserError: there is not one batch.
        """
        if model.recursion is None:
            raise ValueError("the model has no recursion to train")
        self.model, self.config, self.settings = model, model.config, settings
        self.train, self.val = train, val
        self.recursion = model.recursion
        self.objective = AgentObjective(model.recursion, model.predictor, settings.injection_weight)
        self._provenance = provenance
        demand_one_batch(train.source.name, len(train), settings)
        size = settings.batch_size or 1
        self._plan = BatchPlan(np.arange(len(train)), size, True, settings.seed, rank(), world_size(), drop_last=True)
        self.batches_per_epoch = len(self._plan)
        self._read_validation()
        self._confusion: ConfusionReport | None = None
        self._injection: InjectionReport | None = None

    def _read_validation(self) -> None:
        """Texts of the validation samples, and the confused ones among them that have a right answer."""
        val = self.val
        samples = [val.source.sample(i) for i in val.frozen.index.tolist()]
        self._questions = [sample.question for sample in samples]
        self._kinds = [CONFUSION_KINDS[kind] for kind in val.source.kinds[val.frozen.index.numpy()]]
        self._memory_floor = _memory_floor(val, samples)
        rows = torch.arange(len(val))
        knowledge, usable = val.knowledge(rows)
        chosen = rows[usable & val.confused]
        with_target = rows[val.frozen.has_target].tolist()
        texts, embeddings, is_answer = gallery(
            [samples[i].target or "" for i in with_target],
            val.frozen.target_embedding[rows[val.frozen.has_target]],
            [self._questions[i] for i in with_target],
        )
        self._trial = None
        if len(chosen):
            self._trial = InjectionTrial(
                InjectionSamples(
                    pooled=val.frozen.pooled[chosen],
                    knowledge=knowledge[chosen],
                    expected=[samples[i].target or "" for i in chosen.tolist()],
                    questions=[self._questions[i] for i in chosen.tolist()],
                    kinds=[self._kinds[i] for i in chosen.tolist()],
                    texts=texts,
                    text_embeddings=embeddings,
                    text_is_answer=is_answer,
                )
            )
            if rank() == 0 and self._trial.n_without_wrong:
                logger.warning(
                    "%d of %d confused validation samples cannot be tried with wrong knowledge: no other one has both "
                    "another knowledge and another answer",
                    self._trial.n_without_wrong, len(chosen),
                )  # fmt: skip

    def batches(self, epoch: int, skip: int) -> Iterator[AgentBatch]:
        """This process's batches of `epoch`, without the first `skip`."""
        self._plan.set_epoch(epoch, skip)
        for rows in self._plan:
            yield self.batch(self.train, torch.tensor(rows, dtype=torch.int64))

    @staticmethod
    def batch(data: AgentData, rows: Tensor) -> AgentBatch:
        """Rows (B,) int64 of some data."""
        knowledge, injected = data.knowledge(rows)
        return AgentBatch(
            pooled=data.frozen.pooled[rows],
            confused=data.confused[rows],
            knowledge=knowledge,
            target=data.frozen.target_embedding[rows],
            injected=injected,
        )

    def weights(self, batches: Sequence[AgentBatch]) -> list[float]:
        """All batches have the same size, and so the same weight."""
        return [1 / len(batches)] * len(batches)

    def after_step(self) -> None:
        """Nothing to keep in place."""

    @torch.no_grad()
    def validate(self, device: torch.device) -> Validation:
        """Confusion by kind, with threshold and temperature chosen anew and stored, and what injection does; the
        memory's floor is stored too.

        Every rank computes everything: it is little, as the frozen model's outputs are known.
        """
        losses, logits = self._losses(device)
        report = evaluate_confusion(logits, self.val.confused, self._kinds, self._questions)
        probe = self.recursion.confusion_probe
        probe.threshold.fill_(report.calibration.threshold)
        probe.temperature.fill_(report.calibration.temperature)
        self.recursion.memory_floor.fill_(self._memory_floor.floor)
        metrics = losses | report.metrics("val") | self._memory_floor.metrics("val")
        warnings = []
        parts = []
        if report.rocs:
            parts.append(sum(curve.auroc for curve in report.rocs.values()) / len(report.rocs))
        else:
            warnings.append(
                "validation needs both clear and confused samples to measure the confusion monitor and to choose its "
                "threshold: raise --val-fraction or --val-samples, or give more data"
            )
        self._confusion, self._injection = report, None
        if self._trial is not None:
            self._injection = self._trial.run(self.model, device)
            metrics |= self._injection.metrics("val")
            parts.append(self._injection.retrieved.after)
        # How well confusion is noticed and how often knowledge helps; without either, at least the loss.
        return Validation(metrics=metrics, score=sum(parts) if parts else -losses["val/loss"], warnings=warnings)

    def _losses(self, device: torch.device) -> tuple[dict[str, float], Tensor]:
        """The objective over the validation samples, and the monitor's logits (N,)."""
        totals = {"loss": 0.0, "confusion_loss": 0.0, "injection_loss": 0.0}
        n_injected = 0
        logits = []
        for rows in torch.arange(len(self.val)).split(_TOGETHER):
            batch = self.batch(self.val, rows).to(device)
            output = self.objective(batch)
            injected = int(batch.injected.sum())
            totals["loss"] += float(output.loss) * len(rows)
            totals["confusion_loss"] += float(output.logged["confusion_loss"]) * len(rows)
            totals["injection_loss"] += float(output.logged["injection_loss"]) * injected
            n_injected += injected
            logits.append(self.recursion.confusion_probe(batch.pooled).float().cpu())
        counts = {"loss": len(self.val), "confusion_loss": len(self.val), "injection_loss": max(1, n_injected)}
        return {f"val/{name}": total / counts[name] for name, total in totals.items()}, torch.cat(logits)

    def illustrate(self, folder: Path) -> None:
        """plots/confusion_*.png, plots/injection.png and plots/memory_floor.png of the last validation."""
        if len(self._memory_floor.right):
            plot_memory_floor(self._memory_floor, folder / "plots")
        if self._confusion is not None:
            plot_confusion(self._confusion, folder / "plots")
        if self._injection is not None:
            plot_injection(self._injection, folder / "plots")

    def checkpoint_fields(self) -> dict[str, Any]:
        """The tokenizer, and where the data came from."""
        return {"tokenizer": self.model.tokenizer.to_json(), "data": self._provenance}


def _memory_floor(val: AgentData, samples: list[Sample]) -> MemoryFloor:
    """Chosen on lookups in a memory of all knowledge texts of the N validation samples; they are the same at every
    validation, since everything before the recursion is frozen. Vectors are not looked up."""
    knowledge, usable = val.knowledge(torch.arange(len(val)))
    texts = {row: knowledge_text(samples[row]) for row in usable.nonzero().squeeze(1).tolist()}
    known = {row: text for row, text in texts.items() if text is not None and val.answers_are_knowledge}
    if not known:
        return MemoryFloor.none()
    labels, first = distinct(list(known.values()))
    rows = torch.tensor(list(known))
    confused = val.confused[rows]
    return choose_memory_floor(
        val.frozen.embedding[rows[confused]], torch.tensor(labels)[confused], knowledge[rows[first]]
    )
