"""Phase 3: the confusion monitor and the state injector learn on the frozen model's pooled states.

Letters: N samples, B local batch, D width of the pooled state, E embedding width, K length of a knowledge vector.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed
from numpy.typing import NDArray
from torch import Tensor, nn

from mamba3_jepa.config import ModelConfig
from mamba3_jepa.data.confusion import CONFUSION_KINDS, ConfusionSource
from mamba3_jepa.data.loader import BatchPlan
from mamba3_jepa.data.sources import DataSplits
from mamba3_jepa.data.splits import spread
from mamba3_jepa.evaluation.confusion import WRONG_ANSWER, ConfusionReport, evaluate_confusion
from mamba3_jepa.evaluation.confusion_plots import (
    plot_confusion,
    plot_injection,
    plot_memory_floor,
    plot_risk_coverage,
)
from mamba3_jepa.evaluation.injection import InjectionReport, InjectionSamples, InjectionTrial, gallery
from mamba3_jepa.evaluation.selective import SelectiveReport, selective_reports
from mamba3_jepa.export.writer import write_component
from mamba3_jepa.files.checkpoint import DataRecord
from mamba3_jepa.files.folder_lock import alone_in
from mamba3_jepa.models.generation import mean_log_probability
from mamba3_jepa.models.losses import confusion_loss, injection_error
from mamba3_jepa.models.predictor import Predictor
from mamba3_jepa.models.recursion import Recursion
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.training import Phase3Settings
from mamba3_jepa.training.distributed import on_every_rank, rank, world_size
from mamba3_jepa.training.loop import fit
from mamba3_jepa.training.phase3_data import Phase3Data, memory_floor, phase3_data
from mamba3_jepa.training.run import Run
from mamba3_jepa.training.session import build_accelerator, end_training
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
from mamba3_jepa.training.task import KeptOutputs, LrScales, StepOutput, Validation, demand_one_batch

logger = logging.getLogger(__name__)

_TOGETHER = 4096  # validation samples computed at once
# of synthetic data: a caption and two questions, and each question once more as one that confuses
_VAL_SAMPLES_PER_SCENE, _MAX_VAL_SCENES = 5, 512


@alone_in("output_dir")
def train_phase3(settings: Phase3Settings, *, model_type: type[Mamba3Jepa] = Mamba3Jepa) -> None:
    """Train as `settings` say; leaves checkpoints, recursion.safetensors, metrics and plots in the output directory.

    A resumed run goes on with the weights it was started with, whatever has become of the phase 2 checkpoint.

    Args:
        model_type: what `model_type` of `train_phase1` was.

    Raises:
        UserError: anything the user can put right.
        Interrupted: SIGTERM or Ctrl-C; the state has been saved.
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
    run = Run(settings, phase=3, accelerator=accelerator)
    demand_same(run, config, data)
    model = model_type.from_loaded(dataclasses.replace(start, config=config), str(start_path), accelerator.device)
    warn_of_seen_samples(start, data, settings, phase=3)
    model.requires_grad_(False)
    set_seed(settings.seed)  # the first weights depend on the seed alone
    recursion = model.recursion or model.add_recursion()
    recursion.requires_grad_(True)
    if settings.compile:
        compile_layers(model)
    train, train_rows = _confusion(data, "train", settings, config.query_prompt)
    val, val_rows = _confusion(data, "val", settings, config.query_prompt)
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
        for_learning = (data.val.group_hashes()[data.val_indices] >> np.uint64(1)) % np.uint64(2) == 0
        if 0 < for_learning.sum() < len(for_learning):
            learned = np.union1d(learned, data.val_indices[for_learning])
            measured = data.val_indices[~for_learning]
    if side == "train":
        source = ConfusionSource(
            data.train, learned, settings.seed, settings.confusion_kinds,
            beside=[data.val], query_prompt=query_prompt,
        )  # fmt: skip
        return source, np.arange(len(source))
    at_most = settings.val_samples or 1
    chosen = spread(measured, at_most)
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


@dataclass(frozen=True, kw_only=True)
class Phase3Batch:
    """One rank's share of one global batch.

    pooled: (B, D) states of the frozen model; doubt: (B, S) of its answers; confused: (B,) bool; knowledge: (B, K) and
    target: (B, E), zeros where `injected` (B,) bool is False.
    """

    pooled: Tensor
    doubt: Tensor
    confused: Tensor
    knowledge: Tensor
    target: Tensor
    injected: Tensor

    def __len__(self) -> int:
        return len(self.pooled)

    def to(self, device: torch.device | str) -> Phase3Batch:
        """A copy with all tensors on `device`."""
        return Phase3Batch(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})


class Phase3Objective(nn.Module):
    """Binary cross-entropy of the confusion monitor, and the squared error of the embedding predicted from h + W k.

    Both are means over all samples of the batch, one without knowledge counting as an error of zero: batches of equal
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
        logits = _logits(self.recursion, batch)
        confusion = confusion_loss(logits, batch.confused)
        # Where nothing is injected the knowledge is zero: every sample takes part, so every weight has a gradient.
        predicted = self.predictor.embed(self.recursion.injector(batch.pooled, batch.knowledge))
        error = injection_error(predicted, batch.target, batch.injected)
        loss = confusion + self.injection_weight * error.sum() / len(batch)
        logged = {
            "confusion_loss": confusion.detach(),
            "injection_loss": error.detach().sum() / batch.injected.sum().clamp(min=1),
            "confusion_accuracy": ((logits.detach() > 0) == batch.confused).float().mean(),
        }
        return StepOutput(loss, logged)


def _logits(recursion: Recursion, batch: Phase3Batch) -> Tensor:
    """(B,) float32."""
    probe = recursion.confusion_probe
    return probe(batch.pooled, batch.doubt if probe.hears_answer else None).float()


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
        self.lr_scales: LrScales = [] if scale == 1 else [(self.recursion.injector, scale)]
        super().__init__("confusion and injection", record, train.frozen.bad, temperature)
        demand_one_batch(train.source.name, len(train), settings, train.frozen.bad)
        size = settings.batch_size or 1
        self._plan = BatchPlan(np.arange(len(train)), size, True, settings.seed, rank(), world_size(), drop_last=True)
        self.batches_per_epoch = len(self._plan)
        self._read_validation()
        self._confusion: ConfusionReport | None = None
        self._selective: dict[str, SelectiveReport] = {}
        self._injection: InjectionReport | None = None

    def _read_validation(self) -> None:
        """Texts of the validation samples, and the confused ones among them that have a right answer."""
        val = self.val
        samples = [val.source.sample(i) for i in val.frozen.index.tolist()]
        self._questions = [sample.question for sample in samples]
        kinds = [CONFUSION_KINDS[kind] for kind in val.source.kinds[val.frozen.index.numpy()]]
        wrong = (val.answered & val.confused).tolist()
        right = (val.answered & ~val.confused).tolist()
        self._kinds = [
            WRONG_ANSWER if is_wrong else "clear" if is_right else kind
            for kind, is_wrong, is_right in zip(kinds, wrong, right, strict=True)
        ]
        self._memory_floor = memory_floor(val, samples)
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

    def batches(self, epoch: int, skip: int) -> Iterator[Phase3Batch]:
        """This process's batches of `epoch`, without the first `skip`."""
        self._plan.set_epoch(epoch, skip)
        for rows in self._plan:
            yield self.batch(self.train, torch.tensor(rows, dtype=torch.int64))

    @staticmethod
    def batch(data: Phase3Data, rows: Tensor) -> Phase3Batch:
        """Rows (B,) int64 of some data."""
        knowledge, injected = data.knowledge(rows)
        return Phase3Batch(
            pooled=data.frozen.pooled[rows],
            doubt=data.spoken.doubt[rows],
            confused=data.confused[rows],
            knowledge=knowledge,
            target=data.frozen.target_embedding[rows],
            injected=injected,
        )

    def weights(self, batches: Sequence[Phase3Batch]) -> list[float]:
        """All batches have the same size, and so the same weight."""
        return [1 / len(batches)] * len(batches)

    def validate(self, device: torch.device) -> Validation:
        """Confusion by kind, with threshold and temperature chosen anew and stored, and what injection does; the
        memory's floor is stored too.

        Every rank computes everything: it is little, as the frozen model's outputs are known.
        """
        return on_every_rank(lambda: self._validated(device))

    @torch.no_grad()
    def _validated(self, device: torch.device) -> Validation:
        losses, logits = self._losses(device)
        report = evaluate_confusion(logits, self.val.confused, self._kinds, self._questions)
        answered = self.val.answered
        selective = selective_reports(
            {"": logits[answered], "_confidence": -mean_log_probability(self.val.spoken.doubt[answered])},
            self.val.confused[answered],
        )
        probe = self.recursion.confusion_probe
        probe.threshold.fill_(report.calibration.threshold)
        probe.temperature.fill_(report.calibration.temperature)
        self.recursion.memory_floor.fill_(self._memory_floor.floor)
        metrics = losses | report.metrics("val") | self._memory_floor.metrics("val")
        for name, each in selective.items():
            metrics |= each.metrics("val", name)
        warnings = []
        parts = []
        if report.rocs:
            parts.append(sum(curve.auroc for curve in report.rocs.values()) / len(report.rocs))
        else:
            warnings.append(
                "validation needs both clear and confused samples to measure the confusion monitor and to choose its "
                "threshold: raise `val_fraction` or `val_samples`, or give more data"
            )
        self._confusion, self._selective, self._injection = report, selective, None
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
            output = Phase3Objective.forward(self.objective, batch)  # accelerate's own is under autocast
            injected = int(batch.injected.sum())
            totals["loss"] += float(output.loss) * len(rows)
            totals["confusion_loss"] += float(output.logged["confusion_loss"]) * len(rows)
            totals["injection_loss"] += float(output.logged["injection_loss"]) * injected
            n_injected += injected
            logits.append(_logits(self.recursion, batch).cpu())
        counts = {"loss": len(self.val), "confusion_loss": len(self.val), "injection_loss": max(1, n_injected)}
        return {f"val/{name}": total / counts[name] for name, total in totals.items()}, torch.cat(logits)

    def illustrate(self, folder: Path) -> None:
        """plots/confusion_*.png, plots/injection.png and plots/memory_floor.png of the last validation."""
        if len(self._memory_floor.right):
            plot_memory_floor(self._memory_floor, folder / "plots")
        if self._confusion is not None:
            plot_confusion(self._confusion, folder / "plots")
        if self._selective:
            plot_risk_coverage(self._selective, folder / "plots")
        if self._injection is not None:
            plot_injection(self._injection, folder / "plots")
