"""The losses against loops that follow their definitions, one row at a time."""

import math

import pytest
import torch
import torch.nn.functional as F

from mamba3_jepa.models.losses import (
    LOOKUP_MIDDLE,
    LOOKUP_SCALE,
    confusion_loss,
    info_nce,
    injection_error,
    lookup_loss,
)


def _by_definition(predicted: torch.Tensor, target: torch.Tensor, keys: list[int], temperature: float) -> float:
    n = len(keys)
    total = 0.0
    for anchors, others in ((predicted, target), (target, predicted)):
        for i in range(n):
            positive = math.exp(float(anchors[i] @ others[i]) / temperature)
            negatives = sum(
                math.exp(float(anchors[i] @ others[j]) / temperature) for j in range(n) if keys[j] != keys[i]
            )
            total -= math.log(positive / (positive + negatives))
    return total / (2 * n)


def test_matches_the_definition_with_identical_texts() -> None:
    torch.manual_seed(0)
    predicted = F.normalize(torch.randn(7, 5, dtype=torch.float64), dim=-1)
    target = F.normalize(torch.randn(7, 5, dtype=torch.float64), dim=-1)
    for keys in ([1, 2, 3, 4, 5, 6, 7], [1, 1, 2, 3, 2, 1, 4]):
        loss = info_nce(predicted, target, torch.tensor(keys), torch.tensor(0.2)).loss
        assert math.isclose(float(loss), _by_definition(predicted, target, keys, 0.2), rel_tol=1e-6)


@pytest.mark.parametrize("n_hard", [1, 4])
def test_hard_negatives_are_further_columns_but_for_rows_of_their_text(n_hard: int) -> None:
    torch.manual_seed(4)
    predicted, target = (F.normalize(torch.randn(7, 5, dtype=torch.float64), dim=-1) for _ in range(2))
    hard = F.normalize(torch.randn(n_hard, 5, dtype=torch.float64), dim=-1)
    keys, hard_keys, temperature = [1, 1, 2, 3, 2, 1, 4], [2, 9, 1, 9][:n_hard], 0.2
    to_texts = to_images = 0.0
    columns = [*zip(target, keys, strict=True), *zip(hard, hard_keys, strict=True)]
    n_negatives = 0
    for i in range(7):
        positive = math.exp(float(predicted[i] @ target[i]) / temperature)
        wrong = [math.exp(float(predicted[i] @ text) / temperature) for text, key in columns if key != keys[i]]
        n_negatives += len(wrong)
        to_texts -= math.log(positive / (positive + sum(wrong))) / 7
        others = sum(math.exp(float(predicted[j] @ target[i]) / temperature) for j in range(7) if keys[j] != keys[i])
        to_images -= math.log(positive / (positive + others)) / 7
    found = info_nce(predicted, target, torch.tensor(keys), torch.tensor(0.2), hard, torch.tensor(hard_keys))
    assert math.isclose(float(found.loss), (to_texts + to_images) / 2, rel_tol=1e-6)
    assert float(found.negatives) == pytest.approx(n_negatives / 7)


def test_accuracy_is_lost_to_a_hard_negative() -> None:
    embeddings = torch.eye(3)
    nearer = torch.tensor([[1.0, 0.0, 0.0]])
    keys, temperature = torch.tensor([1, 2, 3]), torch.tensor(0.1)
    wrong = F.normalize(torch.tensor([[1.0, 0.2, 0.0]]), dim=-1)
    found = info_nce(F.normalize(torch.tensor([[1.0, 0.3, 0.0], [0, 1, 0], [0, 0, 1]]), dim=-1), embeddings, keys,
                     temperature, wrong, torch.tensor([9]))  # fmt: skip
    assert float(found.accuracy) == pytest.approx(2 / 3)
    same = info_nce(embeddings, embeddings, keys, temperature, nearer, torch.tensor([1]))
    assert float(same.accuracy) == 1.0, "the same text is no negative"


@pytest.mark.parametrize("hard", [None, torch.empty(0, 5)])
def test_without_hard_negatives_the_loss_is_what_it_was_to_the_last_bit(hard: torch.Tensor | None) -> None:
    torch.manual_seed(5)
    predicted, target = (F.normalize(torch.randn(7, 5), dim=-1) for _ in range(2))
    keys = torch.tensor([1, 1, 2, 3, 2, 1, 4])
    found = info_nce(predicted, target, keys, torch.tensor(0.07), hard, None if hard is None else keys[:0])
    assert torch.equal(found.loss, info_nce(predicted, target, keys, torch.tensor(0.07)).loss)


def test_identical_texts_are_not_negatives() -> None:
    """Moving another sample of the same text closer must not change a row's loss."""
    anchor = F.normalize(torch.randn(3, 4), dim=-1)
    target = anchor.clone().requires_grad_()
    keys = torch.tensor([5, 5, 5])
    output = info_nce(anchor, target, keys, torch.tensor(0.07))
    output.loss.backward()
    assert float(output.loss.detach()) == 0.0
    assert torch.equal(target.grad, torch.zeros_like(target))
    assert float(output.accuracy) == 1.0
    assert float(output.negatives) == 0


def test_the_negatives_are_counted() -> None:
    embeddings = F.normalize(torch.randn(5, 4), dim=-1)
    output = info_nce(embeddings, embeddings, torch.tensor([1, 1, 2, 3, 2]), torch.tensor(0.07))
    assert float(output.negatives) == pytest.approx((3 + 3 + 3 + 4 + 3) / 5)


def test_an_empty_batch_teaches_nothing() -> None:
    predicted = torch.empty(0, 4, requires_grad=True)
    temperature = torch.tensor(0.07, requires_grad=True)
    loss = info_nce(predicted, torch.empty(0, 4), torch.empty(0, dtype=torch.int64), temperature).loss
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert temperature.grad == 0


def test_low_precision_does_not_reach_the_logits() -> None:
    torch.manual_seed(1)
    predicted = F.normalize(torch.randn(16, 64), dim=-1)
    target = F.normalize(torch.randn(16, 64), dim=-1)
    keys = torch.arange(16)
    exact = info_nce(predicted, target, keys, torch.tensor(0.01)).loss
    with torch.autocast("cpu", torch.bfloat16):
        mixed = info_nce(predicted, target, keys, torch.tensor(0.01)).loss
    assert torch.equal(exact, mixed)


def test_confusion_loss_is_the_mean_negative_log_probability_of_the_labels() -> None:
    torch.manual_seed(2)
    logits = 3 * torch.randn(7, dtype=torch.float64)
    confused = torch.tensor([True, False, False, True, True, False, True])
    expected = 0.0
    for logit, label in zip(logits.tolist(), confused.tolist(), strict=True):
        probability = 1 / (1 + math.exp(-logit))
        expected -= math.log(probability if label else 1 - probability) / 7
    assert math.isclose(float(confusion_loss(logits, confused)), expected, rel_tol=1e-6)
    sure = confusion_loss(torch.tensor([200.0, -200.0]), torch.tensor([False, True]))
    assert float(sure) == 200.0, "what a probability of 0 would make infinite"
    low = confusion_loss(logits.bfloat16(), confused)
    assert low.dtype == torch.float32


def test_injection_error_is_the_mean_square() -> None:
    torch.manual_seed(0)
    predicted = torch.randn(5, 3, requires_grad=True)
    target = torch.randn(5, 3)
    error = injection_error(predicted, target)
    for i in range(5):
        expected = sum((float(predicted[i, j].detach()) - float(target[i, j])) ** 2 for j in range(3)) / 3
        assert math.isclose(float(error[i].detach()), expected, rel_tol=1e-5)
    error.sum().backward()
    assert predicted.grad is not None
    torch.testing.assert_close(predicted.grad, 2 / 3 * (predicted - target).detach())


def test_lookups_are_scored_among_others_and_alone() -> None:
    right, others = torch.tensor([0.9, 0.1]), torch.tensor([[0.2, 0.95, -0.3], [0.4, 0.6, 0.7]])
    is_other = torch.tensor([[True, False, True], [False, False, False]])
    loss = lookup_loss(right, others, is_other)
    for row in range(2):
        mine = LOOKUP_SCALE * (float(right[row]) - LOOKUP_MIDDLE)
        theirs = [LOOKUP_SCALE * (float(x) - LOOKUP_MIDDLE) for x in others[row][is_other[row]]]
        among = math.log(sum(math.exp(x) for x in [mine, *theirs])) - mine
        alone = math.log1p(math.exp(-mine)) + sum(math.log1p(math.exp(x)) for x in theirs)
        assert math.isclose(float(loss[row]), among + alone, rel_tol=1e-4, abs_tol=1e-6)


def test_no_other_text_leaves_gradients_finite() -> None:
    right = torch.tensor([0.3], requires_grad=True)
    others = torch.zeros(1, 4, requires_grad=True)
    lookup_loss(right, others, torch.zeros(1, 4, dtype=torch.bool)).sum().backward()
    assert right.grad is not None
    assert others.grad is not None
    assert bool(right.grad.isfinite().all())
    assert torch.equal(others.grad, torch.zeros(1, 4))
