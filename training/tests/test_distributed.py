"""Two real processes (gloo) against one: the same gradients, whatever the ranks hold."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from processes import torchrun
from tiny import tiny_model

from mamba3_jepa.config import AngnConfig
from mamba3_jepa.data.batch import Batch
from mamba3_jepa.data.loader import build_loader
from mamba3_jepa.data.scenes import SceneSource
from mamba3_jepa.data.sources import source_texts
from mamba3_jepa.data.tokenizer import TextTokenizer
from mamba3_jepa.training.phase1 import Phase1Objective

GLOBAL_BATCH = 12


def objective_and_batch(rank: int, world_size: int, angn: bool, hard: int) -> tuple[Phase1Objective, Batch]:
    """The same model on every rank, and the rank's share of one batch in which texts repeat, with up to `hard` hard
    negatives a sample: captions have more of them than answers."""
    source = SceneSource("train", n_scenes=8, image_size=32)
    indices = source.indices("target")
    tokenizer = TextTokenizer.train(source_texts(source, indices), 400)
    model = tiny_model(1, tokenizer, moved=False, angn=AngnConfig(enabled=angn)).train()
    objective = Phase1Objective(model).double()  # so that only the mathematics can differ
    objective.model.x_encoder.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    loader = build_loader(
        source, indices, tokenizer, model.config, GLOBAL_BATCH // world_size,
        shuffle=True, seed=3, rank=rank, world_size=world_size, drop_last=True, hard_negatives=hard,
    )  # fmt: skip
    return objective, next(iter(loader))


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


def run_two_processes(out: Path, *arguments: str) -> None:
    status, said = torchrun(2, str(out), *arguments, program=[__file__])
    assert status == 0, said


@pytest.mark.parametrize(("angn", "hard"), [(False, 0), (True, 0), (False, 3)])
def test_two_processes_give_the_gradients_of_one(tmp_path: Path, angn: bool, hard: int) -> None:
    run_two_processes(tmp_path / "grads.pt", "gradients", str(int(angn)), str(hard))
    distributed = torch.load(tmp_path / "grads.pt", weights_only=True)
    objective, batch = objective_and_batch(0, 1, angn, hard)
    if hard:
        sizes = [len(objective_and_batch(rank, 2, angn, hard)[1].negative_ids) for rank in (0, 1)]
        assert sizes[0] != sizes[1]
        assert sum(sizes) == len(batch.negative_ids)
        assert set(batch.negative_hash.tolist()) & set(batch.target_hash.tolist()), "one's wrong text is another's"
    assert len(set(batch.target_hash.tolist())) < len(batch)  # some texts are identical across the batch
    objective(batch).loss.backward()
    single = gradients(objective)
    assert distributed.keys() == single.keys()
    for name, expected in single.items():
        torch.testing.assert_close(distributed[name], expected, atol=1e-9, rtol=1e-9, msg=name)


def test_gather_of_unequal_ranks(tmp_path: Path) -> None:
    """A rank that lost a bad sample has fewer rows; another may have none."""
    run_two_processes(tmp_path / "rows.pt", "unequal")
    results = torch.load(tmp_path / "rows.pt", weights_only=True)
    assert results["rows"].tolist() == [0.0, 1.0, 2.0, 100.0]
    # each rank used every row twice the square: d/dx sum(x^2) over 2 ranks = 4 x
    assert results["grad"].tolist() == [0.0, 4.0, 8.0]
    assert results["empty_rows"].tolist() == [0.0, 1.0]
    assert results["numbers"].tolist() == [1, 2, 3, 101]


def test_a_rank_without_samples_learns_from_the_hard_negatives_of_the_other(tmp_path: Path) -> None:
    run_two_processes(tmp_path / "grads.pt", "emptied", "3")
    distributed = torch.load(tmp_path / "grads.pt", weights_only=True)
    objective, _ = objective_and_batch(0, 1, False, 3)
    objective(objective_and_batch(0, 2, False, 3)[1]).loss.backward()
    for name, expected in gradients(objective).items():
        torch.testing.assert_close(distributed[name], expected, atol=1e-9, rtol=1e-9, msg=name)


def _worker(out: str, what: str, *arguments: str) -> None:
    import torch.distributed as dist

    from mamba3_jepa.training.distributed import all_gather, keep_group

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if what == "emptied":
        objective, batch = objective_and_batch(rank, 2, False, int(arguments[0]))
        wrapped = torch.nn.parallel.DistributedDataParallel(objective)
        wrapped(batch if rank == 0 else emptied(batch)).loss.backward()
        results = gradients(wrapped)
        del wrapped
    elif what == "gradients":
        objective, batch = objective_and_batch(rank, 2, bool(int(arguments[0])), int(arguments[1]))
        wrapped = torch.nn.parallel.DistributedDataParallel(objective)
        wrapped(batch).loss.backward()
        results = gradients(wrapped)
        del wrapped  # before the process group it talks through
    else:
        mine = torch.arange(3.0) if rank == 0 else torch.tensor([100.0])
        mine.requires_grad_()
        dist.all_gather_object = None  # pickling, several times a batch, would take longer than the transfer
        rows, numbers = all_gather(mine, mine.detach().long() + 1)
        rows.square().sum().backward()
        (empty,) = all_gather(torch.arange(2.0) if rank == 0 else torch.empty(0))
        results = {"rows": rows.detach(), "grad": mine.grad, "empty_rows": empty, "numbers": numbers}
    if rank == 0:
        torch.save(results, out)
    dist.barrier()
    keep_group()
    dist.destroy_process_group()


if __name__ == "__main__":
    _worker(*sys.argv[1:])
