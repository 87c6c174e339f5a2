"""Retrieval against hand-computed ranks and a brute-force formula; ties, repeated texts, NaN, chunking."""

import random

import numpy as np
import pytest
import torch
from torchmetrics.retrieval import RetrievalHitRate

from mamba3_jepa.evaluation import retrieval as module
from mamba3_jepa.evaluation.retrieval import (
    answer_accuracy,
    caption_retrieval,
    distinct,
    nearest_answer,
    retrieval,
    top_texts,
)


def brute_force(predicted, target, texts, k):
    """Both recalls by sorting every row in numpy; random embeddings have no ties."""
    predicted = predicted / np.linalg.norm(predicted, axis=1, keepdims=True)
    target = target / np.linalg.norm(target, axis=1, keepdims=True)
    unique = list(dict.fromkeys(texts))
    gallery = np.stack([target[texts.index(text)] for text in unique])
    to_text = [texts[i] in [unique[j] for j in np.argsort(-gallery @ p)[:k]] for i, p in enumerate(predicted)]
    to_image = [
        text in [texts[j] for j in np.argsort(-predicted @ g)[:k]] for text, g in zip(unique, gallery, strict=True)
    ]
    return np.mean(to_text), np.mean(to_image)


@pytest.mark.parametrize("chunk_scores", [1, 50, 1 << 24])
def test_matches_brute_force_with_repeated_texts(monkeypatch, chunk_scores):
    monkeypatch.setattr(module, "_CHUNK_SCORES", chunk_scores)
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 23, size=61)
    texts = [f"text {number}" for number in numbers]
    target = rng.normal(size=(23, 7))[numbers]
    predicted = target + rng.normal(size=target.shape)
    report = retrieval(torch.tensor(predicted), torch.tensor(target), texts)
    for k in (1, 5, 10):
        to_text, to_image = brute_force(predicted, target, texts, k)
        assert report.image_to_text[k] == pytest.approx(to_text)
        assert report.text_to_image[k] == pytest.approx(to_image)
    assert 0 < report.image_to_text[1] < report.image_to_text[5] < 1
    assert report.gallery_texts == len(set(texts))
    assert report.gallery_images == 61


def test_hand_computed_case_that_differs_by_direction():
    """Two images show a cat; the second one points at the dog's text."""
    predicted = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.9, 0.1]])
    target = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    report = retrieval(predicted, target, ["cat", "cat", "dog"])
    assert report.image_to_text[1] == pytest.approx(2 / 3)  # image 1 finds the dog
    assert report.text_to_image[1] == pytest.approx(1 / 2)  # "dog" finds image 1, "cat" finds image 0
    assert report.image_to_text[5] == report.text_to_image[10] == 1.0  # k beyond the gallery


def test_collapsed_embeddings_score_nothing():
    predicted = torch.ones(40, 8) + 1e-8 * torch.randn(40, 8)
    report = retrieval(predicted, torch.ones(40, 8), [str(i) for i in range(40)])
    assert set(report.image_to_text.values()) == set(report.text_to_image.values()) == {0.0}
    rows = torch.nn.functional.normalize(torch.randn(1, 33), dim=-1).expand(40, 33).contiguous()
    report = retrieval(rows, rows, [str(i) for i in range(40)])
    assert set(report.image_to_text.values()) == set(report.text_to_image.values()) == {0.0}


def test_nan_never_counts_as_a_hit():
    target = torch.eye(4)
    predicted = torch.eye(4)
    predicted[2] = torch.nan
    report = retrieval(predicted, target, list("abcd"))
    assert report.image_to_text[10] == pytest.approx(3 / 4)
    assert report.text_to_image[10] == pytest.approx(3 / 4)
    only = retrieval(torch.full((1, 4), torch.nan), torch.ones(1, 4), ["a"])
    assert only.image_to_text[10] == only.text_to_image[10] == 0.0


def test_scale_of_embeddings_does_not_matter():
    torch.manual_seed(0)
    predicted, target = torch.randn(20, 5), torch.randn(20, 5)
    texts = [str(i) for i in range(20)]
    scaled = retrieval(predicted * torch.rand(20, 1) * 9, target * 3, texts)
    assert scaled == retrieval(predicted, target, texts)


def test_wrong_shapes_and_no_samples_are_errors():
    with pytest.raises(ValueError, match="N texts"):
        retrieval(torch.ones(3, 2), torch.ones(3, 2), ["a"])
    with pytest.raises(ValueError, match="N texts"):
        retrieval(torch.ones(3, 2), torch.ones(3, 4), ["a", "b", "c"])
    with pytest.raises(ValueError, match="at least one"):
        retrieval(torch.ones(0, 2), torch.ones(0, 2), [])
    with pytest.raises(ValueError, match="G > 0 texts"):
        nearest_answer(torch.ones(3, 2), torch.ones(0, 2), [])


def test_distinct_numbers_texts_by_first_occurrence():
    assert distinct(["b", "a", "b", "c"]) == ([0, 1, 0, 2], [0, 1, 3])


def test_top_texts_and_nearest_answer():
    answers = ["yes", "no", "blue"]
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    predicted = torch.tensor([[3.0, 0.1], [0.1, 1.0], [1.0, 0.9]])
    assert nearest_answer(predicted, embeddings, answers) == answers
    rows = top_texts(predicted, embeddings, answers, k=2)
    assert [text for text, _ in rows[0]] == ["yes", "blue"]
    assert rows[0][0][1] == pytest.approx(3 / np.hypot(3, 0.1), abs=1e-6)
    assert len(top_texts(predicted, embeddings, answers, k=9)[0]) == 3


def test_of_equal_cosines_the_first_text_comes_first():
    texts = [str(i) for i in range(100)]
    embeddings = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(50, 1)  # 50 times alike, in turns
    rows = top_texts(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), embeddings, texts, k=60)
    odd, even = texts[1::2], texts[::2]
    assert [text for text, _ in rows[0]] == odd + even[:10]
    assert [text for text, _ in rows[1]] == even + odd[:10]
    assert nearest_answer(torch.ones(1, 2), torch.ones(3, 2), ["c", "a", "b"]) == ["c"]


def test_answer_accuracy_by_type():
    types = ["what colour", "is it", "is it", "is it"]
    report = answer_accuracy(["blue", "yes", "no", " RED"], ["blue", "yes", "yes", "red"], types)
    assert report.accuracy == 0.75
    assert list(report.by_type.items()) == [("is it", (2 / 3, 3)), ("what colour", (1.0, 1))]
    assert report.n_questions == 4
    with pytest.raises(ValueError, match="0 answers"):
        answer_accuracy([], [], [])


def test_captions_by_hand():
    """Two images with two captions each; the first one's second caption is nearest to the second image."""
    predicted = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    captions = torch.tensor([[0.8, 0.6], [0.1, 0.9], [0.0, 1.0], [0.9, 0.1]])
    report = caption_retrieval(predicted, captions, list("abcd"), [0, 0, 1, 1])
    assert report.image_to_text == {1: 0.5, 5: 1.0, 10: 1.0}  # image 0 finds d, image 1 finds c
    assert report.text_to_image == {1: 0.5, 5: 1.0, 10: 1.0}  # a and c find their images, b and d the other one
    assert (report.gallery_texts, report.gallery_images) == (4, 2)


@pytest.mark.parametrize("chunk_scores", [1, 300, 1 << 24])
def test_captions_as_torchmetrics_measures_them(monkeypatch, chunk_scores):
    """Any of an image's captions is a hit: RetrievalHitRate with all of them relevant."""
    monkeypatch.setattr(module, "_CHUNK_SCORES", chunk_scores)
    torch.manual_seed(0)
    image_of = [image for image in range(37) for _ in range(3 + image % 4)]
    random.Random(0).shuffle(image_of)
    predicted = torch.randn(37, 6)
    captions = predicted[image_of] + 1.5 * torch.randn(len(image_of), 6)
    report = caption_retrieval(predicted, captions, [str(i) for i in range(len(image_of))], image_of)
    scores = torch.nn.functional.normalize(predicted, dim=1) @ torch.nn.functional.normalize(captions, dim=1).T
    own = torch.arange(37)[:, None] == torch.tensor(image_of)[None]
    for direction, values, right in (
        (report.image_to_text, scores, own),
        (report.text_to_image, scores.T, own.T),
    ):
        queries = torch.arange(len(values))[:, None].expand_as(values)
        for k, recall in direction.items():
            expected = RetrievalHitRate(top_k=k)(values.flatten(), right.flatten(), indexes=queries.flatten())
            assert recall == pytest.approx(float(expected))
            assert 0 < recall < 1


def test_one_caption_each_is_ordinary_retrieval():
    torch.manual_seed(1)
    predicted, target = torch.randn(30, 5), torch.randn(30, 5)
    texts = [str(i) for i in range(30)]
    assert caption_retrieval(predicted, target, texts, range(30)) == retrieval(predicted, target, texts)


def test_equal_captions_of_two_images_are_right_for_both():
    predicted = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [0.0, 0.0, 1.0]])
    captions = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    report = caption_retrieval(predicted, captions, ["a dog", "a dog", "grass", "sea"], [0, 1, 1, 2])
    assert report.image_to_text[1] == report.text_to_image[1] == 1.0
    assert report.gallery_texts == 4
    assert report.text_to_image == {1: 1.0, 5: 1.0, 10: 1.0}  # of four queries, not of three texts
    # Image 2 is nearer to both dogs than to its own text: two wrong captions stand above it, not one.
    crowd = caption_retrieval(
        torch.tensor([[1.0, 0.0], [0.8, 0.2], [0.9, 0.1]]),
        torch.tensor([[1.0, 0.0]] * 5 + [[0.0, 1.0]]),
        ["a dog"] * 5 + ["sea"],
        [0, 0, 1, 1, 1, 2],
    )
    assert crowd.image_to_text == {1: pytest.approx(2 / 3), 5: pytest.approx(2 / 3), 10: 1.0}


def test_captions_of_no_image_and_images_without_captions_are_errors():
    with pytest.raises(ValueError, match="captions of"):
        caption_retrieval(torch.ones(2, 2), torch.ones(2, 2), ["a", "b"], [0, 0])
    with pytest.raises(ValueError, match="captions of"):
        caption_retrieval(torch.ones(2, 2), torch.ones(3, 2), ["a", "b", "c"], [0, 1, 2])
    with pytest.raises(ValueError, match="captions of"):
        caption_retrieval(torch.ones(2, 2), torch.ones(3, 2), ["a", "b", "c"], [0, 1])
