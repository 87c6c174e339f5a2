"""Texts that a language model goes on from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mamba3_jepa.data.text_stream import TextStream
from mamba3_jepa.data.tokenizer import TextTokenizer
from mamba3_jepa.models.generation import continued
from mamba3_jepa.models.language_model import Mamba3LanguageModel
from mamba3_jepa.models.scan import Mamba3State
from mamba3_jepa.settings.inference import GenerationConfig

MAX_TOKENS = 128  # where the settings do not say


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What a language model says behind a text.

    text: without the text it goes on from.
    tokens: how many it has, the end mark not counted.
    confidence: in [0, 1], the geometric mean of the probabilities of its tokens, the end mark included.
    finished: whether the model ended it, rather than the limit.
    """

    text: str
    tokens: int
    confidence: float
    finished: bool


class Continuer:
    """Lets a language model go on from texts, one by one, with memory and time per token that stay the same."""

    def __init__(
        self,
        model: Mamba3LanguageModel,
        tokenizer: TextTokenizer,
        generation: GenerationConfig | None = None,
        source: str = "the language model",
    ) -> None:
        """
        Args:
            model: in eval mode.
            generation: how to choose the tokens; greedy by default.
            source: names the model in messages.

        Raises:
            UserError: the tokens are to be chosen among more than there are.
        """
        self.model, self.tokenizer, self.source = model, tokenizer, source
        self.generation = GenerationConfig() if generation is None else generation
        # rows that pad the vocabulary, or that the tokenizer has no token for, are never said
        self._n_tokens = min(model.config.vocab_size, tokenizer.vocab_size)
        self.generation.demand_choice(self._n_tokens)
        self._turns = 0

    def step(self, ids_t: Tensor, state: list[Mamba3State]) -> tuple[Tensor, list[Mamba3State]]:
        """One token: ids (N,) -> logits (N, V) of what can be said, and the next state."""
        logits, state = self.model.step(ids_t, state)
        return logits[:, : self._n_tokens], state

    @torch.no_grad()
    def go_on(self, text: str, listener: Callable[[str], None] | None = None) -> Continuation:
        """Go on from one text; of several, each draws from a random stream of its own.

        Args:
            listener: hears the text piece by piece, as soon as it is certain.

        Raises:
            UserError: the model's outputs are not finite.
        """
        ids = self.tokenizer.prompt(text)
        stream = TextStream(self.tokenizer, ids)
        pieces: list[str] = []

        def hear(piece: str) -> None:
            pieces.append(piece)
            if listener is not None and piece:
                listener(piece)

        prompt = torch.tensor([ids], device=self.model.device)
        (said,) = continued(
            self,
            prompt[:, -1],
            self.model.prefill(prompt[:, :-1]),
            eos_id=self.tokenizer.eos_id,
            config=self.generation,
            limit=self.generation.max_tokens or MAX_TOKENS,
            rows=[self._turns],
            source=f"{self.source}: the outputs",
            listener=lambda _, token: hear(stream.add(token)),
        )
        if self.generation.method == "beam":
            for token in said.ids:
                hear(stream.add(token))
        hear(stream.rest())
        self._turns += 1
        confidence = math.exp(sum(said.log_probs) / len(said.log_probs))
        return Continuation(text="".join(pieces), tokens=len(said.ids), confidence=confidence, finished=said.finished)
