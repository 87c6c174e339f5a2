"""Settings of `mamba3-jepa ask`, `embed`, `search` and `classify`. Free of torch, so that --help answers at once."""

from __future__ import annotations

from ctypes import c_float
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mamba3_jepa.errors import UserError
from mamba3_jepa.export.contract import CLASS_TEMPERATURE, CLASS_TEMPLATE
from mamba3_jepa.inference.settings import GenerationConfig

_Path = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]
_Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT")]
_Paths = Annotated[tuple[Path, ...], tyro.conf.arg(metavar="PATH ...")]
_Texts = Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT ...")]


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model, and where it computes."""

    checkpoint: Path
    """A checkpoint of any phase."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1, mps."""


@dataclass(frozen=True, kw_only=True)
class ImageSettings(ModelSettings):
    """Which images."""

    images: _Paths = ()
    """Image files."""
    image_dir: _Path = None
    """A folder; every image in it and in the folders under it is taken."""
    batch_size: int = 32
    """Images computed at once."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """An unreadable image is an error, or is left out with a warning."""


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
    knowledge: _Text = None
    """Inject this text, whether the model is confused or not."""
    knowledge_vector: _Path = None
    """Inject this vector: a .npy file, or a JSON list of numbers."""
    top: int = 5
    """Show this many of the nearest known answers."""
    smooth: bool = False
    """The questions are turns of one conversation: judge confusion by its moving average over them."""
    json: bool = False
    """Print JSON."""
    generation: Annotated[GenerationConfig, tyro.conf.arg(name="")] = field(default_factory=GenerationConfig)

    def check(self) -> None:
        """Raise UserError for contradictory or impossible settings."""
        if not self.questions and self.image is None:
            raise UserError('nothing to ask: give a question, such as "What colour is the circle?", or an --image')
        if self.knowledge is not None and self.knowledge_vector is not None:
            raise UserError("--knowledge and --knowledge-vector exclude each other; give one of them")
        if self.memory is not None and (self.knowledge is not None or self.knowledge_vector is not None):
            raise UserError("--memory is looked up when there is no --knowledge and no --knowledge-vector; give one")
        if self.save_memory is not None and self.memory is None:
            raise UserError("--save-memory needs a --memory to save")
        if self.save_memory is not None and self.save_memory.suffix != ".safetensors":
            raise UserError(f"--save-memory {self.save_memory}: its name must end in .safetensors")
        at_least_one(top=self.top)


@dataclass(frozen=True, kw_only=True)
class EmbedSettings(ImageSettings):
    """What to embed, and where to write it."""

    output: Path
    """A .npy file, with the names in a .json file beside it, or a .safetensors file that holds the names too."""
    texts: _Texts = ()
    """Texts, or one text file with a text a line: embedded by the Y-Encoder as answers are."""
    question: _Text = None
    """Ask this about the images; default: the prompt for describing them."""

    def check(self) -> None:
        """Raise UserError for contradictory or impossible settings."""
        at_least_one(batch_size=self.batch_size)
        has_images = bool(self.images) or self.image_dir is not None
        if not has_images and not self.texts:
            raise UserError("nothing to embed: give --images, --image-dir or --texts")
        if self.output.suffix not in (".npy", ".safetensors"):
            raise UserError(f"--output {self.output}: its name must end in .npy or .safetensors")
        if self.output.suffix == ".npy" and has_images and self.texts:
            raise UserError(f"--output {self.output}: one array holds images or texts; for both write .safetensors")
        if self.question is not None and not has_images:
            raise UserError("--question is asked about images; there are none")


@dataclass(frozen=True, kw_only=True)
class SearchSettings(ImageSettings):
    """What to look for, and among which images."""

    text: tyro.conf.Positional[str]
    """What the image should show."""
    top: int = 5
    """Show this many images, best first."""
    contact_sheet: _Path = None
    """Write a picture of the images found to this PNG file."""
    json: bool = False
    """Print JSON."""

    def check(self) -> None:
        """Raise UserError for impossible settings."""
        at_least_one(top=self.top, batch_size=self.batch_size)


@dataclass(frozen=True, kw_only=True)
class ClassifySettings(ImageSettings):
    """Which labels to choose from, for which images."""

    labels: _Texts
    """Labels, or one text file with a label a line."""
    template: str = CLASS_TEMPLATE
    """The text that stands for a label, such as "a photo of a {}"."""
    question: _Text = None
    """The question that the labels answer; default: the prompt for describing an image."""
    temperature: float = CLASS_TEMPERATURE
    """Cosines are divided by it before they become probabilities; the order does not depend on it."""
    top: int = 5
    """Show this many labels for each image, best first."""
    json: bool = False
    """Print JSON."""

    def check(self) -> None:
        """Raise UserError for impossible settings."""
        at_least_one(top=self.top, batch_size=self.batch_size)
        if not 0 < c_float(self.temperature).value < float("inf"):
            raise UserError(f"--temperature {self.temperature}: must be finite and greater than 0, in float32")
        if self.template.count("{}") != 1:
            raise UserError(f"--template {self.template!r}: must contain {{}} once, where the label goes")


def at_least_one(**values: int) -> None:
    """Raise UserError for a count under 1, naming its flag."""
    for name, value in values.items():
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
