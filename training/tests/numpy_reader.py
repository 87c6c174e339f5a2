"""A reader in another language: numpy, float64 and an exported folder, written from WEIGHT_MAPPING.md alone.

Shape letters as there. Everything goes token by token; a Backbone remembers what came before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors.torch import load_file
from tokenizers import Tokenizer

Tensors = dict[str, np.ndarray]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, x)


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def layer_norm(x: np.ndarray, w: Tensors, name: str, eps: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps)
    return normed * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: np.ndarray, w: Tensors, name: str) -> np.ndarray:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def gated_mlp(x: np.ndarray, fc1: np.ndarray, fc2: np.ndarray) -> np.ndarray:
    a, g = np.split(fc1 @ x, 2)
    return fc2 @ (a * silu(g))


class Layer:
    """One Mamba-3 layer: (D,) -> (D,)."""

    def __init__(self, w: Tensors, prefix: str, config: dict, constants: dict) -> None:
        self.w = {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}
        self.config, self.eps, self.floor = config, constants["norm_eps"], constants["A_floor"]
        self.N, self.P, self.G = config["d_state"], config["headdim"], config["ngroups"]
        self.H = config["d_model"] * config["expand"] // self.P
        self.R = config["mimo_rank"] if config["is_mimo"] else 1
        self.S = int(self.N * config["rope_fraction"] / 2)
        self.theta, self.h = np.zeros((self.H, self.S)), np.zeros((self.H, self.P, self.N))
        self.K, self.V = np.zeros((self.R, self.H, self.N)), np.zeros((self.H, self.P))

    def __call__(self, u: np.ndarray) -> np.ndarray:
        H, P, N, G, R, w = self.H, self.P, self.N, self.G, self.R, self.w
        sizes = np.cumsum([H * P, H * P, R * G * N, R * G * N, H, H, H])
        z, x, b, c, dd_dt, dd_a, trap, angle = np.split(w["in_proj.weight"] @ u, sizes)
        dt = softplus(dd_dt + w["dt_bias"])
        rate = np.where(dd_a >= 0, 1 + dd_a, 1 / (1 - np.minimum(dd_a, 0)))
        rate = softplus(dd_a) if self.config["a_activation"] == "softplus" else rate
        alpha, lam = np.exp(-np.maximum(rate, self.floor) * dt), sigmoid(trap)
        self.theta = self.theta + dt[:, None] * np.pi * np.tanh(angle)
        K, Q, V = self._rotated(b, "B"), self._rotated(c, "C"), x.reshape(H, P)
        before = np.einsum("rhp,rhn->hpn", self._spread(self.V), self.K)
        now = np.einsum("rhp,rhn->hpn", self._spread(V), K)
        before, now = ((1 - lam) * dt)[:, None, None] * before, (lam * dt)[:, None, None] * now
        self.h, self.K, self.V = alpha[:, None, None] * (self.h + before) + now, K, V
        y = np.einsum("hpn,rhn->rhp", self.h, Q) + w["D"][:, None] * self._spread(V)
        return w["out_proj.weight"] @ self._gated(y, z.reshape(H, P)).reshape(-1)

    def _rotated(self, x: np.ndarray, name: str) -> np.ndarray:
        """(R G N,) -> (R, H, N): normed, a group for each head, biased, rotated."""
        x = rms_norm(x.reshape(self.R, self.G, self.N), self.w[f"{name}_norm.weight"], self.eps)
        x = np.repeat(x, self.H // self.G, axis=1) + self.w[f"{name}_bias"].swapaxes(0, 1)
        pairs = 2 * np.arange(self.S), 2 * np.arange(self.S) + 1
        if self.config["is_mimo"]:
            pairs = np.arange(self.S), np.arange(self.S) + self.N // 2
        a, b, cos, sin = x[..., pairs[0]], x[..., pairs[1]], np.cos(self.theta), np.sin(self.theta)
        x[..., pairs[0]], x[..., pairs[1]] = a * cos - b * sin, a * sin + b * cos
        return x

    def _spread(self, v: np.ndarray) -> np.ndarray:
        """(H, P) -> (R, H, P)."""
        return v * self.w["mimo_x"].swapaxes(0, 1) if self.config["is_mimo"] else v[None]

    def _gated(self, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """(R, H, P) and (H, P) -> (H, P): normed, gated, gathered."""
        if self.config["is_outproj_norm"]:
            y = rms_norm(y, self.w["norm.weight"].reshape(self.H, self.P), self.eps)
        if self.config["is_mimo"]:
            y = y * silu(z * self.w["mimo_z"].swapaxes(0, 1))
            return (y * self.w["mimo_o"].swapaxes(0, 1)).sum(axis=0)
        return y[0] * silu(z)


class Backbone:
    """A stack of layers: (D,) -> (D,). `activity` holds the mean of each layer's gate for each token so far."""

    def __init__(self, w: Tensors, name: str, config: dict, constants: dict, gates: Tensors | None = None) -> None:
        self.w, self.name, self.gates, self.eps = w, name, gates, constants["norm_eps"]
        self.has_mlps = config.get("mlp_dim", 0) > 0
        numbers = range(config["n_layers"])
        self.layers = [Layer(w, f"{name}.layers.{i}.", config["layer"], constants) for i in numbers]
        names = [f"{name}.reverse_layers.{i}." for i in numbers if config.get("bidirectional")]
        self.reverse_layers = [Layer(w, prefix, config["layer"], constants) for prefix in names]
        self.activity: list[list[float]] = [[] for _ in numbers]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        assert not self.reverse_layers
        for i, layer in enumerate(self.layers):
            x = self._gated(i, x)
            x = self._with_mlp(i, x + layer(rms_norm(x, self.w[f"{self.name}.norms.{i}.weight"], self.eps)))
        return rms_norm(x, self.w[f"{self.name}.final_norm.weight"], self.eps)

    def read(self, sequence: np.ndarray) -> np.ndarray:
        """A whole sequence (L, D) -> (L, D), layer by layer, in both directions where there are two."""
        for i, layer in enumerate(self.layers):
            sequence = np.stack([self._gated(i, x) for x in sequence])
            normed = rms_norm(sequence, self.w[f"{self.name}.norms.{i}.weight"], self.eps)
            added = np.stack([layer(x) for x in normed])
            if self.reverse_layers:
                added = added + np.stack([self.reverse_layers[i](x) for x in normed[::-1]])[::-1]
            sequence = np.stack([self._with_mlp(i, x) for x in sequence + added])
        return rms_norm(sequence, self.w[f"{self.name}.final_norm.weight"], self.eps)

    def _gated(self, i: int, x: np.ndarray) -> np.ndarray:
        if self.gates is None:
            return x
        gate = sigmoid(self.gates[f"angn.gates.{i}.weight"] * x + self.gates[f"angn.gates.{i}.bias"])
        self.activity[i].append(float(gate.mean()))
        return x * gate

    def _with_mlp(self, i: int, x: np.ndarray) -> np.ndarray:
        if not self.has_mlps:
            return x
        normed = rms_norm(x, self.w[f"{self.name}.mlp_norms.{i}.weight"], self.eps)
        return x + gated_mlp(normed, *(self.w[f"{self.name}.mlps.{i}.{fc}.weight"] for fc in ("fc1", "fc2")))


@dataclass(eq=False)
class Sentence:
    """A beginning of an answer: its log-probability and those of its ids, and the decoder that reads `token` next."""

    total: float
    ids: list[int]
    logs: list[float]
    backbone: Backbone
    token: int

    def continued(self, logits: Callable[[Backbone, int], np.ndarray]) -> list[Sentence]:
        logs = np.log(softmax(logits(self.backbone, self.token)))
        return [
            Sentence(self.total + log, [*self.ids, token], [*self.logs, log], self.backbone, token)
            for token, log in enumerate(logs.tolist())
        ]


@dataclass
class Reply:
    """What `ask` says."""

    text: str
    confidence: float
    confusion: float
    confused: bool
    nearest: list[tuple[str, float]]
    memory_used: str | None


class Reader:
    """An exported folder with x_encoder.safetensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.model, self.constants = self.config["model"], self.config["constants"]
        self.w: Tensors = {}
        for name in self.config["files"]:
            self.w |= self.read(name)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.encode_special_tokens = True

    def read(self, name: str) -> Tensors:
        """The tensors of a file in float64."""
        return {key: tensor.double().numpy() for key, tensor in load_file(self.folder / name).items()}

    def backbone(self, name: str) -> Backbone:
        gates = self.w if name == "predictor" and self.model["angn"]["enabled"] else None
        return Backbone(self.w, name, self.model[name], self.constants, gates)

    def normalized(self, x: np.ndarray) -> np.ndarray:
        return x / max(float(np.linalg.norm(x)), self.constants["normalize_eps"])

    def ids(self, text: str, limit: int) -> list[int]:
        tokens = self.config["tokens"]
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return [tokens["bos"], *ids[: limit - 2], tokens["eos"]]

    def pixels(self, image_u8: np.ndarray) -> np.ndarray:
        """(3, S, S) uint8 -> float."""
        mean, std = (np.array(self.config["image"][name])[:, None, None] for name in ("mean", "std"))
        return (image_u8 / 255 - mean) / std

    def visual_tokens(self, pixels: np.ndarray) -> np.ndarray:
        """Normalised pixels of an image (3, H, W) or a clip (T, 3, H, W) -> (N, D)."""
        return visual_tokens(self.w, self.model["vision"], self.constants["x_encoder_layer_norm_eps"], pixels)

    def look(self, pixels: np.ndarray) -> np.ndarray:
        """Normalised pixels of an image (3, S, S) -> the visual tokens that the predictor reads (N, D)."""
        tokens, pool = self.visual_tokens(pixels), self.model["predictor"].get("visual_pool", 1)
        side = self.model["vision"]["image_size"] // self.model["vision"]["patch_size"]
        cells = [
            [tokens.reshape(side, side, -1)[row : row + pool, column : column + pool].mean(axis=(0, 1))]
            for row in range(0, side, pool)
            for column in range(0, side, pool)
        ]
        return np.concatenate(cells)

    def predicted(
        self, visual: np.ndarray | None, query_ids: list[int], backbone: Backbone
    ) -> tuple[np.ndarray, np.ndarray]:
        """The hidden states (L, D) of picture and question in the predictor's order, and the pooled state (D)."""
        tokens = {"question": linear(self.w["y_encoder.embedding.weight"][query_ids], self.w, "predictor.query_proj")}
        if visual is not None:
            tokens["visual"] = linear(visual, self.w, "predictor.vision_proj")
        order = self.model["predictor"].get("order", "visual_question").split("_")
        parts = [part for part in order if part in tokens]
        hidden = backbone.read(np.concatenate([tokens[part] for part in parts]))
        states = np.split(hidden, np.cumsum([len(tokens[part]) for part in parts])[:-1])
        pooling = self.model["predictor"].get("pooling", "all")
        if pooling == "all":
            return hidden, hidden.mean(0)
        if pooling == "attention":
            return hidden, softmax(hidden @ self.w["predictor.pool_score.weight"][0]) @ hidden
        if pooling == "question":
            last = max(i for i, part in enumerate(parts) if part == "question")
            return hidden, states[last].mean(0)
        return hidden, hidden[-1]

    def embedded(self, pooled: np.ndarray) -> np.ndarray:
        return self.normalized(linear(pooled, self.w, "predictor.pred_head"))

    def text_embedding(self, ids: list[int]) -> np.ndarray:
        backbone = self.backbone("y_encoder")
        hidden = np.stack([backbone(token) for token in self.w["y_encoder.embedding.weight"][ids]])
        return self.normalized(linear(hidden.mean(axis=0), self.w, "y_encoder.projection"))

    def speaker(self, embedding: np.ndarray) -> Backbone:
        """The decoder after its prefix."""
        backbone = self.backbone("y_decoder")
        prefix = linear(embedding, self.w, "y_decoder.embed_to_prefix")
        for token in prefix.reshape(self.model["prefix_tokens"], -1):
            backbone(token)
        return backbone

    def logits(self, backbone: Backbone, token: int) -> np.ndarray:
        return self.w["y_decoder.lm_head.weight"] @ backbone(self.w["y_decoder.embedding.weight"][token])

    def spoken(self, embedding: np.ndarray, beams: int = 1) -> tuple[list[int], list[float]]:
        """Ids without eos and log-probabilities with it: greedy with one beam, length_penalty 0 with more."""
        tokens, places = self.config["tokens"], beams
        live, best = [Sentence(0.0, [], [], self.speaker(embedding), tokens["bos"])], None
        for _ in range(self.config["generation"]["max_tokens"]):
            found = [longer for sentence in live for longer in sentence.continued(self.logits)]
            found = sorted(found, key=lambda sentence: -sentence.total)[:places]
            ended = [sentence for sentence in found if sentence.token == tokens["eos"]]
            live = [
                replace(sentence, backbone=deepcopy(sentence.backbone)) for sentence in found if sentence not in ended
            ]
            places -= len(ended)
            best = max([*([best] if best else []), *ended], key=lambda sentence: sentence.total, default=None)
            if not live or not places or (best and live[0].total <= best.total):
                break
        best = live[0] if best is None else best
        return [i for i in best.ids if i != tokens["eos"]], best.logs

    def doubt(self, embedding: np.ndarray) -> np.ndarray:
        """(2): how improbable the decoder finds its greedy answer."""
        _, logs = self.spoken(embedding)
        return np.log(1e-5 - np.minimum(0, [np.mean(logs), np.min(logs)]))

    def confusion(self, pooled: np.ndarray, doubt: np.ndarray) -> tuple[float, bool]:
        """P(confused), and whether that is judged confused; of a model without recursion 0 and never."""
        if "recursion.memory_floor" not in self.w:
            return 0.0, False
        w, eps = self.w, self.constants["confusion_probe_layer_norm_eps"]
        probe = "recursion.confusion_probe"
        normed = layer_norm(pooled, w, f"{probe}.norm", eps)
        if self.model["recursion"].get("hears_answer"):
            normed = np.concatenate([normed, doubt])
        hidden = silu(linear(normed, w, f"{probe}.hidden"))
        score = sigmoid(linear(hidden, w, f"{probe}.linear")[0] / w[f"{probe}.temperature"])
        return float(score), bool(score > w[f"{probe}.threshold"])

    def ask(self, image_u8: np.ndarray | None, question: str | None, memory: Sequence[str], top: int) -> Reply:
        """One question about (3, S, S) uint8, or about nothing."""
        visual = None if image_u8 is None else self.look(self.pixels(image_u8))
        asked, question = question, self.model["query_prompt"] if question is None else question
        query = self.ids(question, self.model["max_query_tokens"])
        _, pooled = self.predicted(visual, query, self.backbone("predictor"))
        embedding, used, score, confused = self.embedded(pooled), None, 0.0, False
        if "generation" in self.config:
            score, confused = self.confusion(pooled, self.doubt(embedding))
        if confused and memory:
            text, cosine = self.found(asked, embedding, memory)
            if cosine >= self.w["recursion.memory_floor"]:
                used = text
                embedding = self.embedded(self.injected(pooled, self._answer_embedding(text)))
        nearest = self.nearest(embedding, self.config["answers"])
        if "generation" in self.config:
            ids, logs = self.spoken(embedding)
            confidence = math.exp(sum(logs) / len(logs))
            text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        else:
            temperature = self.config["classify"]["temperature"]
            text, confidence = nearest[0][0], softmax(np.array([cosine for _, cosine in nearest]) / temperature).max()
        return Reply(text, float(confidence), score, confused, nearest[:top], used)

    def found(self, question: str | None, embedding: np.ndarray, memory: Sequence[str]) -> tuple[str, float]:
        """The memory's nearest text, with its cosine."""
        if not self.model["recursion"].get("retriever_dim"):
            return self.nearest(embedding, memory)[0]
        if question is None:
            return "", -2.0
        asked = self.tower("question", self._answer_embedding(question))
        cosines = [float(asked @ self.tower("text", self._answer_embedding(text))) for text in memory]
        return max(zip(memory, cosines, strict=True), key=lambda pair: pair[1])

    def tower(self, name: str, embedding: np.ndarray) -> np.ndarray:
        """What the retriever makes of a question's or a text's embedding."""
        where = f"recursion.retriever.{name}"
        hidden = silu(linear(rms_normed(embedding), self.w, f"{where}.hidden"))
        return self.normalized(linear(hidden, self.w, f"{where}.output"))

    def nearest(self, embedding: np.ndarray, texts: Sequence[str]) -> list[tuple[str, float]]:
        """All texts with their cosines, nearest first."""
        cosines = [float(embedding @ self._answer_embedding(text)) for text in texts]
        return sorted(zip(texts, cosines, strict=True), key=lambda pair: -pair[1])

    def _answer_embedding(self, text: str) -> np.ndarray:
        return self.text_embedding(self.ids(text, self.model["max_answer_tokens"]))

    def injected(self, pooled: np.ndarray, knowledge: np.ndarray) -> np.ndarray:
        told = pooled + linear(knowledge, self.w, "recursion.injector.projection")
        if self.model["recursion"].get("injector_sees_state"):
            eps = self.constants["confusion_probe_layer_norm_eps"]
            both = np.concatenate([layer_norm(pooled, self.w, "recursion.injector.norm", eps), rms_normed(knowledge)])
            told = told + linear(
                silu(linear(both, self.w, "recursion.injector.hidden")), self.w, "recursion.injector.output"
            )
        return told


def rms_normed(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2) + 1e-12)


def visual_tokens(w: Tensors, vision: dict, eps: float, pixels: np.ndarray) -> np.ndarray:
    """`Reader.visual_tokens` of an X-Encoder with the configuration `vision`."""
    is_21, embeddings = vision.get("kind") == "vjepa2.1", "x_encoder.encoder.embeddings"
    is_image = pixels.ndim == 3 or (is_21 and len(pixels) == 1)
    t, p = 1 if is_21 and is_image else vision["tubelet_size"], vision["patch_size"]
    clip = np.stack([pixels] * t) if pixels.ndim == 3 else pixels
    T, _, height, width = clip.shape
    grid = (T // t, height // p, width // p)
    patches = clip.reshape(grid[0], t, 3, grid[1], p, grid[2], p).transpose(0, 3, 5, 2, 1, 4, 6)
    proj = f"{embeddings}.{'patch_embeddings_img' if is_21 and is_image else 'patch_embeddings'}.proj"
    weight = w[f"{proj}.weight"].reshape(vision["hidden_size"], -1)
    x = patches.reshape(math.prod(grid), -1) @ weight.T + w[f"{proj}.bias"]
    positions = np.stack(np.unravel_index(np.arange(len(x)), grid)).astype(float)
    if is_21:
        x = x + w[f"{embeddings}.{'img' if is_image else 'video'}_mod_embed"][0]
        for axis, places in enumerate(grid[1:], start=1):
            positions[axis] *= (max(1, 256 // p) - 1) / max(1, places - 1)
    for i in range(vision["depth"]):
        layer = f"x_encoder.encoder.layer.{i}"
        normed = layer_norm(x, w, f"{layer}.norm1", eps)
        x = x + _attention(normed, w, f"{layer}.attention", vision, positions)
        hidden = linear(layer_norm(x, w, f"{layer}.norm2", eps), w, f"{layer}.mlp.fc1")
        x = x + linear(gelu(hidden), w, f"{layer}.mlp.fc2")
    return layer_norm(x, w, "x_encoder.encoder.layernorm", eps)


def _attention(x: np.ndarray, w: Tensors, name: str, vision: dict, positions: np.ndarray) -> np.ndarray:
    q, k, v = (
        linear(x, w, f"{name}.{part}").reshape(len(x), vision["heads"], -1).swapaxes(0, 1)
        for part in ("query", "key", "value")
    )
    q, k = (_turned(part, positions, vision.get("kind") == "vjepa2.1") for part in (q, k))
    share = softmax(q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1]))
    return linear((share @ v).swapaxes(0, 1).reshape(len(x), -1), w, f"{name}.proj")


def _turned(x: np.ndarray, positions: np.ndarray, pairs_turn_alike: bool) -> np.ndarray:
    """(heads, N, d) and time, row, column (3, N): a third of the dimensions turns with each."""
    d = x.shape[-1]
    third = 2 * (d // 3 // 2)
    x = x.copy()
    for axis, position in enumerate(positions):
        part = x[..., axis * third : (axis + 1) * third]
        j = np.arange(third)
        place = j // 2 if pairs_turn_alike else j % (third // 2)
        angle = position[:, None] / 10000 ** (place / (third // 2))
        partner = np.stack([-part[..., 1::2], part[..., ::2]], axis=-1).reshape(part.shape)
        x[..., axis * third : (axis + 1) * third] = part * np.cos(angle) + partner * np.sin(angle)
    return x
