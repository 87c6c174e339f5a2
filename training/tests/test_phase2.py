"""Phase 2: its loss and batches against independent formulas, and the command from checkpoint to checkpoint."""

import itertools
import json
import math
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import ranks
from short import changed
from tiny import tiny_model

from mamba3_jepa.cli.main import main
from mamba3_jepa.data.length_batches import length_batches
from mamba3_jepa.data.scenes import SceneSource
from mamba3_jepa.data.sources import DataSplits, source_texts
from mamba3_jepa.data.tokenizer import TextTokenizer
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.checkpoint import DataRecord, load_checkpoint, save_checkpoint
from mamba3_jepa.files.metrics_log import read_metrics
from mamba3_jepa.models.generation import generate
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.inference import GenerationConfig
from mamba3_jepa.settings.training import Phase2Settings
from mamba3_jepa.training import frozen, phase2
from mamba3_jepa.training.frozen import frozen_outputs
from mamba3_jepa.training.phase2 import Phase2Task

PHASE1 = ["--tiny", "--synthetic-scenes", "8", "--val-samples", "12", "--batch-size", "8", "--max-steps", "2",
          "--workers", "0"]  # fmt: skip
PHASE2 = ["--tiny", "--synthetic-scenes", "8", "--val-samples", "12", "--batch-size", "6", "--epochs", "2",
          "--log-every", "1", "--eval-every", "100",
          "--cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def phase1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phase1") / "run"
    assert main(["train-jepa", *PHASE1, "--cpu", "--output-dir", str(folder)]) == 0
    return folder / "phase1_best.pt"


def train(phase1: Path, output_dir: Path, *arguments: str) -> int:
    command = ["train-decoder", "--phase1-checkpoint", str(phase1), "--output-dir", str(output_dir)]
    return main([*command, *changed(PHASE2, arguments)])


@pytest.fixture(scope="module")
def finished(phase1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phase2") / "run"
    assert train(phase1, folder) == 0
    return folder


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(output_dir / "phase2_last.pt", phase=2).model


def different(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


# --- batches ---


def test_batches_group_equal_lengths_and_lose_nothing():
    rng = np.random.default_rng(0)
    lengths = rng.choice([3, 4, 19, 28], size=1003)
    plan = length_batches(lengths, 8, seed=5, epoch=2)
    assert plan.shape == (125, 8)
    assert len(np.unique(plan)) == 1000
    assert np.array_equal(plan, length_batches(lengths, 8, seed=5, epoch=2))
    padded = (lengths[plan].max(axis=1) * 8).sum()
    shuffled = (lengths[rng.permutation(1003)[:1000].reshape(125, 8)].max(axis=1) * 8).sum()
    assert padded < 1.05 * lengths[plan].sum() < 0.7 * shuffled
    assert any(np.diff(lengths[plan].max(axis=1)) < 0)  # not sorted over the whole epoch


@pytest.mark.parametrize("change", [{"seed": 6}, {"epoch": 3}])
def test_batches_differ_between_epochs_and_seeds(change):
    lengths = np.arange(100) % 7
    order = {"seed": 5, "epoch": 2}
    assert not np.array_equal(length_batches(lengths, 8, **order), length_batches(lengths, 8, **order | change))
    assert length_batches(lengths[:5], 8, **order).shape == (0, 8)


# --- the loss ---


def build_task(batch_size: int, target_share: float = 0.5) -> Phase2Task:
    """In float64, so that only the mathematics can differ; the same on every rank."""
    source = SceneSource("train", n_scenes=8, image_size=32)
    tokenizer = TextTokenizer.train(source_texts(source, range(len(source))), 400)
    model = tiny_model(1, tokenizer, moved=False)
    model.requires_grad_(False)
    model.add_decoder().requires_grad_(True)
    outputs = frozen_outputs(model, source, range(len(source)), cache_dir=None, batch_size=8)
    for kept in (outputs.embedding, outputs.target_embedding):
        kept._pieces[0] = kept._pieces[0].double()
    model.y_decoder.double()
    indices = source.indices("target")
    data = DataSplits(train=source, train_indices=indices, val=source, val_indices=indices)
    return Phase2Task(
        model, outputs, outputs, data, Phase2Settings(batch_size=batch_size, target_share=target_share), DataRecord()
    )


def step_gradients(task: Phase2Task, n_micro_batches: int, wrapped=None) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    """Gradients of one step, accumulated as the loop does."""
    objective = wrapped or task.objective
    batches = [batch for batch, _ in zip(task.batches(0, skip=0), range(n_micro_batches), strict=False)]
    for batch, weight in zip(batches, task.weights(batches), strict=True):
        (objective(batch).loss * weight).backward()
    return {name: p.grad for name, p in task.objective.named_parameters()}


def independent_gradients(task: Phase2Task, rows: list[int]) -> dict[str, torch.Tensor]:
    """One sample at a time, token by token through `step`, divided by the number of tokens of all of them."""
    decoder, loss, n_tokens = task.decoder, torch.zeros((), dtype=torch.float64), 0
    own = task._targets.said_from_target(0, task.settings.target_share)
    decoder.zero_grad()
    for row in rows:
        ids, mask = task.train.targets(torch.tensor([row]))
        tokens = ids[0][mask[0]].tolist()
        said = task.train.target_embedding if own[row] else task.train.embedding
        state = decoder.prefill(said[torch.tensor([row])])
        for current, following in itertools.pairwise(tokens):
            logits, state = decoder.step(torch.tensor([current]), state)
            loss = loss - (logits[0, following] - logits[0].exp().sum().log())
            n_tokens += 1
    (loss / n_tokens).backward()
    return {name: p.grad for name, p in task.objective.named_parameters()}


def test_accumulated_batches_give_the_mean_over_all_their_tokens():
    task = build_task(batch_size=3)
    got = step_gradients(task, 8)
    got = {name: grad.clone() for name, grad in got.items()}
    plan = length_batches(task.train.target_lengths.numpy(), 3, seed=0, epoch=0)
    sizes = task.train.target_lengths[torch.from_numpy(plan)].sum(1).tolist()
    assert len(set(sizes)) > 1  # a mean of means would differ
    expected = independent_gradients(task, plan.flatten().tolist())
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-9, rtol=1e-6, msg=name)


def test_a_share_of_the_texts_is_said_from_their_own_embeddings():
    rows = np.arange(24)
    for share in (0.0, 0.5, 1.0):
        task = build_task(batch_size=24, target_share=share)
        drawn = [task._targets.said_from_target(epoch, share) for epoch in range(200)]
        assert torch.stack(drawn).double().mean().item() == pytest.approx(share, abs=0.02)
        assert torch.equal(drawn[0], drawn[1]) == (share in (0, 1))
        for epoch in (0, 1):
            task._show(epoch)
            expected = torch.where(
                drawn[epoch][:, None], task.train.target_embedding.tensor(), task.train.embedding.tensor()
            )
            assert torch.equal(task.batch(rows).embedding, expected)


def test_a_run_from_before_said_only_what_was_predicted(phase1, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(phase1, run, "--target-share", "0", "--max-steps", "3", "--warmup-steps", "1") == 0
    content = torch.load(run / "phase2_last.pt", weights_only=True)
    del content["run"]["target_share"]
    torch.save(content, run / "phase2_last.pt")
    assert train(phase1, run, "--warmup-steps", "1", "--resume") == 2
    assert "--target-share 0.0 -> 0.5" in capsys.readouterr().err
    assert train(phase1, run, "--target-share", "0", "--warmup-steps", "1", "--resume") == 0


def test_two_processes_give_the_mean_over_all_their_tokens(tmp_path):
    status, said = ranks(2, str(tmp_path), program=Path(__file__))
    assert status == 0, said
    distributed = torch.load(tmp_path / "grads.pt", weights_only=True)
    task = build_task(batch_size=6)
    plan = length_batches(task.train.target_lengths.numpy(), 6, seed=0, epoch=0)
    expected = independent_gradients(task, plan[:2].flatten().tolist())
    assert distributed.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(distributed[name], gradient, atol=1e-9, rtol=1e-6, msg=name)
    one, two = (json.loads((tmp_path / f"validation-{rank}.json").read_text()) for rank in range(2))
    single = build_task(batch_size=6)
    alone = single.validate(torch.device("cpu")).metrics
    assert one == two
    assert one == pytest.approx(alone, abs=1e-6)


def _worker(folder: str) -> None:
    import torch.distributed as dist

    from mamba3_jepa.training.distributed import keep_group

    dist.init_process_group("gloo")
    frozen.PART_SIZE = 8  # so that both processes have parts to compute
    task = build_task(batch_size=3)
    (Path(folder) / f"validation-{dist.get_rank()}.json").write_text(
        json.dumps(task.validate(torch.device("cpu")).metrics)
    )
    wrapped = torch.nn.parallel.DistributedDataParallel(task.objective)
    gradients = step_gradients(task, 2, wrapped)
    if dist.get_rank() == 0:
        torch.save(gradients, Path(folder) / "grads.pt")
    dist.barrier()
    del wrapped
    keep_group()
    dist.destroy_process_group()


# --- validation ---


def test_validation_is_what_the_decoder_does(tmp_path):
    task = build_task(batch_size=6)
    result = task.validate(torch.device("cpu"))
    loss, right, n_tokens = 0.0, 0, 0
    for row in range(len(task.val)):
        ids, _ = task.val.targets(torch.tensor([row]))
        log_p = task.decoder(task.val.embedding[torch.tensor([row])], ids[:, :-1])[0].log_softmax(-1)
        loss -= log_p.gather(1, ids[0, 1:, None]).sum().item()
        right += (log_p.argmax(-1) == ids[0, 1:]).sum().item()
        n_tokens += ids.shape[1] - 1
    assert result.metrics["val/loss"] == pytest.approx(loss / n_tokens, abs=1e-6)
    assert result.metrics["val/perplexity"] == pytest.approx(math.exp(loss / n_tokens), rel=1e-5)
    assert result.metrics["val/token_accuracy"] == pytest.approx(right / n_tokens)
    tokenizer, source = task.model.tokenizer, task.data.val
    embedding = task.val.embedding.tensor()
    said = generate(
        task.decoder, embedding, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id,
        config=GenerationConfig(), max_tokens=task.config.max_answer_tokens - 1,
    )  # fmt: skip
    questions = [source.sample(i).question for i in range(len(source))]
    exact = [tokenizer.decode(answer.ids) == source.sample(i).target for i, answer in enumerate(said)]
    asked = [hit for hit, question in zip(exact, questions, strict=True) if question is not None]
    assert result.metrics["val/exact_match"] == pytest.approx(sum(asked) / len(asked))
    assert task.decoder.training
    task.illustrate(tmp_path)
    assert (tmp_path / "answer_sheet.png").exists()
    assert (tmp_path / "plots" / "answers_by_type.png").exists()


def test_a_decoder_that_learned_by_heart_scores_everything():
    task = build_task(batch_size=24)
    assert task.batches_per_epoch == 1
    task.decoder.float()
    for outputs in (task.train, task.val):
        for kept in (outputs.embedding, outputs.target_embedding):
            kept._pieces[0] = torch.eye(24, 32)  # each sample its own embedding
    optimizer = torch.optim.Adam(task.decoder.parameters(), lr=1e-2)
    first = task.validate(torch.device("cpu"))
    for epoch in range(60):
        for batch in task.batches(epoch, skip=0):
            optimizer.zero_grad()
            task.objective(batch).loss.backward()
            optimizer.step()
    last = task.validate(torch.device("cpu"))
    assert last.metrics["val/exact_match"] == 1.0
    assert last.metrics["val/caption_exact_match"] == 1.0
    assert last.metrics["val/bleu"] == pytest.approx(100.0)
    assert last.metrics["val/token_accuracy"] == 1.0
    assert last.score > first.score


def half_learned() -> Phase2Task:
    """A task whose decoder says some of the answers."""
    task = build_task(batch_size=24)
    task.decoder.float()
    for outputs in (task.train, task.val):
        for kept in (outputs.embedding, outputs.target_embedding):
            kept._pieces[0] = torch.eye(24, 32)
    optimizer = torch.optim.Adam(task.decoder.parameters(), lr=1e-2)
    for epoch in range(8):
        for batch in task.batches(epoch, skip=0):
            optimizer.zero_grad()
            task.objective(batch).loss.backward()
            optimizer.step()
    return task


def test_the_best_answers_most_questions_of_all_validation_samples(monkeypatch):
    """Also of those that are not generated, which a generation of all of them shows."""
    task = half_learned()
    every = task.validate(torch.device("cpu")).metrics
    assert 0 < every["val/exact_match"] < 1, "else the test shows nothing"
    assert every["val/led_exact_match"] == pytest.approx(every["val/exact_match"])
    monkeypatch.setattr(phase2, "GENERATED_SAMPLES", 4)
    task._asked = task._questions()
    few = task.validate(torch.device("cpu"))
    assert few.metrics["val/exact_match"] != every["val/exact_match"], "else the test shows nothing"
    assert few.metrics["val/led_exact_match"] == every["val/led_exact_match"]
    assert few.score == pytest.approx((every["val/led_exact_match"] + every["val/token_accuracy"]) / 2, abs=1e-2)


def test_without_questions_all_texts_count(monkeypatch):
    task = half_learned()
    monkeypatch.setattr(SceneSource, "indices", lambda self, kind: np.arange(0))
    metrics = task.validate(torch.device("cpu")).metrics
    assert metrics["val/led_exact_match"] == pytest.approx(metrics["val/all_exact_match"])
    assert metrics["val/led_exact_match"] != pytest.approx(metrics["val/exact_match"])


def test_where_all_is_equally_right_the_loss_decides():
    task = build_task(batch_size=6)
    before = task.validate(torch.device("cpu"))
    with torch.no_grad():
        task.decoder.lm_head.weight *= 1.5  # the same choices, another loss
    after = task.validate(torch.device("cpu"))
    for name in ("val/led_exact_match", "val/token_accuracy"):
        assert before.metrics[name] == after.metrics[name]
    assert (before.score > after.score) == (before.metrics["val/loss"] < after.metrics["val/loss"])
    n_tokens = int((task.val.target_lengths - 1).sum())
    assert 0 < abs(before.score - after.score) < 1 / (2 * n_tokens), "less than one more token that is right"


# --- the command ---


def test_a_run_leaves_everything_behind(finished: Path):
    assert {path.name for path in finished.iterdir()} == {
        "phase2_best.pt", "phase2_last.pt", "config.json", "metrics.jsonl", "answer_sheet.png", "plots"
    }  # fmt: skip
    assert {path.name for path in (finished / "plots").iterdir()} >= {"loss.png", "answers.png", "answers_by_type.png"}
    lines = read_metrics(finished / "metrics.jsonl")
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 9))
    last = {key: value for line in lines for key, value in line.items()}
    wanted = {
        "val/loss",
        "val/perplexity",
        "val/token_accuracy",
        "val/exact_match",
        "val/caption_exact_match",
        "val/bleu",
    }
    assert wanted <= set(last)
    assert any(re.fullmatch(r"val/exact_match_\w+", key) for key in last)
    checkpoint = load_checkpoint(finished / "phase2_best.pt", phase=2)
    assert checkpoint.trainer is None
    assert checkpoint.data.earlier is not None
    assert checkpoint.data.earlier.synthetic is True
    assert checkpoint.data.answers
    assert 0.01 < (checkpoint.temperature or 0) < 1, "phase 1's"
    assert "answers" not in json.loads((finished / "config.json").read_text())["data"]


def test_only_the_decoder_has_moved(phase1: Path, finished: Path):
    before, after = load_checkpoint(phase1), load_checkpoint(finished / "phase2_last.pt")
    own = {name for name in after.model if name.startswith("y_decoder.")}
    assert own
    frozen_part = {name: value for name, value in after.model.items() if name not in own}
    assert different(frozen_part, dict(before.model)) == []
    assert (before.config, before.tokenizer) == (after.config, after.tokenizer)
    torch.manual_seed(0)
    from accelerate.utils import set_seed

    model = Mamba3Jepa.from_checkpoint(phase1)
    set_seed(0)
    start = model.add_decoder().state_dict()
    unmoved = [name for name in start if torch.equal(start[name], after.model[f"y_decoder.{name}"])]
    assert unmoved == []


def test_a_second_run_uses_the_outputs_on_the_disk(phase1, finished, tmp_path, monkeypatch, caplog):
    def forbidden(*arguments: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(frozen._Pass, "_compute", forbidden)
    cache = finished.parent / "frozen_outputs"
    assert train(phase1, tmp_path / "again", "--cache-dir", str(cache)) == 0
    assert different(weights(tmp_path / "again"), weights(finished)) == []


def test_stopped_and_resumed_gives_the_same_bits(phase1, finished, tmp_path, monkeypatch, capfd):
    """Stopped in the middle of an epoch; the phase 1 checkpoint is not needed any more."""
    own = tmp_path / "phase1.pt"
    own.write_bytes(phase1.read_bytes())
    cache = str(finished.parent / "frozen_outputs")
    batch = Phase2Task.batch
    seen: list[int] = []

    def stopping(self, block):  # type: ignore[no-untyped-def]
        seen.append(1)
        if len(seen) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, block)

    with monkeypatch.context() as patched:
        patched.setattr(Phase2Task, "batch", stopping)
        assert train(own, tmp_path / "run", "--cache-dir", cache) == 128 + signal.SIGTERM
    own.unlink()
    assert load_checkpoint(tmp_path / "run" / "phase2_last.pt").trainer["position"]["step"] == 5
    assert train(own, tmp_path / "run", "--cache-dir", cache, "--resume") == 0
    assert different(weights(tmp_path / "run"), weights(finished)) == []
    steps = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/loss" in line]
    assert steps == list(range(1, 9))
    assert train(own, tmp_path / "run", "--cache-dir", cache, "--resume", "--lr", "0.5") == 2
    assert "--lr" in capfd.readouterr().err


def test_another_phase_is_refused(phase1, finished, tmp_path, capfd):
    assert train(finished / "phase2_best.pt", tmp_path / "run") == 2
    error = capfd.readouterr().err
    assert "phase 2 checkpoint" in error
    assert "--resume" in error
    checkpoint = load_checkpoint(phase1)
    checkpoint.phase = 3
    save_checkpoint(tmp_path / "three.pt", checkpoint)
    assert train(tmp_path / "three.pt", tmp_path / "run") == 2
    assert "phase 3 checkpoint" in capfd.readouterr().err
    assert train(tmp_path / "nothing.pt", tmp_path / "run") == 2
    assert "--phase1-checkpoint" in capfd.readouterr().err
    (tmp_path / "cut.pt").write_bytes(phase1.read_bytes()[:1000])
    assert train(tmp_path / "cut.pt", tmp_path / "run") == 2
    assert "cut short" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_bad_settings(phase1, tmp_path, capfd):
    (tmp_path / "file").write_text("in the way")
    for arguments, message in (
        (["--batch-size", "100"], "larger than the 24 samples"),
        (["--lr", "0"], "greater than 0"),
        (["--cache-dir", str(tmp_path / "file")], "--cache-dir"),
        (["--data-dir", "/nowhere"], "no such directory"),
    ):
        assert train(phase1, tmp_path / "run", *arguments) == 2
        error = capfd.readouterr().err
        assert message in error
        assert "Traceback" not in error


def test_settings_follow_the_checkpoints_preset():
    small = Phase2Settings().resolved("small")
    assert (small.epochs, small.batch_size, small.lr) == (20, 32, 1e-4)
    assert small.cache_dir == Path("checkpoints/frozen_outputs")
    mini = Phase2Settings(lr=0.5).resolved("mini")
    assert (mini.lr, mini.batch_size) == (0.5, 64)
    with pytest.raises(UserError, match="is a mini model"):
        Phase2Settings(tiny=True).resolved("mini")


if __name__ == "__main__":
    _worker(*sys.argv[1:])
