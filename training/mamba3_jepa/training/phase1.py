"""Phase 1: the predictor, the Y-Encoder and the gates learn by contrast; the X-Encoder stays frozen.

What is contrasted, and how, stands in `phase1_objective.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import set_seed
from numpy.typing import NDArray

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
from mamba3_jepa.models.contrast import info_nce_in_pieces
from mamba3_jepa.models.state_dict import first_changed, load_state
from mamba3_jepa.models.vit import VisionEncoder
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.training import Phase1Settings, Precision
from mamba3_jepa.training.distributed import all_gather_object, from_rank_0, on_every_rank, rank, world_size
from mamba3_jepa.training.frozen_visual import VisualTokens, visual_tokens
from mamba3_jepa.training.loop import fit
from mamba3_jepa.training.negatives import NegativesWatch, warn_without_negatives
from mamba3_jepa.training.peers import in_company
from mamba3_jepa.training.phase1_objective import Phase1Objective, in_two_passes
from mamba3_jepa.training.pretrained_text import PretrainedText, demand_activation, pretrained_text
from mamba3_jepa.training.run import Run
from mamba3_jepa.training.session import build_accelerator, end_training, use_kernels
from mamba3_jepa.training.sharing import demand_sharing
from mamba3_jepa.training.start import (
    checkpoint_activations,
    compile_layers,
    data_record,
    demand_same,
    open_data,
    say_model,
    workers,
)
from mamba3_jepa.training.task import LrScales, Validation, measure_on

logger = logging.getLogger(__name__)

# Enough visual tokens for a stable covariance, from few images of a large X-Encoder, which are dear.
_TOKENS_PER_DIMENSION, _MIN_WHITENING_IMAGES, _WHITENING_BATCH = 8, 32, 32


@alone_in("output_dir")
@in_company
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
        PeerLostError: see `in_company`.
    """
    settings = settings.resolved()
    _demand_vit(settings)
    accelerator = build_accelerator(settings)
    settings = dataclasses.replace(settings, workers=workers(settings))
    demand_whole_batches(settings)
    if settings.fsdp:
        demand_sharing(settings)
    config = settings.build_config()
    x_encoder = on_every_rank(lambda: _load_vit(settings))
    if x_encoder is not None:
        config = settings.with_vision(config, x_encoder.config)
    pretrained = on_every_rank(lambda: pretrained_text(settings, settings.init_y_encoder, phase=1))
    if pretrained is not None:
        config = config.replace(y_encoder=pretrained.backbone)
    data = open_data(settings, config) if data is None else data
    run = Run(settings, phase=1, accelerator=accelerator)
    use_kernels(settings, accelerator, run.resumed)
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
    looked = _looked(model, data, settings, run)
    if settings.checkpoint_activations:
        checkpoint_activations(model)
    if run.is_main:
        say_model(model)
        logger.info(
            "data: %s, %d training and %d validation samples",
            data.train.name, len(data.train_indices), len(data.val_indices),
        )  # fmt: skip
        size = contrast_size(settings)
        warn_without_negatives(data, tokenizer, config.max_answer_tokens, size, settings.hard_negatives)
    fit((task_type or Phase1Task)(model, data, settings, looked), settings, run, accelerator)
    end_training(accelerator)
    if run.is_main:
        logger.info("done: %s (best), %s (last)", run.best_path, run.last_path)


def contrast_size(settings: Phase1Settings) -> int:
    """How many samples of all ranks are contrasted with each other."""
    return settings.contrast_batch or (settings.batch_size or 1) * world_size()


def demand_whole_batches(settings: Phase1Settings) -> None:
    """Refuse a contrast that is not made of whole micro-batches.

    Raises:
        UserError: names the sizes and the nearest that go.
    """
    size, micro = contrast_size(settings), (settings.batch_size or 1) * world_size()
    below, rest = divmod(size, micro)
    if rest:
        near = " or ".join(str(n * micro) for n in (below, below + 1) if n)
        ranks = f" on each of {world_size()} processes" if world_size() > 1 else ""
        raise UserError(
            f"`contrast_batch` {size}: must be a multiple of the {micro} samples of one micro-batch (`batch_size` "
            f"{settings.batch_size}{ranks}), such as {near}"
        )


def _start_vision_proj(model: Mamba3Jepa, data: DataSplits, settings: Phase1Settings) -> None:
    """Whiten the visual tokens of some training images; the same on every rank, and with any batch size."""
    config = model.config
    n_images = max(_MIN_WHITENING_IMAGES, _TOKENS_PER_DIMENSION * config.vision.hidden_size // config.visual_tokens)
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
            tokens.append(model.look(normalize(batch.pixels.to(model.device)))[batch.picture])
    data.left_out.note(bad)  # said with the first epoch, which meets them again
    if tokens:
        model.predictor.whiten_vision(torch.cat(tokens).flatten(0, 1))


def _looked(model: Mamba3Jepa, data: DataSplits, settings: Phase1Settings, run: Run) -> LookedSides:
    """The visual tokens of both sides, computed as far as they are not kept; none unless they are to be."""
    cache_dir = settings.cache_visual
    if cache_dir is None:
        return LookedSides()
    if run.resumed is not None:  # wherever its X-Encoder came from
        weights = {
            name.removeprefix("x_encoder."): tensor
            for name, tensor in run.resumed.model.items()
            if name.startswith("x_encoder.")
        }
        load_state(model.x_encoder, weights, source=str(run.last_path))

    def kept(source: Source, indices: NDArray[np.int64], precision: Precision) -> VisualTokens | None:
        return visual_tokens(
            model,
            source,
            indices,
            cache_dir=cache_dir,
            workers=settings.workers or 0,
            on_bad_sample=settings.on_bad_sample,
            precision=precision,
            try_again=run.resumed is None,
        )

    train = kept(data.train, data.train_indices, settings.precision)
    return LookedSides(train, kept(data.val, _validated(data, settings), "fp32"))  # as all of validation is computed


def _validated(data: DataSplits, settings: Phase1Settings) -> NDArray[np.int64]:
    return some_of(data.val, data.val_indices, settings.val_samples or 1)


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


class LookedSides(NamedTuple):
    """The visual tokens of training and validation samples, where they are kept and there are pictures."""

    train: VisualTokens | None = None
    val: VisualTokens | None = None


class Phase1Task:
    """Phase 1 as the loop sees it (see `training.task.Task`)."""

    phase = 1
    counts: Sequence[str] = ("skipped_samples", "truncated_texts")
    objective_type = Phase1Objective

    def __init__(
        self, model: Mamba3Jepa, data: DataSplits, settings: Phase1Settings, looked: LookedSides | None = None
    ) -> None:
        """`looked`: the visual tokens of pictures, where they are kept."""
        self.model, self.config, self.data, self.settings = model, model.config, data, settings
        self.objective = self.objective_type(model, settings.temperature)
        self.shares_weights = settings.fsdp
        model.y_encoder.one_pass = settings.fsdp  # the ranks gather its layers equally often
        share = settings.y_encoder_lr_scale
        self.lr_scales: LrScales = [] if share in (None, 1) else [(model.y_encoder, share)]
        self._per_contrast = contrast_size(settings) // ((settings.batch_size or 1) * world_size())
        self.micro_batches = settings.grad_accum * self._per_contrast
        self._demand_one_step()
        looked = looked or LookedSides()
        self.loader = self._loader(data.train, data.train_indices, looked.train, training=True)
        self.val_loader = self._loader(data.val, _validated(data, settings), looked.val, training=False)
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

    def _demand_one_step(self) -> None:
        settings, n_samples = self.settings, len(self.data.train_indices)
        if settings.contrast_batch is None:
            return
        per_step = settings.contrast_batch * settings.grad_accum
        if n_samples < per_step:
            accumulated = f" and `grad_accum` {settings.grad_accum}" if settings.grad_accum > 1 else ""
            raise UserError(
                f"{self.data.train.name}: `contrast_batch` {settings.contrast_batch}{accumulated}: a step of "
                f"{per_step} is larger than the {n_samples} samples there are; lower it, or give more data"
            )
        if rank() == 0:
            logger.info(
                "a contrast of %d samples: %d micro-batches of %d on each of %d process(es); %d of %d samples are "
                "left over in each epoch, others in each",
                settings.contrast_batch, self._per_contrast, settings.batch_size, world_size(),
                n_samples % per_step, n_samples,
            )  # fmt: skip

    def _loader(
        self, source: Source, indices: NDArray[np.int64], looked: VisualTokens | None, *, training: bool
    ) -> BatchLoader:
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
            twice=self._per_contrast if training and self._per_contrast > 1 else 0,
            window=settings.shard_window if training else None,
            looked=looked,
        )

    def batches(self, epoch: int, skip: int) -> Iterator[Batch]:
        """This process's batches of `epoch`, without the first `skip`; those of a contrast of several come twice, in
        the same order."""
        self.loader.set_epoch(epoch, skip)
        self._epoch = epoch
        try:
            for number, batch in enumerate(self.loader):
                if self._per_contrast == 1 or number // self._per_contrast % 2 == 0:
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

    def step(self, read: Callable[[], Batch]) -> Iterator[tuple[Batch, float]]:
        """Micro-batches count alike, as do the contrasts that they are or belong to."""
        for _ in range(self.settings.grad_accum):
            if self._per_contrast == 1:
                yield read(), 1 / self.micro_batches
                continue
            for batch in in_two_passes(self.objective, read, self._per_contrast, self.settings.precision):
                yield batch, 1 / self.micro_batches

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
        size = contrast_size(self.settings)
        tokenizer = self.model.tokenizer
        keys = torch.tensor(target_keys(tokenizer, tokenizer.encode(collected.texts, self.config.max_answer_tokens)))
        temperature = self.objective.log_temperature.detach().exp().cpu()
        order = collected.index.argsort(stable=True)  # who is contrasted with whom is the same on any number of ranks
        parts = (collected.predicted[order], collected.target[order], keys[order])
        chunks = zip(*(part.split(size) for part in parts), strict=True)
        total = sum(float(info_nce_in_pieces(p, t, k, temperature).loss) * len(k) for p, t, k in chunks)
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
