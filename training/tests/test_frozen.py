"""Frozen outputs: the values, what is kept, and when it may be used again."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny import GATES, tiny_model

import mamba3_jepa
from mamba3_jepa.data import images
from mamba3_jepa.data.files import FolderSource, ManifestSource
from mamba3_jepa.data.scenes import SceneSource
from mamba3_jepa.data.shards import ShardSource
from mamba3_jepa.data.tokenizer import TextTokenizer
from mamba3_jepa.errors import UserError
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.training import frozen, frozen_key, frozen_store
from mamba3_jepa.training.frozen import FrozenOutputs, Rows, frozen_outputs
from mamba3_jepa.training.interrupt import Interrupted


@pytest.fixture(scope="module")
def scenes() -> SceneSource:
    kinds = ("caption", "question", "unanswerable")
    return SceneSource("train", n_scenes=8, image_size=32, kinds=kinds, questions_per_scene=1)


@pytest.fixture
def model(tokenizer: TextTokenizer) -> Mamba3Jepa:
    return tiny_model(1, tokenizer, moved=False)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "PART_SIZE", 8)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches the frozen model computes from now on."""
    seen: list[int] = []
    compute = frozen._Pass._compute

    def counting(self, batch):  # type: ignore[no-untyped-def]
        seen.append(len(batch))
        return compute(self, batch)

    monkeypatch.setattr(frozen._Pass, "_compute", counting)
    return seen


def compute(model: Mamba3Jepa, source, cache_dir, indices=None, **options) -> FrozenOutputs:  # type: ignore[no-untyped-def]
    indices = range(len(source)) if indices is None else indices
    return frozen_outputs(model, source, indices, cache_dir=cache_dir, batch_size=4, **options)


def assert_equal(a: FrozenOutputs, b: FrozenOutputs) -> None:
    for name in ("index", "has_target", "target_ids", "target_offsets"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for name in ("embedding", "pooled", "target_embedding"):
        assert torch.equal(getattr(a, name).tensor(), getattr(b, name).tensor()), name
    assert (a.bad, a.n_truncated, a.pad_id) == (b.bad, b.n_truncated, b.pad_id)


def test_the_values_are_the_models_own(model, scenes, tokenizer, tmp_path):
    outputs = compute(model, scenes, tmp_path)
    samples = [scenes.sample(i) for i in range(len(scenes))]
    assert outputs.index.tolist() == list(range(len(scenes)))
    predicted = model.embed([sample.image() for sample in samples], [sample.question for sample in samples])
    torch.testing.assert_close(outputs.embedding.tensor(), predicted, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model.predictor.embed(outputs.pooled.tensor()), predicted, atol=1e-6, rtol=1e-5)
    assert outputs.has_target.tolist() == [sample.target is not None for sample in samples]
    answered = outputs.has_target.nonzero().squeeze(1)
    texts = [sample.target for sample in samples if sample.target is not None]
    assert 0 < len(texts) < len(samples)
    torch.testing.assert_close(outputs.target_embedding[answered], model.embed_text(texts), atol=1e-6, rtol=1e-5)
    assert not outputs.target_embedding[(~outputs.has_target).nonzero().squeeze(1)].any()
    ids, mask = outputs.targets(answered)
    expected = tokenizer.encode(texts, model.config.max_answer_tokens)
    assert torch.equal(ids, expected.ids)
    assert torch.equal(mask, expected.mask)
    assert outputs.targets((~outputs.has_target).nonzero().squeeze(1))[0].numel() == 0
    assert outputs.target_lengths[answered].tolist() == expected.mask.sum(1).tolist()


def test_the_targets_of_a_batch_cost_what_the_batch_is_long(model, scenes, monkeypatch):
    outputs = compute(model, scenes, None)
    rows = torch.tensor([5, 0, 11, 5])
    ids, mask = outputs.targets(torch.arange(len(outputs)))
    monkeypatch.setattr(FrozenOutputs, "target_lengths", property(lambda self: pytest.fail("over all samples")))
    few_ids, few_mask = outputs.targets(rows)
    longest = few_mask.shape[1]
    assert longest == int(mask[rows].sum(dim=1).max()) > 0
    assert torch.equal(few_ids, ids[rows, :longest])
    assert torch.equal(few_mask, mask[rows, :longest])
    assert outputs.targets(rows[:0])[0].shape == (0, 0)


def test_a_second_run_computes_nothing(model, scenes, tmp_path, passes):
    first = compute(model, scenes, tmp_path)
    assert sum(passes) == len(scenes)
    passes.clear()
    assert_equal(compute(model, scenes, tmp_path), first)
    assert passes == []
    assert_equal(compute(model, scenes, None), first)  # and without a disk the same values


def test_what_the_key_covers(model, scenes, tokenizer, tmp_path, passes):
    compute(model, scenes, tmp_path)

    def computes(*arguments, **options) -> bool:
        passes.clear()
        compute(*arguments, **options)
        return passes != []

    model.add_decoder()
    model.add_recursion()
    assert not computes(model, scenes, tmp_path)  # the parts that train later do not matter
    assert computes(model, scenes, tmp_path, indices=range(5))
    assert computes(model, scenes, tmp_path, indices=list(range(len(scenes)))[::-1])
    assert computes(model, scenes, tmp_path, on_bad_sample="skip")
    assert computes(model, scenes, tmp_path, precision="bf16")
    assert computes(model, SceneSource("train", n_scenes=8, seed=1, image_size=32), tmp_path)
    assert computes(tiny_model(1, tokenizer, moved=False, max_answer_tokens=8), scenes, tmp_path)
    assert computes(tiny_model(1, tokenizer, moved=False, query_prompt="What is it?"), scenes, tmp_path)
    for component in (model.x_encoder, model.predictor, model.y_encoder):
        with torch.no_grad():
            next(component.parameters()).view(-1)[0] += 1e-3
        assert computes(model, scenes, tmp_path)
        assert not computes(model, scenes, tmp_path)


@pytest.mark.parametrize("name", ["mamba3_jepa", "code", "torch", "Pillow", "transformers", "tokenizers", "numpy"])
def test_the_key_covers_what_computes(model, scenes, tmp_path, passes, monkeypatch, name):
    compute(model, scenes, tmp_path)
    other = frozen_key.made_by() | {name: "0.0.1"}
    monkeypatch.setattr(frozen_key, "made_by", lambda: other)
    passes.clear()
    compute(model, scenes, tmp_path)
    assert passes


def test_the_key_covers_device_and_kernels(model, monkeypatch):
    assert frozen_key.device_and_kernels(model) == {
        "device": "cpu", "kernels": [], "compiled": False, "float32_products": "highest",
    }  # fmt: skip
    monkeypatch.setattr(frozen_key, "siso_kernel", lambda: print)
    monkeypatch.setattr(frozen_key, "mimo_kernel", lambda: None)
    monkeypatch.setattr(type(model), "device", property(lambda self: torch.device("cuda")))
    found = frozen_key.device_and_kernels(model)
    assert found["device"] == "cuda"
    assert [kernel.split(" ")[0] for kernel in found["kernels"]] == ["siso"]
    model.predictor.backbone.layers[0].compile()
    assert frozen_key.device_and_kernels(model)["compiled"]


def test_the_codes_version_is_that_of_the_files_that_compute(tmp_path, monkeypatch):
    package = Path(mamba3_jepa.__file__).parent
    copy = tmp_path / "mamba3_jepa"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    real = frozen_key._code()
    monkeypatch.setattr(mamba3_jepa, "__file__", str(copy / "__init__.py"))
    assert frozen_key._code() == real
    (copy / "cli" / "main.py").write_text("# prints something else")
    assert frozen_key._code() == real
    for name in ("data/images.py", "models/mamba3.py", "training/frozen.py"):
        before = frozen_key._code()
        with (copy / name).open("a") as file:
            file.write("\n")
        assert frozen_key._code() != before


def write_pairs(folder: Path, n: int) -> None:
    folder.mkdir()
    for i in range(n):
        Image.new("RGB", (40, 30), (i * 40, 90, 200)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")


@pytest.mark.parametrize("kind", ["folder", "manifest"])
@pytest.mark.parametrize("suffix", ["png", "txt"])
def test_a_replaced_file_is_noticed(model, tmp_path, passes, kind, suffix):
    data = tmp_path / "data"
    write_pairs(data, 3)
    lines = [json.dumps({"image": f"{i}.png", "text": f"{i}.txt"}) for i in range(3)]
    (data / "manifest.jsonl").write_text("\n".join(lines))
    source = (FolderSource if kind == "folder" else ManifestSource)(data)
    before = compute(model, source, tmp_path / "cache")
    compute(model, source, tmp_path / "cache", indices=[0])
    shutil.copy(data / f"2.{suffix}", data / f"1.{suffix}")
    passes.clear()
    after = compute(model, source, tmp_path / "cache")
    assert passes
    name = "embedding" if suffix == "png" else "target_embedding"
    difference = (getattr(after, name).tensor() - getattr(before, name).tensor()).abs().amax(dim=1)
    assert (difference > 1e-4).tolist() == [False, True, False]  # rounding may follow the batch
    assert difference[[0, 2]].max() < 1e-6
    passes.clear()
    compute(model, source, tmp_path / "cache", indices=[0])  # does not need the file that changed
    assert passes == []


def test_a_replaced_shard_is_noticed(tmp_path):
    import tarfile

    write_pairs(tmp_path / "data", 2)
    for name in ("a", "b"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for i in range(2):
                for suffix in ("png", "txt"):
                    tar.add(tmp_path / "data" / f"{i}.{suffix}", f"{i}.{suffix}")
    source = ShardSource(tmp_path)
    everything, first = source.file_state(np.arange(4)), source.file_state(np.arange(2))
    os.utime(tmp_path / "b.tar", (1, 1))
    assert source.file_state(np.arange(4)) != everything
    assert source.file_state(np.arange(2)) == first


def parts(cache_dir: Path) -> list[Path]:
    return sorted(cache_dir.glob("*/part-*.safetensors"))


def damage_flip(path: Path, other: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def damage_cut(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage_empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def damage_swap(path: Path, other: Path) -> None:
    shutil.copy(other, path)


@pytest.mark.parametrize("damage", [damage_flip, damage_cut, damage_empty, damage_swap])
def test_a_damaged_part_is_computed_again(model, scenes, tmp_path, passes, caplog, damage):
    whole = compute(model, scenes, tmp_path)
    files = parts(tmp_path)
    assert len(files) == 3
    damage(files[1], files[0])
    passes.clear()
    assert_equal(compute(model, scenes, tmp_path), whole)
    assert sum(passes) == 8
    assert "computing it again" in caplog.text
    passes.clear()
    compute(model, scenes, tmp_path)
    assert passes == []


def test_interrupted_it_goes_on_where_it_stopped(model, scenes, tmp_path, passes, monkeypatch):
    whole = compute(model, scenes, None)
    passes.clear()
    counting = frozen._Pass._compute

    def stopping(self, batch):  # type: ignore[no-untyped-def]
        part = counting(self, batch)
        if len(passes) == 3:  # in the middle of the second part
            os.kill(os.getpid(), signal.SIGTERM)
        return part

    monkeypatch.setattr(frozen._Pass, "_compute", stopping)
    with pytest.raises(Interrupted, match="1 of 3 parts") as stopped:
        compute(model, scenes, tmp_path)
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert len(parts(tmp_path)) == 1
    passes[:] = [0] * 100
    assert_equal(compute(model, scenes, tmp_path), whole)
    assert sum(passes) == len(scenes) - 8
    assert not list(tmp_path.glob("*/.*"))


def test_the_files_hold_nothing_but_tensors(model, scenes, tmp_path):
    compute(model, scenes, tmp_path)
    with safe_open(parts(tmp_path)[0], framework="np") as file:
        assert file.get_tensor("embedding").shape == (8, model.config.embed_dim)
        assert file.metadata()["part"] == "0"


def test_bad_samples_and_long_texts(model, tmp_path, caplog):
    data = tmp_path / "data"
    write_pairs(data, 4)
    (data / "1.png").write_bytes(b"no picture")
    (data / "2.txt").write_text("very long " * 100)
    source = FolderSource(data)
    with pytest.raises(UserError, match=r"1\.png"):
        compute(model, source, tmp_path / "cache")
    for _ in range(2):
        outputs = compute(model, source, tmp_path / "cache", on_bad_sample="skip")
        assert outputs.index.tolist() == [0, 2, 3]
        assert len(outputs.bad) == 1
        assert outputs.n_truncated == 1
        assert outputs.embedding.shape == (3, 32)
    assert "1 bad samples skipped" in caplog.text
    with pytest.raises(UserError, match="not one of 1 samples"):
        compute(model, source, tmp_path / "cache", indices=[1], on_bad_sample="skip")
    with pytest.raises(UserError, match="no samples"):
        compute(model, source, tmp_path / "cache", indices=[])


def test_a_sample_that_the_system_did_not_give_is_tried_again(model, tmp_path, passes, monkeypatch, caplog):
    data = tmp_path / "data"
    write_pairs(data, 12)
    (data / "2.png").write_bytes(b"no picture")  # which stays so
    source = FolderSource(data)
    names = [str(source.group(i)) for i in range(12)]
    lost, bad = names.index("1.png"), names.index("2.png")
    read = images._read
    failing = {"1.png"}

    def fails(path):  # type: ignore[no-untyped-def]
        if Path(path).name in failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path)

    def index(**options) -> set[int]:  # type: ignore[no-untyped-def]
        passes.clear()
        return set(compute(model, source, tmp_path / "cache", on_bad_sample="skip", **options).index.tolist())

    monkeypatch.setattr(images, "_read", fails)
    caplog.set_level("INFO")
    with pytest.raises(UserError, match=r"1\.png: cannot be read: Input/output error"):
        compute(model, source, tmp_path / "cache")
    everything = set(range(12)) - {bad}
    assert index() == everything - {lost}
    assert index() == everything - {lost}
    assert passes == []  # it was tried, but nothing was computed
    failing.clear()
    assert index(try_again=False) == everything - {lost}  # as a run that is continued
    assert passes == []
    assert index() == everything
    assert 0 < sum(passes) <= 8  # its part
    assert "could not be read before are there now" in caplog.text
    assert index() == everything
    assert passes == []


def test_every_part_is_checked_by_one_process_of_a_host(model, scenes, tmp_path, passes, monkeypatch):
    whole = compute(model, scenes, tmp_path)
    files = parts(tmp_path)
    checked: list[int] = []
    digest = frozen_store._digest
    monkeypatch.setattr(
        frozen_store, "_digest", lambda tensors: checked.append(int(tensors["index"][0])) or digest(tensors)
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for local_rank, mine in (("0", [0, 16]), ("1", [8])):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        checked.clear()
        assert_equal(compute(model, scenes, tmp_path), whole)
        assert checked == mine
    damage_flip(files[1], files[0])
    passes.clear()
    assert_equal(compute(model, scenes, tmp_path), whole)
    assert sum(passes) == 8


def test_a_folder_that_cannot_be_written(model, scenes, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="`cache_dir`"):
        compute(model, scenes, tmp_path / "file" / "cache")


def test_modes_and_gates_are_left_as_they_were(tokenizer, scenes):
    model = tiny_model(1, tokenizer, angn=GATES)
    model.predictor.train()
    compute(model, scenes, None)
    assert model.predictor.training
    assert not model.y_encoder.training
    assert model.angn.activity_ema().isnan().all()


def test_memory_mapped_rows_are_the_same_rows(monkeypatch):
    pieces = [torch.randn(n, 3) for n in (5, 1, 7)]
    whole = Rows(pieces)
    monkeypatch.setattr(frozen, "_IN_MEMORY_BYTES", 0)
    mapped = Rows(pieces)
    assert len(mapped._pieces) == 3
    rows = torch.tensor([12, 0, 5, 5, 4, 6, 11])
    assert torch.equal(mapped[rows], torch.cat(pieces)[rows])
    assert torch.equal(whole[rows], mapped[rows])
    assert torch.equal(mapped.tensor(), whole.tensor())
    assert mapped.shape == whole.shape == (13, 3)
    assert mapped[rows[:0]].shape == (0, 3)
