"""Real inputs to try an exported model with: rendered scenes, their captions and questions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mamba3_jepa.data.images import normalize, to_pixels
from mamba3_jepa.data.scenes import SceneSource
from mamba3_jepa.errors import UserError
from mamba3_jepa.models.generation import doubt
from mamba3_jepa.models.vljepa import Mamba3Jepa

N_SCENES = 4
_SMALLEST_SCENE = 16


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Inputs of a model: B questions, some with an image, and B texts.

    Attributes:
        image_u8: (Bi, 3, S, S) uint8, the images there are.
        pixels: the same, normalised, (Bi, 3, S, S) float32.
        has_image: (B,) bool with Bi True.
        query_ids, query_mask: (B, Nq).
        text_ids, text_mask: (B, L).
        questions, texts: what was encoded.
    """

    image_u8: Tensor
    pixels: Tensor
    has_image: Tensor
    query_ids: Tensor
    query_mask: Tensor
    text_ids: Tensor
    text_mask: Tensor
    questions: list[str]
    texts: list[str]


def scene_probe(model: Mamba3Jepa, n_scenes: int = N_SCENES) -> Probe:
    """Rendered scenes with their captions and questions, and each question once more without its image."""
    config, source = model.config, _scenes(model, n_scenes)
    images: list[Image.Image | None] = []
    questions, texts = [], []
    for i in range(0, len(source), len(source) // n_scenes):
        for sample in (source.sample(i), source.sample(i + 1)):
            assert sample.image is not None  # "caption" and "question" have an image and a target
            assert sample.target is not None
            images.append(sample.image())
            questions.append(sample.question or config.query_prompt)
            texts.append(sample.target)
        images.append(None)
        questions.append(questions[-1])
        texts.append(texts[-1])
    return _probe(model, images, questions, texts)


def knowledge_vectors(model: Mamba3Jepa, text_embedding: Tensor) -> Tensor:
    """(B, K): the text embeddings themselves, or, where knowledge has another length, fixed unit vectors."""
    length = model.config.knowledge_dim
    if length == text_embedding.shape[1]:
        return text_embedding
    generator = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(len(text_embedding), length, generator=generator), dim=-1)


def answer_doubts(model: Mamba3Jepa, embedding: Tensor) -> Tensor:
    """(B, S): the decoder's doubt in what it answers greedily from embeddings (B, E)."""
    if model.y_decoder is None:
        raise UserError("a model whose confusion monitor hears the answer cannot be exported without its Y-Decoder")
    return doubt(model.say(embedding))


def golden_probe(model: Mamba3Jepa) -> Probe:
    """Two samples: a question about a scene, and the model's fixed prompt without image; an answer and a caption."""
    caption, question = (_scenes(model, 1).sample(i) for i in (0, 1))
    assert question.image is not None
    assert question.question is not None
    assert question.target is not None
    assert caption.target is not None
    questions = [question.meta["plain"], model.config.query_prompt]
    return _probe(model, [question.image(), None], questions, [question.target, caption.target])


def _scenes(model: Mamba3Jepa, n_scenes: int) -> SceneSource:
    return SceneSource("val", n_scenes=n_scenes, image_size=max(model.config.vision.image_size, _SMALLEST_SCENE))


def _probe(model: Mamba3Jepa, images: list[Image.Image | None], questions: list[str], texts: list[str]) -> Probe:
    config = model.config
    image_u8 = torch.stack([to_pixels(image, config.vision.image_size) for image in images if image is not None])
    query = model.tokenizer.encode(questions, config.max_query_tokens)
    text = model.tokenizer.encode(texts, config.max_answer_tokens)
    return Probe(
        image_u8=image_u8,
        pixels=normalize(image_u8),
        has_image=torch.tensor([image is not None for image in images]),
        query_ids=query.ids,
        query_mask=query.mask,
        text_ids=text.ids,
        text_mask=text.mask,
        questions=questions,
        texts=texts,
    )
