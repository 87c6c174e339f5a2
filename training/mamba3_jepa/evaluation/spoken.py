"""What a model answers greedily to samples of phase 3, whether that is right, and how much it doubted it.

Letters: N samples, E embedding width, S numbers of doubt.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mamba3_jepa.data.plain_text import plain_text
from mamba3_jepa.data.sample import Sample
from mamba3_jepa.models.generation import doubt
from mamba3_jepa.models.vljepa import Mamba3Jepa


class Spoken(NamedTuple):
    """texts: N answers, greedily spoken; doubt: (N, S), see `generation.doubt`."""

    texts: list[str]
    doubt: Tensor

    @staticmethod
    def of(model: Mamba3Jepa, embedding: Tensor) -> Spoken:
        """What the model's decoder says of embeddings (N, E).

        Raises:
            UserError: the decoder's outputs are not finite.
        """
        answers = model.say(embedding)
        return Spoken([model.tokenizer.decode(answer.ids).strip() for answer in answers], doubt(answers))


def is_right(said: str, sample: Sample) -> bool:
    """Whether `said` is one of the texts that are right, but for case and white space."""
    right = {plain_text(text) for text in (*sample.targets, *sample.answers)}
    return plain_text(said) in right
