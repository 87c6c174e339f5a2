"""A model's sizes and kinds from the command line: what may be said, what may not, and that a run keeps to it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from short import changed
from tiny import tiny_model, write_checkpoint

from mamba3_jepa.cli.main import main
from mamba3_jepa.config import AngnConfig, ModelConfig, preset
from mamba3_jepa.errors import UserError
from mamba3_jepa.export.exporter import export_weights
from mamba3_jepa.files.checkpoint import load_checkpoint
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.overrides import (
    keys,
    read_model_config,
    type_name,
    values_by_key,
    with_file,
    with_overrides,
)
from mamba3_jepa.settings.export import ExportSettings
from mamba3_jepa.settings.training import Phase1Settings, Phase2Settings, Phase3Settings

SHORT = ["--tiny", "--cpu", "--synthetic-scenes", "8", "--val-samples", "12", "--batch-size", "6", "--max-steps", "1"]


def test_keys_are_set_with_the_types_they_take() -> None:
    changed = with_overrides(
        preset("tiny"),
        [
            "predictor.n_layers=3", "predictor.layer.is_mimo=true", "predictor.layer.a_activation=softplus",
            "vision.mlp_ratio=2", "recursion.knowledge_dim=5", "query_prompt=7",
        ],
    )  # fmt: skip
    layer = replace(preset("tiny").predictor.layer, is_mimo=True, a_activation="softplus")
    assert changed.predictor == replace(preset("tiny").predictor, n_layers=3, layer=layer)
    assert (changed.vision.mlp_ratio, changed.recursion.knowledge_dim) == (2.0, 5)
    assert changed.query_prompt == "7", "a text is a text, even one of digits"
    assert changed.y_encoder == preset("tiny").y_encoder
    assert with_overrides(changed, ["recursion.knowledge_dim=null"]).recursion.knowledge_dim is None
    assert with_overrides(preset("tiny"), []) == preset("tiny")
    assert with_overrides(preset("tiny"), ["embed_dim=8", "embed_dim=9"]).embed_dim == 9, "the last one counts"


def test_every_key_can_be_set_to_what_it_is() -> None:
    config = preset("mini")
    values = values_by_key(config)
    assert list(values) == list(keys())
    free = {
        key: value for key, value in values.items() if key not in ("preset", "vision.pretrained", "recursion.tools")
    }
    assert with_overrides(config, [f"{key}={json.dumps(value)}" for key, value in free.items()]) == config


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("predictor.n_layers", "expected KEY=VALUE"),
        ("predictor.n_layer=3", r"there is no predictor\.n_layer; did you mean predictor\.n_layers"),
        ("n_layers=3", r"did you mean .*y_encoder\.n_layers"),
        ("predictor=3", "predictor has keys of its own: predictor.n_layers, predictor.layer.d_model"),
        ("embed_dim=99999999999999999999", "embed_dim: "),
        ("angn.sparsity_weight=1e999", "angn.sparsity_weight"),
        ("vision.mlp_ratio=0.001", "mlp_ratio 0.001 leaves no width"),
        ("=3", "expected KEY=VALUE"),
        ("xyzzy=3", r"there is no xyzzy; `inspect --preset mini` shows all keys"),
        ("predictor.n_layers=many", r"predictor\.n_layers takes int, found many"),
        ("predictor.n_layers=1.5", r"predictor\.n_layers takes int, found 1\.5"),
        ("predictor.n_layers=true", r"predictor\.n_layers takes int, found true"),
        ("predictor.layer.is_mimo=1", r"is_mimo takes bool, found 1"),
        ("predictor.layer.is_mimo=True", r"is_mimo takes bool, found True; did you mean true"),
        ("recursion.knowledge_dim=None", r"takes int or null, found None; did you mean null"),
        ("query_prompt=  ", "query_prompt: it is empty"),
        ("predictor.layer.a_activation=softplu", r"takes heavy_tail or softplus, found softplu; did you mean softplus"),
        ("recursion.knowledge_dim=x", r"takes int or null, found x"),
        ("predictor.n_layers=0", r"n_layers: .*greater than 0"),
        ("predictor.n_layers=10001", r"n_layers: .*less than or equal to 10000"),
        ("vocab_size=300000000000000", r"vocab_size: .*less than or equal to 10000000"),
        ("angn.sparsity_weight=Infinity", r"sparsity_weight: .*finite number"),
        ("recursion.knowledge_dim=99999999999999999999", r"knowledge_dim"),
        ("vision.heads=3", "hidden_size 64 is not a multiple of heads 3"),
        ("predictor.layer.headdim=5", r"predictor\.layer: expand \* d_model = 128 is not a multiple of headdim 5"),
        ("y_encoder.layer.ngroups=3", r"y_encoder\.layer: 8 heads are not a multiple of ngroups 3"),
        ("y_decoder.layer.rope_fraction=0.7", r"y_decoder\.layer: rope_fraction is 0\.7, it must be 0\.5 or 1\.0"),
        ("y_decoder.layer.d_state=3", r"y_decoder\.layer: d_state 3 leaves no pair to rotate"),
        ("preset=mini", "preset cannot be set"),
        ("vision.pretrained=true", r"vision\.pretrained cannot be set"),
    ],
)
def test_what_cannot_be_is_named(assignment: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        with_overrides(preset("tiny"), [assignment])
    assert str(caught.value).startswith("`model`")
    assert "\n" not in str(caught.value)


def test_the_kind_of_a_key_in_words() -> None:
    kinds = {key: type_name(kind) for key, kind in keys().items()}
    assert kinds["embed_dim"] == "int"
    assert kinds["recursion.knowledge_dim"] == "int or null"
    assert kinds["y_decoder.layer.a_activation"] == "heavy_tail or softplus"


def test_sizes_that_do_not_go_together_stop_the_command(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Whoever finds it, the configuration or the layer: one line, and nothing left behind."""
    for given in ("vision.patch_size=7", "predictor.layer.headdim=48", "predictor.layer.ngroups=3", "vision.heads=5"):
        assert main(["train-jepa", *SHORT, "--model", given, "--output-dir", str(tmp_path / "run")]) == 2, given
        error = capfd.readouterr().err
        assert "Traceback" not in error
        assert not (tmp_path / "run").exists()


# --- later phases ---


@pytest.mark.parametrize(
    ("settings", "mine", "other"),
    [
        (Phase2Settings, ["y_decoder.n_layers=3", "prefix_tokens=2"], "recursion.hidden_dim=8"),
        (Phase3Settings, ["recursion.hidden_dim=8"], "y_decoder.n_layers=3"),
    ],
)
def test_a_later_phase_changes_only_what_it_builds(settings, mine: list[str], other: str) -> None:  # type: ignore[no-untyped-def]
    config = preset("tiny")
    assert settings(model=tuple(mine)).changed(config) == with_overrides(config, mine)
    for key in (other, "predictor.n_layers=3", "embed_dim=8", "query_prompt=What?"):
        with pytest.raises(UserError, match=f"another phase decides {key.partition('=')[0]}; this one builds"):
            settings(model=(key,)).changed(config)


# --- whole configurations in files ---


def write(path: Path, values: object) -> Path:
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def test_a_whole_configuration_from_a_file(tmp_path: Path) -> None:
    config = with_overrides(preset("tiny"), ["predictor.n_layers=3", "query_prompt=Was ist das? ü"])
    for values in (config.to_dict(), {"settings": {}, "model": config.to_dict()}):
        path = write(tmp_path / "config.json", values)
        assert read_model_config(path) == config
        settings = Phase1Settings(model_config=path, model=("embed_dim=8",)).resolved()
        assert (settings.preset, settings.epochs) == ("tiny", 2)
        assert settings.build_config() == config.replace(embed_dim=8)
    with pytest.raises(UserError, match="is a tiny model, not mini"):
        Phase1Settings(model_config=path, preset="mini").resolved()


def test_a_flag_and_a_key_of_the_same_contradict_each_other() -> None:
    for given, key in (
        ({"patch_size": 16}, "vision.patch_size=8"),
        ({"tokenizer": Path("tokenizer.json")}, "vocab_size=300"),
        ({"angn_sparsity_weight": 0.5}, "angn.sparsity_weight=0.1"),
        ({"angn_sparsity_weight": 0.0}, "angn.sparsity_weight=0.1"),
        ({"angn_reset_threshold": 0}, "angn.context_reset_threshold=0.5"),
        ({"angn_enabled": True}, "angn.enabled=false"),
    ):
        with pytest.raises(UserError, match=f"`model` {key.partition('=')[0]} both say it"):
            Phase1Settings(tiny=True, model=(key,), **given).resolved()
    assert Phase1Settings(tiny=True, model=("angn.enabled=true",)).resolved().build_config().angn.enabled


def test_a_text_is_no_list_of_assignments() -> None:
    with pytest.raises(UserError, match="`model` 'embed_dim=16': expected a list of KEY=VALUE texts"):
        Phase1Settings(tiny=True, model="embed_dim=16").resolved()  # type: ignore[arg-type]


def test_a_pretrained_x_encoder_is_not_replaced_by_a_random_one_in_silence(tmp_path: Path) -> None:
    config = preset("tiny").replace(vision=replace(preset("tiny").vision, pretrained=True))
    path = write(tmp_path / "config.json", {"settings": {}, "model": config.to_dict()})
    with pytest.raises(UserError, match="give that as `vit_checkpoint`, or `random_vit`"):
        Phase1Settings(model_config=path).resolved()
    assert Phase1Settings(model_config=path, random_vit=True).resolved().build_config() == preset("tiny")
    assert Phase1Settings(model_config=path, vit_checkpoint=Path("vitl.pt")).resolved().preset == "tiny"


def test_sizes_are_those_of_the_changed_model() -> None:
    settings = Phase1Settings(tiny=True, model=("vision.image_size=64",), patch_size=64, image_shift=40)
    assert settings.resolved().build_config().vision.patch_size == 64
    with pytest.raises(UserError, match="`image_shift` 20: must lie between 0 and 15"):
        Phase1Settings(tiny=True, model=("vision.image_size=16",), image_shift=20).resolved()


def test_a_flag_stands_above_a_file(tmp_path: Path) -> None:
    config = preset("tiny").replace(angn=AngnConfig(enabled=True, sparsity_weight=0.05))
    path = write(tmp_path / "config.json", config.to_dict())
    assert Phase1Settings(model_config=path).build_config().angn == config.angn
    assert Phase1Settings(model_config=path, angn_sparsity_weight=0.01).build_config().angn.sparsity_weight == 0.01


def test_the_vocabulary_of_another_run_is_no_limit_but_that_run_s_is(tmp_path: Path) -> None:
    learned = preset("tiny").replace(vocab_size=300)
    for settings in ({}, {"model": []}, {"model": ["embed_dim=32"]}, None):
        run = write(tmp_path / "run.json", {"settings": settings, "model": learned.to_dict()})
        assert read_model_config(run) == preset("tiny")
    run = write(tmp_path / "run.json", {"settings": {"model": ["vocab_size=310"]}, "model": learned.to_dict()})
    assert read_model_config(run) == preset("tiny").replace(vocab_size=310)
    assert read_model_config(write(tmp_path / "own.json", learned.to_dict())) == learned


def test_what_inspect_prints_is_a_whole_configuration(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert main(["inspect", "--preset", "mini", "--json"]) == 0
    (tmp_path / "mini.json").write_text(capfd.readouterr().out)
    assert read_model_config(tmp_path / "mini.json") == preset("mini")
    assert main(["inspect", "--preset", "tiny"]) == 0
    shown = capfd.readouterr().out
    for key in keys():
        assert key in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.pop("vision"), "vision: Field required"),
        (lambda values: values["predictor"].update(n_layer=3), r"there is no predictor\.n_layer; did you mean"),
        (lambda values: values["predictor"].update(n_layers="3"), r"predictor\.n_layers"),
        (lambda values: values["vision"].update(heads=3), "not a multiple of heads 3"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    values = preset("tiny").to_dict()
    change(values)
    path = write(tmp_path / "config.json", values)
    with pytest.raises(UserError, match=message) as caught:
        read_model_config(path)
    assert str(path) in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("predictor.n_layers: 3")
    (tmp_path / "deep.json").write_text("[" * 100_000 + "]" * 100_000)
    for path, message in (
        (tmp_path / "none.json", "cannot be read"),
        (tmp_path / "text.json", "not JSON"),
        (tmp_path / "deep.json", "not JSON"),
        (write(tmp_path / "list.json", [1]), "expected a JSON object, found list"),
    ):
        with pytest.raises(UserError, match=message):
            read_model_config(path)


def test_a_later_phase_takes_its_own_part_of_a_file_that_agrees(tmp_path: Path) -> None:
    config = preset("tiny").replace(vocab_size=300)
    decoder = replace(config.y_decoder, n_layers=4)
    vision = replace(config.vision, pretrained=True)
    path = write(tmp_path / "a.json", config.replace(y_decoder=decoder, vocab_size=512, vision=vision).to_dict())
    assert with_file(config, path, Phase2Settings.BUILT) == config.replace(y_decoder=decoder)
    other = write(tmp_path / "b.json", config.replace(embed_dim=8).to_dict())
    later = replace(config, recursion=replace(config.recursion, hidden_dim=8))
    path = write(tmp_path / "c.json", later.to_dict())
    assert with_file(config, path, Phase2Settings.BUILT, Phase2Settings.BUILT_LATER) == config
    assert with_file(config, path, Phase3Settings.BUILT) == later
    with pytest.raises(UserError, match=r"b\.json: embed_dim is 8, the checkpoint has 32: another phase decides"):
        with_file(config, other, Phase2Settings.BUILT)


# --- runs ---


def test_the_model_of_a_run_named_by_other_flags(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Keys in two places count both; a continuation may say the same in other words."""
    command = ["train-jepa", *SHORT, "--output-dir", str(tmp_path / "run")]
    assert main([*command, "--patch-size", "16", "--model", "embed_dim=16", "--model", "predictor.n_layers=1"]) == 0
    config = load_checkpoint(tmp_path / "run" / "phase1_last.pt", phase=1).config
    assert (config.embed_dim, config.predictor.n_layers, config.vision.patch_size) == (16, 1, 16)
    longer = changed(command, ["--resume", "--max-steps", "2"])
    assert main([*longer, "--model-config", str(tmp_path / "run" / "config.json")]) == 0
    same = ["embed_dim=16", "predictor.n_layers=1", "vision.patch_size=8"]
    assert main([*longer, "--model", *same]) == 2
    assert "vision.patch_size 16 -> 8" in " ".join(capfd.readouterr().err.split())


def test_a_mimo_predictor_is_trained_saved_loaded_and_exported(tmp_path: Path) -> None:
    given = ["--model", "predictor.layer.is_mimo=true", "predictor.layer.mimo_rank=2", "predictor.n_layers=1"]
    assert main(["train-jepa", *SHORT, *given, "--output-dir", str(tmp_path / "run")]) == 0
    path = tmp_path / "run" / "phase1_best.pt"
    model = Mamba3Jepa.from_checkpoint(path)
    assert model.config.predictor == with_overrides(preset("tiny"), given[1:]).predictor
    written = json.loads((tmp_path / "run" / "config.json").read_text())["model"]
    assert ModelConfig.from_dict(written) == model.config
    report = export_weights(ExportSettings(checkpoint=path, output=tmp_path / "weights", verify=True))
    assert all(difference.ok for difference in report.differences)


def test_a_run_goes_on_with_the_model_it_was_started_with(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    phase1 = write_checkpoint(tmp_path / "phase1.pt", tiny_model(), 1)
    command = ["train-decoder", *SHORT, "--phase1-checkpoint", str(phase1), "--output-dir", str(tmp_path / "run")]
    assert main([*command, "--model", "y_decoder.n_layers=1"]) == 0
    assert main([*command, "--model", "y_decoder.n_layers=2", "--resume"]) == 2
    said = " ".join(capfd.readouterr().err.split())
    assert "another model configuration (y_decoder.n_layers 1 -> 2)" in said
    assert "Resume with the first run's, --model y_decoder.n_layers=1, or choose another --output-dir" in said
    assert main([*command, "--model", "prefix_tokens=4", "y_decoder.n_layers=1", "--resume"]) == 0, "the same model"
    assert main(changed(command, ["--resume", "--max-steps", "2"])) == 0, "the model stays what it is"
    checkpoint = load_checkpoint(tmp_path / "run" / "phase2_last.pt", phase=2)
    assert checkpoint.config.y_decoder.n_layers == 1
    assert checkpoint.trainer is not None
    assert checkpoint.trainer["position"]["step"] == 2
    assert main([*command, "--model", "predictor.n_layers=1"]) == 2
    assert "another phase decides predictor.n_layers" in " ".join(capfd.readouterr().err.split())


def test_a_flag_of_phase_3_stands_above_a_file(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    phase2 = write_checkpoint(tmp_path / "phase2.pt", tiny_model(2), 2)
    file = write(tmp_path / "config.json", tiny_model(2).config.to_dict())
    command = ["train-agent", *SHORT, "--phase2-checkpoint", str(phase2), "--output-dir", str(tmp_path / "run")]
    assert main([*command, "--knowledge-dim", "5", "--model-config", str(file)]) == 2
    assert "--knowledge-dim 5: " in " ".join(capfd.readouterr().err.split())
