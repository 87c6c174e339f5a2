"""collect against the model's own embed and embed_text; evaluate against its parts and hand-made cases."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import tiny_model

from mamba3_jepa.config import AngnConfig
from mamba3_jepa.data.batch import Batch
from mamba3_jepa.data.images import to_pixels
from mamba3_jepa.data.question_type import question_type
from mamba3_jepa.errors import UserError
from mamba3_jepa.evaluation import embedding_metrics
from mamba3_jepa.evaluation.retrieval import retrieval
from mamba3_jepa.evaluation.text_gallery import TextGallery, validation_answers
from mamba3_jepa.evaluation.validate import Collected, collect, evaluate
from mamba3_jepa.models.vljepa import Mamba3Jepa

CAPTIONS = ["a red circle", "a long blue rectangle above a small green triangle", "a square"]
QUESTIONS = ["What colour is it?", "Is there a circle in the upper left corner?"]


def picture(seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


# image, question, target
SAMPLES: list[tuple[Image.Image | None, str | None, str]] = [
    (picture(0), None, CAPTIONS[0]),
    (None, QUESTIONS[1], "yes"),
    (picture(1), None, CAPTIONS[1]),
    (picture(2), QUESTIONS[0], "blue"),
    (picture(3), None, CAPTIONS[2]),
]


def make_model(angn: bool) -> Mamba3Jepa:
    return tiny_model(1, [*CAPTIONS, *QUESTIONS, "yes no blue red"], angn=AngnConfig(enabled=angn))


def make_batch(model: Mamba3Jepa, numbers: list[int]) -> Batch:
    samples = [SAMPLES[i] for i in numbers]
    config = model.config
    questions = [question for _, question, _ in samples]
    queries = model.tokenizer.encode([text or config.query_prompt for text in questions], config.max_query_tokens)
    targets = model.tokenizer.encode([text for _, _, text in samples], config.max_answer_tokens)
    pixels = [to_pixels(image, config.vision.image_size) for image, _, _ in samples if image is not None]
    size = config.vision.image_size
    return Batch(
        pixels=torch.stack(pixels) if pixels else torch.empty(0, 3, size, size, dtype=torch.uint8),
        picture=torch.arange(len(pixels)),
        has_image=torch.tensor([image is not None for image, _, _ in samples], dtype=torch.bool),
        query_ids=queries.ids,
        query_mask=queries.mask,
        target_ids=targets.ids,
        target_mask=targets.mask,
        target_hash=torch.zeros(len(samples), dtype=torch.int64),
        has_target=torch.ones(len(samples), dtype=torch.bool),
        index=torch.tensor(numbers, dtype=torch.int64) + 100,
        questions=questions,
        types=[None if question is None else question_type(question) for question in questions],
        targets=[text for _, _, text in samples],
        n_truncated=0,
        bad=[],
    )


@contextmanager
def counted(entries: list[int]):
    entries.append(1)
    yield


@pytest.mark.parametrize("sizes", [(5,), (1, 1, 3), (2, 3)])
def test_collect_gives_what_embed_gives(sizes):
    model = make_model(angn=True).train()
    numbers = iter(range(5))
    batches = [make_batch(model, [next(numbers) for _ in range(size)]) for size in sizes]
    entries: list[int] = []
    collected = collect(model, batches, "cpu", counted(entries))

    images, questions, texts = (list(column) for column in zip(*SAMPLES, strict=True))
    torch.testing.assert_close(collected.predicted, model.embed(images, questions), rtol=0, atol=1e-5)
    torch.testing.assert_close(collected.target, model.embed_text(texts), rtol=0, atol=1e-5)
    assert collected.texts == texts
    assert collected.questions == questions
    assert collected.index.tolist() == [100, 101, 102, 103, 104]
    assert entries == [1]
    assert model.training
    assert not model.x_encoder.training
    assert not collected.predicted.requires_grad


def test_collect_averages_gate_activity_over_samples():
    model = make_model(angn=True)
    first, second = make_batch(model, [0, 1, 2]), make_batch(model, [3])
    parts = [collect(model, [batch], "cpu").gate_activity for batch in (first, second)]
    both = collect(model, [first, second], "cpu").gate_activity
    torch.testing.assert_close(both, (3 * parts[0] + parts[1]) / 4)
    assert both.shape == (2,)
    assert not torch.allclose(parts[0], parts[1])
    assert collect(make_model(angn=False), [first], "cpu").gate_activity is None


def test_collect_of_nothing_is_empty_and_evaluating_it_is_a_user_error():
    model = make_model(angn=True)
    collected = collect(model, [], "cpu")
    assert collected.predicted.shape == collected.target.shape == (0, model.config.embed_dim)
    with pytest.raises(UserError, match="no sample"):
        evaluate(collected)


def made_up(predicted, target, texts, questions, gate_activity=None):
    return Collected(
        predicted=F.normalize(predicted, dim=-1),
        target=F.normalize(target, dim=-1),
        texts=texts,
        questions=questions,
        types=[None if question is None else question_type(question) for question in questions],
        index=torch.arange(len(texts)),
        gate_activity=gate_activity,
    )


def unit(*axes: int) -> torch.Tensor:
    return torch.eye(6)[list(axes)]


def test_retrieval_on_captions_and_accuracy_on_questions():
    """The captions are right; of the three questions "red" is answered with blue."""
    collected = made_up(
        predicted=unit(0, 1, 2, 3, 3),
        target=unit(0, 1, 2, 3, 4),
        texts=["cat", "dog", "yes", "blue", "red"],
        questions=[None, None, "Is it red?", "what colour?", "What colour is it?"],
        gate_activity=torch.tensor([0.25, 0.75]),
    )
    report = evaluate(collected)
    metrics = report.metrics()
    assert metrics["val/image_to_text_r1"] == metrics["val/text_to_image_r1"] == 1.0
    assert (metrics["val/gallery_texts"], metrics["val/gallery_images"], metrics["val/samples"]) == (2, 2, 5)
    assert metrics["val/answer_accuracy"] == pytest.approx(2 / 3)
    assert (metrics["val/answer_accuracy_is_it"], metrics["val/answer_accuracy_what_colour"]) == (1.0, 0.5)
    assert metrics["val/questions"] == 3
    assert metrics["val/alignment"] == pytest.approx(2 / 5)
    assert (metrics["val/gate_activity_0"], metrics["val/gate_activity_1"]) == (0.25, 0.75)
    assert report.metrics("unseen")["unseen/image_to_text_r1"] == 1.0


def test_only_frequent_question_types_are_logged():
    questions = [f"kind {i}?" for i in range(40) for _ in range(40 - i)]
    texts = ["yes", "no"] * (len(questions) // 2)
    answered = torch.eye(6)[[0, 1] * (len(questions) // 2)]
    report = evaluate(made_up(answered, answered, texts, questions))
    assert report.answers is not None
    assert report.answers.by_type["kind 39"] == (1.0, 1)
    keys = [key for key in report.metrics() if key.startswith("val/answer_accuracy_")]
    assert keys == [f"val/answer_accuracy_kind_{i}" for i in range(16)]


def test_questions_only_are_retrieved_over_all_samples():
    torch.manual_seed(0)
    texts = ["yes", "no", "blue", "yes", "no", "yes"]
    target = torch.randn(3, 6)[[0, 1, 2, 0, 1, 0]]
    collected = made_up(target + torch.randn(6, 6), target, texts, ["?"] * 6)
    report = evaluate(collected)
    assert report.retrieval == retrieval(collected.predicted, collected.target, texts)
    assert report.retrieval.gallery_texts == 3
    assert report.answers is not None
    # With all of its own answers as candidates, accuracy is recall at 1.
    assert report.answers.accuracy == pytest.approx(report.retrieval.image_to_text[1])
    assert "val/gate_activity_0" not in report.metrics()


def test_given_answers_replace_the_collected_ones():
    collected = made_up(unit(0, 1), unit(0, 1), ["yes", "no"], ["a?", "b?"])
    assert evaluate(collected).metrics()["val/answer_accuracy"] == 1.0
    report = evaluate(collected, TextGallery(texts=["no", "yes", "maybe"], embeddings=unit(0, 1, 2)))
    assert report.metrics()["val/answer_accuracy"] == 0.0
    report = evaluate(collected, TextGallery(texts=[" Yes", "NO"], embeddings=unit(0, 1)))
    assert report.metrics()["val/answer_accuracy"] == 1.0, "case and white space do not count"


def test_during_training_known_answers_stand_beside_the_right_ones():
    """A right answer can be found also where the training data does not know it; what it knows can be taken for it."""
    model = make_model(angn=False)
    known = model.embed_text(["blue", "red"])
    texts, questions = ["yes", "no", "a caption", "yes"], ["a?", "b?", None, "c?"]
    target = F.normalize(torch.randn(4, known.shape[1]), dim=-1)
    gallery = validation_answers(model, texts, target, questions, ["blue", "no", "red", "blue"])
    assert gallery is not None
    assert gallery.texts == ["yes", "no", "blue", "red"]
    torch.testing.assert_close(gallery.embeddings, torch.cat([target[:2], known]))
    predicted = torch.stack([target[0], known[0], target[2], known[1]])
    collected = made_up(predicted, target[[0, 1, 2, 0]], texts, questions)
    assert evaluate(collected, gallery).metrics()["val/answer_accuracy"] == pytest.approx(1 / 3)
    assert validation_answers(model, texts[2:3], target[2:3], [None], ["blue"]) is None


def test_embedding_metrics_count_each_text_once():
    torch.manual_seed(1)
    texts = [str(i % 7) for i in range(40)]
    target = torch.randn(7, 6)[[i % 7 for i in range(40)]]
    collected = made_up(torch.randn(40, 6), target, texts, [None] * 40)
    report = evaluate(collected)
    metrics = report.metrics()
    assert metrics["val/uniformity_target"] == embedding_metrics.uniformity(collected.target[:7])
    assert metrics["val/uniformity_predicted"] == embedding_metrics.uniformity(collected.predicted)
    mean = (metrics["val/uniformity_target"] + metrics["val/uniformity_predicted"]) / 2
    assert metrics["val/uniformity"] == pytest.approx(mean)
    assert metrics["val/effective_rank_target"] == embedding_metrics.effective_rank(collected.target[:7])
    assert metrics["val/effective_rank_predicted"] == embedding_metrics.effective_rank(collected.predicted)
    assert "val/answer_accuracy" not in metrics
    assert report.warnings == ()


def test_collapse_is_a_warning_and_scores_nothing():
    texts = [str(i) for i in range(20)]
    report = evaluate(made_up(torch.ones(20, 6), torch.randn(20, 6), texts, [None] * 20))
    assert len(report.warnings) == 1
    assert "predicted embeddings have collapsed" in report.warnings[0]
    report = evaluate(made_up(torch.ones(20, 6), torch.ones(20, 6), texts, [None] * 20))
    assert len(report.warnings) == 2
    assert report.retrieval.image_to_text[10] == report.retrieval.text_to_image[10] == 0.0


def test_frequent_answers_on_one_point_are_named():
    texts = [["red", "yes", "no", "blue"][i % 4] for i in range(40)]
    points = {text: torch.nn.functional.normalize(torch.randn(6), dim=0) for text in ("red", "yes", "blue", "rare")}
    points["no"] = torch.nn.functional.normalize(points["yes"] + 1e-3 * torch.randn(6), dim=0)
    target = torch.stack([points[text] for text in texts])
    report = evaluate(made_up(target, target, texts, ["?"] * 40))
    assert [warning.split(" (")[0] for warning in report.warnings] == ["the answers 'yes' and 'no' lie on one point"]
    assert evaluate(made_up(target, target, texts, [None] * 40)).warnings == ()
    apart = torch.stack([points[text] for text in ("red", "yes", "blue", "rare") * 10])
    assert evaluate(made_up(apart, apart, ["red", "yes", "blue", "no"] * 10, ["?"] * 40)).warnings == ()
    often = torch.stack([points["red"], points["blue"]] * 150 + [points["yes"], points["no"]])
    rare = evaluate(made_up(often, often, ["red", "blue"] * 150 + ["yes", "no"], ["?"] * 302))
    assert rare.warnings == ()  # one question in three hundred each
