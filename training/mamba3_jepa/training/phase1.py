"""Phase 1: the predictor, the Y-Encoder and the gates learn by contrast; the X-Encoder stays frozen.

Letters: B local batch, G global batch, E embedding width.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from numpy.typing import NDArray
from torch import Tensor, nn

from mamba3_jepa.config import ModelConfig
from mamba3_jepa.data.batch import Batch, target_keys
from mamba3_jepa.data.images import normalize
from mamba3_jepa.data.loader import BatchLoader, build_loader
from mamba3_jepa.data.sample import some_of
from mamba3_jepa.data.sources import DataSplits, Source, source_texts
from mamba3_jepa.data.splits import stable_hash
from mamba3_jepa.data.tokenizer import TextTokenizer
from mamba3_jepa.errors import UserError
from mamba3_jepa.evaluation.showcase import write_contact_sheet
from mamba3_jepa.evaluation.text_gallery import TextGallery, validation_answers
from mamba3_jepa.evaluation.validate import Collected, collect, evaluate, merge
from mamba3_jepa.files.checkpoint import Checkpoint
from mamba3_jepa.files.folder_lock import alone_in
from mamba3_jepa.models.losses import info_nce
from mamba3_jepa.models.state_dict import first_changed
from mamba3_jepa.models.vit import VisionEncoder
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.training import Phase1Settings
from mamba3_jepa.training.distributed import all_gather, all_gather_object, from_rank_0, on_every_rank, rank, world_size
from mamba3_jepa.training.loop import fit
from mamba3_jepa.training.negatives import NegativesWatch, warn_without_negatives
from mamba3_jepa.training.pretrained_text import PretrainedText, demand_activation, pretrained_text
from mamba3_jepa.training.run import Run
from mamba3_jepa.training.session import build_accelerator, end_training
from mamba3_jepa.training.start import compile_layers, data_record, demand_same, open_data, say_model, workers
from mamba3_jepa.training.task import LrScales, StepOutput, Validation, measure_on

logger = logging.getLogger(__name__)

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 1.0

# Enough visual tokens for a stable covariance, from few images of a large X-Encoder, which are dear.
_TOKENS_PER_DIMENSION, _MIN_WHITENING_IMAGES, _WHITENING_BATCH = 8, 32, 32


@alone_in("output_dir")
def train_phase1(
    settings: Phase1Settings,
    *,
    data: DataSplits | None = None,
    model_type: type[Mamba3Jepa] = Mamba3Jepa,
    task_type: type[Phase1Task] | None = None,
) -> None:
    """Train as `settings` say; leaves checkpoints, metrics and plots in the output directory.

    Args:
        data: other samples than those of `settings.data_dir`.
        model_type, task_type: what to train, and how, where it is not `Mamba3Jepa` and `Phase1Task`.

    Raises:
        UserError: anything the user can put right.
        Interrupted: SIGTERM or Ctrl-C; the state has been saved.
    """
    settings = settings.resolved()
    _demand_vit(settings)
    accelerator = build_accelerator(settings)
    settings = dataclasses.replace(settings, workers=workers(settings))
    config = settings.build_config()
    x_encoder = on_every_rank(lambda: _load_vit(settings))
    if x_encoder is not None:
        config = config.replace(vision=x_encoder.config)
    pretrained = on_every_rank(lambda: pretrained_text(settings, settings.init_y_encoder, phase=1))
    if pretrained is not None:
        config = config.replace(y_encoder=pretrained.backbone)
    data = open_data(settings, config) if data is None else data
    run = Run(settings, phase=1, accelerator=accelerator)
    if run.resumed is not None and settings.init_y_encoder is not None:  # whatever has become of the folder
        config = config.replace(y_encoder=run.resumed.config.y_encoder)
        demand_activation(settings, config.y_encoder)
    tokenizer = _tokenizer(settings, config, data, run, pretrained)
    config = config.replace(vocab_size=tokenizer.vocab_size)
    demand_same(run, config, data)
    if run.resumed is not None and x_encoder is not None:
        _demand_same_vit(run, x_encoder, settings)
    set_seed(settings.seed)  # the weights depend on the seed alone, not on what was read before
    model = model_type(config, tokenizer, x_encoder=x_encoder).to(accelerator.device)
    if run.resumed is None:
        if pretrained is not None:
            on_every_rank(lambda: pretrained.start_y_encoder(model))
        on_every_rank(lambda: _start_vision_proj(model, data, settings))
    if settings.compile:
        compile_layers(model)
    if run.is_main:
        say_model(model)
        logger.info(
            "data: %s, %d training and %d validation samples",
            data.train.name, len(data.train_indices), len(data.val_indices),
        )  # fmt: skip
        size = (settings.batch_size or 1) * world_size()
        warn_without_negatives(data, tokenizer, config.max_answer_tokens, size, settings.hard_negatives)
    fit((task_type or Phase1Task)(model, data, settings), settings, run, accelerator)
    end_training(accelerator)
    if run.is_main:
        logger.info("done: %s (best), %s (last)", run.best_path, run.last_path)


def _start_vision_proj(model: Mamba3Jepa, data: DataSplits, settings: Phase1Settings) -> None:
    """Whiten the visual tokens of some training images; the same on every rank, and with any batch size."""
    vision = model.config.vision
    n_images = max(_MIN_WHITENING_IMAGES, _TOKENS_PER_DIMENSION * vision.hidden_size // vision.n_tokens)
    loader = build_loader(
        data.train,
        some_of(data.train, data.train_indices, n_images),
        model.tokenizer,
        model.config,
        _WHITENING_BATCH,
        shuffle=False,
        seed=0,
        drop_last=False,
        on_bad_sample=settings.on_bad_sample,
    )
    tokens, bad = [], []
    for batch in loader:
        bad += batch.bad
        if len(batch.pixels):
            tokens.append(model.x_encoder(normalize(batch.pixels.to(model.device)))[batch.picture])
    data.left_out.note(bad)  # said with the first epoch, which meets them again
    if tokens:
        model.predictor.whiten_vision(torch.cat(tokens).flatten(0, 1))


def _demand_vit(settings: Phase1Settings) -> None:
    if settings.preset == "small" and settings.vit_checkpoint is None and not settings.random_vit:
        raise UserError(
            "`preset` small needs `vit_checkpoint`, the weights of a V-JEPA 2 or 2.1 encoder: Meta's vitl.pt (the link "
            "is in the README of github.com/facebookresearch/vjepa2), a local copy of the Hugging Face repository "
            "facebook/vjepa2-vitl-fpc64-256, or another that docs/checkpoints.md lists. To try things without: "
            "`preset` mini, `tiny`, or `random_vit`."
        )


def _load_vit(settings: Phase1Settings) -> VisionEncoder | None:
    if settings.vit_checkpoint is None:
        return None
    return VisionEncoder.from_checkpoint(settings.vit_checkpoint, settings.image_size)


def _demand_same_vit(run: Run, x_encoder: VisionEncoder, settings: Phase1Settings) -> None:
    own = run.resumed.model if run.resumed is not None else {}
    known = {name.removeprefix("x_encoder."): tensor for name, tensor in own.items() if name.startswith("x_encoder.")}
    name = first_changed(x_encoder.state_dict(), known)
    if name is not None:
        raise UserError(
            f"cannot resume {run.last_path}: the weights of `vit_checkpoint` {settings.vit_checkpoint} are not "
            f"those it was started with ({name})"
        )


def _tokenizer(
    settings: Phase1Settings, config: ModelConfig, data: DataSplits, run: Run, pretrained: PretrainedText | None
) -> TextTokenizer:
    """The run's own when it is resumed, the language model's, the given file, or one trained on the training texts (by
    one process)."""
    if run.resumed is not None:
        known = TextTokenizer.from_json(run.resumed.tokenizer, source=str(run.last_path))
        given = known if settings.tokenizer is None else TextTokenizer.from_file(settings.tokenizer)
        if given.to_json() != known.to_json():
            raise UserError(
                f"cannot resume {run.last_path}: `tokenizer` {settings.tokenizer} is not the one it was started with"
            )
        return known
    return TextTokenizer.from_json(from_rank_0(lambda: _new_tokenizer(settings, config, data, pretrained)))


def _new_tokenizer(
    settings: Phase1Settings, config: ModelConfig, data: DataSplits, pretrained: PretrainedText | None
) -> str:
    if pretrained is not None:
        return pretrained.tokenizer(settings.tokenizer).to_json()
    if settings.tokenizer is not None:
        return TextTokenizer.from_file(settings.tokenizer).to_json()
    bad: list[str] | None = [] if settings.on_bad_sample == "skip" else None
    texts = [config.query_prompt, *source_texts(data.train, data.train_indices, bad)]
    data.left_out.say(data.train.name, bad or ())
    return TextTokenizer.train(texts, config.vocab_size).to_json()


class Phase1Objective(nn.Module):
    """Symmetric InfoNCE between predicted and target embeddings over the batches of all ranks.

    Every rank computes the loss of the whole global batch, with gradients through the gathered embeddings;
    averaging the parameter gradients over ranks then gives the gradient of one process with the global batch.
    """

    def __init__(self, model: Mamba3Jepa, temperature: float = 0.07) -> None:
        super().__init__()
        self.model = model
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        self.negatives: list[Tensor] = []  # of each batch since the task last looked

    def forward(self, batch: Batch) -> StepOutput:
        """Loss of one batch, with the scalars worth logging."""
        model = self.model
        temperature = self.log_temperature.exp()
        predicted, target, hard = self._embeddings(batch)
        predicted, target, keys, hard, hard_keys = all_gather(
            predicted, target, batch.target_hash, hard, batch.negative_hash
        )
        contrast = info_nce(predicted, target, keys, temperature, hard, hard_keys)
        loss = contrast.loss
        if len(keys):
            self.negatives.append(contrast.negatives)
        logged = {
            "info_nce": contrast.loss.detach(),
            "accuracy": contrast.accuracy,
            "negatives": contrast.negatives,
            "hard_negatives": torch.tensor(len(hard) / max(1, len(keys))),
            "temperature": temperature.detach(),
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

    def _embeddings(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(B, E) predicted and (B, E) target embeddings, and (M, E) of the hard negatives."""
        if not len(batch):
            return (self._no_embeddings(),) * 3
        predicted = self.model(*batch.inputs()).embedding
        texts = self.model.y_encoder.forward_distinct(*batch.texts())
        return predicted, texts[: len(batch)], texts[len(batch) :]

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


class Phase1Task:
    """Phase 1 as the loop sees it (see `training.task.Task`)."""

    phase = 1
    counts: Sequence[str] = ("skipped_samples", "truncated_texts")
    objective_type = Phase1Objective

    def __init__(self, model: Mamba3Jepa, data: DataSplits, settings: Phase1Settings) -> None:
        self.model, self.config, self.data, self.settings = model, model.config, data, settings
        self.objective = self.objective_type(model, settings.temperature)
        share = settings.y_encoder_lr_scale
        self.lr_scales: LrScales = [] if share in (None, 1) else [(model.y_encoder, share)]
        self.loader = self._loader(data.train, data.train_indices, training=True)
        self.val_loader = self._loader(
            data.val, some_of(data.val, data.val_indices, settings.val_samples or 1), training=False
        )
        self.batches_per_epoch = len(self.loader)
        self.collected: Collected | None = None
        self._gallery: TextGallery | None = None
        self._epoch, self._n_truncated = 0, 0  # of the training batches since all ranks last spoke of them
        self._watch = NegativesWatch()
        self._bad: list[str] = []
        self._lost: set[int] = set()  # bad training samples of all ranks, as hashes of what was wrong with them
        self._example = ""
        self._record = data_record(data)
        self.measure = measure_on("share right, known answers beside", self._record)

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
            image_shift=settings.image_shift if training else 0,
            draw_captions=training,
            hard_negatives=settings.hard_negatives if training else None,
            workers=(settings.workers or 0) if training else 0,
            on_bad_sample=settings.on_bad_sample,
            window=settings.shard_window if training else None,
        )

    def batches(self, epoch: int, skip: int) -> Iterator[Batch]:
        """This process's batches of `epoch`, without the first `skip`."""
        self.loader.set_epoch(epoch, skip)
        self._epoch = epoch
        try:
            for batch in self.loader:
                self._bad += batch.bad
                self._n_truncated += batch.n_truncated
                yield batch
        finally:
            self._watch.end_epoch(epoch)

    def say_left_out(self) -> str:
        """What all ranks have left out or cut in training since the last time."""
        bad, truncated = zip(*all_gather_object((self._bad, self._n_truncated)), strict=True)
        self._bad, self._n_truncated = [], 0
        where, messages = f"epoch {self._epoch + 1}", list(itertools.chain(*bad))
        self._lost.update(map(stable_hash, messages))
        self._example = self._example or "".join(messages[:1])
        if rank() == 0:
            self.data.left_out.say(where, messages)
            if sum(truncated):
                logger.warning("%s: %d texts longer than the token limit were cut", where, sum(truncated))
        return f": {len(self._lost)} were left out, the first: {self._example}" if self._lost else ""

    def resume(self, checkpoint: Checkpoint) -> None:
        """Bad samples found before stay counted."""
        before = checkpoint.data.train_samples
        if before is not None:
            self._record = dataclasses.replace(self._record, train_samples=before)

    def weights(self, batches: Sequence[Batch]) -> list[float]:
        """Micro-batches count alike: each is a contrast of its own."""
        return [1 / len(batches)] * len(batches)

    def after_step(self) -> None:
        """Clamp the temperature, and look whether the batches had negatives."""
        self.objective.clamp_temperature()
        for negatives in self.objective.negatives:
            self._watch.see(negatives)
        self.objective.negatives.clear()

    def validate(self, device: torch.device) -> Validation:
        """Retrieval, answers and the health of the embeddings on the held-out samples, each rank doing its share."""
        mine = on_every_rank(lambda: collect(self.model, self.val_loader, device))
        if self.model.angn is not None:
            self.model.angn.reset_context()  # its moving average is for inference, not for what was measured here
        self.collected = everyone = merge(all_gather_object(mine))
        self.say_left_out()
        if rank() == 0:
            self.data.left_out.say("validation", everyone.bad)
        if not everyone.texts:
            raise UserError(f"validation: not one of {len(everyone.bad)} samples could be read: {everyone.bad[0]}")
        known = self._record.answers
        self._gallery = validation_answers(self.model, everyone.texts, everyone.target, everyone.questions, known)
        report = evaluate(everyone, self._gallery)
        metrics = report.metrics()
        metrics["val/loss"] = self._loss(everyone)
        # How often the model is right, whatever it was asked: what "best" means.
        shares = ("val/image_to_text_r1", "val/answer_accuracy", "val/swap_accuracy")
        right = [metrics[name] for name in shares if name in metrics]
        return Validation(metrics=metrics, score=sum(right) / len(right), warnings=list(report.warnings))

    def _loss(self, collected: Collected) -> float:
        """InfoNCE over the held-out samples, in batches as large as those of training."""
        size = (self.settings.batch_size or 1) * world_size()
        tokenizer = self.model.tokenizer
        keys = torch.tensor(target_keys(tokenizer, tokenizer.encode(collected.texts, self.config.max_answer_tokens)))
        temperature = self.objective.log_temperature.detach().exp().cpu()
        chunks = zip(collected.predicted.split(size), collected.target.split(size), keys.split(size), strict=True)
        total = sum(float(info_nce(p, t, k, temperature).loss) * len(k) for p, t, k in chunks)
        return total / len(keys)

    def illustrate(self, folder: Path) -> None:
        """contact_sheet.png: the nearest texts for a few validation samples."""
        if self.collected is not None:
            write_contact_sheet(self.collected, self.data.val, folder / "contact_sheet.png", self._gallery)

    def checkpoint_fields(self) -> dict[str, Any]:
        """The tokenizer, where the data came from, with its most frequent answers, and the temperature."""
        known, left = self._record.train_samples or 0, len(self.data.train_indices) - len(self._lost)
        data = dataclasses.replace(self._record, train_samples=min(known, left))
        temperature = float(self.objective.log_temperature.detach().exp())
        return {"tokenizer": self.model.tokenizer.to_json(), "data": data, "temperature": temperature}
