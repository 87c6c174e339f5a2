"""Phase 1 from settings to checkpoints: opens the data, builds or restores the model, trains."""

from __future__ import annotations

import dataclasses
import logging

import torch
from accelerate.utils import set_seed

from mamba3_jepa.config import ModelConfig
from mamba3_jepa.data.images import normalize
from mamba3_jepa.data.loader import build_loader
from mamba3_jepa.data.sources import DataSplits, open_splits, source_texts
from mamba3_jepa.data.splits import spread
from mamba3_jepa.data.tokenizer import TextTokenizer
from mamba3_jepa.errors import UserError
from mamba3_jepa.models.mamba3 import Mamba3
from mamba3_jepa.models.vit import VisionEncoder
from mamba3_jepa.models.vljepa import Mamba3Jepa, parameter_counts
from mamba3_jepa.settings.training import Phase1Settings, TrainSettings
from mamba3_jepa.training.distributed import all_gather_object, rank
from mamba3_jepa.training.jepa import JepaTask
from mamba3_jepa.training.loop import fit
from mamba3_jepa.training.run import Run
from mamba3_jepa.training.session import build_accelerator, spare_cores

logger = logging.getLogger(__name__)

# Enough visual tokens for a stable covariance, from few images of a large X-Encoder, which are dear.
_TOKENS_PER_DIMENSION, _MIN_WHITENING_IMAGES, _WHITENING_BATCH = 8, 32, 32

_SCENES_PER_VALIDATION_SAMPLE = 3  # one caption and two questions of each scene


def train_phase1(settings: Phase1Settings) -> None:
    """Train as `settings` say; leaves checkpoints, metrics and plots in the output directory.

    Raises:
        UserError: anything the user can put right.
        Interrupted: SIGTERM or Ctrl-C; the state has been saved.
    """
    settings = settings.resolved()
    _demand_vit(settings)
    accelerator = build_accelerator(settings)
    settings = dataclasses.replace(settings, workers=spare_cores() if settings.workers is None else settings.workers)
    config = settings.model_config()
    x_encoder = _load_vit(settings)
    if x_encoder is not None:
        config = config.replace(vision=x_encoder.config)
    data = open_data(settings, config)
    run = Run(settings, phase=1, accelerator=accelerator)
    tokenizer = _tokenizer(settings, config, data, run)
    config = config.replace(vocab_size=tokenizer.vocab_size)
    demand_same(run, config, data)
    set_seed(settings.seed)  # the weights depend on the seed alone, not on what was read before
    model = Mamba3Jepa(config, tokenizer, x_encoder=x_encoder).to(accelerator.device)
    if run.resumed is None:
        _start_vision_proj(model, data, settings)
    if settings.compile:
        compile_layers(model)
    if run.is_main:
        counts = ", ".join(f"{name} {count:,}" for name, count in parameter_counts(model).items())
        logger.info("parameters: %s", counts)
        logger.info(
            "data: %s, %d training and %d validation samples",
            data.train.name, len(data.train_indices), len(data.val_indices),
        )  # fmt: skip
    fit(JepaTask(model, data, settings), settings, run, accelerator)
    accelerator.end_training()
    if run.is_main:
        logger.info("done: %s (best), %s (last)", run.best_path, run.last_path)


def _start_vision_proj(model: Mamba3Jepa, data: DataSplits, settings: Phase1Settings) -> None:
    """Whiten the visual tokens of some training images; the same on every rank, and with any batch size."""
    vision = model.config.vision
    n_images = max(_MIN_WHITENING_IMAGES, _TOKENS_PER_DIMENSION * vision.hidden_size // vision.n_tokens)
    loader = build_loader(
        data.train,
        spread(data.train_indices, n_images),
        model.tokenizer,
        model.config,
        _WHITENING_BATCH,
        shuffle=False,
        seed=0,
        drop_last=False,
        on_bad_sample=settings.on_bad_sample,
    )
    tokens = [model.x_encoder(normalize(batch.pixels.to(model.device))) for batch in loader if len(batch.pixels)]
    if tokens:
        model.predictor.whiten_vision(torch.cat(tokens).flatten(0, 1))


def compile_layers(model: torch.nn.Module) -> None:
    """Compile each Mamba-3 layer in place; names in the state dict stay."""
    for module in model.modules():
        if isinstance(module, Mamba3):
            module.compile()


def _demand_vit(settings: Phase1Settings) -> None:
    if settings.preset == "small" and settings.vit_checkpoint is None and not settings.random_vit:
        raise UserError(
            "--preset small needs --vit-checkpoint, the weights of V-JEPA 2's ViT-L: Meta's vitl.pt (the link is in "
            "the README of github.com/facebookresearch/vjepa2) or a local copy of the Hugging Face repository "
            "facebook/vjepa2-vitl-fpc64-256. To try things without it: --preset mini, --tiny, or --random-vit."
        )


def _load_vit(settings: Phase1Settings) -> VisionEncoder | None:
    if settings.vit_checkpoint is None:
        return None
    return VisionEncoder.from_checkpoint(settings.vit_checkpoint)


def open_data(settings: TrainSettings, config: ModelConfig) -> DataSplits:
    """Training and validation samples with a target, for any phase."""
    return open_splits(
        settings.data_dir,
        image_size=config.vision.image_size,
        seed=settings.seed,
        val_fraction=settings.val_fraction,
        n_scenes=settings.synthetic_scenes or 1,
        n_val_scenes=max(2, min(256, (settings.val_samples or 1) // _SCENES_PER_VALIDATION_SAMPLE)),
        on_bad_sample=settings.on_bad_sample,
    )


def _tokenizer(settings: Phase1Settings, config: ModelConfig, data: DataSplits, run: Run) -> TextTokenizer:
    """The run's own when it is resumed, the given file, or one trained on the training texts (by one process)."""
    if run.resumed is not None:
        return TextTokenizer.from_json(run.resumed.tokenizer, source=str(run.last_path))
    if settings.tokenizer is not None:
        return TextTokenizer.from_file(settings.tokenizer)
    trained = ""
    if rank() == 0:
        texts = [config.query_prompt, *source_texts(data.train, data.train_indices)]
        trained = TextTokenizer.train(texts, config.vocab_size).to_json()
    return TextTokenizer.from_json(all_gather_object(trained)[0])


def demand_same(run: Run, config: ModelConfig, data: DataSplits) -> None:
    """A continued run must see the model and the data it was started with."""
    if run.resumed is None:
        return
    if run.resumed.config != config:
        raise UserError(f"cannot resume {run.last_path}: it was made with another model configuration")
    if run.resumed.data.get("fingerprint") != data.fingerprint:
        raise UserError(
            f"cannot resume {run.last_path}: the data has changed since ({data.train.name}, "
            f"{len(data.train_indices)} training samples; it was {run.resumed.data.get('source')}, "
            f"{run.resumed.data.get('train_samples')}). Start a new run in another --output-dir."
        )
