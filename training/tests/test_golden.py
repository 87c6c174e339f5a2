"""A reader in another language: numpy, the exported files and WEIGHT_MAPPING.md, against the golden files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_export import build, export, save

from mamba3_jepa.export.golden import GOLDEN_NAMES
from mamba3_jepa.export.key_map import COMPONENTS
from mamba3_jepa.export.reader import load_exported


def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


class NumpyLayer:
    """One Mamba-3 layer, a token at a time."""

    def __init__(self, w: dict[str, np.ndarray], prefix: str, config: dict) -> None:
        self.w = {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}
        self.N, self.P = config["d_state"], config["headdim"]
        self.H = config["d_model"] * config["expand"] // self.P
        self.S = int(self.N * config["rope_fraction"]) // 2
        self.theta, self.h = np.zeros((self.H, self.S)), np.zeros((self.H, self.P, self.N))
        self.K, self.V = np.zeros((self.H, self.N)), np.zeros((self.H, self.P))

    def rotate(self, x: np.ndarray) -> np.ndarray:
        a, b, x = x[:, 0 : 2 * self.S : 2], x[:, 1 : 2 * self.S : 2], x.copy()
        cos, sin = np.cos(self.theta), np.sin(self.theta)
        x[:, 0 : 2 * self.S : 2], x[:, 1 : 2 * self.S : 2] = a * cos - b * sin, a * sin + b * cos
        return x

    def __call__(self, u: np.ndarray) -> np.ndarray:
        H, P, N, w = self.H, self.P, self.N, self.w
        sizes = np.cumsum([H * P, H * P, N, N, H, H, H])
        z, x, b, c, dd_dt, dd_a, trap, angle = np.split(w["in_proj.weight"] @ u, sizes)
        dt = np.log1p(np.exp(dd_dt + w["dt_bias"]))
        rate = np.where(dd_a >= 0, 1 + dd_a, 1 / (1 - np.minimum(dd_a, 0)))
        alpha, lam = np.exp(-np.maximum(rate, 1e-4) * dt), sigmoid(trap)
        self.theta = self.theta + dt[:, None] * np.pi * np.tanh(angle)
        K = self.rotate(rms(b, w["B_norm.weight"]) + w["B_bias"][:, 0])
        Q = self.rotate(rms(c, w["C_norm.weight"]) + w["C_bias"][:, 0])
        V = x.reshape(H, P)
        before = ((1 - lam) * dt)[:, None, None] * self.V[:, :, None] * self.K[:, None]
        now = (lam * dt)[:, None, None] * V[:, :, None] * K[:, None]
        self.h, self.K, self.V = alpha[:, None, None] * (self.h + before) + now, K, V
        y = (self.h @ Q[:, :, None])[:, :, 0] + w["D"][:, None] * V
        return w["out_proj.weight"] @ (y.reshape(-1) * z * sigmoid(z))


class NumpyBackbone:
    def __init__(self, w: dict[str, np.ndarray], component: str, config: dict, gates: dict | None = None) -> None:
        self.w, self.name, self.gates = w, component, gates
        self.layers = [NumpyLayer(w, f"{component}.layers.{i}.", config["layer"]) for i in range(config["n_layers"])]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        for i, layer in enumerate(self.layers):
            if self.gates is not None:
                x = x * sigmoid(self.gates[f"angn.gates.{i}.weight"] * x + self.gates[f"angn.gates.{i}.bias"])
            x = x + layer(rms(x, self.w[f"{self.name}.norms.{i}.weight"]))
        return rms(x, self.w[f"{self.name}.final_norm.weight"])


class Files:
    """The tensors of an export in float64, by the bytes of the files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())

    def read(self, name: str) -> dict[str, np.ndarray]:
        return {key: tensor.double().numpy() for key, tensor in load_file(self.folder / name).items()}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = save(build(), folder / "phase3.pt", 3)
    export(checkpoint, folder / "weights", golden=True, x_encoder=True, dtype=request.param)
    return Files(folder / "weights")


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())


def test_golden_predictor(files: Files) -> None:
    w, gates = files.read("predictor.safetensors"), files.read("angn.safetensors")
    golden = files.read("golden/predictor.safetensors")
    embedding = files.read("y_encoder.safetensors")["y_encoder.embedding.weight"]
    for b, has_image in enumerate(golden["has_image"]):
        ids = golden["query_ids"][b][golden["query_mask"][b] == 1].astype(int)
        tokens = embedding[ids] @ w["predictor.query_proj.weight"].T + w["predictor.query_proj.bias"]
        if has_image:
            visual = golden["visual_tokens"][b] @ w["predictor.vision_proj.weight"].T + w["predictor.vision_proj.bias"]
            tokens = np.concatenate([visual, tokens])
        backbone = NumpyBackbone(w, "predictor", files.config["model"]["predictor"], gates)
        hidden = np.stack([backbone(token) for token in tokens])
        close(hidden, golden["hidden"][b, : len(hidden)])
        close(hidden.mean(0), golden["pooled"][b])
        predicted = w["predictor.pred_head.weight"] @ hidden.mean(0) + w["predictor.pred_head.bias"]
        close(predicted / np.linalg.norm(predicted), golden["embedding"][b])
    assert golden["has_image"].tolist() == [1, 0]
    assert golden["query_mask"].min() == 0  # one of the two is padded


def test_golden_layer_in_detail(files: Files) -> None:
    for component in ("predictor", "y_encoder", "y_decoder"):
        w, golden = files.read(f"{component}.safetensors"), files.read(f"golden/{component}.safetensors")
        layer = NumpyLayer(w, f"{component}.layers.0.", files.config["model"][component]["layer"])
        for t, u in enumerate(golden["layer0.u"]):
            close(layer(u), golden["layer0.out"][t])
            close(layer.h, golden["layer0.state.h"][t])
            close(layer.K, golden["layer0.state.k"][t, 0])
            close(layer.V, golden["layer0.state.v"][t])
            close(np.cos(layer.theta), np.cos(golden["layer0.state.theta"][t]))
        assert t == 3


def test_golden_y_encoder(files: Files) -> None:
    w, golden = files.read("y_encoder.safetensors"), files.read("golden/y_encoder.safetensors")
    for b, mask in enumerate(golden["mask"]):
        backbone = NumpyBackbone(w, "y_encoder", files.config["model"]["y_encoder"])
        ids = golden["ids"][b][mask == 1].astype(int)
        hidden = np.stack([backbone(token) for token in w["y_encoder.embedding.weight"][ids]])
        embedded = w["y_encoder.projection.weight"] @ hidden.mean(0) + w["y_encoder.projection.bias"]
        close(embedded / np.linalg.norm(embedded), golden["embedding"][b])
        if b == 0:
            close(hidden, golden["step.hidden"][: len(hidden)])
    assert np.abs(golden["step.layers.0"] - golden["layers.1.input"][0]).max() < 1e-4


def test_golden_angn(files: Files) -> None:
    w, golden = files.read("angn.safetensors"), files.read("golden/angn.safetensors")
    for i in range(2):
        x = golden[f"gates.{i}.input"]
        close(x * sigmoid(w[f"angn.gates.{i}.weight"] * x + w[f"angn.gates.{i}.bias"]), golden[f"gates.{i}.output"])
        assert x.shape == (4, 64)


def test_golden_y_decoder(files: Files) -> None:
    w, golden = files.read("y_decoder.safetensors"), files.read("golden/y_decoder.safetensors")
    prefix = golden["embedding"] @ w["y_decoder.embed_to_prefix.weight"].T + w["y_decoder.embed_to_prefix.bias"]
    prefix = prefix.reshape(2, files.config["model"]["prefix_tokens"], -1)
    close(prefix, golden["prefix"])

    def prefilled(b: int) -> NumpyBackbone:
        backbone = NumpyBackbone(w, "y_decoder", files.config["model"]["y_decoder"])
        for token in prefix[b]:
            backbone(token)
        return backbone

    def logits(backbone: NumpyBackbone, token: int) -> np.ndarray:
        return w["y_decoder.lm_head.weight"] @ backbone(w["y_decoder.embedding.weight"][token])

    backbone = prefilled(0)
    for i, layer in enumerate(backbone.layers):
        close(layer.h, golden[f"prefill.{i}.h"][0])
    stepped = np.stack([logits(backbone, int(token)) for token in golden["ids"][0]])
    close(stepped, golden["logits"][0])
    close(stepped, golden["step.logits"])
    tokens = files.config["tokens"]
    for b in range(2):
        backbone, token, said = prefilled(b), tokens["bos"], []
        while len(said) < files.config["model"]["max_answer_tokens"] - 1:
            token = int(logits(backbone, token).argmax())
            if token == tokens["eos"]:
                break
            said.append(token)
        assert said == golden[f"greedy_ids.{b}"].astype(int).tolist()


def test_golden_recursion(files: Files) -> None:
    w, golden = files.read("recursion.safetensors"), files.read("golden/recursion.safetensors")
    w = {name.removeprefix("recursion."): value for name, value in w.items()}
    x = golden["pooled"]
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    normed = normed * w["confusion_probe.norm.weight"] + w["confusion_probe.norm.bias"]
    close(normed, golden["normed"])
    hidden = normed @ w["confusion_probe.hidden.weight"].T + w["confusion_probe.hidden.bias"]
    logit = (hidden * sigmoid(hidden)) @ w["confusion_probe.linear.weight"][0] + w["confusion_probe.linear.bias"]
    close(logit, golden["logit"])
    score = sigmoid(logit / w["confusion_probe.temperature"])
    close(score, golden["score"])
    decay = files.config["model"]["recursion"]["ema_decay"]
    close(decay * 0.25 + (1 - decay) * score, golden["smoothed_score"])
    injected = x + golden["knowledge"] @ w["injector.projection.weight"].T
    close(injected, golden["injected"])
    p = files.read("predictor.safetensors")
    embedded = injected @ p["predictor.pred_head.weight"].T + p["predictor.pred_head.bias"]
    close(embedded / np.linalg.norm(embedded, axis=1, keepdims=True), golden["embedding_injected"])
    assert np.abs(golden["embedding_injected"] - golden["embedding"]).max() > 1e-3


def test_golden_files_describe_themselves(files: Files) -> None:
    folder = files.folder
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
    golden = load_file(folder / "golden" / "x_encoder.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(load_exported(folder).x_encoder(golden["pixels"]), golden["visual_tokens"])
