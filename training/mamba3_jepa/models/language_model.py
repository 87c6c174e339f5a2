"""Mamba-3 language models: token ids in, logits of the next token out.

The architecture of the official checkpoints: an embedding, a backbone of Mamba-3 layers with a gated MLP after each,
and a head that may be the embedding ("Mamba-3", arXiv 2603.15569; mamba-ssm's `MambaLMHeadModel`).

Shape letters: B batch, L length in tokens, D model width, V rows of the vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba3_jepa.config import AActivation
from mamba3_jepa.errors import UserError
from mamba3_jepa.models.language_model_files import (
    LanguageModelConfig,
    read_language_model_config,
    read_language_model_weights,
)
from mamba3_jepa.models.mamba3 import Mamba3Backbone
from mamba3_jepa.models.scan import Mamba3State
from mamba3_jepa.models.state_dict import load_state

_EMBEDDING_STD = 0.02  # as mamba-ssm starts


class Mamba3LanguageModel(nn.Module):
    """Embedding -> Mamba-3 backbone -> logits over V = `config.rows` tokens; the first `config.vocab_size` are real.

    It is causal: what comes after a token, padding included, changes nothing before it.
    """

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.rows, config.backbone.d_model)
        nn.init.normal_(self.embedding.weight, std=_EMBEDDING_STD)
        self.backbone = Mamba3Backbone(config.backbone)
        self.lm_head = None if config.tied else nn.Linear(config.backbone.d_model, config.rows, bias=False)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        a_activation: AActivation = "heavy_tail",
        device: torch.device | str = "cpu",
    ) -> Mamba3LanguageModel:
        """An official checkpoint, in eval mode and float32.

        Args:
            folder: with `config.json` and `pytorch_model.bin` or `model.safetensors`, whole or in shards; nothing in
                them is run.
            a_activation: what the model was trained with, which its files do not say; docs/checkpoints.md has more.

        Raises:
            UserError: a file is missing or damaged, or not of a Mamba-3 language model; names file and key.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such folder; expected one of an official Mamba-3 language model")
        config = read_language_model_config(folder, a_activation)
        with torch.device("meta"):
            model = cls(config)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        load_state(model, read_language_model_weights(folder, config, shapes), source=str(folder), assign=True)
        return model.eval().to(device)

    @property
    def head(self) -> Tensor:
        """(V, D), the embedding itself where it is tied."""
        return self.embedding.weight if self.lm_head is None else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, L), padded on the right if at all -> logits (B, L, V); position t predicts the token after
        ids[:, t]."""
        return F.linear(self.hidden(ids), self.head)

    def hidden(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> hidden states (B, L, D) after the final norm, of which the logits are a linear map."""
        return self.backbone(self.embedding(ids))

    def prefill(self, ids: Tensor) -> list[Mamba3State]:
        """The state after token ids (B, L), none of them padding; L may be 0."""
        if not ids.shape[1]:
            return self.backbone.initial_state(len(ids))
        _, state = self.backbone(self.embedding(ids), return_state=True)
        return state

    def step(self, ids_t: Tensor, state: list[Mamba3State]) -> tuple[Tensor, list[Mamba3State]]:
        """One token: ids (B,) -> logits (B, V) and the next state, in constant time and memory."""
        h, state = self.backbone.step(self.embedding(ids_t), state)
        return F.linear(h, self.head), state

    def initial_state(self, batch: int) -> list[Mamba3State]:
        """The state before the first of the tokens of `batch` texts."""
        return self.backbone.initial_state(batch)
