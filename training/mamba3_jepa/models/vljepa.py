"""The vision-language JEPA for people who have files, texts and pictures; `network.py` is what it computes.

Shape letters: B samples, Bi of them with an image, P different pictures, S pixels, V vision width, E embedding width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from mamba3_jepa.config import PICTURE_CELLS, ModelConfig
from mamba3_jepa.data.images import load_image, normalize, to_pixels, upright
from mamba3_jepa.data.tokenizer import EncodedTexts, TextTokenizer
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.checkpoint import Checkpoint, load_checkpoint
from mamba3_jepa.models.episodes import picture_keys
from mamba3_jepa.models.generation import Generated, GenerationConfig, generate
from mamba3_jepa.models.network import Network, eval_mode
from mamba3_jepa.models.state_dict import load_state
from mamba3_jepa.models.vit import VisionEncoder

logger = logging.getLogger(__name__)


class Observation(NamedTuple):
    """What a model makes of B samples, in float32: embedding (B, E), the predicted ones, of unit length; pooled
    (B, d_model), the states they were read from; picture (B, 4 V), what the pictures look like (`picture_keys`)."""

    embedding: Tensor
    pooled: Tensor
    picture: Tensor


class Mamba3Jepa(Network):
    """The network with its tokenizer; see `Network` for the other arguments.

    Args:
        tokenizer: its vocabulary must have `config.vocab_size` tokens.

    Attributes:
        source: what messages call it: the file it came from.

    Raises:
        UserError: the tokenizer or the X-Encoder does not fit the configuration.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: TextTokenizer,
        x_encoder: VisionEncoder | None = None,
        with_decoder: bool = False,
        with_recursion: bool = False,
    ) -> None:
        if config.vocab_size != tokenizer.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model configuration says {config.vocab_size}"
            )
        super().__init__(config, x_encoder, with_decoder=with_decoder, with_recursion=with_recursion)
        self.tokenizer, self.source = tokenizer, "the model"

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: torch.device | str = "cpu") -> Mamba3Jepa:
        """The model of a training checkpoint of any phase, in eval mode.

        Raises:
            UserError: the file is missing, damaged, or its weights do not fit its configuration.
        """
        return cls.from_loaded(load_checkpoint(path), str(path), device)

    @classmethod
    def from_loaded(cls, checkpoint: Checkpoint, source: str, device: torch.device | str = "cpu") -> Mamba3Jepa:
        """`from_checkpoint` for a checkpoint that has been read already; `source` names it in messages."""
        model = cls(
            checkpoint.config,
            TextTokenizer.from_json(checkpoint.tokenizer, source=f"{source}: tokenizer"),
            x_encoder=VisionEncoder.empty(checkpoint.config.vision),
            with_decoder=any(name.startswith("y_decoder.") for name in checkpoint.model),
            with_recursion=any(name.startswith("recursion.") for name in checkpoint.model),
        )
        load_state(model, checkpoint.model, source=source)
        model.source = source
        return model.eval().to(device)

    def observe(
        self,
        images: Sequence[str | Path | Image.Image | None],
        questions: Sequence[str | None],
        batch_size: int = 32,
    ) -> Observation:
        """What the model makes of image-question pairs.

        Args:
            images: per sample a file, an image, or None for a question without image.
            questions: per sample a text, or None for `config.query_prompt`.
            batch_size: samples computed at once; the result does not depend on it.

        Returns:
            Tensors on the model's device.

        Raises:
            UserError: no sample, lengths that differ, an empty question, an image that cannot be read.
        """
        if len(images) != len(questions):
            raise UserError(f"embed: {len(images)} images but {len(questions)} questions; give one per sample")
        texts = [self.config.query_prompt if question is None else question for question in questions]
        encoded = self._encode_texts(texts, self.config.max_query_tokens, "question")
        outputs = []
        with self._inference():
            for rows in _slices(len(texts), batch_size):
                pixels, has_image, picture = self._pixels(images[rows])
                tokens = self.encode_images(pixels, has_image, picture)
                output = self.predict(tokens, has_image, *self._batch(encoded, rows))
                outputs.append((*output, picture_keys(tokens, has_image)))
        # Outside, so that the result can take part in training.
        return Observation(*(torch.cat([tensor.float() for tensor in part]) for part in zip(*outputs, strict=True)))

    def picture_keys(self, images: Sequence[str | Path | Image.Image | None], batch_size: int = 32) -> Tensor:
        """What some images look like, (B, 4 V); see `models.episodes.picture_keys`.

        Raises:
            UserError: an image cannot be read.
        """
        keys = [torch.empty(0, PICTURE_CELLS * self.config.vision.hidden_size, device=self.device)]
        with self._inference():
            for rows in _slices(len(images), batch_size):
                pixels, has_image, picture = self._pixels(images[rows])
                keys.append(picture_keys(self.encode_images(pixels, has_image, picture), has_image))
        return torch.cat(keys)

    def embed(
        self,
        images: Sequence[str | Path | Image.Image | None],
        questions: Sequence[str | None],
        batch_size: int = 32,
    ) -> Tensor:
        """Predicted embeddings (B, E) of image-question pairs: the embeddings of `observe`."""
        return self.observe(images, questions, batch_size).embedding

    def embed_text(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Target embeddings of answers or captions.

        Returns:
            (B, E) float32 of unit length, on the model's device.

        Raises:
            UserError: no text, or an empty one.
        """
        encoded = self._encode_texts(texts, self.config.max_answer_tokens, "text")
        embeddings = []
        with self._inference():
            for rows in _slices(len(texts), batch_size):
                embeddings.append(self.y_encoder(*self._batch(encoded, rows)).float())
        return torch.cat(embeddings)

    def say(
        self,
        embedding: Tensor,
        config: GenerationConfig | None = None,
        *,
        batch_size: int = 256,
        first_row: int = 0,
    ) -> list[Generated]:
        """What the Y-Decoder says of embeddings (B, E), at most as long as the answers that it learned from.

        Args:
            config: how to choose the tokens; greedily by default.
            batch_size: sequences in memory at once; the answers do not depend on it.
            first_row: the number of the first embedding, and the others count on from it; what is drawn depends on it.

        Raises:
            UserError: the decoder's outputs are not finite.
        """
        if self.y_decoder is None:
            raise ValueError("the model has no Y-Decoder")
        config = config or GenerationConfig()
        answers: list[Generated] = []
        with eval_mode(self.y_decoder):
            for rows in _slices(len(embedding), config.samples_at_once(batch_size)):
                some = embedding[rows].to(self.device)
                answers += generate(
                    self.y_decoder,
                    some,
                    bos_id=self.tokenizer.bos_id,
                    eos_id=self.tokenizer.eos_id,
                    config=config,
                    max_tokens=self.config.max_answer_tokens - 1,  # bos is given
                    rows=range(first_row + rows.start, first_row + rows.start + len(some)),
                    source=self.source,
                )
        return answers

    def _encode_texts(self, texts: Sequence[str], max_tokens: int, kind: str) -> EncodedTexts:
        if isinstance(texts, str) or not texts:
            raise UserError(f"expected a list of {kind}s with at least one, found {texts!r}")
        for i, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"{kind} {i} is empty or not a text: {text!r}")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"{kind} {i} is not valid UTF-8: {text!r}") from error
        encoded = self.tokenizer.encode(list(texts), max_tokens)
        if encoded.n_truncated:
            logger.warning(
                "%d of %d %ss are longer than %d tokens and were cut",
                encoded.n_truncated,
                len(texts),
                kind,
                max_tokens,
            )
        return encoded

    def _batch(self, encoded: EncodedTexts, rows: slice) -> tuple[Tensor, Tensor]:
        """Ids and mask of some texts, as long as the longest of them, on the model's device."""
        mask = encoded.mask[rows]
        length = int(mask.sum(dim=1).max())
        return encoded.ids[rows, :length].to(self.device), mask[:, :length].to(self.device)

    def _pixels(self, images: Sequence[str | Path | Image.Image | None]) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised pixels (P, 3, S, S) of the different pictures, has_image (B,), and which picture each sample with
        an image sees (Bi,), on the model's device. A picture asked several questions is decoded once."""
        size = self.config.vision.image_size
        has_image = torch.tensor([image is not None for image in images], device=self.device)
        given = [image for image in images if image is not None]
        different = {_identity(image): image for image in given}
        number = {key: i for i, key in enumerate(different)}
        picture = torch.tensor([number[_identity(image)] for image in given], dtype=torch.int64)
        decoded = [to_pixels(_decode(image), size) for image in different.values()]
        stacked = torch.stack(decoded) if decoded else torch.empty(0, 3, size, size, dtype=torch.uint8)
        return normalize(stacked.to(self.device)), has_image, picture.to(self.device)

    @contextmanager
    def _inference(self) -> Iterator[None]:
        with eval_mode(self), torch.inference_mode():
            yield


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Parameters of each component of a model by its name, and their `total`; frozen ones count too."""
    counts = {
        name: sum(parameter.numel() for parameter in child.parameters()) for name, child in model.named_children()
    }
    return counts | {"total": sum(counts.values())}


def _slices(length: int, size: int) -> list[slice]:
    if size < 1:
        raise UserError(f"batch_size must be at least 1, found {size}")
    return [slice(start, start + size) for start in range(0, length, size)]


def _identity(image: str | Path | Image.Image) -> str | int:
    return id(image) if isinstance(image, Image.Image) else str(image)


def _decode(image: str | Path | Image.Image) -> Image.Image:
    if isinstance(image, Image.Image):
        return upright(image)
    if isinstance(image, str | Path):
        return load_image(image)
    raise UserError(f"expected an image file, a PIL image or None, found {type(image).__name__}")
