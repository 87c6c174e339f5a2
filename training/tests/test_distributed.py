"""Real processes (gloo) against one: the same gradients, whatever the ranks hold and in however many micro-batches."""

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from processes import ranks
from tiny import tiny_model
from torch.nn.parallel import DistributedDataParallel

from mamba3_jepa.config import AngnConfig
from mamba3_jepa.data.batch import Batch
from mamba3_jepa.data.loader import build_loader
from mamba3_jepa.data.scenes import SceneSource
from mamba3_jepa.data.sources import source_texts
from mamba3_jepa.data.tokenizer import TextTokenizer
from mamba3_jepa.training.phase1_objective import Phase1Objective, in_two_passes

GLOBAL_BATCH = 12


def objective_and_batches(
    rank: int, world_size: int, angn: bool, hard: int, n_batches: int = 1
) -> tuple[Phase1Objective, Iterator[Batch]]:
    """The same model on every rank, and the rank's share of one batch in which texts repeat, with up to `hard` hard
    negatives a sample: captions have more of them than answers. In several micro-batches it comes twice."""
    source = SceneSource("train", n_scenes=8, image_size=32)
    indices = source.indices("target")
    tokenizer = TextTokenizer.train(source_texts(source, indices), 400)
    model = tiny_model(1, tokenizer, moved=False, angn=AngnConfig(enabled=angn)).train()
    objective = Phase1Objective(model).double()  # so that only the mathematics can differ
    objective.model.x_encoder.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    loader = build_loader(
        source, indices, tokenizer, model.config, GLOBAL_BATCH // world_size // n_batches,
        shuffle=True, seed=3, rank=rank, world_size=world_size, drop_last=True, hard_negatives=hard,
        twice=n_batches if n_batches > 1 else 0,
    )  # fmt: skip
    return objective, iter(loader)


def objective_and_batch(rank: int, world_size: int, angn: bool, hard: int) -> tuple[Phase1Objective, Batch]:
    objective, batches = objective_and_batches(rank, world_size, angn, hard)
    return objective, next(batches)


def backward_in_two_passes(
    objective: Phase1Objective, wrapped: torch.nn.Module, batches: Iterator[Batch], n_batches: int
) -> None:
    """As the loop does it: gradients are averaged over the ranks with the last micro-batch."""
    for number, batch in enumerate(in_two_passes(objective, lambda: next(batches), n_batches, "fp32")):
        waits = isinstance(wrapped, DistributedDataParallel) and number < n_batches - 1
        with wrapped.no_sync() if waits else nullcontext():
            (wrapped(batch).loss / n_batches).backward()


def emptied(batch: Batch) -> Batch:
    """What is left of it when every sample was bad."""
    lists = {"questions": [], "targets": [], "negative_kinds": []}
    tensors = {name: value[:0] for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return dataclasses.replace(batch, **tensors, **lists)


def gradients(objective: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("module."): parameter.grad
        for name, parameter in objective.named_parameters()
        if parameter.requires_grad
    }


def run_processes(n: int, out: Path, *arguments: str) -> dict[str, torch.Tensor]:
    status, said = ranks(n, str(out), *arguments, program=Path(__file__))
    assert status == 0, said
    return torch.load(out, weights_only=True)


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-9, rtol=1e-9, msg=name)


@pytest.mark.parametrize(("n", "angn", "hard"), [(2, False, 0), (2, True, 0), (2, False, 3), (4, True, 3)])
def test_several_processes_give_the_gradients_of_one(tmp_path: Path, n: int, angn: bool, hard: int) -> None:
    distributed = run_processes(n, tmp_path / "grads.pt", "gradients", str(int(angn)), str(hard))
    objective, batch = objective_and_batch(0, 1, angn, hard)
    if hard:
        sizes = [len(objective_and_batch(rank, n, angn, hard)[1].negative_ids) for rank in range(n)]
        assert len(set(sizes)) > 1
        assert sum(sizes) == len(batch.negative_ids)
        assert set(batch.negative_hash.tolist()) & set(batch.target_hash.tolist()), "one's wrong text is another's"
    assert len(set(batch.target_hash.tolist())) < len(batch)  # some texts are identical across the batch
    objective(batch).loss.backward()
    assert_close(distributed, gradients(objective))


@pytest.mark.parametrize(("angn", "hard"), [(True, 3), (False, 0)])
@pytest.mark.parametrize("n_batches", [2, 4, 12])
def test_micro_batches_in_two_passes_give_the_gradients_of_one_batch(n_batches: int, angn: bool, hard: int) -> None:
    whole, batch = objective_and_batch(0, 1, angn, hard)
    whole(batch).loss.backward()
    assert whole.log_temperature.grad.abs() > 1e-3
    objective, batches = objective_and_batches(0, 1, angn, hard, n_batches)
    backward_in_two_passes(objective, objective, batches, n_batches)
    assert_close(gradients(objective), gradients(whole))
    assert objective.negatives == whole.negatives, "one contrast"


def test_random_numbers_are_the_same_in_both_passes() -> None:
    objective, batches = objective_and_batches(0, 1, False, 3, 3)
    objective.model.predictor.backbone.register_forward_hook(lambda *seen: torch.nn.functional.dropout(seen[2], 0.5))
    embed, seen = objective.embed, []
    objective.embed = lambda batch: seen.append(embed(batch)) or seen[-1]
    torch.manual_seed(0)
    backward_in_two_passes(objective, objective, batches, 3)
    for first, second in zip(seen[:3], seen[3:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.manual_seed(0)
    objective, batches = objective_and_batches(0, 1, False, 3, 3)
    assert not torch.equal(objective.embed(next(batches)).predicted, seen[0].predicted), "something was dropped"


def test_a_micro_batch_that_only_one_pass_could_read_teaches_nothing(caplog: pytest.LogCaptureFixture) -> None:
    whole, batches = objective_and_batches(0, 1, False, 3, 3)
    backward_in_two_passes(whole, whole, batches, 3)
    parts = []
    for emptied_reads in ([3, 4, 5], [4, 5], [3], [3, 4]):
        objective, batches = objective_and_batches(0, 1, False, 3, 3)
        read = (emptied(batch) if i in emptied_reads else batch for i, batch in enumerate(batches))
        backward_in_two_passes(objective, objective, read, 3)
        parts.append(gradients(objective))
    assert "in one of a step's two passes only" in caplog.text
    nothing, first, others, last = parts
    for name, value in gradients(whole).items():
        if name == "log_temperature":
            continue
        assert torch.equal(nothing[name], torch.zeros_like(value)), name
        torch.testing.assert_close(first[name] + others[name], value, atol=1e-12, rtol=1e-9, msg=name)
        assert not torch.equal(last[name], value) or not value.any(), name


@pytest.mark.parametrize(("n", "n_batches"), [(2, 3), (4, 3)])
def test_several_processes_in_two_passes_give_the_gradients_of_one(tmp_path: Path, n: int, n_batches: int) -> None:
    distributed = run_processes(n, tmp_path / "grads.pt", "passes", "1", "3", str(n_batches))
    objective, batch = objective_and_batch(0, 1, True, 3)
    objective(batch).loss.backward()
    assert_close(distributed, gradients(objective))


def test_gather_of_unequal_ranks(tmp_path: Path) -> None:
    """A rank that lost a bad sample has fewer rows; another may have none."""
    results = run_processes(2, tmp_path / "rows.pt", "unequal")
    assert results["rows"].tolist() == [0.0, 1.0, 2.0, 100.0]
    assert results["empty_rows"].tolist() == [0.0, 1.0]
    assert results["numbers"].tolist() == [1, 2, 3, 101]
    assert results["firsts"].tolist() == [[0, 0, 0], [3, 3, 2]]


def test_a_rank_without_samples_learns_from_the_hard_negatives_of_the_other(tmp_path: Path) -> None:
    distributed = run_processes(2, tmp_path / "grads.pt", "emptied", "3")
    objective, _ = objective_and_batch(0, 1, False, 3)
    objective(objective_and_batch(0, 2, False, 3)[1]).loss.backward()
    assert_close(distributed, gradients(objective))


def _worker(out: str, what: str, *arguments: str) -> None:
    import torch.distributed as dist

    from mamba3_jepa.training.distributed import all_gather, keep_group

    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    if what == "emptied":
        objective, batch = objective_and_batch(rank, 2, False, int(arguments[0]))
        wrapped = DistributedDataParallel(objective)
        wrapped(batch if rank == 0 else emptied(batch)).loss.backward()
        results = gradients(wrapped)
        del wrapped
    elif what == "gradients":
        objective, batch = objective_and_batch(rank, size, bool(int(arguments[0])), int(arguments[1]))
        wrapped = DistributedDataParallel(objective)
        wrapped(batch).loss.backward()
        results = gradients(wrapped)
        del wrapped  # before the process group it talks through
    elif what == "passes":
        angn, hard, n_batches = map(int, arguments)
        objective, batches = objective_and_batches(rank, size, bool(angn), hard, n_batches)
        wrapped = DistributedDataParallel(objective)
        backward_in_two_passes(objective, wrapped, batches, n_batches)
        results = gradients(wrapped)
        del wrapped
    else:
        mine = torch.arange(3.0) if rank == 0 else torch.tensor([100.0])
        dist.all_gather_object = None  # pickling, several times a batch, would take longer than the transfer
        empty = torch.arange(2.0) if rank == 0 else torch.empty(0)
        (rows, numbers, empty), firsts = all_gather(mine, mine.long() + 1, empty)
        ((own,), _) = all_gather(torch.tensor([firsts]))
        results = {"rows": rows, "empty_rows": empty, "numbers": numbers, "firsts": own}
    if rank == 0:
        torch.save(results, out)
    dist.barrier()
    keep_group()
    dist.destroy_process_group()


if __name__ == "__main__":
    _worker(*sys.argv[1:])
