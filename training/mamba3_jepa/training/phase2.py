"""Phase 2: the Y-Decoder learns to say the answer whose embedding is predicted; everything before it is frozen.

Letters: B local batch, G global batch, E embedding width, La tokens of an answer.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed
from numpy.typing import NDArray
from torch import Tensor, nn

from mamba3_jepa.data.length_batches import length_batches
from mamba3_jepa.data.question_type import asked_type
from mamba3_jepa.data.sample import some_of
from mamba3_jepa.data.sources import DataSplits, Source
from mamba3_jepa.data.splits import spread
from mamba3_jepa.data.tokenizer import TextTokenizer
from mamba3_jepa.evaluation.answers import Answers, nearest_texts, write_answer_pictures
from mamba3_jepa.evaluation.decoding import TokenReport, generate_texts, sum_scores
from mamba3_jepa.evaluation.text_gallery import validation_answers
from mamba3_jepa.files.checkpoint import DataRecord
from mamba3_jepa.files.folder_lock import alone_in
from mamba3_jepa.models.losses import score_tokens
from mamba3_jepa.models.network import eval_mode
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.models.y_decoder import YDecoder
from mamba3_jepa.settings.training import Phase2Settings
from mamba3_jepa.training.distributed import all_gather_object, on_every_rank, rank, world_size
from mamba3_jepa.training.epoch_targets import EpochTargets
from mamba3_jepa.training.frozen import FrozenOutputs, frozen_outputs
from mamba3_jepa.training.loop import fit
from mamba3_jepa.training.peers import in_company
from mamba3_jepa.training.pretrained_text import demand_activation, pretrained_text
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
from mamba3_jepa.training.task import KeptOutputs, StepOutput, Validation, demand_one_batch

logger = logging.getLogger(__name__)

GENERATED_SAMPLES = 512  # of the validation samples so many are answered by generation
_SCORED_TOGETHER = 256
_FROZEN_BATCH = 64  # samples the frozen model sees at once


@alone_in("output_dir")
@in_company
def train_phase2(settings: Phase2Settings, *, model_type: type[Mamba3Jepa] = Mamba3Jepa) -> None:
    """Train as `settings` say; leaves checkpoints, metrics and plots in the output directory.

    A resumed run goes on with the weights it was started with, whatever has become of the phase 1 checkpoint.

    Args:
        model_type: what `model_type` of `train_phase1` was.

    Raises:
        UserError: anything the user can put right.
        Interrupted: SIGTERM or Ctrl-C; the state has been saved.
        PeerLostError: see `in_company`.
    """
    accelerator = build_accelerator(settings)
    start, start_path = starting_point(settings, phase=2, earlier=settings.phase1_checkpoint)
    settings = settings.resolved(start.config.preset)
    start = dataclasses.replace(start, config=settings.changed(start.config))
    pretrained = on_every_rank(lambda: pretrained_text(settings, settings.init_y_decoder, phase=2))
    if pretrained is not None:
        pretrained.demand_tokens_of(TextTokenizer.from_json(start.tokenizer, source=f"{start_path}: tokenizer"))
        start = dataclasses.replace(start, config=start.config.replace(y_decoder=pretrained.backbone))
    data = open_data(settings, start.config)
    run = Run(settings, phase=2, accelerator=accelerator)
    use_kernels(settings, accelerator, run.resumed)
    demand_same(run, start.config, data)
    if run.resumed is not None:
        demand_activation(settings, start.config.y_decoder)
    model = model_type.from_loaded(start, str(start_path), accelerator.device)
    warn_of_seen_samples(start, data, settings, phase=2)
    model.requires_grad_(False)
    set_seed(settings.seed)  # the decoder's first weights depend on the seed alone
    decoder = model.y_decoder or model.add_decoder()
    if pretrained is not None:
        on_every_rank(lambda: pretrained.start_y_decoder(model))
    decoder.requires_grad_(True)
    if settings.compile:
        compile_layers(model)
    demand_one_batch(data.train.name, len(data.train_indices), settings)
    is_new = run.resumed is None
    train = _outputs(model, data.train, data.train_indices, settings, is_new)
    in_float32 = dataclasses.replace(settings, precision="fp32")  # rounding must not decide which weights are the best
    val = _outputs(model, data.val, some_of(data.val, data.val_indices, settings.val_samples or 1), in_float32, is_new)
    if run.is_main:
        say_model(model, trained="y_decoder")
        logger.info("data: %s, %d training and %d validation samples", data.train.name, len(train), len(val))
    record = data_record(data, start=start, phase=2, train_samples=len(train))
    fit(Phase2Task(model, train, val, data, settings, record, start.temperature), settings, run, accelerator)
    end_training(accelerator)
    if run.is_main:
        logger.info("done: %s (best), %s (last)", run.best_path, run.last_path)


def _outputs(
    model: Mamba3Jepa, source: Source, indices: NDArray[np.int64], settings: Phase2Settings, try_again: bool
) -> FrozenOutputs:
    return frozen_outputs(
        model,
        source,
        indices,
        cache_dir=settings.cache_dir,
        batch_size=_FROZEN_BATCH,
        workers=workers(settings),
        on_bad_sample=settings.on_bad_sample,
        precision=settings.precision,
        try_again=try_again,
    )


@dataclass(frozen=True, kw_only=True)
class Phase2Batch:
    """One rank's share of one global batch.

    embedding: (B, E), the predicted ones, or of some the text's own; ids, mask: (B, La) `[bos] ... [eos]`, padded on
        the right, and which of them are valid.
    n_tokens: tokens to predict here; n_global_tokens: in the whole global batch, over all ranks.
    """

    embedding: Tensor
    ids: Tensor
    mask: Tensor
    n_tokens: int
    n_global_tokens: int

    def __len__(self) -> int:
        return len(self.embedding)

    def to(self, device: torch.device | str) -> Phase2Batch:
        """A copy with all tensors on `device`."""
        return Phase2Batch(
            embedding=self.embedding.to(device, non_blocking=True),
            ids=self.ids.to(device, non_blocking=True),
            mask=self.mask.to(device, non_blocking=True),
            n_tokens=self.n_tokens,
            n_global_tokens=self.n_global_tokens,
        )


class Phase2Objective(nn.Module):
    """Cross-entropy of the next token, over the valid tokens of the answers."""

    def __init__(self, decoder: YDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, batch: Phase2Batch) -> StepOutput:
        """Mean loss per token of this batch."""
        scores = score_tokens(self.decoder, batch.embedding, batch.ids, batch.mask)
        loss = scores.nll / scores.tokens
        return StepOutput(loss, {"token_accuracy": scores.right / scores.tokens})


class Phase2Task(KeptOutputs):
    """Phase 2 as the loop sees it (see `training.task.Task`)."""

    phase = 2

    def __init__(
        self,
        model: Mamba3Jepa,
        train: FrozenOutputs,
        val: FrozenOutputs,
        data: DataSplits,
        settings: Phase2Settings,
        record: DataRecord,
        temperature: float | None = None,
    ) -> None:
        """`train`, `val`: the frozen model's outputs on samples of `data` with a target; `record`: what the
        checkpoint says about the data; `temperature`: phase 1's, which it hands on."""
        if model.y_decoder is None:
            raise ValueError("the model has no Y-Decoder to train")
        self.model, self.config, self.decoder = model, model.config, model.y_decoder
        self.train, self.val, self.data, self.settings = train, val, data, settings
        self.objective = Phase2Objective(self.decoder)
        super().__init__(settings, "exact match and token accuracy", record, train.bad, temperature)
        self._targets = EpochTargets(
            train, data.train, model.tokenizer, max_tokens=model.config.max_answer_tokens, seed=settings.seed
        )
        self._show(epoch=0)
        self._global_size = (settings.batch_size or 1) * world_size()
        demand_one_batch(data.train.name, len(train), settings, train.bad)
        self._step_size = self._global_size * settings.grad_accum
        self.batches_per_epoch = len(train) // self._step_size * settings.grad_accum
        self._asked = self._questions()
        self._answers: Answers | None = None

    def batches(self, epoch: int, skip: int) -> Iterator[Phase2Batch]:
        """This process's batches of `epoch`, without the first `skip`.

        What a step sees depends on its size alone, however many micro-batches and ranks share it.
        """
        self._show(epoch)
        steps = length_batches(self._lengths, self._step_size, seed=self.settings.seed, epoch=epoch)
        for block in steps.reshape(-1, self._global_size)[skip:]:
            yield self.batch(block)

    def batch(self, block: NDArray[np.int64]) -> Phase2Batch:
        """This rank's share of the global batch of rows `block` (G,), in the epoch that `batches` is in."""
        mine = block[rank() :: world_size()]  # rows lie sorted by length: every rank gets some of all
        rows = torch.from_numpy(mine)
        ids, mask = self._shown.targets(rows)
        embedding, own = self._shown.embedding[rows], self._from_target[rows]
        embedding[own] = self._shown.target_embedding[rows[own]]
        return Phase2Batch(
            embedding=embedding,
            ids=ids,
            mask=mask,
            n_tokens=int((self._lengths[mine] - 1).sum()),
            n_global_tokens=int((self._lengths[block] - 1).sum()),
        )

    def _show(self, epoch: int) -> None:
        """Take the targets of an epoch, and what they are said from."""
        self._shown = self._targets.of(epoch)
        self._from_target = self._targets.said_from_target(epoch, self.settings.target_share)
        self._lengths: NDArray[np.int64] = self._shown.target_lengths.numpy()

    def weights(self, batches: Sequence[Phase2Batch]) -> list[float]:
        """Every token of the step counts alike, whichever rank and micro-batch it is in; gradients are averaged
        over ranks afterwards."""
        total = sum(batch.n_global_tokens for batch in batches)
        return [batch.n_tokens * world_size() / total for batch in batches]

    def validate(self, device: torch.device) -> Validation:
        """Tokens of all held-out samples when led, and generated answers to some of them, each rank doing its share.

        The best weights have the highest mean of two shares over all validation samples: questions answered word for
        word, and tokens right when led. Greedy generation says a text just where each of its tokens is the likeliest
        behind those before it, so the first needs no generation; alone it leaves the choice to the few questions that
        neighbouring checkpoints answer differently. Measured on the 24 checkpoints of a tiny run (two seeds, 400 draws
        of 2,048 validation samples each), what was chosen answers so many percent fewer of the other samples than the
        best one would: exact match of 512 generated samples, the loss where they are equal, 0.7 and 0.8 (with a scatter
        of 0.6); exact match of all 0.4 and 0.6 (0.4, 0.5); this mean 0.4 and 0.4 (0.2, 0.25); the loss alone, which
        counts how sure wrong answers are, 0.5 and 2.0.
        """
        with eval_mode(self.decoder):
            scores = on_every_rank(lambda: sum_scores(self.decoder, self._val_batches(), device))
            tokens = TokenReport.of(all_gather_object(scores))
            self._answers, unfinished = self._generate()
        metrics = {
            "val/loss": tokens.loss,
            "val/perplexity": tokens.perplexity,
            "val/token_accuracy": tokens.accuracy,
            "val/led_exact_match": tokens.exact_match,
            **self._answers.metrics().metrics("val"),
            "val/unfinished": unfinished,
        }
        # Where two checkpoints are right alike, the one with the lower loss: one more right token outweighs any loss.
        tie = min(tokens.loss, 10.0) / 10 / (2 * max(1, tokens.tokens))
        return Validation(metrics=metrics, score=(tokens.exact_match + tokens.accuracy - tie) / 2)

    def _val_batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """This rank's validation samples, in batches of similar length, and which of them are questions; all count as
        such where there is none."""
        is_question = torch.isin(self.val.index, torch.from_numpy(self.data.val.indices("question")))
        counts = is_question | ~is_question.any()
        order = self.val.target_lengths.argsort(stable=True)[rank() :: world_size()]
        for rows in order.split(_SCORED_TOGETHER):
            yield self.val.embedding[rows], *self.val.targets(rows), counts[rows]

    def _questions(self) -> Answers:
        """The samples to answer by generation, with nothing generated yet."""
        rows = torch.from_numpy(spread(np.arange(len(self.val)), GENERATED_SAMPLES))
        index = self.val.index[rows].tolist()
        samples = [self.data.val.sample(i) for i in index]
        expected = [sample.target or "" for sample in samples]
        questions = [sample.question for sample in samples]
        self._rows = rows
        embedding, target = self.val.embedding[rows], self.val.target_embedding[rows]
        gallery = validation_answers(self.model, expected, target, questions, self._record.answers)
        return Answers(
            index=index,
            questions=questions,
            types=[asked_type(sample) for sample in samples],
            expected=expected,
            generated=[],
            nearest=nearest_texts(embedding, target, expected, questions, gallery),
        )

    def _generate(self) -> tuple[Answers, float]:
        """The answers, and the share of them that did not come to an end."""
        mine = self.val.embedding[self._rows[rank() :: world_size()]]
        said = on_every_rank(lambda: generate_texts(self.model, mine))
        generated: list[tuple[str, bool]] = [("", False)] * len(self._rows)
        for number, share in enumerate(all_gather_object(said)):
            generated[number :: world_size()] = share
        answers = Answers(**vars(self._asked) | {"generated": [text for text, _ in generated]})
        return answers, sum(not finished for _, finished in generated) / len(generated)

    def illustrate(self, folder: Path) -> None:
        """answer_sheet.png: a few validation samples and what was said; plots/answers_by_type.png."""
        if self._answers is not None:
            write_answer_pictures(self._answers, self.data.val, folder)
