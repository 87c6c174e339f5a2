"""The architecture on one page: which parts there are, and how tensors pass through them.

    pixels   -> x_encoder (frozen) -> visual tokens -.
    question -> y_encoder.embed_tokens -------------- +-> predictor, gated by angn -> predicted embedding, pooled state
    answer   -> y_encoder -> target embedding
    predicted embedding -> y_decoder -> the answer's tokens
    pooled state -> recursion: P(confused), and knowledge added to it

Phase 1 trains predictor, y_encoder and angn, phase 2 y_decoder, phase 3 recursion. Files, texts and pictures are the
business of `vljepa.Mamba3Jepa`.

Shape letters: B samples, Bi of them with an image, P different pictures, Nv visual tokens, Nq query tokens, D vision
width, E embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mamba3_jepa.config import ModelConfig
from mamba3_jepa.errors import UserError
from mamba3_jepa.models.angn import Angn
from mamba3_jepa.models.pooling import grid_mean
from mamba3_jepa.models.predictor import Predictor, PredictorOutput
from mamba3_jepa.models.recursion import Recursion
from mamba3_jepa.models.vit import VisionEncoder
from mamba3_jepa.models.y_decoder import YDecoder
from mamba3_jepa.models.y_encoder import YEncoder


class Network(nn.Module):
    """X-Encoder, predictor, Y-Encoder, and where wanted the gates, the Y-Decoder and the recursion.

    Args:
        config: all sizes.
        x_encoder: a `VisionEncoder` with `config.vision`; by default one with random weights.
        with_decoder: also build the Y-Decoder.
        with_recursion: also build the confusion monitor and the state injector.

    Attributes:
        angn: None unless `config.angn.enabled`.
        y_decoder, recursion: None until there is one.

    Raises:
        UserError: the X-Encoder does not fit the configuration.
    """

    def __init__(
        self,
        config: ModelConfig,
        x_encoder: VisionEncoder | None = None,
        *,
        with_decoder: bool = False,
        with_recursion: bool = False,
    ) -> None:
        super().__init__()
        if x_encoder is not None and x_encoder.config != config.vision:
            raise UserError(f"the X-Encoder is {x_encoder.config}, the model configuration says {config.vision}")
        self.config = config
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

    def add_decoder(self) -> YDecoder:
        """A Y-Decoder with new weights in place of the one there is, on the model's device."""
        config = self.config
        decoder = YDecoder(config.y_decoder, config.vocab_size, config.embed_dim, config.prefix_tokens)
        self.y_decoder = decoder.to(self.device)
        return self.y_decoder

    def add_recursion(self) -> Recursion:
        """A confusion monitor and a state injector with new weights, on the model's device."""
        config = self.config
        self.recursion = Recursion(
            config.predictor.d_model, config.embed_dim, config.knowledge_dim, config.recursion, config.episode_dim
        ).to(self.device)
        return self.recursion

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.predictor.pred_head.weight.device

    def forward(
        self,
        pixels: Tensor,
        has_image: Tensor,
        query_ids: Tensor,
        query_mask: Tensor,
        picture: Tensor | None = None,
        looked: Tensor | None = None,
    ) -> PredictorOutput:
        """Predict the embeddings of the answers: `encode_images`, then `predict`.

        Args:
            looked: what `look` gave of the pictures before, of any floating-point type; `pixels` are not used then.
        """
        if looked is None:
            visual_tokens = self.encode_images(pixels, has_image, picture)
        else:
            visual_tokens = _of_samples(looked.to(self.predictor.vision_proj.weight.dtype), has_image, picture)
        return self.predict(visual_tokens, has_image, query_ids, query_mask)

    def look(self, pixels: Tensor) -> Tensor:
        """The visual tokens (P, Nv, D) of pictures, pooled as the predictor reads them; pixels: see `encode_images`."""
        tokens, side = self.x_encoder(pixels), self.config.predictor.visual_pool
        return tokens if side == 1 else grid_mean(tokens, self.x_encoder.grid(pixels), side)

    def encode_images(self, pixels: Tensor, has_image: Tensor, picture: Tensor | None = None) -> Tensor:
        """Run the frozen X-Encoder, once on each picture.

        Args:
            pixels: (P, 3, H, W) or (P, T, 3, H, W), ImageNet-normalised.
            has_image: (B,) bool with Bi True.
            picture: (Bi,) int64, which of the pictures each sample with an image sees; by default each has its own, in
                the order of the samples.

        Returns:
            (B, Nv, D) visual tokens, zeros where there is no image; Nv is 0 when no sample has one.
        """
        if not len(pixels):
            return pixels.new_zeros(len(has_image), 0, self.config.vision.hidden_size)
        return _of_samples(self.look(pixels), has_image, picture)

    def predict(
        self, visual_tokens: Tensor, has_image: Tensor, query_ids: Tensor, query_mask: Tensor
    ) -> PredictorOutput:
        """Predict the embeddings of the answers.

        Args:
            visual_tokens: (B, Nv, D) from `encode_images`.
            has_image: (B,) bool.
            query_ids, query_mask: (B, Nq) token ids, padded on the right, and which of them are valid.

        Returns:
            embedding (B, E) of unit length, and the pooled state (B, d_model).
        """
        query_tokens = self.y_encoder.embed_tokens(query_ids)
        return self.predictor(visual_tokens, has_image, query_tokens, query_mask, gate=self.angn)


def _of_samples(tokens: Tensor, has_image: Tensor, picture: Tensor | None) -> Tensor:
    """Visual tokens of pictures (P, Nv, D) -> of samples (B, Nv, D); the others as in `encode_images`."""
    if not len(tokens):
        return tokens.new_zeros(len(has_image), 0, tokens.shape[2])
    if picture is not None:
        tokens = tokens[picture]
    if len(tokens) == len(has_image):
        return tokens
    rows = has_image.nonzero().squeeze(1)
    if len(rows) != len(tokens):
        raise ValueError(f"{len(tokens)} images for {len(rows)} samples that have one")
    return tokens.new_zeros(len(has_image), *tokens.shape[1:]).index_copy(0, rows, tokens)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Every module in it in eval mode; afterwards each is back in the mode it was in."""
    in_training = [each for each in module.modules() if each.training]
    module.eval()
    try:
        yield
    finally:
        for each in in_training:
            each.training = True
