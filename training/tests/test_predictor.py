"""The predictor's orders, poolings and directions, against a plain reading of each sample by itself."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from mamba3_jepa.config import AngnConfig, ModelConfig, Order, Pooling, PredictorConfig, preset
from mamba3_jepa.errors import UserError
from mamba3_jepa.models.angn import Angn
from mamba3_jepa.models.predictor import Predictor

VISION, QUERY, EMBED = 12, 10, 8
KINDS: list[dict[str, Any]] = [
    {"order": order, "pooling": pooling, "bidirectional": bidirectional}
    for order, pooling, bidirectional in itertools.product(get_args(Order), get_args(Pooling), (False, True))
    if (order, pooling, bidirectional) != ("question_visual", "question", False)
]


def config(**kind: Any) -> PredictorConfig:
    return dataclasses.replace(preset("tiny").predictor, **kind)


def build(gated: bool = False, **kind: Any) -> tuple[Predictor, Angn | None]:
    """In float64, away from the initial weights."""
    torch.manual_seed(0)
    predictor = Predictor(config(**kind), VISION, QUERY, EMBED).double()
    gates = Angn(2, 64, AngnConfig(enabled=True)).double() if gated else None
    for parameter in itertools.chain(predictor.parameters(), [] if gates is None else gates.parameters()):
        parameter.data += 0.1 * torch.randn_like(parameter)
    return predictor, gates


def samples() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Three of 5 visual tokens and up to 4 of the question; the second has no picture."""
    torch.manual_seed(1)
    mask = torch.tensor([[True] * 4, [True] * 3 + [False], [True] + [False] * 3])
    has_image = torch.tensor([True, False, True])
    return torch.randn(3, 5, VISION).double(), has_image, torch.randn(3, 4, QUERY).double(), mask


def plain(predictor: Predictor, gates: Angn | None, visual: Tensor | None, query: Tensor) -> tuple[Tensor, Tensor]:
    """One sample: visual tokens (Nv, .) or None, query tokens (Nq, .) -> embedding (E), pooled (D)."""
    settings, backbone = predictor.config, predictor.backbone
    parts = [
        predictor.query_proj(query) if part == "question" else predictor.vision_proj(visual)
        for part in settings.order.split("_")
        if part == "question" or visual is not None
    ]
    ends = list(itertools.accumulate(len(part) for part in parts))
    h = torch.cat(parts)
    for i, (norm, layer) in enumerate(zip(backbone.norms, backbone.layers, strict=True)):
        h = h if gates is None else h * torch.sigmoid(gates.gates[i].weight * h + gates.gates[i].bias)
        added = layer(norm(h)[None])[0]
        if settings.bidirectional:
            added = added + backbone.reverse_layers[i](norm(h).flip(0)[None])[0].flip(0)
        h = h + added
    h = backbone.final_norm(h)
    states = [h[end - len(part) : end] for part, end in zip(parts, ends, strict=True)]
    if settings.pooling == "all":
        pooled = h.mean(0)
    elif settings.pooling == "attention":
        scores = (h @ predictor.pool_score.weight[0]).exp()
        pooled = (scores[:, None] * h).sum(0) / scores.sum()
    elif settings.pooling == "question":
        questions = [part for part in settings.order.split("_") if part == "question" or visual is not None]
        pooled = states[len(questions) - 1 - questions[::-1].index("question")].mean(0)
    else:
        pooled = h[-1]
    embedding = predictor.pred_head(pooled)
    return embedding / embedding.norm(), pooled


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_a_batch_is_each_sample_read_by_itself(kind: dict[str, Any], gated: bool) -> None:
    predictor, gates = build(gated, **kind)
    visual, has_image, query, mask = samples()
    found = predictor(visual, has_image, query, mask, gate=gates)
    rows = [
        plain(predictor, gates, visual[i] if has_image[i] else None, query[i, mask[i]]) for i in range(len(has_image))
    ]
    embedding, pooled = (torch.stack(part) for part in zip(*rows, strict=True))
    torch.testing.assert_close(found.embedding, embedding, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.pooled, pooled, rtol=1e-9, atol=1e-9)
    target = torch.randn_like(pooled)
    trained = [parameter for parameter in predictor.parameters() if parameter.requires_grad]
    ours = torch.autograd.grad((found.pooled * target).sum() + found.embedding.sum(), trained)
    theirs = torch.autograd.grad((pooled * target).sum() + embedding.sum(), trained)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_no_padding_and_no_neighbour_is_seen(kind: dict[str, Any]) -> None:
    predictor, _ = build(**kind)
    visual, has_image, query, mask = samples()
    before = predictor(visual, has_image, query, mask)
    visual[1], query[~mask] = torch.nan, torch.nan
    visual[1] = 1e3
    query = torch.cat([torch.where(mask[..., None], query, -1e3), torch.full((3, 2, QUERY), 1e3).double()], dim=1)
    mask = torch.cat([mask, torch.zeros(3, 2, dtype=torch.bool)], dim=1)
    after = predictor(visual, has_image, query, mask)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)
    alone = predictor(visual[:0, :0].new_zeros(1, 0, VISION), has_image[1:2], query[1:2], mask[1:2])
    torch.testing.assert_close(alone.embedding, before.embedding[1:2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", get_args(Order))
def test_padding_is_on_the_right_of_everything(order: Order) -> None:
    predictor, _ = build(order=order)
    visual, has_image, query, mask = samples()
    tokens, valid, _ = predictor._sequence(visual, has_image, query, mask)
    pictures, questions = order.count("visual"), order.count("question")
    lengths = torch.tensor([5 * pictures + 4 * questions, 3 * questions, 5 * pictures + questions])
    assert torch.equal(valid, torch.arange(valid.shape[1]) < lengths[:, None])
    first = predictor.query_proj(query[0]) if order.startswith("question") else predictor.vision_proj(visual[0])
    torch.testing.assert_close(tokens[0, : len(first)], first)


def test_a_prediction_that_never_sees_the_picture_is_refused() -> None:
    with pytest.raises(UserError, match="would never see the picture"):
        config(order="question_visual", pooling="question")
    assert config(order="question_visual", pooling="question", bidirectional=True).bidirectional


def test_a_bidirectional_backbone_does_not_stream() -> None:
    predictor, _ = build(bidirectional=True)
    x = torch.randn(1, 3, 64).double()
    with pytest.raises(ValueError, match="no state to go on from"):
        predictor.backbone(x, return_state=True)
    with pytest.raises(ValueError, match="no state to go on from"):
        predictor.backbone.step(x[:, 0], predictor.backbone.initial_state(1))


def test_configurations_of_before_are_read_and_written_as_they_were() -> None:
    before = preset("tiny").replace(predictor=config(order="visual_question", pooling="all"))
    written = before.to_dict()
    assert written["predictor"].keys() == {"n_layers", "layer"}
    assert ModelConfig.from_dict(written) == before
    chosen = preset("tiny").replace(predictor=config(order="question_visual", pooling="last", bidirectional=True))
    assert ModelConfig.from_dict(chosen.to_dict()) == chosen
