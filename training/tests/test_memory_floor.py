"""The floor of the memory: chosen where right and wrong lookups are known, against counting by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mamba3_jepa.config import NO_FLOOR
from mamba3_jepa.evaluation.confusion_plots import plot_memory_floor
from mamba3_jepa.evaluation.memory_floor import MemoryFloor, best_floor, choose_memory_floor


def youden(floor: float, right: torch.Tensor, wrong: torch.Tensor) -> float:
    return float((right >= floor).double().mean() - (wrong >= floor).double().mean())


@pytest.mark.parametrize("sizes", [(1, 1), (3, 7), (40, 90)])
def test_no_other_floor_separates_better(sizes: tuple[int, int]) -> None:
    torch.manual_seed(sum(sizes))
    for _ in range(20):
        right, wrong = torch.rand(sizes[0]) * 0.6 + 0.3, torch.rand(sizes[1]) * 0.7
        right[0] = wrong[-1] if sizes[0] > 1 else right[0]  # a tie between the two
        floor = best_floor(right, wrong)
        found = youden(floor, right, wrong)
        everywhere = {f: youden(f, right, wrong) for f in [NO_FLOOR, *torch.linspace(-0.1, 1.0, 4001).tolist()]}
        assert found >= max(everywhere.values()) - 1e-12
        below = [f for f, value in everywhere.items() if f < floor and value > found - 1e-12]
        # of equally good ones the lowest: what lies lower and is as good lies between the same two cosines
        cosines = torch.cat([right, wrong])
        assert all(not bool(((cosines >= f) & (cosines < floor)).any()) for f in below)


def test_the_floor_lies_midway_and_low_among_equals() -> None:
    assert best_floor(torch.tensor([0.75, 1.0]), torch.tensor([0.0, 0.25])) == 0.5
    # 0.125 and 0.625 both stop as many wrong ones more than right ones, in shares
    assert best_floor(torch.tensor([0.25, 0.75]), torch.tensor([0.0, 0.5])) == 0.125
    assert best_floor(torch.tensor([0.0, 0.5]), torch.tensor([0.5, 1.0])) == NO_FLOOR, "none is better than all"


def test_without_both_there_is_no_floor() -> None:
    some, none = torch.tensor([0.3, 0.4]), torch.empty(0)
    assert best_floor(some, none) == best_floor(none, some) == best_floor(none, none) == NO_FLOOR
    nothing = MemoryFloor.none().metrics()
    assert nothing == {"val/memory_floor": -1.0, "val/memory_right_lookups": 0, "val/memory_wrong_lookups": 0}
    one_text = choose_memory_floor(torch.eye(2), torch.tensor([0, 0]), torch.tensor([[1.0, 0.0]]))
    assert (one_text.floor, len(one_text.right), len(one_text.wrong)) == (NO_FLOOR, 2, 0)


@pytest.mark.usefixtures("real_figures")
def test_lookups_with_and_without_the_right_text(tmp_path: Path) -> None:
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    predicted = torch.tensor([[0.8, 0.6], [0.6, 0.8], [0.8, -0.6], [0.6, 0.8]])
    chosen = choose_memory_floor(predicted, torch.tensor([0, 1, 2, 0]), texts)
    torch.testing.assert_close(chosen.right, torch.tensor([0.8, 0.8]))  # the others' nearest is not theirs
    torch.testing.assert_close(chosen.wrong, torch.tensor([0.6, 0.6, 0.8, 0.8]))
    assert chosen.floor == pytest.approx(0.7)
    assert chosen.metrics("val") == {
        "val/memory_floor": chosen.floor, "val/memory_right_lookups": 2, "val/memory_wrong_lookups": 4,
        "val/memory_found": 0.5, "val/memory_right_passed": 1.0, "val/memory_wrong_stopped": 0.5,
    }  # fmt: skip
    is_answer = torch.tensor([[False, True, False], [False] * 3, [False] * 3, [False] * 3])
    spared = choose_memory_floor(predicted, torch.tensor([0, 1, 2, 0]), texts, lambda rows, c: is_answer[rows][:, c])
    torch.testing.assert_close(spared.wrong, torch.tensor([-0.8, 0.6, 0.8, 0.8]))  # the other answer is no wrong one
    small = choose_memory_floor(predicted, torch.tensor([0, 1, 2, 0]), texts, memory=2)
    assert (small.lookups, len(small.wrong) < 4) == (4, True), "with one more text some have only their own"
    for floor in (chosen, MemoryFloor(floor=NO_FLOOR, right=chosen.right, wrong=torch.empty(0))):
        assert plot_memory_floor(floor, tmp_path).stat().st_size > 5000
