"""The assembled vision-language JEPA.

Shape letters: B batch, Bi images in it, Nv visual tokens, Nq query tokens, D vision width, E embedding width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from mamba3_jepa.config import ModelConfig
from mamba3_jepa.data.images import load_image, normalize, to_pixels, upright
from mamba3_jepa.data.tokenizer import EncodedTexts, TextTokenizer
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.checkpoint import Checkpoint, load_checkpoint
from mamba3_jepa.models.angn import Angn
from mamba3_jepa.models.predictor import Predictor, PredictorOutput
from mamba3_jepa.models.recursion import Recursion
from mamba3_jepa.models.state_dict import load_state
from mamba3_jepa.models.vit import VisionEncoder
from mamba3_jepa.models.y_decoder import YDecoder
from mamba3_jepa.models.y_encoder import YEncoder

logger = logging.getLogger(__name__)


class Mamba3Jepa(nn.Module):
    """X-Encoder, predictor, Y-Encoder, and where wanted the gates, the Y-Decoder and the recursion.

    Args:
        config: all sizes.
        tokenizer: its vocabulary must have `config.vocab_size` tokens.
        x_encoder: a `VisionEncoder` with `config.vision`; by default one with random weights.
        with_decoder: also build the Y-Decoder (phase 2 trains it).
        with_recursion: also build the confusion monitor and the state injector (phase 3 trains them).

    Attributes:
        source: the file or folder that the weights came from, for messages.
        angn: None unless `config.angn.enabled`.
        y_decoder: None until there is one.
        recursion: None until there is one.

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
        super().__init__()
        if config.vocab_size != tokenizer.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model configuration says {config.vocab_size}"
            )
        if x_encoder is not None and x_encoder.config != config.vision:
            raise UserError(f"the X-Encoder is {x_encoder.config}, the model configuration says {config.vision}")
        self.config, self.tokenizer, self.source = config, tokenizer, "the model"
        d_model, query_dim = config.predictor.d_model, config.y_encoder.d_model
        self.x_encoder = VisionEncoder(config.vision) if x_encoder is None else x_encoder
        self.predictor = Predictor(config.predictor, config.vision.hidden_size, query_dim, embed_dim=config.embed_dim)
        self.y_encoder = YEncoder(config.y_encoder, config.vocab_size, config.embed_dim)
        self.angn = Angn(config.predictor.n_layers, d_model, config.angn) if config.angn.enabled else None
        self.y_decoder: YDecoder | None = None
        self.recursion: Recursion | None = None
        if with_decoder:
            self.add_decoder()
        if with_recursion:
            self.add_recursion()

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

    def add_decoder(self) -> YDecoder:
        """A Y-Decoder with new weights in place of the one there is, on the model's device."""
        config = self.config
        decoder = YDecoder(config.y_decoder, config.vocab_size, config.embed_dim, config.prefix_tokens)
        self.y_decoder = decoder.to(self.device)
        return self.y_decoder

    def add_recursion(self) -> Recursion:
        """A confusion monitor and a state injector with new weights, on the model's device."""
        config = self.config
        self.recursion = Recursion(config.predictor.d_model, config.knowledge_dim, config.recursion).to(self.device)
        return self.recursion

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.predictor.pred_head.weight.device

    def encode_images(self, pixels: Tensor, has_image: Tensor) -> Tensor:
        """Run the frozen X-Encoder on the images there are.

        Args:
            pixels: (Bi, 3, H, W) or (Bi, T, 3, H, W), ImageNet-normalised, in the order of the samples that
                have an image.
            has_image: (B,) bool with Bi True.

        Returns:
            (B, Nv, D) visual tokens, zeros where there is no image; Nv is 0 when no sample has one.
        """
        n_samples, n_images = len(has_image), len(pixels)
        if n_images == 0:
            return pixels.new_zeros(n_samples, 0, self.config.vision.hidden_size)
        tokens = self.x_encoder(pixels)
        if n_images == n_samples:
            return tokens
        rows = has_image.nonzero().squeeze(1)
        if len(rows) != n_images:
            raise ValueError(f"{n_images} images for {len(rows)} samples that have one")
        return tokens.new_zeros(n_samples, *tokens.shape[1:]).index_copy(0, rows, tokens)

    def predict(
        self, visual_tokens: Tensor, has_image: Tensor, query_ids: Tensor, query_mask: Tensor
    ) -> PredictorOutput:
        """Predict answer embeddings.

        Args:
            visual_tokens: (B, Nv, D) from `encode_images`.
            has_image: (B,) bool.
            query_ids, query_mask: (B, Nq) token ids, padded on the right, and which of them are valid.

        Returns:
            embedding (B, E) of unit length, and the pooled state (B, d_model).
        """
        query_tokens = self.y_encoder.embed_tokens(query_ids)
        return self.predictor(visual_tokens, has_image, query_tokens, query_mask, gate=self.angn)

    def observe(
        self,
        images: Sequence[str | Path | Image.Image | None],
        questions: Sequence[str | None],
        batch_size: int = 32,
    ) -> PredictorOutput:
        """What the predictor makes of image-question pairs: embeddings and pooled states.

        Args:
            images: per sample a file, an image, or None for a question without image.
            questions: per sample a text, or None for `config.query_prompt`.
            batch_size: samples computed at once; the result does not depend on it.

        Returns:
            embedding (B, E) float32 of unit length and pooled (B, d_model) float32, on the model's device.

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
                pixels, has_image = self._pixels(images[rows])
                ids, mask = self._batch(encoded, rows)
                visual_tokens = self.encode_images(pixels, has_image)
                outputs.append(self.predict(visual_tokens, has_image, ids, mask))
        # Outside, so that the result can take part in training.
        return PredictorOutput(*(torch.cat([tensor.float() for tensor in part]) for part in zip(*outputs, strict=True)))

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

    def _pixels(self, images: Sequence[str | Path | Image.Image | None]) -> tuple[Tensor, Tensor]:
        """Normalised pixels (Bi, 3, S, S) and has_image (B,), on the model's device."""
        size = self.config.vision.image_size
        has_image = torch.tensor([image is not None for image in images], device=self.device)
        decoded = [to_pixels(_decode(image), size) for image in images if image is not None]
        stacked = torch.stack(decoded) if decoded else torch.empty(0, 3, size, size, dtype=torch.uint8)
        return normalize(stacked.to(self.device)), has_image

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """Inference mode with every module in eval mode; afterwards each is back in the mode it was in."""
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            for module in training:
                module.training = True


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


def _decode(image: str | Path | Image.Image) -> Image.Image:
    if isinstance(image, Image.Image):
        return upright(image)
    if isinstance(image, str | Path):
        return load_image(image)
    raise UserError(f"expected an image file, a PIL image or None, found {type(image).__name__}")
