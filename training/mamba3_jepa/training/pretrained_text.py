"""Text towers that start from an official Mamba-3 language model: its embedding, its layers, its tokenizer.

Shape letters: V tokens of the run's vocabulary, D width.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from mamba3_jepa.config import AActivation, BackboneConfig
from mamba3_jepa.data.tokenizer import TextTokenizer
from mamba3_jepa.errors import UserError
from mamba3_jepa.models.language_model import Mamba3LanguageModel
from mamba3_jepa.models.language_model_files import (
    LanguageModelConfig,
    read_language_model_config,
    read_language_model_tokenizer,
)
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.models.y_encoder import EMBEDDING_STD
from mamba3_jepa.settings.training import Phase1Settings, Phase2Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PretrainedText:
    """A language model's folder, of which only config.json has been read."""

    folder: Path
    config: LanguageModelConfig

    @classmethod
    def open(cls, folder: Path, a_activation: AActivation | None) -> PretrainedText:
        """
        Raises:
            UserError: it is no folder of a Mamba-3 language model.
        """
        return cls(folder=folder, config=read_language_model_config(folder, a_activation or "heavy_tail"))

    @property
    def backbone(self) -> BackboneConfig:
        """The sizes of what starts from it."""
        return self.config.backbone

    def tokenizer(self, file: Path | None) -> TextTokenizer:
        """The one beside the weights, or, where there is none, `file`.

        Raises:
            UserError: there is none, there are two, or it has tokens that the model has no row for.
        """
        if file is not None and (self.folder / "tokenizer.json").exists():
            raise UserError(f"`tokenizer` {file}: {self.folder} has a tokenizer.json of its own; leave `tokenizer` out")
        return read_language_model_tokenizer(self.folder, self.config, file)

    def demand_tokens_of(self, tokenizer: TextTokenizer) -> None:
        """Refuse a model that was trained with other tokens than the run has.

        Raises:
            UserError: it was, or it has no tokenizer.json that would tell.
        """
        if not tokenizer.has_same_tokens(read_language_model_tokenizer(self.folder, self.config)):
            raise UserError(
                f"`init_y_decoder` {self.folder}: was trained with other tokens than phase 1, whose tokenizer decides: "
                "train phase 1 with this model as its `init_y_encoder`, or with its tokenizer.json as `tokenizer`"
            )

    def _model(self) -> Mamba3LanguageModel:
        activation = self.config.backbone.layer.a_activation
        return Mamba3LanguageModel.from_pretrained(self.folder, a_activation=activation)

    @torch.no_grad()
    def start_y_encoder(self, model: Mamba3Jepa) -> None:
        """Give the Y-Encoder the language model's embedding and layers; its projection stays new.

        The questions' tokens enter the predictor through the same embedding, whose spread is no longer the one that
        `query_proj` was made for: `query_proj` takes the difference, so that questions start as loud as before.

        Raises:
            UserError: the weights cannot be read, or do not fit the folder's config.json.
        """
        source, encoder = self._model(), model.y_encoder
        encoder.backbone.load_state_dict(source.backbone.state_dict())
        encoder.embedding.weight.copy_(source.embedding.weight[: len(encoder.embedding.weight)])
        spread = encoder.embedding.weight.square().mean().sqrt()
        model.predictor.query_proj.weight.mul_(EMBEDDING_STD / spread)
        self._say("Y-Encoder", len(encoder.embedding.weight))

    @torch.no_grad()
    def start_y_decoder(self, model: Mamba3Jepa) -> None:
        """Give the Y-Decoder the language model's embedding, layers and head; its way in from the embedding stays new.

        Head and embedding are two tensors here: of a tied model they start equal, and are trained apart.

        Raises:
            UserError: as `start_y_encoder`.
        """
        source, decoder = self._model(), model.y_decoder
        assert decoder is not None  # it has been added
        decoder.backbone.load_state_dict(source.backbone.state_dict())
        rows = len(decoder.embedding.weight)
        decoder.embedding.weight.copy_(source.embedding.weight[:rows])
        decoder.lm_head.weight.copy_(source.head[:rows])
        self._say("Y-Decoder", rows)

    def _say(self, part: str, rows: int) -> None:
        left = self.config.rows - rows
        dropped = f"; {left} rows that no token uses are left out" if left else ""
        logger.info("the %s starts from %s%s", part, self.folder, dropped)


def demand_activation(settings: Phase1Settings | Phase2Settings, backbone: BackboneConfig) -> None:
    """Refuse to continue with another A activation than a part, whose sizes are `backbone`, was started with.

    Raises:
        UserError: it is another one.
    """
    if settings.a_activation not in (None, backbone.layer.a_activation):
        raise UserError(
            f"cannot resume with `a_activation` {settings.a_activation}: the run was started with "
            f"{backbone.layer.a_activation}"
        )


def pretrained_text(
    settings: Phase1Settings | Phase2Settings, folder: Path | None, *, phase: int
) -> PretrainedText | None:
    """What a run starts a text tower from: nothing where it names no folder, or is continued.

    Raises:
        UserError: it is no folder of a Mamba-3 language model.
    """
    if folder is None or (settings.resume and (settings.output_dir / f"phase{phase}_last.pt").exists()):
        return None
    return PretrainedText.open(folder, settings.a_activation)
