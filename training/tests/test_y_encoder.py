"""The Y-Encoder on repeated texts of very different lengths."""

import torch

from mamba3_jepa.config import preset
from mamba3_jepa.models.y_encoder import YEncoder, _cheapest_split

LENGTHS = (3, 20, 3, 4, 20, 2, 3)
TEXT = (0, 1, 0, 2, 3, 4, 0)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    distinct = torch.randint(0, 512, (5, 20), generator=generator)
    mask = torch.arange(20)[None] < torch.tensor(LENGTHS)[:, None]
    ids = distinct[torch.tensor(TEXT)].masked_fill(~mask, 0)
    key = torch.tensor([9, -4, 9, 77, 1, 2**62, 9])
    return ids, mask, key


def test_distinct_texts_give_what_every_row_gives_values_and_gradients() -> None:
    torch.manual_seed(0)
    encoder = YEncoder(preset("tiny").y_encoder, 512, 32).double()
    ids, mask, key = batch()
    weights = torch.randn(len(ids), 32, dtype=torch.float64)
    results = []
    for embed in (lambda: encoder(ids, mask), lambda: encoder.forward_distinct(ids, mask, key)):
        encoder.zero_grad()
        embedding = embed()
        (embedding * weights).sum().backward()
        results.append((embedding.detach(), [p.grad.clone() for p in encoder.parameters()]))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-10, atol=1e-12)
    for ours, expected in zip(results[1][1], results[0][1], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10)


def test_each_distinct_text_is_computed_once_and_without_the_padding_of_longer_ones() -> None:
    encoder = YEncoder(preset("tiny").y_encoder, 512, 32)
    seen: list[tuple[int, ...]] = []
    encoder.backbone.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    ids, mask, key = batch()
    encoder.forward_distinct(ids, mask, key)
    assert seen == [(3, 4), (2, 20)]


def test_no_row_and_one_row() -> None:
    encoder = YEncoder(preset("tiny").y_encoder, 512, 32)
    ids, mask, key = batch()
    assert encoder.forward_distinct(ids[:0], mask[:0], key[:0]).shape == (0, 32)
    one = encoder.forward_distinct(ids[1:2], mask[1:2], key[1:2])
    torch.testing.assert_close(one, encoder(ids[1:2], mask[1:2]))


def test_the_split_is_the_cheapest_of_all() -> None:
    lengths = torch.tensor([2, 3, 3, 9, 10, 30])
    cost = {k: k * int(lengths[k - 1]) + (6 - k) * 30 for k in range(1, 7)}
    assert cost[_cheapest_split(lengths)] == min(cost.values())
