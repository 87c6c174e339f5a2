"""Phase 1's contrast: of one micro-batch on each rank, or of many with the memory of one.

Letters: B samples of this rank's micro-batch, M its hard negatives, E embedding width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mamba3_jepa.data.batch import Batch
from mamba3_jepa.models.contrast import info_nce_in_pieces
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.training import Precision
from mamba3_jepa.training.distributed import all_gather, world_size
from mamba3_jepa.training.precision import autocast
from mamba3_jepa.training.rng import rng_state, set_rng_state
from mamba3_jepa.training.task import StepOutput

logger = logging.getLogger(__name__)

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 1.0


class Embedded(NamedTuple):
    """predicted, target: (B, E) embeddings of the samples; hard: (M, E), of the hard negatives."""

    predicted: Tensor
    target: Tensor
    hard: Tensor


class Keys(NamedTuple):
    """The texts of `Embedded` as integers, equal where they are: target (B,), hard (M,)."""

    target: Tensor
    hard: Tensor


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a first pass over a contrast of several micro-batches says of one of them.

    index: (B,), which samples it had. n_batches: how many micro-batches make the contrast. contrast: its loss, without
    gradient, and its scalars. gradient: of the loss by the micro-batch's embeddings; of_temperature: by the logarithm
    of the temperature.
    """

    index: Tensor
    n_batches: int
    contrast: StepOutput
    gradient: Embedded
    of_temperature: Tensor

    def loss(self, index: Tensor, embedded: Embedded, log_temperature: Tensor) -> Tensor:
        """The contrast's loss, so that the mean over its micro-batches has its gradient.

        What the first pass did not see, because a file could not be read that time, or only then, teaches nothing.
        """
        if torch.equal(self.index, index):
            pulls = [(each * by).sum() for each, by in zip(embedded, self.gradient, strict=True)]
        else:
            logger.warning("a sample could be read in one of a step's two passes only: its micro-batch is left out")
            pulls = [each.sum() * 0 for each in embedded]
        pull = self.n_batches * torch.stack(pulls).sum() + self.of_temperature * log_temperature
        return self.contrast.loss + pull - pull.detach()


class Phase1Objective(nn.Module):
    """Symmetric InfoNCE between predicted and target embeddings over the batches of all ranks.

    Every rank computes its share of the loss, times the number of ranks, and the gradient of the whole loss by its own
    embeddings; averaging the parameter gradients over ranks then gives the gradient of one process with the global
    batch.

    Attributes:
        negatives: how many a sample had on average, of each contrast since the task last looked.
        look: what the next batch is part of, if that is a contrast of several micro-batches.
    """

    def __init__(self, model: Mamba3Jepa, temperature: float = 0.07) -> None:
        super().__init__()
        self.model = model
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        self.negatives: list[Tensor] = []
        self.look: Look | None = None

    def forward(self, batch: Batch) -> StepOutput:
        """Loss of one batch, with the scalars worth logging."""
        model = self.model
        embedded = self.embed(batch)
        log_temperature = self.log_temperature.reshape(())  # one that is shared out has a dimension
        look, self.look = self.look, None
        if look is None:
            keys = Keys(batch.target_hash, batch.negative_hash)
            loss, logged = self.contrast(embedded, keys, log_temperature)
        else:
            loss, logged = look.loss(batch.index, embedded, log_temperature), look.contrast.logged
        logged = logged | {
            "skipped_samples": torch.tensor(len(batch.bad)),
            "truncated_texts": torch.tensor(batch.n_truncated),
        }
        if model.angn is not None:
            penalty = model.angn.sparsity_penalty()
            loss = loss + model.config.angn.sparsity_weight * penalty
            logged["gate_sparsity"] = penalty.detach()
            activity = model.angn.activity()
            logged |= {f"gate_activity_{layer}": value for layer, value in enumerate(activity)}
        return StepOutput(loss, logged)

    def embed(self, batch: Batch) -> Embedded:
        """The embeddings that are contrasted."""
        if not len(batch):
            return Embedded(*(self._no_embeddings(),) * 3)
        predicted = self.model(*batch.inputs()).embedding
        texts = self.model.y_encoder.forward_distinct(*batch.texts())
        return Embedded(predicted, texts[: len(batch)], texts[len(batch) :])

    def contrast(self, embedded: Embedded, keys: Keys, log_temperature: Tensor) -> StepOutput:
        """InfoNCE over the embeddings of all ranks, which call it together."""
        temperature = log_temperature.exp()
        found = info_nce_in_pieces(
            embedded.predicted, embedded.target, keys.target, temperature, embedded.hard, keys.hard, all_gather
        )
        if len(keys.target):
            self.negatives.append(found.negatives)
        loss = found.loss * world_size()
        logged = {
            "info_nce": loss.detach(),
            "accuracy": found.accuracy * world_size(),
            "negatives": found.negatives,
            "hard_negatives": torch.tensor(len(keys.hard) / max(1, len(keys.target))),
            "temperature": temperature.detach(),
        }
        return StepOutput(loss, logged)

    def _no_embeddings(self) -> Tensor:
        """(0, E), for a batch of which every sample was bad: they depend on every weight that trains, with gradients of
        0, since the other ranks wait for a gradient of each."""
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        nothing = torch.stack([weight.flatten()[:0].sum() for weight in weights]).sum()
        return nothing.expand(0, self.model.config.embed_dim)

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Keep the temperature within [0.01, 1]."""
        self.log_temperature.clamp_(math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE))


def in_two_passes(
    objective: Phase1Objective, next_batch: Callable[[], Batch], n_batches: int, precision: Precision
) -> Iterator[Batch]:
    """The micro-batches of one contrast, each to be given to the objective when it comes.

    GradCache (Gao et al. 2021, arXiv 2101.06983): a first pass keeps the embeddings of all micro-batches, from which
    the loss and its gradient by each embedding follow; in the second these go on into the weights, one micro-batch
    after the other. So the batches are read twice, and none is in memory longer than it is used. Random numbers, if a
    model draws some, are the same in both passes.

    Args:
        next_batch: gives the micro-batches of this rank one by one, and then once more; its ranks stay in step.
    """
    device = objective.log_temperature.device
    embedded, keys, indices, states = [], [], [], []
    for _ in range(n_batches):
        batch = next_batch().to(device)
        states.append(rng_state(device))
        with torch.no_grad(), autocast(device, precision):
            embedded.append(objective.embed(batch))
        keys.append(Keys(batch.target_hash, batch.negative_hash))
        indices.append(batch.index)
    of_all = Embedded(*(torch.cat(part).requires_grad_() for part in zip(*embedded, strict=True)))
    sizes = [[len(each) for each in part] for part in zip(*embedded, strict=True)]
    del embedded
    log_temperature = objective.log_temperature.detach().requires_grad_()
    contrast = objective.contrast(of_all, Keys(*map(torch.cat, zip(*keys, strict=True))), log_temperature)
    *gradients, of_temperature = torch.autograd.grad(contrast.loss, [*of_all, log_temperature])
    contrast = StepOutput(contrast.loss.detach(), contrast.logged)
    del of_all
    each = zip(*(gradient.split(of) for gradient, of in zip(gradients, sizes, strict=True)), strict=True)
    for index, state, gradient in zip(indices, states, each, strict=True):
        batch = next_batch()
        set_rng_state(state, device)
        objective.look = Look(
            index=index,
            n_batches=n_batches,
            contrast=contrast,
            gradient=Embedded(*gradient),
            of_temperature=of_temperature,
        )
        yield batch
