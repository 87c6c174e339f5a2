"""The Y-Decoder: decoding token by token equals the full forward; what it may see and what not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mamba3_jepa.config import preset
from mamba3_jepa.models.y_decoder import YDecoder


@pytest.fixture(scope="module")
def decoder() -> YDecoder:
    torch.manual_seed(0)
    config = preset("tiny")
    decoder = YDecoder(config.y_decoder, vocab_size=200, embed_dim=32, prefix_tokens=config.prefix_tokens)
    with torch.no_grad():  # away from the initial values, so that every part matters
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder.eval()


def test_decoding_step_by_step_equals_the_full_forward(decoder: YDecoder) -> None:
    embedding = F.normalize(torch.randn(2, 32), dim=-1)
    ids = torch.randint(0, 200, (2, 9))
    with torch.no_grad():
        logits = decoder(embedding, ids)
        state = decoder.prefill(embedding)
        for t in range(ids.shape[1]):
            step_logits, state = decoder.step(ids[:, t], state)
            torch.testing.assert_close(step_logits, logits[:, t], atol=1e-5, rtol=0)
    assert logits.shape == (2, 9, decoder.lm_head.out_features)


def test_decoder_sees_the_embedding_and_the_past_only(decoder: YDecoder) -> None:
    embedding = F.normalize(torch.randn(1, 32), dim=-1)
    ids = torch.randint(0, 200, (1, 8))
    padded = torch.cat([ids[:, :5], torch.zeros(1, 6, dtype=torch.int64)], dim=1)
    with torch.no_grad():
        logits = decoder(embedding, ids)
        torch.testing.assert_close(decoder(embedding, padded)[:, :5], logits[:, :5], atol=1e-5, rtol=0)
        assert (decoder(-embedding, ids)[:, 0] - logits[:, 0]).abs().max() > 1e-3
        changed = ids.clone()
        changed[0, 3] += 1
        difference = (decoder(embedding, changed) - logits).abs().amax(dim=(0, 2))
    assert difference[:3].max() < 1e-6
    assert difference[3:].min() > 1e-4
