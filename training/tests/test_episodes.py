"""Episodes of a memory: their scores by hand, when one is recalled, and what remembers them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import GATES, tiny_model, write_checkpoint, write_images

from mamba3_jepa.cli.main import main
from mamba3_jepa.config import SHUT, preset
from mamba3_jepa.errors import UserError
from mamba3_jepa.evaluation.confusion_plots import plot_episode_floor
from mamba3_jepa.evaluation.episode_recall import EpisodeFloor, choose_episode_floor
from mamba3_jepa.export.exporter import export_weights
from mamba3_jepa.export.reader import load_exported
from mamba3_jepa.files.file_lock import alone_with
from mamba3_jepa.inference.answerer import Answerer
from mamba3_jepa.inference.digests import observer_digest
from mamba3_jepa.inference.episodes import Episode, Episodes, made_episodes
from mamba3_jepa.inference.memory import KnowledgeMemory
from mamba3_jepa.models.episodes import episode_scores, picture_keys
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.export import ExportSettings

QUESTION = "Is there a square?"


def recalling(floor: float = 0.5, threshold: float = 0.0) -> Mamba3Jepa:
    """A model that is confused by everything, and recalls episodes."""
    model = tiny_model(3, angn=GATES)
    assert model.recursion is not None
    model.recursion.confusion_probe.threshold.fill_(threshold)
    model.recursion.episode_floor.fill_(floor)
    model.recursion.memory_floor.fill_(SHUT)
    return model


@pytest.fixture
def images(tmp_path: Path) -> dict[str, Path]:
    return write_images(tmp_path / "images")


def test_the_score_is_its_formula() -> None:
    mean = torch.tensor([1.0, 0.0, -1.0])
    pooled, states = torch.tensor([[3.0, 4.0, -1.0]]), torch.tensor([[1.0, 5.0, -1.0], [3.0, 0.0, -1.0]])
    questions = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    scores = episode_scores(pooled, torch.tensor([[0.6, 0.8]]), states, questions, mean=mean, blend=0.25)
    root = math.sqrt(5)
    expected = torch.tensor([[0.25 * 2 / root + 0.75 * 0.8, 0.25 / root + 0.75 * 0.6]])
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5])
def test_what_a_picture_looks_like_is_its_quarters_less_their_mean(side: int) -> None:
    generator = torch.Generator().manual_seed(side)
    tokens = torch.randn(3, side * side, 2, generator=generator)
    has_image = torch.tensor([True, False, True])
    found = picture_keys(tokens, has_image)
    assert found.shape == (3, 8)
    assert not found[1].any()
    assert bool(found[0].any()) == (side > 1), "one token has no quarters"
    for b in (0, 2):
        grid = tokens[b].reshape(side, side, 2)
        halves = [range(0, (side + 1) // 2), range(side // 2, side)]
        quarters = [
            torch.stack([grid[y, x] for y in rows for x in columns]).mean(0) for rows in halves for columns in halves
        ]
        mean = torch.stack(quarters).mean(0)
        torch.testing.assert_close(found[b], torch.cat([quarter - mean for quarter in quarters]), atol=1e-6, rtol=1e-5)
    # lighter or darker is the same, and of no picture at all there is nothing to see
    torch.testing.assert_close(picture_keys(tokens + 3, has_image), found, atol=1e-5, rtol=1e-4)
    assert picture_keys(tokens[:, :0], torch.zeros(3).bool()).shape == (3, 8)


@pytest.mark.parametrize("key", ["picture", "state"])
def test_a_model_says_what_its_episodes_are_found_by(key: str, images: dict[str, Path]) -> None:
    recursion = dataclasses.replace(preset("tiny").recursion, episode_key=key)
    model = tiny_model(3, recursion=recursion)
    assert model.recursion is not None
    model.recursion.episode_floor.fill_(0.5)
    observed = model.observe([images["red"], None], [QUESTION, QUESTION])
    episodes = made_episodes(model, observed, [QUESTION] * 2, ["yes", "no"], ["red.png", None])
    assert torch.equal(episodes.seen, observed.picture if key == "picture" else observed.pooled)
    assert episodes.seen.shape[1] == len(model.recursion.episode_mean) == model.config.episode_dim
    assert torch.equal(model.picture_keys([images["red"], None]), observed.picture)
    assert ("episode_key" in model.config.to_dict()["recursion"]) == (key == "picture"), (
        "files of before stay as they were"
    )


def test_blend_and_floor_are_those_that_separate_best() -> None:
    """The states tell all, the questions nothing."""
    seen = torch.tensor([[0.9, 0.1, 0.2], [0.0, 0.8, 0.3]])
    chosen = choose_episode_floor(
        seen, torch.ones(2, 3), torch.tensor([0, 1]), torch.zeros(2, 3).bool(), torch.ones(2, 3).bool(), memory=3
    )
    assert (chosen.lookups, len(chosen.right), chosen.gain) == (2, 2, 1.0)
    assert chosen.blend > 0
    assert float(chosen.wrong.max()) < chosen.floor < float(chosen.right.min())
    metrics = chosen.metrics()
    assert (metrics["val/episode_found"], metrics["val/episode_right_passed"]) == (1.0, 1.0)
    assert (metrics["val/episode_wrong_stopped"], metrics["val/episode_lookups"]) == (1.0, 2)
    # with the floor of before, the second lookup passes, and so does a wrong one
    stored = choose_episode_floor(
        torch.tensor([[0.4, 0.1, 0.2], [0.0, 0.8, 0.6]]), torch.ones(2, 3), torch.tensor([0, 1]),
        torch.zeros(2, 3).bool(), torch.ones(2, 3).bool(), memory=3, stored=(1.0, 0.5),
    )  # fmt: skip
    assert stored.as_json() == {"lookups": 2, "found": 1.0, "recalled": 0.5, "recalled_without": 0.5}


@pytest.mark.usefixtures("real_figures")
def test_where_nothing_is_told_apart_nothing_is_recalled(tmp_path: Path) -> None:
    same = torch.ones(3, 4)
    own, no = torch.tensor([0, 1, 2]), torch.zeros(3, 4).bool()
    for chosen in (
        choose_episode_floor(same, same, own, no, no),
        choose_episode_floor(same[:0], same[:0], own[:0], no[:0], no[:0]),
        choose_episode_floor(same[:, :1], same[:, :1], own * 0, no[:, :1], no[:, :1]),
    ):
        assert (chosen.floor, chosen.gain) == (SHUT, 0.0)
    floor = EpisodeFloor(floor=0.5, blend=0.25, right=torch.tensor([0.9]), wrong=torch.tensor([0.1]), lookups=1)
    assert plot_episode_floor(floor, tmp_path).stat().st_size > 5000


def test_equal_episodes_are_not_doubled() -> None:
    def one(state: list[float], answer: str, question: str | None = "q") -> Episodes:
        entry = Episode(question=question, answer=answer, image=None)
        tensor = torch.tensor([[float(len(answer)), 1.0]])
        return Episodes(entries=(entry,), seen=torch.tensor([state]), questions=tensor, answers=tensor, observer="o")

    first = one([3.0, 4.0], "a")
    assert first.joined(one([3.0, 4.0 + 4e-4], "a"))[1:] == (0, 0)
    joined, added, changed = first.joined(one([3.0, 4.0], "bb"))
    assert (added, changed, joined.entries[0].answer, float(joined.answers[0, 0])) == (0, 1, "bb", 2.0)
    for other in (one([3.0, 4.1], "a"), one([3.0, 4.0], "a", None)):
        assert first.joined(other)[1:] == (1, 0)
    assert one([0.0, 0.0], "yes", None).entries[0].text == "yes"


def test_the_observer_is_that_of_the_exported_files(tmp_path: Path) -> None:
    """As WEIGHT_MAPPING.md describes it, from the files' bytes alone."""
    model = recalling()
    checkpoint = write_checkpoint(tmp_path / "phase3.pt", model, 3)
    folder = tmp_path / "weights"
    export_weights(ExportSettings(checkpoint=checkpoint, output=folder, x_encoder=True))
    memory = KnowledgeMemory.build(model, ["red"])
    config = json.loads((folder / "config.json").read_text())["model"]
    parts = {name: config[name] for name in ("max_query_tokens", "predictor", "query_prompt", "vision")}
    parts["angn"] = config["angn"]["enabled"]
    digest = hashlib.sha256(f"mamba3-jepa observer\n{memory.encoder}\n".encode())
    digest.update(json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() + b"\n")
    for name in ("predictor", "angn"):
        content = (folder / f"{name}.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        del header["__metadata__"]
        for key in sorted(header, key=str.encode):
            entry = header[key]
            digest.update(f"{key} {entry['dtype']} {'x'.join(map(str, entry['shape']))}\n".encode())
            digest.update(data[slice(*entry["data_offsets"])])
    assert observer_digest(model) == observer_digest(load_exported(folder)) == digest.hexdigest()


def test_ask_remembers_and_recalls(tmp_path: Path, images: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    checkpoint = write_checkpoint(tmp_path / "x.pt", recalling(), 3, answers=["red"])
    memory = tmp_path / "m.safetensors"
    ask = ["ask", "--checkpoint", str(checkpoint), "--image", str(images["red"]), QUESTION, "--memory", str(memory)]

    def said() -> dict:
        return json.loads(capsys.readouterr().out)[0]

    assert main([*ask, "--remember", "yes", "--json"]) == 0
    first = said()
    assert (first["remembered"], first["memory_used"], first["memory_kind"]) == ("yes", None, None)
    assert main([*ask, "--json"]) == 0
    again = said()
    assert (again["memory_used"], again["memory_kind"]) == (f"{QUESTION} yes", "episode")
    assert again["remembered"] is None
    assert again["confusion_after"] < again["confusion"]
    assert again["sure"] == (again["confusion_after"] <= again["threshold"])
    assert again["nearest"] != first["nearest"]
    assert main([*ask, "--remember", "no"]) == 0
    assert f"remembered in {memory}: {QUESTION} no" in " ".join(capsys.readouterr().out.split())
    assert [entry.text for entry in KnowledgeMemory.read(memory).entries] == [f"{QUESTION} no"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "m.safetensors", "x.answers.safetensors",
                                                                "x.pt"]  # fmt: skip


def test_of_a_fact_and_an_episode_the_one_further_above_its_floor(images: dict[str, Path]) -> None:
    model = recalling(floor=0.5)
    assert model.recursion is not None
    observed = model.observe([images["red"]], [QUESTION])
    memory = KnowledgeMemory.build(model, ["a fact"], made_episodes(model, observed, [QUESTION], ["yes"], ["red.png"]))
    for fact_floor, kind in ((-3.0, "fact"), (0.9999 * SHUT, "episode")):
        model.recursion.memory_floor.fill_(fact_floor)
        assert Answerer(model, memory).ask(images["red"], QUESTION).memory_kind == kind
    model.recursion.episode_floor.fill_(SHUT)
    assert Answerer(model, memory).ask(images["red"], QUESTION).memory_kind is None
    with pytest.raises(UserError, match="too little to learn when to recall an episode"):
        made_episodes(model, observed, [QUESTION], ["yes"], [None])


def test_the_commands(
    tmp_path: Path, images: dict[str, Path], capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = write_checkpoint(tmp_path / "x.pt", recalling(), 3)
    file = str(tmp_path / "new" / "m.safetensors")
    add = ["memory", "add", file, "--checkpoint", str(checkpoint)]
    (tmp_path / "facts.txt").write_text("one\ntwo\n")
    seen = ["--image", str(images["red"]), "--question", QUESTION, "--answer", "yes"]

    def printed(*arguments: str) -> object:
        assert main([*arguments, "--json"]) == 0
        return json.loads(capfd.readouterr().out)

    counts = {"file": file, "added": 3, "changed": 0, "facts": 2, "episodes": 1}
    assert printed(*add, "two", "--texts", str(tmp_path / "facts.txt"), *seen) == counts
    assert printed(*add, "two", *seen) == counts | {"added": 0}
    assert printed(*add, *seen[:-1], "no") == counts | {"added": 0, "changed": 1}
    listed = printed("memory", "list", file)
    assert listed == [
        {"number": 1, "kind": "fact", "text": "two", "image": None},
        {"number": 2, "kind": "fact", "text": "one", "image": None},
        {"number": 3, "kind": "episode", "text": f"{QUESTION} no", "image": str(images["red"])},
    ]
    before = Path(file).read_bytes()
    for wrong, message in ((["4"], "there is no entry 4: it has 3"), (["--text", "three"], "no entry with the text"),
                           (["1", "9"], "no entry 9"), (["0"], "there is no entry 0: it has 3"),
                           ([], "give the numbers")):  # fmt: skip
        assert main(["memory", "remove", file, *wrong]) == 2
        assert message in " ".join(capfd.readouterr().err.split())
        assert Path(file).read_bytes() == before
    assert printed("memory", "remove", file, "--text", "one") == {
        "file": file, "removed": [listed[1]], "facts": 1, "episodes": 1,
    }  # fmt: skip
    assert main(["memory", "remove", file, "1", "2"]) == 0
    assert "empty" in capfd.readouterr().out
    ask = ["ask", "--checkpoint", str(checkpoint), QUESTION, "--memory", file]
    assert main(ask) == 0
    assert "this memory is empty" in caplog.text
    capfd.readouterr()
    assert printed(*add, "again")["facts"] == 1  # type: ignore[index]


def test_bad_settings(tmp_path: Path, images: dict[str, Path], capfd: pytest.CaptureFixture) -> None:
    plain = recalling()
    plain.recursion.episode_floor.fill_(SHUT)  # type: ignore[union-attr]
    checkpoint = write_checkpoint(tmp_path / "x.pt", plain, 3)
    model, image, memory = (
        ["--checkpoint", str(checkpoint)],
        ["--image", str(images["red"])],
        ["--memory", "m.safetensors"],
    )
    for arguments, message in (
        (["ask", *model, "x?", "--remember", "a", *memory], "memory add FILE TEXT"),
        (["ask", *model, *image, "x?", "y?", "--remember", "a", *memory], "answer to one question, not to 2"),
        (["ask", *model, *image, "x?", "--remember", "a"], "--remember needs the --memory"),
        (["ask", *model, *image, "x?", "--remember", "a", "--memory", "m.txt"], "--remember needs the --memory"),
        (["ask", *model, *image, "x?", "--remember", " ", *memory], "--remember is empty"),
        (["ask", *model, *image, "x?", "--remember", "a", *memory], "too little to learn when to recall"),
        (["memory", "add", "m.txt", *model, "a"], "must end in .safetensors"),
        (["memory", "add", "m.safetensors", *model], "nothing to remember"),
        (["memory", "add", "m.safetensors", *model, *image], "with their --answer"),
        (["memory", "add", "m.safetensors", *model, "--answer", "a"], "--answer: to what?"),
        (["memory", "add", "m.safetensors", *model, *image, "--answer", "a"], "too little to learn when to recall"),
        (["memory", "list", str(tmp_path / "none.safetensors")], "cannot read it as a saved memory"),
    ):
        assert main(arguments) == 2, arguments
        assert message in " ".join(capfd.readouterr().err.split())


def test_bad_files(tmp_path: Path, images: dict[str, Path]) -> None:
    model, path = recalling(), tmp_path / "m.safetensors"
    observed = model.observe([images["red"]], [QUESTION])
    memory = KnowledgeMemory.build(model, ["a"], made_episodes(model, observed, [QUESTION], ["yes"], [None]))
    memory.save(path)
    again = KnowledgeMemory.load(path, model)
    assert again.entries == memory.entries
    assert torch.equal(again.episodes.seen, observed.picture)  # type: ignore[union-attr]
    metadata = {
        "format": "mamba3-jepa memory", "format_version": "3", "encoder": memory.encoder, "texts": '["a"]',
        "observer": memory.episodes.observer,  # type: ignore[union-attr]
        "episodes": json.dumps([{"question": QUESTION, "answer": "yes", "image": None}]),
    }  # fmt: skip
    tensors = load_file(path)
    for name, value in (
        ("episodes", "[]"), ("episodes", "[1]"), ("episodes", '[{"question": 1, "answer": "a", "image": null}]'),
        ("episodes", '[{"answer": "a"}]'), ("episode_states", tensors["episode_states"] * torch.nan),
        ("episode_answers", tensors["episode_answers"][:, 1:].contiguous()),
        ("episode_questions", tensors["episode_questions"].double()),
    ):  # fmt: skip
        if isinstance(value, str):
            save_file(tensors, path, metadata | {name: value})
        else:
            save_file(tensors | {name: value}, path, metadata)
        with pytest.raises(UserError, match="damaged: expected"):
            KnowledgeMemory.load(path, model)
    save_file(tensors, path, metadata | {"observer": "0" * 64})
    with pytest.raises(UserError, match="seen by another predictor"):
        KnowledgeMemory.load(path, model)
    save_file({"embeddings": tensors["embeddings"]}, path, {**metadata, "format_version": "2", "episodes": ""})
    with pytest.raises(UserError, match="damaged"):
        KnowledgeMemory.read(path)
    for key in ("episodes", "observer"):
        del metadata[key]
    save_file({"embeddings": tensors["embeddings"]}, path, metadata | {"format_version": "2"})
    old = KnowledgeMemory.load(path, model)
    assert (old.texts, old.episodes) == (["a"], None)


def test_who_changes_a_memory_second_waits(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with (
        alone_with(path),
        pytest.raises(UserError, match="another command has been changing it"),
        alone_with(path, patience=0.05),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
