"""Settings of the three training runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

import tyro

from mamba3_jepa.addresses import is_address, shown_place
from mamba3_jepa.config import LARGEST_SIZE, ModelConfig, PresetName, VisionConfig, preset
from mamba3_jepa.errors import UserError
from mamba3_jepa.overrides import read_model_config, with_file, with_overrides
from mamba3_jepa.settings.common import ConfusionKind, Kernels
from mamba3_jepa.settings.data import demand_data_dir
from mamba3_jepa.settings.init_text import PRETRAINED_LR_SCALE, Activation, Folder, demand_consistent
from mamba3_jepa.settings.limits import (
    BATCH,
    COUNT,
    FRACTION,
    FROM_ZERO,
    PIXELS,
    POSITIVE,
    PROCESSES,
    Checked,
    Count,
    NotNegative,
    Positive,
    Range,
    Seed,
)
from mamba3_jepa.settings.preset_defaults import PHASE1_DEFAULTS, PHASE2_DEFAULTS, PHASE3_DEFAULTS

Precision = Literal["fp32", "bf16", "fp16"]

_Float = Annotated[float | None, tyro.conf.arg(metavar="FLOAT")]
_Int = Annotated[int | None, tyro.conf.arg(metavar="INT")]
_Count = Annotated[_Int, COUNT]
_Path = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]
# an address keeps its slashes only as a str
_PathOrAddress = Annotated[str | Path | None, tyro.conf.arg(metavar="PATH")]
_Preset = Annotated[PresetName | None, tyro.conf.arg(metavar="{small,mini,tiny}")]
_Assignments = Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE ...")]
SHARD_WINDOW = 4  # shards whose samples are mixed where each has to be fetched
_Settings = TypeVar("_Settings", bound="TrainSettings")


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Checked):
    """What all phases share.

    Raises:
        UserError: a number is out of its range, or `manifest` stands without `data_dir`.
    """

    data_dir: _PathOrAddress = None
    """Folder with manifest.jsonl, image+text pairs, or WebDataset tar shards; or shards elsewhere: s3://bucket/folder,
    hf://datasets/owner/name, https://host/{00000..01242}.tar. Without it: synthetic scenes."""
    manifest: _Path = None
    """Another manifest than the manifest.jsonl in --data-dir, there or elsewhere; its images lie in --data-dir."""
    index_dir: _Path = None
    """Keep the index of each shard in this folder, so that data of any size opens at once; default: none is kept, and
    of shards elsewhere in --shard-cache."""
    shard_cache: _Path = None
    """Folder that shards from elsewhere are fetched into, each whole; those not used for longest make room."""
    shard_cache_gb: Positive = 100.0
    """What --shard-cache may hold, in gigabytes (10^9 bytes)."""
    output_dir: Path = Path("checkpoints")
    """Where checkpoints, metrics and plots go."""
    model: _Assignments = ()
    """Change the model key by key: predictor.n_layers=8 predictor.layer.is_mimo=true embed_dim=256. All keys:
    mamba3-jepa inspect --preset mini. A later phase changes only what it builds."""
    model_config: _Path = None
    """A JSON file with a whole model configuration, such as another run's config.json."""
    epochs: _Count = None
    """Passes over the training data."""
    max_steps: _Count = None
    """Stop after this many optimizer steps, whatever --epochs says."""
    batch_size: Annotated[_Int, BATCH] = None
    """Samples per process and micro-batch."""
    grad_accum: Count = 1
    """Micro-batches per optimizer step; in phase 1 contrasts."""
    lr: Annotated[float | None, tyro.conf.arg(metavar="FLOAT"), POSITIVE] = None
    """Peak learning rate (linear warm-up, then cosine)."""
    warmup_steps: Annotated[_Int, FROM_ZERO] = None
    """Warm-up length; default: 5% of all steps, at most 2,000."""
    weight_decay: NotNegative = 0.05
    """AdamW weight decay, on weight matrices only."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""
    precision: Precision = "fp32"
    """Arithmetic of the forward and backward pass; weights stay in float32."""
    compile: bool = False
    """Compile the layers of X-Encoder and Mamba-3 (needs a C++ compiler on CPU). Slower to start, faster to run."""
    kernels: Kernels = "auto"
    cpu: bool = False
    """Stay on the CPU even where there is a GPU."""
    seed: Seed = 0
    """Seed of the initial weights, the data order and the synthetic scenes."""
    workers: Annotated[_Int, PROCESSES] = None
    """Data-loading processes per training process; default: the CPU cores beyond two, at most 8."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """An unreadable image or text stops the run, or is skipped, counted once and reported."""
    val_fraction: Annotated[float, Range(0, 1, open=True)] = 0.02
    """Share of the data held out for validation (by hash), unless val.jsonl is there."""
    val_samples: _Count = None
    """Validate on at most this many held-out samples; default: 2,048; for tiny about
    a hundred."""
    synthetic_scenes: Annotated[_Int, Range(1, 10_000_000)] = None
    """Number of training scenes when the data is synthetic."""
    log_every: Count = 10
    """Optimizer steps between lines in metrics.jsonl."""
    eval_every: _Count = None
    """Optimizer steps between validations; default: once per epoch."""
    save_every: Count = 500
    """Optimizer steps between saves of the last checkpoint (it is also saved after every epoch)."""
    resume: bool = False
    """Continue the run in --output-dir from its last checkpoint, bit for bit."""
    wandb: bool = False
    """Log to Weights & Biases (needs: pip install wandb)."""
    tensorboard: bool = False
    """Log to TensorBoard files in --output-dir (needs: pip install tensorboard)."""

    # Settings that may differ between a run and its continuation.
    FREE_ON_RESUME: ClassVar[frozenset[str]] = frozenset([
        "output_dir", "workers", "log_every", "save_every", "resume", "wandb", "tensorboard", "cpu", "epochs",
        "max_steps", "cache_dir", "index_dir", "shard_cache", "shard_cache_gb", "on_bad_sample",
        "checkpoint_activations", "fsdp",
        "kernels",  # so that a run goes on whose kernel has failed
        # places: what lies there is compared itself, or stands in the checkpoint
        "data_dir", "manifest", "phase1_checkpoint", "phase2_checkpoint", "tokenizer", "vit_checkpoint",
        "init_y_encoder", "init_y_decoder",
        # what they decide is the model's configuration, which is compared itself
        "model", "model_config", "a_activation", "angn_enabled", "angn_sparsity_weight", "angn_reset_threshold",
        "patch_size", "knowledge_dim", "visual_pool",
    ])  # fmt: skip

    # Places that may differ, but not whether there is one.
    PLACES: ClassVar[frozenset[str]] = frozenset(["cache_visual"])

    # What newer settings were before they were settings, where that is not their default.
    BEFORE: ClassVar[dict[str, Any]] = {}

    # Whether micro-batches add up to what one large batch would be.
    ACCUMULATES: ClassVar[bool] = True

    # What a later phase builds, and `model` may change there; the first builds everything. And what is built after it.
    BUILT: ClassVar[tuple[str, ...]] = ()
    BUILT_LATER: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        demand_data_dir(self.manifest, self.data_dir, self.shard_cache)

    def changed(self, config: ModelConfig) -> ModelConfig:
        """The configuration of an earlier phase's model with this phase's choices.

        Raises:
            UserError: an unknown key, one that another phase decides, or a wrong type.
        """
        if self.model_config is not None:
            config = with_file(config, self.model_config, self.BUILT, self.BUILT_LATER)
        return with_overrides(config, self.model, self.BUILT)

    def with_defaults(self: _Settings, values: dict[str, Any]) -> _Settings:
        """A copy in which `values` stand wherever the command line was silent, which is where a field is None.

        So a field that a preset decides has None as its default: a default that could also be given would hide
        whether it was.
        """
        open_fields = {name: value for name, value in values.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **open_fields)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(self).items()
        } | {"data_dir": shown_place(self.data_dir)}


# Settings of phase 1 that are also keys of the model.
_ALSO_A_SETTING = {
    "tokenizer": "vocab_size",
    "image_size": "vision.image_size",
    "init_y_encoder": "vocab_size",
    "patch_size": "vision.patch_size",
    "visual_pool": "predictor.visual_pool",
    "angn_enabled": "angn.enabled",
    "angn_sparsity_weight": "angn.sparsity_weight",
    "angn_reset_threshold": "angn.context_reset_threshold",
}


@dataclass(frozen=True, kw_only=True)
class Phase1Settings(TrainSettings):
    """Phase 1: train the Predictor, the Y-Encoder and the ANGN gates with InfoNCE; the X-Encoder stays frozen."""

    output_dir: Path = Path("checkpoints/phase1")
    """Where phase1_best.pt, phase1_last.pt, config.json, metrics.jsonl and the plots go."""
    preset: _Preset = None
    """Model size: small (full size: 50 epochs of batch 64), mini (learns on a laptop), tiny (for tests); default:
    small."""
    tiny: bool = False
    """Short for --preset tiny."""
    vit_checkpoint: _Path = None
    """V-JEPA 2 or 2.1 weights for the X-Encoder: Meta's .pt/.pth, a transformers folder, or safetensors."""
    random_vit: bool = False
    """Let --preset small run with a random X-Encoder (tests and benchmarks only)."""
    image_size: Annotated[_Int, PIXELS] = None
    """Side in pixels of what the X-Encoder sees, a multiple of its patch; default: what --vit-checkpoint was trained
    on (384 for the 384 files), or the preset's."""
    patch_size: Annotated[_Int, PIXELS] = None
    """Patch size of the random X-Encoder in pixels. Smaller patches see finer and take longer; default: the
    preset's."""
    image_shift: Annotated[int, FROM_ZERO] = 0
    """Move every training image by up to this many pixels, differently in each epoch, its edges repeated: for few
    images."""
    cache_visual: _Path = None
    """Keep the visual tokens of every picture in this folder, in bfloat16, so that the X-Encoder sees each once and not
    in every epoch; how much that takes is said before."""
    visual_pool: _Count = None
    """Let the predictor read the mean of so many by so many neighbouring visual tokens as one: 2 leaves a quarter of
    them, and of --cache-visual; default: 1."""
    shard_window: _Count = None
    """Read shard after shard and mix the samples of so many, instead of all: for shards that are far away; default: 4
    for those that are fetched, else all."""
    hard_negatives: Annotated[int, FROM_ZERO] = 2
    """How many of a sample's wrong texts (a manifest's negatives; synthetic scenes have them) are further negatives of
    its batch, drawn anew in each epoch; 0: none."""
    contrast_batch: _Count = None
    """Samples that are contrasted with each other, over all processes: a multiple of --batch-size times the processes.
    More than that takes two passes, and the memory of one micro-batch; default: one micro-batch of each process."""
    checkpoint_activations: bool = False
    """Keep only the input of each Mamba-3 layer for the backward pass and compute the rest again: less memory, more
    time, the same numbers."""
    fsdp: bool = False
    """Share weights, gradients and optimizer state out among the processes (FSDP2), where one GPU cannot hold them."""
    tokenizer: _Path = None
    """A tokenizer.json to use; default: that of --init-y-encoder, or a byte-level BPE trained on the data's texts."""
    init_y_encoder: Folder = None
    """Start the Y-Encoder from an official Mamba-3 language model: a folder with config.json, weights and
    tokenizer.json, which decide its size and the vocabulary."""
    a_activation: Activation = None
    """A activation that the model of --init-y-encoder was trained with, which its files do not say; default:
    heavy_tail."""
    y_encoder_lr_scale: Annotated[_Float, Range(0)] = None
    """Learning rate of the Y-Encoder as a share of the others'; default: 0.05 with --init-y-encoder, else 1."""
    temperature: Annotated[float, Range(0.01, 1)] = 0.07
    """Initial InfoNCE temperature (learned, kept within 0.01 and 1)."""
    angn_enabled: bool = False
    """Gate the Predictor's residual stream before every layer (ANGN)."""
    angn_sparsity_weight: Annotated[_Float, Range(0)] = None
    """Weight of the gates' sparsity penalty in the loss; default: 0.01."""
    angn_reset_threshold: Annotated[_Float, FRACTION] = None
    """In inference, mean gate activity under this value is reported as a context reset; default: 0.3."""

    BEFORE: ClassVar[dict[str, Any]] = {"hard_negatives": 0}
    ACCUMULATES: ClassVar[bool] = False  # each contrast is one by itself

    def resolved(self) -> Phase1Settings:
        """A copy in which the preset has filled every value the command line left open.

        Raises:
            UserError: contradictory or impossible settings.
        """
        if self.tiny and self.preset not in (None, "tiny"):
            raise UserError(f"`tiny` and `preset` {self.preset} contradict each other; give one of them")
        name: PresetName | None = "tiny" if self.tiny else self.preset
        base = self._base(name)
        if name not in (None, base.preset):
            raise UserError(f"`model_config` {self.model_config} is a {base.preset} model, not {name}; leave that out")
        name = base.preset
        if base.vision.pretrained and self.vit_checkpoint is None and not self.random_vit and not self.resume:
            raise UserError(
                f"`model_config` {self.model_config} is of a model whose X-Encoder came from a file: give that as "
                "`vit_checkpoint`, or `random_vit` to go without"
            )
        if self.vit_checkpoint is not None and self.random_vit:
            raise UserError("`random_vit` and `vit_checkpoint` contradict each other; give one of them")
        if self.vit_checkpoint is not None and self.patch_size is not None:
            raise UserError("`patch_size` is for a random X-Encoder; the weights of `vit_checkpoint` have theirs")
        if self.vit_checkpoint is not None and any(each.startswith("vision.") for each in self.model):
            raise UserError("`model` vision.* is for a random X-Encoder; the weights of `vit_checkpoint` have theirs")
        demand_consistent("y_encoder", self.init_y_encoder, self.a_activation, self.model)
        for setting, key in _ALSO_A_SETTING.items():
            value = getattr(self, setting)
            if value is not None and value is not False and any(each.startswith(f"{key}=") for each in self.model):
                raise UserError(f"`{setting}` and `model` {key} both say it; give one of them")
        vision = with_overrides(base, self.model).vision
        image_size, patch_size = self.image_size or vision.image_size, self.patch_size or vision.patch_size
        if self.vit_checkpoint is None and image_size % patch_size:
            if self.patch_size is not None:
                raise UserError(f"`patch_size` {patch_size}: must divide the {image_size} pixels of the images")
            raise UserError(f"`image_size` {image_size}: must be a multiple of the patch, {patch_size} pixels")
        if self.image_shift >= image_size:
            raise UserError(f"`image_shift` {self.image_shift}: must lie between 0 and {image_size - 1} pixels")
        if self.image_shift and self.cache_visual is not None:
            raise UserError(
                f"`image_shift` {self.image_shift} moves every picture differently in each epoch, and `cache_visual` "
                "keeps what the X-Encoder sees of it once: leave one of them out"
            )
        pretrained = {} if self.init_y_encoder is None else {"y_encoder_lr_scale": PRETRAINED_LR_SCALE}
        window = {"shard_window": SHARD_WINDOW} if is_address(self.data_dir) else {}
        return dataclasses.replace(
            self.with_defaults(PHASE1_DEFAULTS[name] | pretrained | window), preset=name, tiny=False
        )

    def build_config(self) -> ModelConfig:
        """The model configuration with this run's choices; what files decide is settled when they are read: vision,
        vocabulary, and a Y-Encoder that starts from a language model.

        Raises:
            UserError: an unknown key, a wrong type, or sizes that do not go together.
        """
        config = self._base(self.preset)
        given: dict[str, Any] = {
            "enabled": self.angn_enabled or None,
            "sparsity_weight": self.angn_sparsity_weight,
            "context_reset_threshold": self.angn_reset_threshold,
        }
        angn = dataclasses.replace(config.angn, **{name: value for name, value in given.items() if value is not None})
        vision = dataclasses.replace(config.vision, pretrained=False)
        config = with_overrides(config.replace(vision=vision, angn=angn), self.model)
        if self.vit_checkpoint is not None:  # the X-Encoder that is read has its own sizes
            return config
        vision = dataclasses.replace(
            config.vision,
            image_size=self.image_size or config.vision.image_size,
            patch_size=self.patch_size or config.vision.patch_size,
        )
        return self.with_vision(config, vision)

    def with_vision(self, config: ModelConfig, vision: VisionConfig) -> ModelConfig:
        """The configuration with that X-Encoder, its visual tokens pooled as wanted.

        Raises:
            UserError: sizes that do not go together.
        """
        pool = self.visual_pool or config.predictor.visual_pool
        return config.replace(vision=vision, predictor=dataclasses.replace(config.predictor, visual_pool=pool))

    def _base(self, name: PresetName | None) -> ModelConfig:
        return preset(name or "small") if self.model_config is None else read_model_config(self.model_config)


@dataclass(frozen=True, kw_only=True)
class Phase2Settings(TrainSettings):
    """Phase 2: train the Y-Decoder to say the answer that phase 1's model predicts; everything else stays frozen."""

    output_dir: Path = Path("checkpoints/phase2")
    """Where phase2_best.pt, phase2_last.pt, config.json, metrics.jsonl, answer_sheet.png and the plots go."""
    phase1_checkpoint: Path = Path("checkpoints/phase1/phase1_best.pt")
    """The model of phase 1; its size, its tokenizer and its weights are kept."""
    tiny: bool = False
    """A short run, for the checkpoint of a --tiny phase 1 only."""
    init_y_decoder: Folder = None
    """Start the Y-Decoder from an official Mamba-3 language model of the run's vocabulary: a folder with config.json,
    weights and tokenizer.json, which decide its size."""
    a_activation: Activation = None
    """A activation that the model of --init-y-decoder was trained with, which its files do not say; default:
    heavy_tail."""
    target_share: Annotated[float, FRACTION] = 0.5
    """Share of the samples, drawn anew in each epoch, whose text is learned from its own embedding and not from the
    predicted one: what a memory's knowledge puts right comes near to such embeddings."""
    cache_dir: _Path = None
    """Where the frozen model's outputs are kept for later epochs and runs; default: frozen_outputs beside
    --output-dir."""

    BEFORE: ClassVar[dict[str, Any]] = {"target_share": 0.0}
    BUILT: ClassVar[tuple[str, ...]] = ("y_decoder.", "prefix_tokens")
    BUILT_LATER: ClassVar[tuple[str, ...]] = ("recursion.",)

    def resolved(self, preset_name: PresetName) -> Phase2Settings:
        """A copy in which the checkpoint's preset has filled every value the command line left open.

        Raises:
            UserError: impossible settings, or --tiny for a checkpoint that is not tiny.
        """
        _demand_tiny(self.tiny, preset_name, self.phase1_checkpoint)
        demand_consistent("y_decoder", self.init_y_decoder, self.a_activation, self.model)
        filled = self.with_defaults(PHASE2_DEFAULTS[preset_name])
        return dataclasses.replace(filled, cache_dir=self.cache_dir or self.output_dir.parent / "frozen_outputs")


# The names of `data.confusion.MADE_KINDS`, repeated here because that module needs numpy and more.


@dataclass(frozen=True, kw_only=True)
class Phase3Settings(TrainSettings):
    """Phase 3: train the confusion monitor and the state injector; the model of phases 1 and 2 stays frozen."""

    output_dir: Path = Path("checkpoints/phase3")
    """Where phase3_best.pt, phase3_last.pt, recursion.safetensors, config.json, metrics.jsonl and the plots go."""
    phase2_checkpoint: Path = Path("checkpoints/phase2/phase2_best.pt")
    """The model of phase 2; its size, its tokenizer and its weights are kept."""
    tiny: bool = False
    """A short run, for the checkpoint of --tiny phases 1 and 2 only."""
    knowledge_dim: Annotated[_Int, Range(1, LARGEST_SIZE)] = None
    """Length of the knowledge vectors in the data; default: what the Y-Encoder makes of a text."""
    injection_weight: NotNegative = 1.0
    """Weight of the injection error in the loss, beside the confusion loss."""
    injector_lr_scale: Annotated[_Float, Range(0)] = None
    """Learning rate of the state injector as a multiple of the monitor's; default: one over the size of a knowledge
    vector's elements (root mean square), so that short vectors come to weigh as much as the pooled state."""
    confusion_kinds: tuple[ConfusionKind, ...] = get_args(ConfusionKind)
    """Confusion to make from the data, beside its own "confused" labels and the model's own errors: questions with
    another image, questions about what is not there (of scenes), destroyed images, questions without image, foreign
    questions, images spoilt step by step, questions that a tool answers (of scenes). Leave out mismatched where every
    question fits every image."""
    cache_dir: _Path = None
    """Where the frozen model's outputs are kept for later epochs and runs; default: frozen_outputs beside
    --output-dir."""

    BEFORE: ClassVar[dict[str, Any]] = {"injector_lr_scale": 1.0}
    BUILT: ClassVar[tuple[str, ...]] = ("recursion.",)

    def resolved(self, preset_name: PresetName) -> Phase3Settings:
        """A copy in which the checkpoint's preset has filled every value the command line left open.

        Raises:
            UserError: impossible settings, or --tiny for a checkpoint that is not tiny.
        """
        if self.knowledge_dim is not None and any(each.startswith("recursion.knowledge_dim=") for each in self.model):
            raise UserError("`knowledge_dim` and `model` recursion.knowledge_dim both say it; give one of them")
        _demand_tiny(self.tiny, preset_name, self.phase2_checkpoint)
        filled = self.with_defaults(PHASE3_DEFAULTS[preset_name])
        return dataclasses.replace(
            filled,
            # in one order, so that a resumed run may name them in another
            confusion_kinds=tuple(sorted(set(self.confusion_kinds))),
            cache_dir=self.cache_dir or self.output_dir.parent / "frozen_outputs",
        )


def _demand_tiny(tiny: bool, preset_name: PresetName, checkpoint: Path) -> None:
    """Refuse --tiny for the checkpoint of a larger model."""
    if tiny and preset_name != "tiny":
        raise UserError(
            f"`tiny`: {checkpoint} is a {preset_name} model; leave `tiny` out, or give the checkpoint of a `tiny` run"
        )
