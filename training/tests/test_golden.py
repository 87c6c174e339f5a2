"""A reader in numpy, written from WEIGHT_MAPPING.md, against the golden files and the commands' own answers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy_reader import Layer, Reader, layer_norm, linear, sigmoid
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_export import ANSWERS, QUESTIONS, build, export, save

from mamba3_jepa.config import BACKBONES, preset
from mamba3_jepa.data.images import load_image
from mamba3_jepa.export.golden import GOLDEN_NAMES
from mamba3_jepa.export.reader import load_exported
from mamba3_jepa.inference.answerer import Answerer
from mamba3_jepa.inference.memory import KnowledgeMemory
from mamba3_jepa.models.key_map import COMPONENTS

_PREDICTORS: dict[str, dict[str, Any]] = {
    "picture first": {"order": "visual_question", "pooling": "all"},
    "question first": {"order": "question_visual", "pooling": "last"},
    "question twice": {"order": "question_visual_question", "pooling": "question"},
    "attention": {"order": "question_visual_question", "pooling": "attention"},
    "bidirectional": {"bidirectional": True},
    "pooled": {"visual_pool": 2},
}


def _variants(name: str) -> dict[str, Any]:
    """Changes to the configuration that reach every branch of a layer."""
    tiny = preset("tiny")
    if name == "vjepa2.1":
        return {"vision": dataclasses.replace(tiny.vision, heads=2, kind=name)}
    if name in _PREDICTORS:
        return {"predictor": dataclasses.replace(tiny.predictor, **_PREDICTORS[name])}
    if name == "mlps":
        return {each: dataclasses.replace(getattr(tiny, each), mlp_dim=100) for each in BACKBONES}
    if name != "variants":
        return {}

    def changed(component: str, **changes: object) -> object:
        backbone = getattr(tiny, component)
        return dataclasses.replace(backbone, layer=dataclasses.replace(backbone.layer, **changes))

    return {
        "predictor": changed("predictor", is_mimo=True, mimo_rank=3, ngroups=2, rope_fraction=1.0),
        "y_encoder": changed("y_encoder", is_outproj_norm=True, ngroups=4, a_activation="softplus", rope_fraction=1.0),
        "y_decoder": changed("y_decoder", is_mimo=True, mimo_rank=2, is_outproj_norm=True),
        "vision": dataclasses.replace(tiny.vision, heads=2),
    }


@pytest.fixture(scope="module", params=["float32", "bfloat16", "variants", "vjepa2.1", "mlps", *_PREDICTORS])
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    folder = tmp_path_factory.mktemp(request.param)
    dtype = "bfloat16" if request.param == "bfloat16" else "float32"
    checkpoint = save(build(**_variants(request.param)), folder / "phase3.pt", 3)
    export(checkpoint, folder / "weights", golden=True, x_encoder=True, dtype=dtype)
    return Reader(folder / "weights")


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())


def ids_of(golden: dict[str, np.ndarray], prefix: str, b: int) -> list[int]:
    return golden[f"{prefix}ids"][b][golden[f"{prefix}mask"][b] == 1].astype(int).tolist()


def test_golden_x_encoder(reader: Reader) -> None:
    golden = reader.read("golden/x_encoder.safetensors")
    for image_u8, pixels, visual_tokens in zip(
        golden["image_u8"], golden["pixels"], golden["visual_tokens"], strict=True
    ):
        close(reader.pixels(image_u8), pixels)
        close(reader.visual_tokens(pixels), visual_tokens)
    pooled = reader.model["predictor"].get("visual_pool", 1) > 1
    assert ("pooled_visual_tokens" in golden) == pooled
    if pooled:
        assert golden["pooled_visual_tokens"].shape[1] == 4
        close(reader.look(golden["pixels"][0]), golden["pooled_visual_tokens"][0])
    assert golden["clip"].shape == (1, 4, 3, 24, 40)
    close(reader.visual_tokens(golden["clip"][0]), golden["clip_visual_tokens"][0])


def test_golden_predictor(reader: Reader) -> None:
    golden = reader.read("golden/predictor.safetensors")
    for b, has_image in enumerate(golden["has_image"]):
        visual = golden["visual_tokens"][b] if has_image else None
        hidden, pooled = reader.predicted(visual, ids_of(golden, "query_", b), reader.backbone("predictor"))
        close(hidden, golden["hidden"][b, : len(hidden)])
        assert golden["mask"][b].sum() == len(hidden)
        close(pooled, golden["pooled"][b])
        close(reader.embedded(pooled), golden["embedding"][b])
    assert golden["has_image"].tolist() == [1, 0]
    assert golden["query_mask"].min() == 0  # one of the two is padded


def test_golden_layer_in_detail(reader: Reader) -> None:
    for component in ("predictor", "y_encoder", "y_decoder"):
        golden = reader.read(f"golden/{component}.safetensors")
        config = reader.model[component]["layer"]
        layer = Layer(reader.w, f"{component}.layers.0.", config, reader.constants)
        for t, u in enumerate(golden["layer0.u"]):
            close(layer(u), golden["layer0.out"][t])
            close(layer.h, golden["layer0.state.h"][t])
            close(layer.K, golden["layer0.state.k"][t])
            close(layer.V, golden["layer0.state.v"][t])
            close(np.cos(layer.theta), np.cos(golden["layer0.state.theta"][t]))
        assert t == 3


def test_golden_y_encoder(reader: Reader) -> None:
    golden = reader.read("golden/y_encoder.safetensors")
    for b in range(len(golden["ids"])):
        ids = ids_of(golden, "", b)
        close(reader.text_embedding(ids), golden["embedding"][b])
        if b == 0:
            backbone = reader.backbone("y_encoder")
            hidden = np.stack([backbone(token) for token in reader.w["y_encoder.embedding.weight"][ids]])
            close(hidden, golden["step.hidden"][: len(hidden)])
    assert np.abs(golden["step.layers.0"] - golden["layers.1.input"][0]).max() < 1e-4


def test_golden_angn(reader: Reader) -> None:
    golden, angn = reader.read("golden/angn.safetensors"), reader.model["angn"]
    for i in range(2):
        x = golden[f"gates.{i}.input"]
        gate = sigmoid(reader.w[f"angn.gates.{i}.weight"] * x + reader.w[f"angn.gates.{i}.bias"])
        close(x * gate, golden[f"gates.{i}.output"])
        assert x.shape == (4, 64)
    inputs = reader.read("golden/predictor.safetensors")
    average = None
    for n, samples in enumerate(([0, 1], [0])):  # a pass over both, then one over the first alone
        activity: list[list[float]] = [[], []]
        for b in samples:
            backbone = reader.backbone("predictor")
            visual = inputs["visual_tokens"][b] if inputs["has_image"][b] else None
            reader.predicted(visual, ids_of(inputs, "query_", b), backbone)
            for i in range(2):
                activity[i] += backbone.activity[i]
        mean = np.array([np.mean(row) for row in activity])
        decay = angn["ema_decay"]
        average = mean if average is None else decay * average + (1 - decay) * mean
        close(mean, golden["activity"][n])
        close(average, golden["activity_ema"][n])
        due = average.mean() < angn["context_reset_threshold"]
        assert due == golden["context_reset_due"][n]


def test_golden_y_decoder(reader: Reader) -> None:
    golden = reader.read("golden/y_decoder.safetensors")
    prefix = linear(golden["embedding"], reader.w, "y_decoder.embed_to_prefix")
    close(prefix.reshape(2, reader.model["prefix_tokens"], -1), golden["prefix"])
    backbone = reader.speaker(golden["embedding"][0])
    for i, layer in enumerate(backbone.layers):
        close(layer.h, golden[f"prefill.{i}.h"][0])
    stepped = np.stack([reader.logits(backbone, int(token)) for token in golden["ids"][0]])
    close(stepped, golden["logits"][0])
    close(stepped, golden["step.logits"])
    for b in range(2):
        for name, beams in (("greedy", 1), ("beam", 4)):
            ids, logs = reader.spoken(golden["embedding"][b], beams)
            assert ids == golden[f"{name}_ids.{b}"].astype(int).tolist()
            close(np.array(logs), golden[f"{name}_log_probs.{b}"])


def test_golden_recursion(reader: Reader) -> None:
    golden = reader.read("golden/recursion.safetensors")
    probe, eps = "recursion.confusion_probe", reader.constants["confusion_probe_layer_norm_eps"]
    close(layer_norm(golden["pooled"], reader.w, f"{probe}.norm", eps), golden["normed"])
    decay = reader.model["recursion"]["ema_decay"]
    for b, pooled in enumerate(golden["pooled"]):
        doubt = reader.doubt(golden["embedding"][b])
        close(doubt, golden["doubt"][b])
        score, _ = reader.confusion(pooled, doubt)
        close(np.array(score), golden["score"][b])
        close(np.array(decay * 0.25 + (1 - decay) * score), golden["smoothed_score"][b])
        injected = reader.injected(pooled, golden["knowledge"][b])
        close(injected, golden["injected"][b])
        close(reader.embedded(injected), golden["embedding_injected"][b])
        for name in ("question", "text"):
            close(reader.tower(name, golden[f"{name}_embedding"][b]), golden[f"retriever_{name}"][b])
    assert np.abs(golden["embedding_injected"] - golden["embedding"]).max() > 1e-3


MEMORY = ["a red circle", "the square is blue", "größer als 😀"]


@pytest.mark.parametrize("confused", [False, True])
def test_the_same_answers_as_the_commands(reader: Reader, confused: bool) -> None:
    """Pictures, questions, confusion, memory and its floor, nearest answers, spoken text and confidence."""
    images = load_file(reader.folder / "golden" / "images.safetensors")
    names = ["shape-wide", "png-rgba", "exif-png-7", None]
    model = load_exported(reader.folder)
    assert model.recursion is not None
    threshold, floor = model.recursion.confusion_probe.threshold, model.recursion.memory_floor
    threshold.fill_(0.0 if confused else 1.0)
    reader.w["recursion.confusion_probe.threshold"] = np.array(float(threshold))
    memory = KnowledgeMemory.build(model, MEMORY)
    found = [load_image(images[f"image.{name}.file"].numpy().tobytes()) if name else None for name in names]
    questions = [*QUESTIONS, None, "  <eos> größer?"]
    best = [reader.found(question, np.zeros(0), MEMORY)[1] for question in questions if question is not None]
    floor.fill_((min(best) + max(best)) / 2)  # between the questions: some find something, some do not
    reader.w["recursion.memory_floor"] = np.array(float(floor))
    answers = Answerer(model, memory, reader.config["answers"], top=2).ask_many(found, questions)
    for name, question, expected in zip(names, questions, answers, strict=True):
        pixels = None if name is None else images[f"image.{name}.pixels"].numpy()
        reply = reader.ask(pixels, question, MEMORY, top=2)
        assert (reply.text, reply.memory_used) == (expected.text, expected.memory_used)
        assert reply.confused is expected.confused is confused
        assert [text for text, _ in reply.nearest] == [text for text, _ in expected.nearest]
        for mine, its in zip(reply.nearest, expected.nearest, strict=True):
            assert mine[1] == pytest.approx(its[1], abs=1e-5)
        assert reply.confidence == pytest.approx(expected.confidence, rel=1e-4)
        assert reply.confusion == pytest.approx(expected.confusion, rel=1e-4)
    assert {answer.memory_used is None for answer in answers} == ({True, False} if confused else {True})


def test_answers_without_decoder(tmp_path: Path) -> None:
    export(save(build(), tmp_path / "phase1.pt", 1), tmp_path / "weights", x_encoder=True)
    reader = Reader(tmp_path / "weights")
    expected = Answerer(load_exported(reader.folder), known_answers=reader.config["answers"]).ask(None, QUESTIONS[0])
    reply = reader.ask(None, QUESTIONS[0], [], top=5)
    assert reply.text == expected.text in ANSWERS
    assert reply.confidence == pytest.approx(expected.confidence, rel=1e-4)


def test_golden_files_describe_themselves(reader: Reader) -> None:
    folder = reader.folder
    names = {path.stem for path in (folder / "golden").iterdir()}
    assert {path.stem for path in folder.glob("*.safetensors")} == set(COMPONENTS)
    assert names == {*COMPONENTS, "images", "tokens"} == set(GOLDEN_NAMES)
    for name in names:
        with safe_open(folder / "golden" / f"{name}.safetensors", framework="np") as file:
            metadata = file.metadata()
            dtypes = {file.get_slice(key).get_dtype() for key in sorted(file.keys())}
            assert set(json.loads(metadata["tensors"])) == set(file.keys())
        assert (metadata["format"], metadata["component"]) == ("mamba3-jepa-golden", name)
        assert dtypes <= {"F32", "I64", "U8"}  # what readers in other languages have
