"""Text towers that start from an official language model: what they compute at first, learn, keep, and refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy_reader import Reader
from tiny import write_images
from tiny_export import export
from tiny_language_model import language_model, write_language_model
from torch import nn

from mamba3_jepa.cli.main import main
from mamba3_jepa.data.scenes import SceneSource
from mamba3_jepa.data.tokenizer import TextTokenizer
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.checkpoint import load_checkpoint
from mamba3_jepa.models.language_model import Mamba3LanguageModel
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.training import Phase1Settings, Phase2Settings
from mamba3_jepa.training.optim import build_optimizer
from mamba3_jepa.training.phase1 import train_phase1
from mamba3_jepa.training.phase2 import train_phase2

WIDTH = 48  # of the language model; the other parts of preset tiny have 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: TextTokenizer) -> Path:
    """A language model that has read the scenes' tokens, with rows that no token uses."""
    made = language_model(tokenizer.vocab_size)
    with torch.no_grad():
        made.embedding.weight.mul_(0.1)  # language models have small ones
    return write_language_model(tmp_path_factory.mktemp("lm") / "model", made, tokenizer)


def phase1(output: Path, folder: Path | None, **settings: object) -> Path:
    values = {"tiny": True, "cpu": True, "workers": 0, "max_steps": 2, "batch_size": 8, "val_samples": 32} | settings
    train_phase1(Phase1Settings(output_dir=output / "phase1", init_y_encoder=folder, **values))  # type: ignore[arg-type]
    return output / "phase1" / "phase1_last.pt"


def phase2(output: Path, start: Path, folder: Path | None, **settings: object) -> Path:
    values = {"tiny": True, "cpu": True, "workers": 0, "max_steps": 2, "batch_size": 8, "val_samples": 32} | settings
    train_phase2(
        Phase2Settings(output_dir=output / "phase2", phase1_checkpoint=start, init_y_decoder=folder, **values)  # type: ignore[arg-type]
    )
    return output / "phase2" / "phase2_last.pt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> tuple[Path, Path]:
    """Checkpoints of both phases, each tower from the language model."""
    output = tmp_path_factory.mktemp("run")
    first = phase1(output, folder)
    return first, phase2(output, first, folder)


def test_the_towers_start_as_the_language_model(folder: Path, tmp_path: Path) -> None:
    """With a learning rate of 0, nothing has moved: hidden states, logits and tokenizer are the language model's."""
    start = phase1(tmp_path, folder, lr=1e-30, max_steps=1)
    model = Mamba3Jepa.from_checkpoint(phase2(tmp_path, start, folder, lr=1e-30, max_steps=1))
    language = Mamba3LanguageModel.from_pretrained(folder)
    assert model.config.y_encoder == model.config.y_decoder == language.config.backbone
    assert model.tokenizer.to_json() == TextTokenizer.from_file(folder / "tokenizer.json").to_json()
    assert len(model.y_encoder.embedding.weight) == model.tokenizer.vocab_size < language.config.rows
    decoder, ids = model.y_decoder, model.tokenizer.encode(["a red circle"], 32).ids
    assert decoder is not None
    with torch.no_grad():
        hidden = model.y_encoder.backbone(model.y_encoder.embed_tokens(ids))
        logits = decoder.lm_head(decoder.backbone(decoder.embedding(ids)))
        torch.testing.assert_close(hidden, language.hidden(ids))
        torch.testing.assert_close(logits, language(ids)[..., : model.tokenizer.vocab_size])


def test_questions_start_as_loud_as_without(folder: Path, tmp_path: Path) -> None:
    """A language model's embedding is small, and questions would be drowned by the bias beside them."""
    spreads = []
    for name, init in (("with", folder), ("without", None)):
        model = Mamba3Jepa.from_checkpoint(phase1(tmp_path / name, init, lr=1e-30, max_steps=1))
        projected = model.predictor.query_proj(model.y_encoder.embedding.weight)
        spreads.append(projected.detach().std(dim=0).mean().item())
        if init is not None:
            assert model.y_encoder.embedding.weight.detach().square().mean().sqrt() < 0.2
    assert spreads[0] == pytest.approx(spreads[1], rel=0.2)


def test_a_text_is_embedded_the_same_alone_and_in_any_batch(trained: tuple[Path, Path]) -> None:
    model = Mamba3Jepa.from_checkpoint(trained[0])
    texts = ["red", "a small red circle above a large blue square", "is there a star?"]
    together = model.embed_text(texts)
    for i, text in enumerate(texts):
        torch.testing.assert_close(model.embed_text([text])[0], together[i], rtol=1e-5, atol=1e-6)


def test_a_pretrained_encoder_learns_slowly_and_the_rest_does_not(folder: Path, tmp_path: Path) -> None:
    """After one step of Adam everything with a gradient has moved by its learning rate."""
    moved = {}
    for name, init, scale in (
        ("own", folder, None),
        ("full", folder, 1.0),
        ("random", None, None),
        ("half", None, 0.5),
    ):
        common = {"seed": 3, "weight_decay": 0.0, "warmup_steps": 0, "y_encoder_lr_scale": scale}
        before = load_checkpoint(phase1(tmp_path / f"{name}-0", init, max_steps=1, lr=1e-30, **common)).model
        after = load_checkpoint(phase1(tmp_path / f"{name}-1", init, max_steps=1, lr=1e-3, **common)).model
        moved[name] = [
            float((after[key] - before[key]).abs().max())
            for key in ("y_encoder.backbone.layers.0.out_proj.weight", "predictor.pred_head.weight")
        ]
    for name, share in (("own", 0.05), ("full", 1.0), ("random", 1.0), ("half", 0.5)):
        assert moved[name] == pytest.approx([1e-3 * share, 1e-3], rel=0.02), name


def test_every_parameter_is_in_one_group_and_without_shares_there_are_the_two_of_old() -> None:
    module = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(3, 2), "c": nn.Embedding(4, 2)})
    module["b"].bias.requires_grad = False
    plain = build_optimizer(module, 0.1, 0.5)
    assert [(len(group["params"]), group["weight_decay"]) for group in plain.param_groups] == [(2, 0.5), (2, 0.0)]
    scaled = build_optimizer(module, 0.1, 0.5, [(module["b"], 0.05)])
    groups = [(group["lr_scale"], group["weight_decay"], len(group["params"])) for group in scaled.param_groups]
    assert groups == [(1.0, 0.5, 1), (1.0, 0.0, 2), (0.05, 0.5, 1), (0.05, 0.0, 0)]
    assert sum(len(group["params"]) for group in scaled.param_groups) == 4
    old = plain.state_dict()
    for group in old["param_groups"]:
        del group["lr_scale"]  # as runs from before wrote it
    build_optimizer(module, 0.1, 0.5).load_state_dict(old)


def test_a_run_that_is_continued_needs_the_folder_no_more(folder: Path, tmp_path: Path) -> None:
    """And gives the weights of one that was not stopped, bit for bit."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    warming = {"warmup_steps": 1000, "lr": 1.0}  # a schedule that does not depend on the number of steps
    start = phase1(tmp_path / "whole", copy, max_steps=4, **warming)
    whole = [load_checkpoint(start), load_checkpoint(phase2(tmp_path / "whole", start, copy, max_steps=4, **warming))]
    phase1(tmp_path / "parts", copy, max_steps=2, **warming)
    phase2(tmp_path / "parts", start, copy, max_steps=2, **warming)
    shutil.rmtree(copy)
    again = {"max_steps": 4, "resume": True, **warming}
    parts = [phase1(tmp_path / "parts", copy, **again), phase2(tmp_path / "parts", start, copy, **again)]
    for path, expected in zip(parts, whole, strict=True):
        found = load_checkpoint(path)
        assert found.config == expected.config
        torch.testing.assert_close(found.model, expected.model, rtol=0, atol=0)
    with pytest.raises(UserError, match=r"`y_encoder_lr_scale` 0\.05 -> None"):
        phase1(tmp_path / "parts", None, **again)
    for phase in (lambda **more: phase1(tmp_path / "parts", copy, **again, **more),
                  lambda **more: phase2(tmp_path / "parts", start, copy, **again, **more)):  # fmt: skip
        phase(a_activation="heavy_tail")
        with pytest.raises(UserError, match="`a_activation` softplus: the run was started with heavy_tail"):
            phase(a_activation="softplus")


def test_the_export_carries_the_mlps(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """Read back by Python, and by the reader in numpy, which knows only WEIGHT_MAPPING.md."""
    report = export(trained[1], tmp_path / "weights", x_encoder=True, verify=True, golden=True)
    assert max(each.largest for each in report.differences) == 0
    model, reader = Mamba3Jepa.from_checkpoint(trained[1]), Reader(tmp_path / "weights")
    assert reader.model["y_encoder"]["mlp_dim"] == reader.model["y_decoder"]["mlp_dim"] == 100
    assert "mlp_dim" not in reader.model["predictor"]
    assert reader.w["y_encoder.mlps.1.fc1.weight"].shape == (256, WIDTH)
    assert reader.w["y_decoder.mlp_norms.0.weight"].shape == (WIDTH,)
    ids = reader.ids("a red circle", model.config.max_answer_tokens)
    embedded = reader.text_embedding(ids)
    np.testing.assert_allclose(embedded, model.embed_text(["a red circle"])[0], atol=1e-5)
    golden = reader.read("golden/y_decoder.safetensors")
    backbone = reader.speaker(golden["embedding"][0])
    logits = np.stack([reader.logits(backbone, int(token)) for token in golden["ids"][0]])
    np.testing.assert_allclose(logits, golden["logits"][0], atol=1e-4 * np.abs(logits).max())
    streams = reader.read("golden/y_encoder.safetensors")
    added = streams["layers.0.input"] + streams["layers.0.mixer_output"] + streams["layers.0.mlp_output"]
    np.testing.assert_allclose(added, streams["layers.1.input"], atol=1e-4)


def test_the_model_answers(trained: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    image = write_images(tmp_path)["red"]
    assert main(["ask", "--checkpoint", str(trained[1]), "--image", str(image), "--json", "is it red?"]) == 0
    assert json.loads(capfd.readouterr().out)[0]["question"] == "is it red?"


# --- what is refused ---


def test_a_tokenizer_of_the_run_may_stand_in_for_a_missing_one(folder: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer.json"))
    with pytest.raises(UserError, match=r"bare: there is no tokenizer\.json: put the one there"):
        phase1(tmp_path, bare)
    assert not (tmp_path / "phase1").exists()
    start = phase1(tmp_path, bare, tokenizer=folder / "tokenizer.json")
    with pytest.raises(UserError, match=r"bare: there is no tokenizer\.json: put the one there"):
        phase2(tmp_path, start, bare)
    shutil.copy(folder / "tokenizer.json", bare)
    assert load_checkpoint(phase2(tmp_path, start, bare)).config.y_decoder.mlp_dim == 100
    with pytest.raises(UserError, match=r"`tokenizer` .*has a tokenizer\.json of its own; leave `tokenizer` out"):
        phase1(tmp_path / "b", folder, tokenizer=folder / "tokenizer.json")


def test_tokens_that_the_model_has_no_rows_for(folder: Path, tmp_path: Path, scenes: SceneSource) -> None:
    small = write_language_model(tmp_path / "small", language_model(270))
    shutil.copy(folder / "tokenizer.json", small)
    with pytest.raises(UserError, match=r"tokenizer\.json: has 300 tokens, but the model in .*small only 272 rows"):
        phase1(tmp_path, small)


def test_a_decoder_with_other_tokens_than_the_run(folder: Path, tmp_path: Path) -> None:
    start = phase1(tmp_path, None)  # its tokenizer is learned from the data
    with pytest.raises(UserError, match=r"`init_y_decoder` .*: was trained with other tokens than phase 1"):
        phase2(tmp_path, start, folder)
    assert not (tmp_path / "phase2").exists()
    start = phase1(tmp_path / "same", None, tokenizer=folder / "tokenizer.json")
    assert load_checkpoint(phase2(tmp_path / "same", start, folder)).config.y_decoder.mlp_dim == 100


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": ("y_encoder.n_layers=3",)}, r"`model` y_encoder\.\* is for new weights"),
        ({"model": ("vocab_size=300",)}, r"`init_y_encoder` and `model` vocab_size both say it"),
        ({"init_y_encoder": None, "a_activation": "softplus"}, r"`a_activation` is of the language model of"),
        ({"y_encoder_lr_scale": -1.0}, r"`y_encoder_lr_scale` -1\.0: must be finite and at least 0"),
    ],
)
def test_settings_of_phase_1_that_do_not_go_together(settings: dict[str, object], message: str, folder: Path) -> None:
    with pytest.raises(UserError, match=message):
        Phase1Settings(**{"tiny": True, "init_y_encoder": folder} | settings).resolved()  # type: ignore[arg-type]


def test_settings_of_phase_2_that_do_not_go_together(folder: Path) -> None:
    with pytest.raises(UserError, match=r"`model` y_decoder\.\* is for new weights"):
        Phase2Settings(init_y_decoder=folder, model=("y_decoder.n_layers=3",)).resolved("tiny")
    with pytest.raises(UserError, match=r"`a_activation` is of the language model of `init_y_decoder`"):
        Phase2Settings(a_activation="softplus").resolved("tiny")


def test_a_folder_that_is_none_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    common = ["--tiny", "--cpu", "--output-dir", str(tmp_path / "out")]
    assert main(["train-jepa", *common, "--init-y-encoder", str(tmp_path / "none")]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert "none" in error
    assert not (tmp_path / "out").exists()
