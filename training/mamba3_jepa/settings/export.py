"""Settings of `mamba3-jepa export` and `inspect`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mamba3_jepa.config import PresetName
from mamba3_jepa.errors import UserError
from mamba3_jepa.settings.common import Json

DtypeName = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What to export, and where to."""

    checkpoint: Path
    """A checkpoint of any phase."""
    output: Path = Path("weights")
    """Folder for the .safetensors files, config.json and tokenizer.json."""
    phase: Annotated[Literal[1, 2, 3] | None, tyro.conf.arg(metavar="{1,2,3}")] = None
    """1: predictor, y_encoder, angn; 2: and y_decoder; 3: and recursion. Default: the checkpoint's phase."""
    dtype: DtypeName = "float32"
    """Type of the weights of linear maps and embeddings; everything small stays float32."""
    x_encoder: bool = False
    """Also write the frozen X-Encoder, needed where its weights are random instead of V-JEPA 2's own."""
    verify: bool = False
    """Reload the files into a fresh model and compare it with the checkpoint's, which is rounded alike."""
    golden: bool = False
    """Also write golden/*.safetensors: inputs and outputs of every component, for other implementations to test by."""
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class InspectSettings:
    """What to look into."""

    file: tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="FILE")]] = None
    """A checkpoint (.pt) or any safetensors file."""
    preset: Annotated[PresetName | None, tyro.conf.arg(metavar="{small,mini,tiny}")] = None
    """Instead of a file: every key of this model size, for --model of the training commands."""
    environment: bool = False
    """Instead of a file: versions, devices and kernels, for a report of an error."""
    device: str = "cpu"
    """As in the other commands; it must be there, but a file is only read, nothing is computed."""
    json: Json = False

    def check(self) -> None:
        """Raise UserError unless there is one thing to look into."""
        if [self.file is not None, self.preset is not None, self.environment].count(True) != 1:
            raise UserError("name one thing to look into: a file, `preset` or `environment`")
