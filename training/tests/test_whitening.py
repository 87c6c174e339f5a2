"""The predictor's start from whitened visual tokens."""

import torch

from mamba3_jepa.config import preset
from mamba3_jepa.models.predictor import Predictor


def projected(vision_dim: int, d_model_preset: str = "tiny") -> tuple[torch.Tensor, int]:
    config = preset(d_model_preset).predictor
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(1, -1, vision_dim)
    mixing = torch.linalg.qr(torch.randn(vision_dim, vision_dim, generator=generator)).Q
    tokens = (torch.randn(20_000, vision_dim, generator=generator) * scales) @ mixing + 3.0
    predictor = Predictor(config, vision_dim, 32, 16)
    predictor.whiten_vision(tokens, floor=0.0)
    return predictor.vision_proj(tokens).detach(), config.d_model


def test_the_projection_of_the_tokens_is_centred_and_white() -> None:
    """As many directions as the model is wide: the covariance is the identity."""
    h, d_model = projected(96)
    torch.testing.assert_close(h.mean(dim=0), torch.zeros(d_model), atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.cov(h.T), torch.eye(d_model), atol=2e-2, rtol=0)


def test_fewer_visual_dimensions_than_the_model_is_wide() -> None:
    """The covariance is a projection: as many eigenvalues 1 as there are dimensions, the others 0."""
    h, d_model = projected(24)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(h.T))
    torch.testing.assert_close(eigenvalues[-24:], torch.ones(24), atol=2e-2, rtol=0)
    torch.testing.assert_close(eigenvalues[:-24], torch.zeros(d_model - 24), atol=1e-4, rtol=0)


def test_the_floor_keeps_noise_small() -> None:
    tokens = torch.randn(5_000, 64) * torch.cat([torch.ones(32), torch.full((32,), 1e-6)])
    predictor = Predictor(preset("tiny").predictor, 64, 32, 16)
    predictor.whiten_vision(tokens)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(predictor.vision_proj(tokens).detach().T))
    assert eigenvalues[:32].max() < 1e-3
    assert eigenvalues[-32:].min() > 0.9
