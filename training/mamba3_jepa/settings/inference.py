"""Settings of the commands that use a trained model: `ask`, `embed`, `search`, `classify`, `evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from mamba3_jepa.contract import CLASS_TEMPERATURE, CLASS_TEMPLATE
from mamba3_jepa.errors import UserError
from mamba3_jepa.settings.common import ConfusionKind, Device, Json
from mamba3_jepa.settings.data import demand_data_dir
from mamba3_jepa.settings.limits import (
    BEAMS,
    COUNT,
    PROCESSES,
    TOKENS,
    Batch,
    Checked,
    Count,
    Finite,
    HashedSeed,
    NotNegative,
    Positive,
    Range,
    check_ranges,
)

_Path = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]
_Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT")]
_Paths = Annotated[tuple[Path, ...], tyro.conf.arg(metavar="PATH ...")]
_Texts = Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT ...")]

# Settings that only one method reads: set with another one they would silently do nothing.
_BELONGS_TO = {
    "temperature": "sample",
    "top_k": "sample",
    "top_p": "sample",
    "beams": "beam",
    "length_penalty": "beam",
}
_LARGEST_SEARCH = 10_000_000


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How the Y-Decoder, or a language model, chooses its tokens."""

    method: Literal["greedy", "sample", "beam"] = "greedy"
    """greedy: the most probable token each time; sample: draw it; beam: search for the most probable answer."""
    temperature: NotNegative = 1.0
    """sample: divides the logits; below 1 the probable tokens get more probable, 0 is greedy."""
    top_k: Annotated[int | None, COUNT] = None
    """sample: draw from the k most probable tokens only."""
    top_p: Annotated[float | None, Range(0, 1)] = None
    """sample: draw from the fewest most probable tokens that have this probability together."""
    beams: Annotated[int, BEAMS] = 4
    """beam: unfinished answers kept at a time."""
    length_penalty: Finite = 0.0
    """beam: an answer's log-probability is divided by its number of tokens to this power; 0 prefers the most probable
    answer, 1 the one with the best mean."""
    max_tokens: Annotated[int | None, TOKENS] = None
    """Stop after this many tokens, the end mark included; default: as long as the model's longest answers, 128 for
    lm."""
    seed: HashedSeed = 0
    """sample: the same seed draws the same answers."""

    def __post_init__(self) -> None:
        if self.method not in ("greedy", "sample", "beam"):
            raise UserError(f"generation: method is {self.method!r}, it must be greedy, sample or beam")
        check_ranges(self, lambda name, value, rule: f"generation: {name} is {value!r}, it {rule}")
        if self.top_p == 0:
            raise UserError("generation: top_p is 0.0, it must be greater than 0")
        for each in fields(self):
            method = _BELONGS_TO.get(each.name, self.method)
            if method != self.method and getattr(self, each.name) != each.default:
                raise UserError(f"generation: {each.name} has no effect with {self.method}; choose method {method}")
        if self.width * (self.max_tokens or 1) > _LARGEST_SEARCH:
            raise UserError(
                f"generation: beams is {self.beams} and max_tokens {self.max_tokens}; a search remembers their "
                f"product, which must be at most {_LARGEST_SEARCH}"
            )

    @property
    def width(self) -> int:
        """Sequences that one sample takes at a time."""
        return self.beams if self.method == "beam" else 1

    def samples_at_once(self, batch_size: int) -> int:
        """Samples to go on with together where `batch_size` sequences are to be in memory; at least one."""
        return max(1, batch_size // self.width)

    def demand_choice(self, n_tokens: int) -> None:
        """Refuse to choose among more tokens than there are.

        Raises:
            UserError: names the setting, its value and the number of tokens.
        """
        for name, value in (("top_k", self.top_k or 1), ("beams", self.width)):
            if value > n_tokens:
                raise UserError(
                    f"generation: {name} is {value}, but the model has only {n_tokens} tokens to choose from"
                )


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Checked):
    """Which model, and where it computes."""

    checkpoint: Path
    """A checkpoint of any phase."""
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class ImageSettings(ModelSettings):
    """Which images."""

    images: _Paths = ()
    """Image files."""
    image_dir: _Path = None
    """A folder; every image in it and in the folders under it is taken, hidden ones aside."""
    batch_size: Batch = 32
    """Images computed at once."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """An unreadable image is an error, or is left out with a warning."""


Inject = Literal["confused", "always"]


@dataclass(frozen=True, kw_only=True)
class AskSettings(ModelSettings):
    """What to ask, and what the model may look up."""

    questions: tyro.conf.Positional[_Texts] = ()
    """Questions; without one, the image is described."""
    image: _Path = None
    """What the questions are about; they may also be asked without image."""
    answers: _Path = None
    """Known answers, one a line in a text file; default: the frequent answers of the training data."""
    memory: _Path = None
    """Knowledge to look up when the model is confused: a text file, one text a line, or a saved memory."""
    save_memory: _Path = None
    """Write the memory with its embeddings to this .safetensors file, which opens faster."""
    remember: _Text = None
    """The right answer: add picture, question and this answer to --memory, a .safetensors file that is made if need be.
    """
    knowledge: _Text = None
    """Tell the model this text, where it is confused."""
    knowledge_vector: _Path = None
    """Tell it this vector: a .npy file, or a JSON list of numbers."""
    inject: Inject = "confused"
    """Use knowledge where the model is confused, or always; being told turns some answers that are right."""
    top: Count = 5
    """Show this many of the nearest known answers."""
    smooth: bool = False
    """Where a question comes several times, judge its confusion by the moving average over those turns."""
    json: Json = False
    generation: Annotated[GenerationConfig, tyro.conf.arg(name="")] = field(default_factory=GenerationConfig)

    def check(self) -> None:
        """Raise UserError for contradictory or impossible settings."""
        _demand_question(self)
        demand_words(knowledge=self.knowledge)
        if self.knowledge is not None and self.knowledge_vector is not None:
            raise UserError("`knowledge` and `knowledge_vector` exclude each other; give one of them")
        if self.inject == "always" and self.knowledge is None and self.knowledge_vector is None:
            raise UserError("`inject` always: there is nothing to inject; give `knowledge` or `knowledge_vector`")
        if self.memory is not None and (self.knowledge is not None or self.knowledge_vector is not None):
            raise UserError("`memory` is looked up when there is no `knowledge` and no `knowledge_vector`; give one")
        if self.remember is not None:
            self._check_remember()
        if self.save_memory is not None and self.memory is None:
            raise UserError("`save_memory` needs a `memory` to save")
        if self.save_memory is not None and self.save_memory.suffix != ".safetensors":
            raise UserError(f"`save_memory` {self.save_memory}: its name must end in .safetensors")

    def _check_remember(self) -> None:
        if self.memory is None or self.memory.suffix != ".safetensors":
            raise UserError("`remember` needs the `memory` to add to, a file whose name ends in .safetensors")
        if len(self.questions) > 1:
            raise UserError(
                f"`remember` is the answer to one question, not to {len(self.questions)}: ask them one by one"
            )
        if not (self.remember or "").strip():
            raise UserError("`remember` is empty; give the right answer")


@dataclass(frozen=True, kw_only=True)
class AgentSettings(ModelSettings):
    """What to ask, and what the agent may use where it is confused."""

    questions: tyro.conf.Positional[_Texts] = ()
    """Questions, each answered by itself; without one, the image is described."""
    image: _Path = None
    """What the questions are about; they may also be asked without image."""
    tools: _Path = None
    """A JSON file with tools to call: commands, run without a shell, and Python functions."""
    memory: _Path = None
    """The tool "memory": a text file, one text a line, or a saved memory."""
    answers: _Path = None
    """Known answers, one a line in a text file; default: the frequent answers of the training data."""
    max_rounds: Annotated[int, Range(0, 100)] = 3
    """Call at most this many tools for a question."""
    trace: _Path = None
    """Write every step to this JSON file."""
    json: Json = False
    generation: Annotated[GenerationConfig, tyro.conf.arg(name="")] = field(default_factory=GenerationConfig)

    def check(self) -> None:
        """Raise UserError for impossible settings."""
        _demand_question(self)


def demand_words(**texts: str | None) -> None:
    """Refuse a text without words, by the name of its setting; None stands for nothing.

    Raises:
        UserError: one is empty, or blank.
    """
    for name, text in texts.items():
        if text is not None and not text.strip():
            raise UserError(f"`{name}` is empty: {text!r}; give a text, or leave it out")


def demand_words_in_each(kind: str, texts: Sequence[str]) -> None:
    """Refuse a text without words among several, by its number from 1.

    Raises:
        UserError: one is empty, or blank.
    """
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise UserError(f"{kind} {number} of {len(texts)} is empty: {text!r}")


def _demand_question(settings: AskSettings | AgentSettings) -> None:
    if not settings.questions and settings.image is None:
        raise UserError('nothing to ask: give a question, such as "What colour is the circle?", or an `image`')
    demand_words_in_each("question", settings.questions)


@dataclass(frozen=True, kw_only=True)
class EmbedSettings(ImageSettings):
    """What to embed, and where to write it."""

    output: Path
    """A .npy file, with the names in a .json file beside it, or a .safetensors file that holds the names too."""
    texts: _Texts = ()
    """Texts, or one text file with a text a line: embedded by the Y-Encoder as answers are."""
    question: _Text = None
    """Ask this about the images; default: the prompt for describing them."""
    json: Json = False

    def check(self) -> None:
        """Raise UserError for contradictory or impossible settings."""
        has_images = bool(self.images) or self.image_dir is not None
        if not has_images and not self.texts:
            raise UserError("nothing to embed: give `images`, `image_dir` or `texts`")
        if self.output.suffix not in (".npy", ".safetensors"):
            raise UserError(f"`output` {self.output}: its name must end in .npy or .safetensors")
        if self.output.suffix == ".npy" and has_images and self.texts:
            raise UserError(f"`output` {self.output}: one array holds images or texts; for both write .safetensors")
        if self.question is not None and not has_images:
            raise UserError("`question` is asked about images; there are none")


@dataclass(frozen=True, kw_only=True)
class SearchSettings(ImageSettings):
    """What to look for, and among which images."""

    text: tyro.conf.Positional[str]
    """What the image should show."""
    top: Count = 5
    """Show this many images, best first."""
    contact_sheet: _Path = None
    """Write a picture of the images found to this PNG file."""
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class ClassifySettings(ImageSettings):
    """Which labels to choose from, for which images."""

    labels: _Texts
    """Labels, or one text file with a label a line."""
    template: _Texts = (CLASS_TEMPLATE,)
    """The text that stands for a label, such as "a photo of a {}"; of several, or of the lines of one text file, the
    mean of their embeddings."""
    question: _Text = None
    """The question that the labels answer; default: the prompt for describing an image."""
    temperature: Positive = CLASS_TEMPERATURE
    """Cosines are divided by it before they become probabilities; the order does not depend on it."""
    top: Count = 5
    """Show this many labels for each image, best first."""
    json: Json = False

    def check(self) -> None:
        """Raise UserError for impossible settings."""
        if not 0 < c_float(self.temperature).value < float("inf"):
            raise UserError(f"`temperature` {self.temperature}: must be finite and greater than 0, in float32")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(Checked):
    """What to measure, on which data."""

    checkpoint: Path
    """A checkpoint of any phase."""
    data_dir: Annotated[str | Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Data directory, or shards elsewhere, as --data-dir of training; without it, synthetic scenes (--scenes)."""
    manifest: _Path = None
    """A manifest in --data-dir, such as test.jsonl, or elsewhere; its images lie in --data-dir. Default: the held-out
    validation split, by which training on this data chose its best checkpoint."""
    index_dir: _Path = None
    """Where the indexes of shards are kept, as --index-dir of training; default: none is kept, and of shards elsewhere
    in --shard-cache."""
    shard_cache: _Path = None
    """Folder that shards from elsewhere are fetched into, as --shard-cache of training."""
    shard_cache_gb: Positive = 100.0
    """What --shard-cache may hold, in gigabytes (10^9 bytes)."""
    scenes: Literal["test", "val", "compositional"] = "test"
    """Without --data-dir: scenes that neither training nor the choice of the best checkpoint saw; those that chose it;
    or scenes with colour-shape pairs kept out of training."""
    samples: Count = 100_000
    """Measure on at most this many samples."""
    batch_size: Batch = 64
    """Samples per forward pass."""
    workers: Annotated[int, PROCESSES] = 0
    """Data-loading processes."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """An unreadable image or text is an error, or is left out with a warning."""
    device: Device = "auto"
    labels: _Path = None
    """Zero-shot classification among the lines of this text file, of the samples whose answer or caption is one."""
    label_template: _Texts = (CLASS_TEMPLATE,)
    """The text that stands for a label, such as "a photo of a {}"; of several, or of the lines of one text file, the
    mean of their embeddings."""
    benchmark: Literal["vqav2", "gqa", "tallyqa", "pope"] | None = None
    """Measure all questions as this benchmark does; default: the one that their lines name, and VQA accuracy where a
    question has several answers."""
    answers: _Path = None
    """What questions may be answered with by nearest embedding, one a line in a text file; default: the frequent
    answers of the training data."""
    skip_generation: bool = False
    """Leave out the generated answers, which take the most time."""
    skip_recursion: bool = False
    """Leave out what phase 3 is measured by: confusion, knowledge and memory. --skip-generation leaves it out too."""
    confusion_kinds: tuple[ConfusionKind, ...] = get_args(ConfusionKind)
    """Of a phase 3 checkpoint: confusion to make from the data, beside its own "confused" labels and the model's own
    errors, as train-agent does. Leave out mismatched where every question fits every image."""
    foreign_questions: _Path = None
    """Of a phase 3 checkpoint: questions that have nothing to do with the pictures, one a line in a text file; they are
    asked about them, and the model should be confused."""
    recursion_plots: _Path = None
    """Of a phase 3 checkpoint: write pictures of its confusion and of what knowledge does into this folder."""
    output: _Path = None
    """Write the numbers to this JSON file."""
    predictions: _Path = None
    """Write the answers to all samples to this file, a JSON object a line: id, question, what is right, nearest,
    generated."""
    contact_sheet: _Path = None
    """Write a picture of some images with their nearest texts to this PNG file."""
    answer_sheet: _Path = None
    """Write a picture of some images with their generated answers to this PNG file."""
    answers_plot: _Path = None
    """Write a bar chart of the answers by question type to this PNG file."""
    json: Json = False
    generation: Annotated[GenerationConfig, tyro.conf.arg(name="")] = field(default_factory=GenerationConfig)

    def check(self) -> None:
        """Raise UserError for contradictory or impossible settings."""
        demand_data_dir(self.manifest, self.data_dir, self.shard_cache)
        if self.skip_generation and self.answer_sheet is not None:
            raise UserError("`answer_sheet` shows generated answers; it cannot go with `skip_generation`")
        for name in ("foreign_questions", "recursion_plots"):
            for skipped in ("skip_recursion", "skip_generation"):
                if getattr(self, name) is not None and getattr(self, skipped):
                    raise UserError(f"`{name}` measures confusion; it cannot go with `{skipped}`")
