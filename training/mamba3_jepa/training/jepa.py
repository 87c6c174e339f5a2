"""Phase 1's objective and task. Letters: B local batch, G global batch, E embedding width."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mamba3_jepa.data.answers import common_answers
from mamba3_jepa.data.augment import shift
from mamba3_jepa.data.images import normalize
from mamba3_jepa.data.loader import Batch, BatchLoader, build_loader, target_hash
from mamba3_jepa.data.sources import DataSplits, Source
from mamba3_jepa.data.splits import spread
from mamba3_jepa.evaluation.showcase import write_contact_sheet
from mamba3_jepa.evaluation.validate import Collected, collect, evaluate, merge
from mamba3_jepa.models.losses import info_nce
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.training import Phase1Settings
from mamba3_jepa.training.distributed import all_gather, all_gather_object, rank, world_size
from mamba3_jepa.training.task import StepOutput, Validation

logger = logging.getLogger(__name__)

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 1.0


class JepaObjective(nn.Module):
    """Symmetric InfoNCE between predicted and target embeddings over the batches of all ranks.

    Every rank computes the loss of the whole global batch, with gradients through the gathered embeddings;
    averaging the parameter gradients over ranks then gives the gradient of one process with the global batch.
    """

    def __init__(self, model: Mamba3Jepa, temperature: float = 0.07) -> None:
        super().__init__()
        self.model = model
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    def forward(self, batch: Batch) -> StepOutput:
        """Loss of one batch, with the scalars worth logging."""
        model = self.model
        visual_tokens = model.encode_images(normalize(batch.pixels), batch.has_image)
        predicted = model.predict(visual_tokens, batch.has_image, batch.query_ids, batch.query_mask).embedding
        target = model.y_encoder.forward_distinct(batch.target_ids, batch.target_mask, batch.target_hash)
        temperature = self.log_temperature.exp()
        contrast = info_nce(all_gather(predicted), all_gather(target), all_gather(batch.target_hash), temperature)
        loss = contrast.loss
        logged = {
            "info_nce": contrast.loss.detach(),
            "accuracy": contrast.accuracy,
            "temperature": temperature.detach(),
            "skipped_samples": torch.tensor(float(len(batch.bad))),
            "truncated_texts": torch.tensor(float(batch.n_truncated)),
        }
        if model.angn is not None:
            penalty = model.angn.sparsity_penalty()
            loss = loss + model.config.angn.sparsity_weight * penalty
            logged["gate_sparsity"] = penalty.detach()
            activity = model.angn.activity()
            logged |= {f"gate_activity_{layer}": value for layer, value in enumerate(activity)}
        return StepOutput(loss, logged)

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Keep the temperature within [0.01, 1]."""
        self.log_temperature.clamp_(math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE))


class JepaTask:
    """Phase 1 as the loop sees it (see `training.task.Task`)."""

    phase = 1

    def __init__(self, model: Mamba3Jepa, data: DataSplits, settings: Phase1Settings) -> None:
        self.model, self.config, self.data, self.settings = model, model.config, data, settings
        self.objective = JepaObjective(model, settings.temperature)
        self.loader = self._loader(data.train, data.train_indices, training=True)
        self.val_loader = self._loader(data.val, spread(data.val_indices, settings.val_samples or 1), training=False)
        self.batches_per_epoch = len(self.loader)
        self._collected: Collected | None = None
        self._answers = common_answers(data.train, data.train_indices)

    def _loader(self, source: Source, indices: NDArray[np.int64], training: bool) -> BatchLoader:
        settings = self.settings
        return build_loader(
            source,
            indices,
            self.model.tokenizer,
            self.config,
            settings.batch_size or 1,
            shuffle=training,
            seed=settings.seed,
            rank=rank(),
            world_size=world_size(),
            drop_last=training,
            workers=(settings.workers or 0) if training else 0,
            on_bad_sample=settings.on_bad_sample,
        )

    def batches(self, epoch: int, skip: int) -> Iterator[Batch]:
        """This process's batches of `epoch`, without the first `skip`; at the end, says what was left out or cut."""
        settings = self.settings
        self.loader.set_epoch(epoch, skip)
        bad: list[str] = []
        truncated = 0
        try:
            for batch in self.loader:
                bad += batch.bad
                truncated += batch.n_truncated
                moved = shift(batch.pixels, batch.index[batch.has_image], settings.image_shift, settings.seed, epoch)
                yield dataclasses.replace(batch, pixels=moved)
        finally:
            if bad:
                logger.warning("epoch %d: %d bad samples skipped, the first: %s", epoch + 1, len(bad), bad[0])
            if truncated:
                logger.warning("epoch %d: %d texts longer than the token limit were cut", epoch + 1, truncated)

    def weights(self, batches: Sequence[Batch]) -> list[float]:
        """Micro-batches count alike: each is a contrast of its own."""
        return [1 / len(batches)] * len(batches)

    def after_step(self) -> None:
        """Clamp the temperature."""
        self.objective.clamp_temperature()

    def validate(self, device: torch.device) -> Validation:
        """Retrieval, answers and the health of the embeddings on the held-out samples, each rank doing its share."""
        mine = collect(self.model, self.val_loader, device)
        if self.model.angn is not None:
            self.model.angn.reset_context()  # its moving average is for inference, not for what was measured here
        self._collected = everyone = merge(all_gather_object(mine))
        report = evaluate(everyone)
        metrics = report.metrics()
        metrics["val/loss"] = self._loss(everyone)
        # How often the model is right, whatever it was asked: what "best" means.
        right = [metrics[name] for name in ("val/image_to_text_r1", "val/answer_accuracy") if name in metrics]
        return Validation(metrics=metrics, score=sum(right) / len(right), warnings=list(report.warnings))

    def _loss(self, collected: Collected) -> float:
        """InfoNCE over the held-out samples, in batches as large as those of training."""
        size = (self.settings.batch_size or 1) * world_size()
        keys = torch.tensor([target_hash(text) for text in collected.texts])
        temperature = self.objective.log_temperature.detach().exp().cpu()
        chunks = zip(collected.predicted.split(size), collected.target.split(size), keys.split(size), strict=True)
        total = sum(float(info_nce(p, t, k, temperature).loss) * len(k) for p, t, k in chunks)
        return total / len(keys)

    def illustrate(self, folder: Path) -> None:
        """contact_sheet.png: the nearest texts for a few validation samples."""
        if self._collected is not None:
            write_contact_sheet(self._collected, self.data.val, folder / "contact_sheet.png")

    def checkpoint_fields(self) -> dict[str, Any]:
        """The tokenizer, where the data came from, and its most frequent answers."""
        data = describe(self.data) | {"answers": self._answers}
        return {"tokenizer": self.model.tokenizer.to_json(), "data": data}


def describe(data: DataSplits) -> dict[str, Any]:
    """Provenance of the data for config.json and the checkpoint."""
    return {
        "source": data.train.name,
        "synthetic": data.synthetic,
        "train_samples": len(data.train_indices),
        "val_samples": len(data.val_indices),
        "fingerprint": data.fingerprint,
    }
