"""Official Mamba-3 language models: read from their files, with the numbers of their authors, one token or many."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_language_model import plain_language_model
from safetensors.torch import load_file, save_file
from tiny_language_model import (
    FIXTURE,
    language_model,
    official_config,
    official_state,
    reopened,
    write_language_model,
)
from torch import Tensor

from mamba3_jepa.errors import UserError
from mamba3_jepa.models.language_model import Mamba3LanguageModel

KINDS: dict[str, dict[str, Any]] = {
    "siso": {},
    "untied": {"tied": False},
    "mimo": {"is_mimo": True, "mimo_rank": 3},
    "groups, output norm, softplus": {"ngroups": 2, "is_outproj_norm": True, "a_activation": "softplus"},
    "without mlp": {"mlp_dim": 0},
}


def close(ours: Tensor, expected: Tensor, share: float = 1e-5) -> None:
    largest = float((ours - expected).abs().max())
    assert largest <= share * float(expected.abs().max()), largest


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(FIXTURE / "expected.safetensors")


@torch.no_grad()
def test_hidden_states_and_logits_are_those_of_the_reference_implementation(expected: dict[str, Tensor]) -> None:
    model = reopened(FIXTURE)
    close(model.hidden(expected["ids"]), expected["hidden"], share=1e-6)
    close(model(expected["ids"]), expected["logits"], share=1e-6)
    assert model.config.vocab_size == 45
    assert model.config.rows == 48 == model(expected["ids"]).shape[-1]
    assert model.config.backbone.mlp_width == 128


@torch.no_grad()
def test_the_other_a_activation_is_another_model(expected: dict[str, Tensor]) -> None:
    other = reopened(FIXTURE, "softplus")(expected["ids"])
    assert float((other - expected["logits"]).abs().max()) > 0.1 * float(expected["logits"].abs().max())


@pytest.mark.parametrize("kind", list(KINDS))
@torch.no_grad()
def test_every_kind_is_the_plain_reference(kind: str, tmp_path: Path) -> None:
    """Written in the official layout, read by both: values at length 1, odd, and beyond a chunk."""
    made = language_model(50, **KINDS[kind])
    folder = write_language_model(tmp_path, made)
    config = json.loads((folder / "config.json").read_text())
    config["ssm_cfg"]["ngroups"] = made.config.backbone.layer.ngroups
    (folder / "config.json").write_text(json.dumps(config))
    activation = made.config.backbone.layer.a_activation
    model = reopened(folder, activation)
    for length in (1, 7, 37):
        ids = torch.randint(0, 50, (length,), generator=torch.Generator().manual_seed(length))
        hidden, logits = plain_language_model(folder, ids.tolist(), activation)
        close(model.hidden(ids[None])[0], torch.from_numpy(hidden).float())
        close(model(ids[None])[0], torch.from_numpy(logits).float())


@pytest.mark.parametrize("kind", list(KINDS))
@torch.no_grad()
def test_step_by_step_is_all_at_once(kind: str) -> None:
    model = language_model(50, **KINDS[kind]).double()
    ids = torch.randint(0, 50, (2, 21), generator=torch.Generator().manual_seed(0))
    whole = model(ids)
    for start in (0, 1, 17):
        state = model.prefill(ids[:, :start])
        for t in range(start, ids.shape[1]):
            logits, state = model.step(ids[:, t], state)
            torch.testing.assert_close(logits, whole[:, t], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(model.prefill(ids[:, :0]), model.initial_state(2))


@torch.no_grad()
def test_padding_and_neighbours_change_nothing() -> None:
    model = language_model(50)
    ids = torch.randint(0, 50, (3, 20), generator=torch.Generator().manual_seed(1))
    for length in (1, 6, 19):
        alone = model(ids[:1, :length])
        padded = torch.cat([ids[:1, :length], torch.full((1, 20 - length), 7)], dim=1)
        close(model(padded)[:, :length], alone)
        close(model(torch.cat([padded, ids[1:]]))[:1, :length], alone)


def test_gradients_are_those_of_finite_differences() -> None:
    """Through mixer and MLP, to a weight of each part."""
    model = language_model(20, n_layers=1, d_model=16, tied=False).double()
    ids = torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(0))
    weights = torch.randn(2, 5, model.config.rows, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss() -> Tensor:
        return (model(ids) * weights).sum()

    loss().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        place = int(parameter.grad.abs().argmax())
        gradient, step = float(parameter.grad.flatten()[place]), 1e-5
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.view(-1)[place] += sign * step
                values.append(float(loss()))
                parameter.view(-1)[place] -= sign * step
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(gradient, rel=1e-5), name


# --- files ---


def test_any_layout_of_the_files_gives_the_same_model(tmp_path: Path) -> None:
    """One file or shards, with index or without, safetensors or torch's format, old or new, tied head or none."""
    made = language_model(50)
    state, ids = official_state(made), torch.arange(10)[None]
    keys = sorted(state)
    halves = [{key: state[key].clone() for key in part} for part in (keys[::2], keys[1::2])]
    names = [f"{i}-of-00002" for i in ("00001", "00002")]
    whole = {key: tensor.clone() for key, tensor in state.items()}
    without_head = {key: tensor for key, tensor in whole.items() if key != "lm_head.weight"}

    def indexed(folder: Path, stem: str) -> None:
        parts = {key: f"{stem.replace('*', name)}" for name, half in zip(names, halves, strict=True) for key in half}
        kind = "model.safetensors" if stem.endswith("safetensors") else "pytorch_model.bin"
        (folder / f"{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))

    def shards(folder: Path, stem: str) -> None:
        for name, half in zip(names, halves, strict=True):
            path = folder / stem.replace("*", name)
            save_file(half, path) if path.suffix == ".safetensors" else torch.save(half, path)

    def indexed_shards(folder: Path, stem: str) -> None:
        shards(folder, stem)
        indexed(folder, stem)

    layouts = {
        "bin": lambda folder: torch.save(whole, folder / "pytorch_model.bin"),
        "tied": lambda folder: torch.save(state, folder / "pytorch_model.bin"),
        "old": lambda folder: torch.save(
            whole, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False
        ),
        "numbers": lambda folder: torch.save(
            {**whole, "loss": np.float64(1.5), "steps": np.int64(3), "log": np.arange(3)}, folder / "pytorch_model.bin"
        ),
        "no head": lambda folder: torch.save(without_head, folder / "pytorch_model.bin"),
        "safetensors": lambda folder: save_file(without_head, folder / "model.safetensors"),
        "shards": lambda folder: shards(folder, "model-*.safetensors"),
        "indexed": lambda folder: indexed_shards(folder, "part-*.safetensors"),
        "bin shards": lambda folder: indexed_shards(folder, "pytorch_model-*.bin"),
    }  # fmt: skip
    for name, write in layouts.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(official_config(made)))
        write(folder)
        opened = reopened(folder)
        torch.testing.assert_close(opened(ids), made(ids), rtol=0, atol=0, msg=name)
        (folder / "config.json").unlink()


def test_sixteen_bits_are_widened(tmp_path: Path) -> None:
    made = language_model(50).bfloat16()
    opened = reopened(write_language_model(tmp_path, made))
    assert {tensor.dtype for tensor in opened.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(opened.state_dict(), made.float().state_dict(), rtol=0, atol=0)


def test_the_files_may_go_while_the_model_is_used(tmp_path: Path) -> None:
    made = language_model(50)
    opened = reopened(write_language_model(tmp_path / "a", made))
    shutil.rmtree(tmp_path / "a")
    torch.testing.assert_close(opened(torch.tensor([[1, 2]])), made(torch.tensor([[1, 2]])), rtol=0, atol=0)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("ran").write_text, ("it ran",))


def broken(folder: Path, kind: str) -> None:
    """One thing wrong with a folder that is right."""
    made = language_model(50)
    config, state = official_config(made), {k: v.clone() for k, v in official_state(made).items()}
    weights = folder / "pytorch_model.bin"
    if kind.startswith("config:"):
        key, _, value = kind.removeprefix("config:").partition("=")
        place = config["ssm_cfg"] if key.startswith("ssm.") else config
        place[key.removeprefix("ssm.")] = json.loads(value)
    elif kind == "missing":
        del state["backbone.layers.1.norm2.weight"], state["backbone.norm_f.weight"]
    elif kind == "strange":
        state["backbone.layers.0.mlp.fc1.bias"] = torch.zeros(3)
    elif kind == "shape":
        state["backbone.layers.0.mlp.fc1.weight"] = torch.zeros(200, 48)
    elif kind == "head":
        state["lm_head.weight"][3, 3] += 1
    elif kind == "nan":
        state["backbone.layers.0.mixer.D"][0] = float("nan")
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(state | ({"x": Evil()} if kind == "evil" else {}), weights)
    if kind == "not json":
        (folder / "config.json").write_text("{")
    elif kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "list":
        (folder / "config.json").write_text("[1]")
    elif kind == "no weights":
        weights.unlink()
    elif kind == "cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif kind == "text":
        weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif kind == "shard":
        weights.rename(folder / "one.bin")
        (folder / "pytorch_model.bin.index.json").write_text(
            json.dumps({"weight_map": {"a": "one.bin", "b": "two.bin"}})
        )
    elif kind == "outside":
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("config:rms_norm=false", r"config\.json: rms_norm is False, expected True"),
        ("config:attn_layer_idx=[3]", r"attn_layer_idx is \[3\], expected \[\]"),
        ("config:ssm.layer=\"Mamba2\"", r"ssm_cfg\.layer is 'Mamba2', expected 'Mamba3'"),
        ("config:ssm.A_floor=0.1", r"ssm_cfg\.A_floor is 0\.1, expected 0\.0001"),
        ("config:ssm.d_conv=4", r"ssm_cfg has d_conv, which a Mamba-3 layer has not"),
        ("config:ssm.headdim=17", r"config\.json: ssm_cfg: expand \* d_model = 96 is not a multiple of headdim 17"),
        ("config:ssm.d_state=\"x\"", r"config\.json: d_state: "),
        ("config:ssm_cfg={}", r"names no ssm_cfg\.layer"),
        ("config:d_model=0", r"config\.json: d_model: "),
        ("config:tie_embeddings=\"false\"", r"tie_embeddings is 'false', expected true or false"),
        ("config:n_layer=1.5", r"n_layer is 1\.5, expected a whole number"),
        ("config:n_layer=3", r"missing: backbone\.layers\.2\.norm\.weight, .* and \d+ more"),
        ("config:vocab_size=70", r"backbone\.embedding\.weight: expected shape \(80, 48\), found \(64, 48\)"),
        ("missing", r"missing: backbone\.layers\.1\.norm2\.weight, backbone\.norm_f\.weight$"),
        ("strange", r"not expected: backbone\.layers\.0\.mlp\.fc1\.bias$"),
        ("shape", r"mlp\.fc1\.weight: expected shape \(256, 48\), found \(200, 48\)"),
        ("head", r"lm_head\.weight differs from backbone\.embedding\.weight, but config\.json ties them"),
        ("nan", r"backbone\.layers\.0\.mixer\.D has values that are no finite numbers"),
        ("not json", r"config\.json: the configuration is not JSON"),
        ("list", r"config\.json: the configuration is not a JSON object"),
        ("no config", r"config\.json: cannot be read"),
        ("no weights", r"found config\.json\. Expected an official Mamba-3 language model: a folder with"),
        ("cut", r"pytorch_model\.bin \(5000 bytes\) cannot be read"),
        ("text", r"pytorch_model\.bin \(43 bytes\) cannot be read"),
        ("shard", r"two\.bin is missing: pytorch_model\.bin\.index\.json names it as a part of the model"),
        ("outside", r"model\.safetensors\.index\.json: '\.\./a\.safetensors' is not the name of a file in this folder"),
        ("evil", r"pytorch_model\.bin \(\d+ bytes\) cannot be read"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_in_one_line(
    kind: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    broken(folder, kind)
    with pytest.raises(UserError, match=message) as caught:
        reopened(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("ran").exists()


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(UserError, match="there is no such folder"):
            Mamba3LanguageModel.from_pretrained(path)
