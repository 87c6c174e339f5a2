"""The parity experiment in small: rotation solves it, and the switch really switches it off."""

import torch

from mamba3_jepa.bench.parity import ParityModel, learn_parity
from mamba3_jepa.settings.bench import ParitySettings

SMALL = ParitySettings(steps=400, train_length=12, test_lengths=(12, 48), test_strings=256, batch_size=64, threads=1)


def test_rotation_carries_parity_beyond_the_training_length() -> None:
    accuracy = learn_parity(SMALL, rotation=True).accuracy
    assert accuracy[12] == 1.0
    assert accuracy[48] > 0.99


def test_without_rotation_it_stays_near_chance() -> None:
    assert learn_parity(SMALL, rotation=False).accuracy[48] < 0.65


def test_rotation_off_means_no_angle_and_nothing_else() -> None:
    torch.manual_seed(0)
    on = ParityModel(SMALL, rotation=True).state_dict()
    torch.manual_seed(0)
    off = ParityModel(SMALL, rotation=False)
    n_angles = off.layers[0].n_angles
    for name, value in off.state_dict().items():
        if name.endswith("in_proj.weight"):
            assert not value[-n_angles:].any()
            assert torch.equal(value[:-n_angles], on[name][:-n_angles])
        else:
            assert torch.equal(value, on[name])
