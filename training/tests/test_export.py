"""Export: what is written, that it is strict both ways, and that a reader without this code gets the same numbers."""

from __future__ import annotations

import json
import os
import resource
import runpy
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_export import ANSWERS, QUESTIONS, build, export, save

from mamba3_jepa.cli.main import main
from mamba3_jepa.config import AngnConfig, RecursionConfig, preset
from mamba3_jepa.errors import UserError
from mamba3_jepa.export import exporter
from mamba3_jepa.export.mapping_doc import mapping_document
from mamba3_jepa.export.reader import load_exported
from mamba3_jepa.export.writer import write_component
from mamba3_jepa.models.key_map import COMPONENTS, key_map
from mamba3_jepa.models.vljepa import Mamba3Jepa

_PROJECTION = "y_encoder.projection.weight"


@pytest.fixture(scope="module")
def model() -> Mamba3Jepa:
    return build()


@pytest.fixture(scope="module")
def checkpoints(model: Mamba3Jepa, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {phase: save(model, folder / f"phase{phase}.pt", phase) for phase in (1, 2, 3)}


@pytest.fixture(scope="module")
def exported(checkpoints: dict[int, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole export, never changed by a test."""
    folder = tmp_path_factory.mktemp("exported") / "weights"
    export(checkpoints[3], folder, x_encoder=True, golden=True, verify=True)
    return folder


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    """One that a test may damage."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- the files ---


def test_a_part_the_model_lacks_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the model has no angn"):
        write_component(build(angn=False), "angn", tmp_path / "angn.safetensors", phase=1)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_library_reads_what_was_written(model: Mamba3Jepa, tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "recursion.safetensors"
    write_component(model, "recursion", path, phase=3, dtype=dtype)  # type: ignore[arg-type]
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
    assert {name: metadata[name] for name in ("format", "format_version", "component", "phase", "dtype")} == {
        "format": "mamba3-jepa", "format_version": "2", "component": "recursion", "phase": "3", "dtype": dtype,
    }  # fmt: skip
    assert json.loads(metadata["config"]) == model.config.to_dict()
    state = model.state_dict()
    assert set(tensors) == {name for name in state if name.startswith("recursion.")}
    for name, tensor in tensors.items():
        matrix = name.endswith((".hidden.weight", ".linear.weight", ".projection.weight", ".output.weight"))
        assert tensor.dtype == (getattr(torch, dtype) if matrix else torch.float32), name
        assert torch.equal(tensor, state[name].to(tensor.dtype)), name
    assert [item.name for item in tmp_path.iterdir()] == ["recursion.safetensors"]


def test_the_same_weights_give_the_same_bytes(model: Mamba3Jepa, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_component(model, "predictor", tmp_path / name, phase=1)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_phases_add_up(checkpoints: dict[int, Path], tmp_path: Path) -> None:
    first, second = {"predictor", "y_encoder", "angn"}, {"predictor", "y_encoder", "angn", "y_decoder"}
    for checkpoint_phase, phase, expected in ((1, None, first), (3, 1, first), (2, 2, second), (3, 2, second),
                                              (3, None, second | {"recursion"})):  # fmt: skip
        folder = tmp_path / f"{checkpoint_phase}-{phase}"
        report = export(checkpoints[checkpoint_phase], folder, phase=phase)
        names = {f"{name}.safetensors" for name in expected}
        assert {path.name for path in folder.iterdir()} == names | {"config.json", "tokenizer.json"}
        assert {file.path.name for file in report.files} == names
    with pytest.raises(UserError, match=r"phase 1 checkpoint: `phase` 3 needs one of phase 3, which train_agent\.py"):
        export(checkpoints[1], tmp_path / "none", phase=3)
    assert not (tmp_path / "none").exists()


def test_no_gates_no_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    report = export(save(build(angn=False), tmp_path / "c.pt", 1), tmp_path / "out")
    assert [file.path.name for file in report.files] == ["predictor.safetensors", "y_encoder.safetensors"]
    assert "ANGN is off" in caplog.text
    assert "X-Encoder has random weights" in caplog.text


def test_what_an_earlier_export_left_is_removed(checkpoints: dict[int, Path], copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    report = export(checkpoints[1], copy, phase=1)
    gone = {"y_decoder.safetensors", "recursion.safetensors", "x_encoder.safetensors"}
    assert {path.name for path in report.removed if path.parent == copy} == gone
    assert {path.name for path in copy.iterdir() if path.is_file()} == {
        "predictor.safetensors", "y_encoder.safetensors", "angn.safetensors", "config.json", "tokenizer.json",
        "notes.txt",
    }  # fmt: skip
    assert list((copy / "golden").iterdir()) == []  # they belonged to other weights


def test_files_that_no_export_wrote_stay(checkpoints: dict[int, Path], tmp_path: Path) -> None:
    (tmp_path / "recursion.safetensors").write_text("mine")
    export(checkpoints[2], tmp_path)
    assert (tmp_path / "recursion.safetensors").read_text() == "mine"
    (tmp_path / "config.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="not free for an export"):
        export(checkpoints[2], tmp_path)
    assert (tmp_path / "config.json").read_text() == '{"a": 1}'


@pytest.mark.parametrize("obstacle", ["golden", "y_decoder.safetensors"])
def test_an_export_that_cannot_be_placed_leaves_the_earlier_one(
    checkpoints: dict[int, Path], tmp_path: Path, obstacle: str
) -> None:
    export(checkpoints[1], tmp_path, phase=1)
    if obstacle == "golden":
        (tmp_path / obstacle).write_text("in the way")
    else:
        (tmp_path / obstacle).mkdir()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(UserError, match=obstacle):
        export(checkpoints[2], tmp_path, golden=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_changed_tokenizer_is_noticed(copy: Path) -> None:
    values = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = values["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (copy / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"tokenizer.json has changed since the export"):
        load_exported(copy)


@pytest.mark.parametrize(
    ("field", "value"), [("phase", "3"), ("phase", 9), ("dtype", "float8"), ("files", []), ("tokenizer", None)]
)
def test_an_edited_config_is_an_error(copy: Path, field: str, value: object) -> None:
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(values | {field: value}))
    with pytest.raises(UserError, match=r"config.json"):
        load_exported(copy)


def test_config_json_says_what_a_reader_needs(exported: Path, model: Mamba3Jepa) -> None:
    values = json.loads((exported / "config.json").read_text())
    assert values["model"] == model.config.to_dict()
    assert values["tokens"] == {"pad": 0, "bos": 1, "eos": 2}
    assert values["constants"] == {
        "norm_eps": 1e-5, "A_floor": 1e-4, "normalize_eps": 1e-6, "x_encoder_layer_norm_eps": 1e-6,
        "confusion_probe_layer_norm_eps": 1e-5,
    }  # fmt: skip
    assert values["metrics"] == {"val/loss": 0.5, "val/undefined": None}  # NaN is not JSON
    assert values["format_version"] == 2
    assert values["answers"] == ANSWERS
    assert values["generation"] == {"max_tokens": 31}
    assert values["classify"] == {"temperature": 0.07, "template": "{}"}
    assert values["memory"]["format"] == "mamba3-jepa memory"
    assert values["data"] == {"source": "synthetic scenes", "synthetic": True}
    assert (exported / "tokenizer.json").read_text() == model.tokenizer.to_json()


def test_config_json_of_an_earlier_phase(checkpoints: dict[int, Path], tmp_path: Path) -> None:
    """Also of a later checkpoint: what is not exported is not described."""
    for checkpoint_phase, phase, generates in ((3, 1, False), (2, 2, True)):
        export(checkpoints[checkpoint_phase], tmp_path / str(phase), phase=phase)
        values = json.loads((tmp_path / str(phase) / "config.json").read_text())
        assert ("generation" in values) == generates
        assert "confusion_probe_layer_norm_eps" not in values["constants"]


# --- the way back ---


def test_a_key_that_nobody_knows_is_said(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_exported(copy)
    assert "not known" not in caplog.text, "an export's own keys are known"
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(values | {"notes": "mine", "b": 1}))
    load_exported(copy)
    assert f"{copy / 'config.json'}: not known to this version, and ignored: b, notes" in caplog.text


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 1e-6), ("float16", 4e-3), ("bfloat16", 3e-2)])
def test_reloaded_embeddings(
    model: Mamba3Jepa, checkpoints: dict[int, Path], tmp_path: Path, dtype: str, allowed: float
) -> None:
    report = export(checkpoints[3], tmp_path, dtype=dtype, verify=True, x_encoder=True)
    assert {difference.output for difference in report.differences} == {
        "predicted embedding", "pooled state", "text embedding", "decoder logits", "confusion score",
        "confusion threshold", "memory floor", "injected state", "doubt of the answer", "question embedding",
        "retriever's question", "retriever's text", "episode floor", "episode scores", "answer in the knowledge",
    }  # fmt: skip
    assert all(difference.ok for difference in report.differences)
    reloaded = load_exported(tmp_path)
    assert {parameter.dtype for parameter in reloaded.parameters()} == {torch.float32}
    expected, actual = (m.embed([None, None], QUESTIONS) for m in (model, reloaded))
    largest = (expected - actual).abs().max().item()
    assert largest <= allowed
    assert all(difference.largest <= 1e-6 for difference in report.differences)
    rounding = {difference.output: difference.rounding for difference in report.differences}
    assert rounding["memory floor"] == rounding["confusion threshold"] == 0  # always float32
    if dtype == "float32":
        assert all(torch.equal(tensor, reloaded.state_dict()[name]) for name, tensor in model.state_dict().items())
        assert not any(rounding.values())
    else:
        assert largest > 0  # the weights were rounded
        assert rounding["predicted embedding"] > 0


def test_knowledge_of_another_length(tmp_path: Path) -> None:
    model = build(recursion=RecursionConfig(hidden_dim=8, knowledge_dim=5))
    report = export(save(model, tmp_path / "c.pt", 3), tmp_path / "out", verify=True, golden=True)
    assert all(difference.ok for difference in report.differences)
    assert load_file(tmp_path / "out" / "golden" / "recursion.safetensors")["knowledge"].shape == (2, 5)


def test_an_x_encoder_is_demanded(model: Mamba3Jepa, checkpoints: dict[int, Path], tmp_path: Path) -> None:
    export(checkpoints[2], tmp_path)
    with pytest.raises(UserError, match=r"no x_encoder\.safetensors: give load_exported the X-Encoder"):
        load_exported(tmp_path)
    reloaded = load_exported(tmp_path, x_encoder=model.x_encoder)
    assert reloaded.recursion is None
    assert torch.equal(model.embed([None], QUESTIONS[:1]), reloaded.embed([None], QUESTIONS[:1]))


def _rewrite(path: Path, change: Any) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def _wrong_shape(tensors: dict, _: dict) -> None:
    tensors["predictor.final_norm.weight"] = torch.ones(3)


def _wrong_dtype(tensors: dict, _: dict) -> None:
    tensors["predictor.final_norm.weight"] = tensors["predictor.final_norm.weight"].half()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("predictor.layers.0.D"), r"missing from the file: predictor\.layers\.0\.D"),
        (lambda t, m: t.update(extra=torch.ones(1)), "not in the key map: extra"),
        (_wrong_dtype, r"final_norm\.weight: expected torch\.float32, found torch\.float16"),
        (lambda t, m: t["predictor.pred_head.bias"].add_(1), "has changed since the export: its SHA-256"),
        (_wrong_shape, "has changed since the export"),
        (lambda t, m: m.update(format_version="1"), "export format 1, but config.json beside it says 2"),
        (lambda t, m: m.update(format="other"), "not a file of a Mamba3-JEPA export"),
        (lambda t, m: m.update(component="y_encoder"), "holds 'y_encoder', not 'predictor'"),
        (lambda t, m: m.update(config=json.dumps(preset("mini").to_dict())), "belongs to another model"),
    ],
)
def test_tampered_files(copy: Path, change: Any, message: str) -> None:
    _rewrite(copy / "predictor.safetensors", change)
    with pytest.raises(UserError, match=rf"predictor\.safetensors.*{message}"):
        load_exported(copy)


def _as_version_1(folder: Path) -> None:
    """What the exporter wrote before there was a memory floor."""
    config = json.loads((folder / "config.json").read_text())
    for name in config["files"]:
        _rewrite(folder / name, lambda t, m: (t.pop("recursion.memory_floor", None), m.update(format_version="1")))
        config["files"][name] = exporter._entry(folder / name)
    for key in ("answers", "classify", "memory", "generation"):
        del config[key]
    config |= {"format_version": 1, "constants": {"norm_eps": 1e-5, "A_floor": 1e-4, "layer_norm_eps": 1e-5}}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_folder_of_version_1(model: Mamba3Jepa, copy: Path) -> None:
    _as_version_1(copy)
    reloaded = load_exported(copy)
    assert reloaded.recursion is not None
    assert float(reloaded.recursion.memory_floor) == -1
    assert torch.equal(model.embed([None], QUESTIONS[:1]), reloaded.embed([None], QUESTIONS[:1]))
    _rewrite(copy / "angn.safetensors", lambda t, m: m.update(format_version="2"))
    with pytest.raises(UserError, match=r"angn\.safetensors has export format 2, but config\.json beside it says 1"):
        load_exported(copy)


def test_wrong_shape_with_a_digest_to_match(copy: Path) -> None:
    _rewrite(copy / "predictor.safetensors", _wrong_shape)
    config = json.loads((copy / "config.json").read_text())
    config["files"]["predictor.safetensors"] = exporter._entry(copy / "predictor.safetensors")
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"final_norm\.weight: expected shape \(64,\), found \(3,\)"):
        load_exported(copy)


@pytest.mark.parametrize("cut", [0, 5, 200, -1])
def test_truncated_file(copy: Path, cut: int) -> None:
    path = copy / "y_encoder.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"y_encoder\.safetensors is not a safetensors file, or was cut short"):
        load_exported(copy)


def test_missing_or_foreign_config(copy: Path) -> None:
    config = copy / "config.json"
    values = json.loads(config.read_text())
    for changed, message in (
        ({**values, "phase": 1}, "export of phase 1 has angn, predictor, y_encoder; this one lists"),
        ({**values, "format_version": 7}, "export format 7; this version reads 1 and 2"),
        ({name: values[name] for name in values if name != "answers"}, "lacks answers, which export format 2 has"),
        ({"model_type": "bert"}, r"not the config\.json of a Mamba3-JEPA export"),
    ):
        config.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=message):
            load_exported(copy)
    config.write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        load_exported(copy)
    config.unlink()
    with pytest.raises(UserError, match="there is no such file"):
        load_exported(copy)


# --- what cannot be written ---


def test_values_that_do_not_fit(tmp_path: Path) -> None:
    model, path = build(), tmp_path / "predictor.safetensors"
    with torch.no_grad():
        model.predictor.vision_proj.weight[3, 4] = -70_000
    with pytest.raises(UserError, match=r"vision_proj\.weight has a value of 7e\+04, too large for float16"):
        write_component(model, "predictor", path, phase=1, dtype="float16")
    write_component(model, "predictor", path, phase=1, dtype="bfloat16")
    before = path.read_bytes()
    with torch.no_grad():
        model.predictor.vision_proj.weight[3, 4] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        write_component(model, "predictor", path, phase=1)
    assert path.read_bytes() == before


def test_folders_that_cannot_be_written(checkpoints: dict[int, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (Path("/proc/nowhere"), tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=rf"cannot write to the export folder {output}"):
            export(checkpoints[1], output)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_is_no_file_stays(checkpoints: dict[int, Path], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer\.json is not a file, where a file is to go"):
        export(checkpoints[1], tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_fifo()] == ["tokenizer.json"]
    assert len(list(tmp_path.iterdir())) == 1


def test_full_disk_leaves_the_earlier_export(checkpoints: dict[int, Path], copy: Path, tmp_path: Path) -> None:
    """A file-size limit stands in for the full disk; it stops the second file, not the first."""
    before = contents(copy)
    sizes = [len(before[f"{name}.safetensors"]) for name in ("predictor", "y_encoder")]
    assert sizes[0] < sizes[1]
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[0] + 100, limit[1]))
        for output in (copy, tmp_path / "new"):
            with pytest.raises(UserError, match=r"cannot write .*y_encoder\.safetensors: File too large"):
                export(checkpoints[3], output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert contents(copy) == before
    assert not (tmp_path / "new").exists()


def test_a_failed_verification_publishes_nothing(
    checkpoints: dict[int, Path], copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    before = contents(copy)
    right = exporter.write_component

    def swapped(model: Mamba3Jepa, component: str, path: Path, **settings: Any) -> Any:
        written = right(model, component, path, **settings)
        if component == "y_encoder":
            _rewrite(path, lambda tensors, _: tensors.update({_PROJECTION: tensors[_PROJECTION].roll(1, 0)}))
        return written

    monkeypatch.setattr(exporter, "write_component", swapped)
    assert main(["export", "--checkpoint", str(checkpoints[1]), "--output", str(copy), "--verify"]) == 2
    assert f"differs from the checkpoint in {_PROJECTION}. Nothing was exported." in capsys.readouterr().err
    assert contents(copy) == before


# --- the document and the commands ---


def test_weight_mapping_is_up_to_date() -> None:
    committed = (Path(__file__).parents[1] / "WEIGHT_MAPPING.md").read_text()
    assert committed == mapping_document(), "run: python -m mamba3_jepa.export.mapping_doc"
    config = preset("small").replace(angn=AngnConfig(enabled=True))
    for component in COMPONENTS:
        for key in key_map(component, config):
            assert committed.count(f"\n| `{key}` | ") in (1, 2), key  # 2: keys without a layer are also patterns
    assert "| `predictor.layers.11.in_proj.weight` | 4480 x 1024 | F32 | F16 / BF16 |" in committed
    assert "| `predictor.layers.0.B_bias` | 32 x 1 x 128 | F32 | F32 |" in committed


def test_the_users_command(
    checkpoints: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """python -m utils.export_weights --checkpoint ... --output weights/ --phase 2"""
    arguments = ["--checkpoint", str(checkpoints[2]), "--output", str(tmp_path / "weights"), "--phase"]
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    for phase, status in (("2", 0), ("3", 2)):
        monkeypatch.setattr(sys, "argv", ["export_weights", *arguments, phase])
        with pytest.raises(SystemExit) as left:
            runpy.run_module("utils.export_weights", run_name="__main__")
        assert left.value.code == status
    assert (tmp_path / "weights" / "y_decoder.safetensors").is_file()
    shown = capsys.readouterr()
    assert "y_decoder.safetensors" in shown.out
    assert "--phase 3 needs one of phase 3" in shown.err
