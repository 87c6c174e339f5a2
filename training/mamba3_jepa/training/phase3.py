"""Phase 3: the confusion monitor and the state injector learn on the frozen model's pooled states.

Letters: N samples, B local batch, D width of the pooled state, E embedding width, K length of a knowledge vector.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed
from numpy.typing import NDArray
from torch import Tensor

from mamba3_jepa.config import ModelConfig
from mamba3_jepa.data.confusion import ConfusionSource
from mamba3_jepa.data.confusion_plan import CONFUSION_KINDS
from mamba3_jepa.data.loader import BatchPlan
from mamba3_jepa.data.sample import some_of
from mamba3_jepa.data.sources import DataSplits
from mamba3_jepa.data.splits import learned_in_phase3, spread
from mamba3_jepa.evaluation.phase3_data import Phase3Data
from mamba3_jepa.evaluation.phase3_trials import Phase3Report, Phase3Trials
from mamba3_jepa.export.writer import write_component
from mamba3_jepa.files.checkpoint import DataRecord
from mamba3_jepa.files.folder_lock import alone_in
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.training import Phase3Settings
from mamba3_jepa.training.distributed import on_every_rank, rank, world_size
from mamba3_jepa.training.loop import fit
from mamba3_jepa.training.peers import in_company
from mamba3_jepa.training.phase3_data import phase3_data
from mamba3_jepa.training.phase3_objective import Phase3Batch, Phase3Objective, confusion_logits
from mamba3_jepa.training.run import Run
from mamba3_jepa.training.session import build_accelerator, end_training, use_kernels
from mamba3_jepa.training.start import (
    compile_layers,
    data_record,
    demand_same,
    open_data,
    say_model,
    starting_point,
    warn_of_seen_samples,
    workers,
)
from mamba3_jepa.training.task import KeptOutputs, LrScales, Validation, demand_one_batch

logger = logging.getLogger(__name__)

_TOGETHER = 1024  # validation samples computed at once
_OTHER_TEXTS = 64  # that a question learns to tell from the one that answers it
# of synthetic data: a caption and two questions, and each question once more as one that confuses
_VAL_SAMPLES_PER_SCENE, _MAX_VAL_SCENES = 5, 512


@alone_in("output_dir")
@in_company
def train_phase3(settings: Phase3Settings, *, model_type: type[Mamba3Jepa] = Mamba3Jepa) -> None:
    """Train as `settings` say; leaves checkpoints, recursion.safetensors, metrics and plots in the output directory.

    A resumed run goes on with the weights it was started with, whatever has become of the phase 2 checkpoint.

    Args:
        model_type: what `model_type` of `train_phase1` was.

    Raises:
        UserError: anything the user can put right.
        Interrupted: SIGTERM or Ctrl-C; the state has been saved.
        PeerLostError: see `in_company`.
    """
    accelerator = build_accelerator(settings)
    start, start_path = starting_point(settings, phase=3, earlier=settings.phase2_checkpoint)
    settings = settings.resolved(start.config.preset)
    config = _with_knowledge_dim(settings.changed(start.config), settings)
    # All samples there are: questions without an answer are learnt from too, if they are labelled.
    data = open_data(
        settings,
        config,
        kind="all",
        scenes="fresh",
        val_samples_per_scene=_VAL_SAMPLES_PER_SCENE,
        max_val_scenes=_MAX_VAL_SCENES,
    )
    train, train_rows = _confusion(data, "train", settings, config.query_prompt)
    val, val_rows = _confusion(data, "val", settings, config.query_prompt)
    config = _with_tools(config, train.tools)
    run = Run(settings, phase=3, accelerator=accelerator)
    use_kernels(settings, accelerator, run.resumed)
    demand_same(run, config, data)
    model = model_type.from_loaded(dataclasses.replace(start, config=config), str(start_path), accelerator.device)
    warn_of_seen_samples(start, data, settings, phase=3)
    model.requires_grad_(False)
    set_seed(settings.seed)  # the first weights depend on the seed alone
    recursion = model.recursion or model.add_recursion()
    recursion.requires_grad_(True)
    if settings.compile:
        compile_layers(model)
    demand_one_batch(train.name, len(train_rows), settings)
    is_new = run.resumed is None
    train_data = _outputs(model, train, train_rows, settings, demand_vectors=True, try_again=is_new)
    # rounding must not decide which weights are the best
    in_float32 = dataclasses.replace(settings, precision="fp32")
    val_data = _outputs(model, val, val_rows, in_float32, demand_vectors=False, try_again=is_new)
    n_read = train.n_made_of(train_data.frozen.index.numpy())
    record = data_record(data, start=start, phase=3, train_samples=n_read, confusion=_counts(train_data))
    if run.is_main:
        _say(model, train_data, val_data)
    fit(Phase3Task(model, train_data, val_data, settings, record, start.temperature), settings, run, accelerator)
    end_training(accelerator)
    if run.is_main:
        exported = export_recursion(run.best_path, settings.output_dir)
        logger.info("done: %s (best), %s (last), %s", run.best_path, run.last_path, exported)


def export_recursion(checkpoint: Path, folder: Path) -> Path:
    """Write the trained part of a phase 3 checkpoint to `folder`/recursion.safetensors.

    Raises:
        UserError: the checkpoint cannot be read, or the file not be written.
    """
    path = folder / "recursion.safetensors"
    write_component(Mamba3Jepa.from_checkpoint(checkpoint), "recursion", path, phase=3)
    return path


def _with_knowledge_dim(config: ModelConfig, settings: Phase3Settings) -> ModelConfig:
    if settings.knowledge_dim is None:
        return config
    return config.replace(recursion=dataclasses.replace(config.recursion, knowledge_dim=settings.knowledge_dim))


def _with_tools(config: ModelConfig, tools: list[str]) -> ModelConfig:
    return config.replace(recursion=dataclasses.replace(config.recursion, tools=tools))


def _confusion(
    data: DataSplits, side: str, settings: Phase3Settings, query_prompt: str
) -> tuple[ConfusionSource, NDArray[np.int64]]:
    """Clear and confused samples of one side, made of nothing from the other; and which to use.

    What the model answers wrongly can only be learned from samples that the phases before did not learn from. Of
    scenes, all are such. Of other data it is half of the validation side, by the hash of the group: it goes to the
    training side here, and the other half is for validation.
    """
    learned, measured = data.train_indices, data.val_indices
    if not data.synthetic and data.val is data.train:
        for_learning = learned_in_phase3(data.val.group_hashes()[data.val_indices])
        learned = np.union1d(learned, data.val_indices[for_learning])
        measured = data.val_indices[~for_learning]
    if side == "train":
        source = ConfusionSource(
            data.train, learned, settings.seed, settings.confusion_kinds,
            beside=[data.val], query_prompt=query_prompt,
        )  # fmt: skip
        return source, np.arange(len(source))
    at_most = settings.val_samples or 1
    chosen = some_of(data.val, measured, at_most)
    source = ConfusionSource(
        data.val, chosen, settings.seed, settings.confusion_kinds, beside=[data.train], query_prompt=query_prompt
    )
    return source, spread(np.arange(len(source)), at_most)


def _outputs(
    model: Mamba3Jepa,
    source: ConfusionSource,
    rows: NDArray[np.int64],
    settings: Phase3Settings,
    demand_vectors: bool,
    try_again: bool,
) -> Phase3Data:
    return phase3_data(
        model,
        source,
        rows,
        cache_dir=settings.cache_dir,
        workers=workers(settings),
        on_bad_sample=settings.on_bad_sample,
        precision=settings.precision,
        demand_vectors=demand_vectors,
        try_again=try_again,
    )


def _counts(data: Phase3Data) -> dict[str, int]:
    """Samples of each kind, without those that were left out."""
    return dict(Counter(CONFUSION_KINDS[kind] for kind in data.source.kinds[data.frozen.index.numpy()].tolist()))


def _say(model: Mamba3Jepa, train: Phase3Data, val: Phase3Data) -> None:
    say_model(model, trained="recursion")
    kinds = ", ".join(f"{name} {count:,}" for name, count in _counts(train).items())
    name = train.source.name
    logger.info("data: %s, %d training (%s) and %d validation samples", name, len(train), kinds, len(val))


def _taken(table: Tensor, rows: Tensor, length: int) -> Tensor:
    """Rows (...) of a table (R, length) -> (..., length); zeros where a row is negative."""
    taken = torch.zeros(*rows.shape, length)
    known = rows >= 0
    if bool(known.any()):
        taken[known] = table[rows[known]]
    return taken


def _mean(states: Tensor) -> Tensor:
    """Of (N, D), in float64: (D,)."""
    return sum((rows.double().sum(dim=0) for rows in states.split(_TOGETHER)), torch.zeros(1)) / len(states)


class Phase3Task(KeptOutputs):
    """Phase 3 as the loop sees it (see `training.task.Task`)."""

    phase = 3

    def __init__(
        self,
        model: Mamba3Jepa,
        train: Phase3Data,
        val: Phase3Data,
        settings: Phase3Settings,
        record: DataRecord,
        temperature: float | None = None,
    ) -> None:
        """`record`: what the checkpoint says about the data; `temperature`: phase 1's, which it hands on.

        Raises:
            UserError: there is not one batch.
        """
        if model.recursion is None:
            raise ValueError("the model has no recursion to train")
        self.model, self.config, self.settings = model, model.config, settings
        self.train, self.val = train, val
        self.recursion = model.recursion
        self.objective = Phase3Objective(model.recursion, model.predictor, settings.injection_weight)
        scale = settings.injector_lr_scale
        if scale is None:
            scale = 1 / train.knowledge_size()
        # its hidden layer sees knowledge that is as large as the state already
        injector = self.recursion.injector
        scaled = injector.projection if injector.sees_state else injector
        self.lr_scales: LrScales = [] if scale == 1 else [(scaled, scale)]
        super().__init__(settings, "confusion and injection", record, train.frozen.bad, temperature)
        demand_one_batch(train.source.name, len(train), settings, train.frozen.bad)
        size = settings.batch_size or 1
        self._plan = BatchPlan(np.arange(len(train)), size, True, settings.seed, rank(), world_size(), drop_last=True)
        self.batches_per_epoch = len(self._plan)
        self._trials = on_every_rank(lambda: Phase3Trials(model, val))
        if self._trials.episodes is not None:
            by_state = self.config.recursion.episode_key == "state"
            mean = _mean(train.frozen.pooled[torch.arange(len(train))]) if by_state else self._trials.episodes.mean()
            self.recursion.episode_mean.copy_(mean)
        self._report: Phase3Report | None = None
        if rank() == 0 and self._trials.warning is not None:
            logger.warning(self._trials.warning)

    def batches(self, epoch: int, skip: int) -> Iterator[Phase3Batch]:
        """This process's batches of `epoch`, without the first `skip`."""
        self._plan.set_epoch(epoch, skip)
        for rows in self._plan:
            yield self.batch(self.train, torch.tensor(rows, dtype=torch.int64), epoch)

    @staticmethod
    def batch(data: Phase3Data, rows: Tensor, epoch: int) -> Phase3Batch:
        """Rows (B,) int64 of some data; in every epoch other texts are looked up."""
        lessons, embed_dim = data.lessons, data.frozen.embedding.shape[1]
        numbers, about = lessons.of(rows)
        right = data.findable.right(rows, epoch)
        others = data.findable.others(rows, epoch, _OTHER_TEXTS)
        # what has nothing to do with the data is learned beside the rest, not instead of some of it
        weighs = (~lessons.are(["foreign"], numbers)).float()
        counts = torch.bincount(about, weights=weighs, minlength=len(rows)).clamp(min=1)
        knowledge, goal = lessons.vectors[lessons.knowledge[numbers]], data.goals(numbers, rows[about])
        share = 1 / counts[about]
        if not len(numbers):  # every weight has a gradient in every batch: a lesson that counts nothing
            about, share = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
            knowledge, goal = torch.zeros(1, lessons.vectors.shape[1]), torch.zeros(1, embed_dim)
        return Phase3Batch(
            pooled=data.frozen.pooled[rows],
            doubt=data.spoken.doubt[rows],
            confused=data.confused[rows],
            about=about,
            knowledge=knowledge,
            goal=goal,
            share=share,
            answers=lessons.answer[numbers] >= 0 if len(numbers) else torch.zeros(1, dtype=torch.bool),
            question=_taken(lessons.questions, lessons.question[rows], embed_dim),
            right=_taken(lessons.vectors, right, embed_dim),
            asks=right >= 0,
            others=_taken(lessons.vectors, others, embed_dim),
            is_other=others >= 0,
            tool=data.tool[rows],
        )

    def validate(self, device: torch.device) -> Validation:
        """Confusion by kind, with threshold and temperature chosen anew and stored, and what injection does; the
        floors of the memory's facts and episodes are stored too.

        Every rank computes everything: it is little, as the frozen model's outputs are known.
        """
        return on_every_rank(lambda: self._validated(device))

    @torch.no_grad()
    def _validated(self, device: torch.device) -> Validation:
        losses, logits = self._losses(device)
        report = self._trials.run(self.model, logits, device)
        probe = self.recursion.confusion_probe
        probe.threshold.fill_(report.confusion.calibration.threshold)
        probe.temperature.fill_(report.confusion.calibration.temperature)
        self.recursion.memory_floor.fill_(report.memory_floor.floor)
        if report.episode_floor is not None:
            self.recursion.episode_floor.fill_(report.episode_floor.floor)
            self.recursion.episode_blend.fill_(report.episode_floor.blend)
        warnings = []
        parts = []
        if report.confusion.rocs:
            parts.append(sum(curve.auroc for curve in report.confusion.rocs.values()) / len(report.confusion.rocs))
        else:
            warnings.append(
                "validation needs both clear and confused samples to measure the confusion monitor and to choose its "
                "threshold: raise `val_fraction` or `val_samples`, or give more data"
            )
        if report.tools is not None:
            parts.append(report.tools.accuracy)
        if report.injection is not None:
            parts.append(report.injection.retrieved.after)
        self._report = report
        # How well confusion is noticed and how often knowledge helps; without either, at least the loss.
        score = sum(parts) if parts else -losses["val/loss"]
        return Validation(metrics=losses | report.metrics("val"), score=score, warnings=warnings)

    def _losses(self, device: torch.device) -> tuple[dict[str, float], Tensor]:
        """The objective over the validation samples, and the monitor's logits (N,)."""
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        logits = []
        for rows in torch.arange(len(self.val)).split(_TOGETHER):
            batch = self.batch(self.val, rows, epoch=0).to(device)
            output = Phase3Objective.forward(self.objective, batch)  # accelerate's own is under autocast
            weights = {
                "loss": len(rows),
                "confusion_loss": len(rows),
                "injection_loss": float(batch.share.sum()),
                "lookup_loss": float(batch.asks.sum()),
                "knowledge_loss": float(batch.share.sum()),
                "tool_loss": float((batch.tool >= 0).sum()),
            }
            for name, value in {"loss": output.loss, **output.logged}.items():
                if name in weights:
                    sums[name] = sums.get(name, 0.0) + float(value) * weights[name]
                    counts[name] = counts.get(name, 0.0) + weights[name]
            logits.append(confusion_logits(self.recursion, batch).cpu())
        return {f"val/{name}": total / max(1.0, counts[name]) for name, total in sums.items()}, torch.cat(logits)

    def illustrate(self, folder: Path) -> None:
        """The pictures of the last validation, in plots/."""
        if self._report is not None:
            self._report.plot(folder / "plots")
