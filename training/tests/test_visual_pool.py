"""Visual tokens that the predictor reads as means of neighbours: values, configuration, and what goes with it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, write_checkpoint

from mamba3_jepa.config import ModelConfig, preset
from mamba3_jepa.errors import UserError
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.training import Phase1Settings


def pooled(pool: int, name: str = "tiny") -> ModelConfig:
    config = preset(name)
    return config.replace(predictor=dataclasses.replace(config.predictor, visual_pool=pool))


def model_of(pool: int) -> Mamba3Jepa:
    return tiny_model(1, predictor=pooled(pool).predictor)


def test_the_tokens_are_means_of_neighbours() -> None:
    model = model_of(2)
    pixels = torch.randn(3, 3, 32, 32)
    plain = model.x_encoder(pixels)
    read = model.look(pixels)
    assert read.shape == (3, 4, 64)
    expected = [plain[:, [0, 1, 4, 5]], plain[:, [2, 3, 6, 7]], plain[:, [8, 9, 12, 13]], plain[:, [10, 11, 14, 15]]]
    torch.testing.assert_close(read, torch.stack([cell.mean(dim=1) for cell in expected], dim=1))
    has_image = torch.tensor([True, False, True, True])
    rows = model.encode_images(pixels, has_image, torch.tensor([2, 0, 2]))
    assert torch.equal(rows, torch.stack([read[2], torch.zeros(4, 64), read[0], read[2]]))


def test_clips_are_pooled_frame_by_frame() -> None:
    model = model_of(2)
    clip = torch.randn(1, 4, 3, 32, 48)
    plain = model.x_encoder(clip).reshape(1, 2, 4, 6, 64)
    read = model.look(clip)
    assert read.shape == (1, 12, 64)
    torch.testing.assert_close(read[0, 7], plain[0, 1, 0:2, 2:4].mean(dim=(0, 1)))
    with pytest.raises(UserError, match=r"4 x 5 visual tokens cannot be pooled 2 x 2"):
        model.look(torch.randn(1, 3, 32, 40))


def test_it_is_part_of_the_model(tmp_path: Path, images: dict[str, Path]) -> None:
    model = model_of(2)
    path = write_checkpoint(tmp_path / "phase1.pt", model, 1)
    again = Mamba3Jepa.from_checkpoint(path)
    assert again.config.predictor.visual_pool == 2
    assert again.config.visual_tokens == 4
    asked = [images["red"], None], ["What colour is it?", "Is it red?"]
    assert torch.equal(again.embed(*asked), model.embed(*asked))
    plain = model_of(1)
    plain.load_state_dict(model.state_dict())
    other = plain.embed(*asked)
    assert not torch.allclose(other[0], model.embed(*asked)[0], atol=1e-4)
    assert torch.equal(other[1], model.embed(*asked)[1]), "without a picture it makes no difference"


def test_files_of_before_are_as_they_were() -> None:
    assert "visual_pool" not in pooled(1).to_dict()["predictor"]
    values = pooled(2).to_dict()
    assert values["predictor"]["visual_pool"] == 2
    assert ModelConfig.from_dict(values) == pooled(2)


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(UserError, match="visual_pool 3 does not divide the 4 x 4 visual tokens"):
        pooled(3)
    with pytest.raises(UserError, match=r"visual_pool 2 leaves one visual token .*episode_key"):
        pooled(2, "mini")
    mini = preset("mini")
    by_state = mini.replace(recursion=dataclasses.replace(mini.recursion, episode_key="state"))
    assert by_state.replace(predictor=pooled(2).predictor).visual_tokens == 1
    with pytest.raises(UserError, match=r"`visual_pool` and `model` predictor\.visual_pool both say it"):
        Phase1Settings(tiny=True, visual_pool=2, model=("predictor.visual_pool=2",)).resolved()


def test_the_flag_decides_it_after_the_size_of_the_patches() -> None:
    def config(**given: object) -> ModelConfig:
        return Phase1Settings(**given).resolved().build_config()  # type: ignore[arg-type]

    assert config(tiny=True).predictor.visual_pool == 1
    assert config(tiny=True, visual_pool=2).visual_tokens == 4
    assert config(tiny=True, model=("predictor.visual_pool=2",)) == config(tiny=True, visual_pool=2)
    assert config(preset="mini", patch_size=16, visual_pool=2).visual_tokens == 4
    settings = Phase1Settings(preset="small", random_vit=True, visual_pool=3).resolved()
    vision = dataclasses.replace(preset("small").vision, image_size=384)  # as a file says it, of 24 x 24 tokens
    assert settings.with_vision(preset("small"), vision).visual_tokens == 64
