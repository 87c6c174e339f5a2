"""Golden inputs and outputs of every component, for implementations in other languages to test against.

They are computed by the model that the exported files give, in float32, so that whoever reads the same files and
computes in float32 gets the same numbers up to rounding, whatever type the weights are stored in. Tensors are F32, I64
(ids) and U8 (masks: 1 is valid); the header's metadata describes each of them.

Shape letters: B samples, Nv visual tokens, Nq query tokens, L tokens, D model width, E embedding width, V vocabulary, H
heads, P head size, N state size, R ranks, S rotated pairs, T traced tokens.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from mamba3_jepa.contract import FORMAT_VERSION
from mamba3_jepa.data.images import load_image, to_pixels
from mamba3_jepa.export.golden_images import golden_pictures
from mamba3_jepa.export.golden_tokens import AWKWARD_TEXTS
from mamba3_jepa.export.layer_trace import captured, trace_layer, trace_steps
from mamba3_jepa.export.probe import Probe, answer_doubts, golden_probe, knowledge_vectors
from mamba3_jepa.files.safetensors_file import write_safetensors
from mamba3_jepa.models.episodes import picture_keys
from mamba3_jepa.models.generation import GenerationConfig
from mamba3_jepa.models.key_map import COMPONENTS, Component
from mamba3_jepa.models.mamba3 import Mamba3, Mamba3Backbone
from mamba3_jepa.models.pooling import masked_mean
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.export import DtypeName

GOLDEN_FORMAT = "mamba3-jepa-golden"
GOLDEN_NAMES = (*COMPONENTS, "images", "tokens")  # of the files, without .safetensors
TRACED = 4

PREVIOUS_SCORE = 0.25  # what the smoothed confusion score of the golden files continues from


class Golden:
    """The tensors of one golden file, each with a description, and what else its header says."""

    def __init__(self, metadata: dict[str, str]) -> None:
        self.metadata = metadata
        self.tensors: dict[str, Tensor] = {}
        self.descriptions: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor, description: str) -> Tensor:
        """Record `tensor`; booleans become U8, which every reader knows."""
        stored = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor
        self.tensors[name] = stored.detach().clone()
        self.descriptions[name] = description
        return tensor

    def add_all(self, prefix: str, tensors: dict[str, Tensor], description: str) -> None:
        """Record several under `prefix`."""
        for name, tensor in tensors.items():
            self.add(f"{prefix}.{name}", tensor, description)


def write_golden(
    model: Mamba3Jepa, components: list[Component], folder: Path, *, phase: int, dtype: DtypeName
) -> list[Path]:
    """Write `<name>.safetensors` for each component, the X-Encoder, `images` and `tokens` into `folder`.

    Args:
        model: the model read back from the exported files.
        components: what was exported.
        folder: made if need be.
        phase: the export's phase.
        dtype: the export's type.

    Raises:
        UserError: a file cannot be written.
    """
    probe = golden_probe(model)
    makers: dict[str, Callable[[Mamba3Jepa, Probe, Golden], None]] = {
        "x_encoder": _x_encoder, "predictor": _predictor, "y_encoder": _y_encoder, "angn": _angn,
        "y_decoder": _y_decoder, "recursion": _recursion, "images": _images, "tokens": _tokens,
    }  # fmt: skip
    paths = []
    for name in dict.fromkeys(["x_encoder", *components, "images", "tokens"]):
        golden = Golden({"questions": json.dumps(probe.questions), "texts": json.dumps(probe.texts)})
        with torch.inference_mode():
            makers[name](model, probe, golden)
        metadata = {
            "format": GOLDEN_FORMAT, "format_version": str(FORMAT_VERSION), "component": name, "phase": str(phase),
            "dtype": dtype, **golden.metadata, "tensors": json.dumps(golden.descriptions),
        }  # fmt: skip
        path = folder / f"{name}.safetensors"
        write_safetensors(path, golden.tensors, metadata)
        paths.append(path)
    return paths


def _images(model: Mamba3Jepa, _: Probe, golden: Golden) -> None:
    size, pictures = model.config.vision.image_size, golden_pictures(model.config.vision.image_size)
    for picture in pictures:
        file = torch.frombuffer(bytearray(picture.content), dtype=torch.uint8)
        golden.add(f"image.{picture.name}.file", file, f"the bytes of a {picture.format} file: {picture.what}")
        pixels = to_pixels(load_image(picture.content, picture.name), size)
        golden.add(f"image.{picture.name}.pixels", pixels, "(3, S, S) what the model sees of it, RGB, not normalised")
    described = {p.name: {"format": p.format, "lossy": p.lossy, "what": p.what} for p in pictures}
    golden.metadata = {"images": json.dumps(described)}


def _tokens(model: Mamba3Jepa, _: Probe, golden: Golden) -> None:
    config, tokenizer = model.config, model.tokenizer
    for i, text in enumerate(AWKWARD_TEXTS):
        for name, limit, meaning in (
            ("ids", config.max_answer_tokens, "bos, ids, eos, cut at max_answer_tokens"),
            ("query_ids", config.max_query_tokens, "bos, ids, eos, cut at max_query_tokens"),
            ("all_ids", sys.maxsize, "bos, ids, eos, not cut"),
        ):
            golden.add(f"{name}.{i}", tokenizer.encode([text], limit).ids[0], f"text {i}: {meaning}")
    golden.metadata = {"texts": json.dumps(AWKWARD_TEXTS)}


def _x_encoder(model: Mamba3Jepa, probe: Probe, golden: Golden) -> None:
    golden.add("image_u8", probe.image_u8, "(1, 3, S, S) the picture, RGB")
    pixels = golden.add("pixels", probe.pixels, "(1, 3, S, S) (image_u8 / 255 - mean) / std of config.json")
    golden.add(
        "visual_tokens",
        model.x_encoder(pixels),
        "(1, Nv, vision width) of the picture: of a tubelet of equal frames, or of the image branch",
    )
    pool = model.config.predictor.visual_pool
    if pool > 1:
        golden.add(
            "pooled_visual_tokens", model.look(pixels), f"(1, Nv / {pool * pool}, vision width) as they are read"
        )
    vision = model.config.vision
    shape = (1, 2 * vision.tubelet_size, 3, 3 * vision.patch_size, 5 * vision.patch_size)
    clip = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    golden.add("clip", clip, "(1, T, 3, H, W) a clip of two tubelets, 3 x 5 patches, of fixed random numbers")
    golden.add("clip_visual_tokens", model.x_encoder(clip), "(1, 30, vision width) of the clip")


def _predictor(model: Mamba3Jepa, probe: Probe, golden: Golden) -> None:
    add, predictor = golden.add, model.predictor
    visual = add(
        "visual_tokens",
        model.encode_images(probe.pixels, probe.has_image),
        "(B, Nv, vision width); zeros for the sample without image",
    )
    has_image = add("has_image", probe.has_image, "(B,)")
    ids = add("query_ids", probe.query_ids, "(B, Nq) token ids of the questions, padded on the right")
    query_mask = add("query_mask", probe.query_mask, "(B, Nq)")
    query = add("query_tokens", model.y_encoder.embed_tokens(ids), "(B, Nq, .) rows of y_encoder.embedding.weight")
    tokens, mask, _ = predictor._sequence(visual, has_image, query, query_mask)
    add("sequence", tokens, "(B, L, D) projected, in the predictor's order; what a sample lacks on the right")
    add("mask", mask, "(B, L) positions that are no padding")
    with captured(predictor.backbone) as inner:
        embedding, pooled = model.predict(visual, has_image, ids, query_mask)
    _add_layers(golden, inner, predictor.backbone, "after its gate, if there is ANGN")
    add("pooled", pooled, "(B, D) mean of hidden over the positions that are pooled")
    add("embedding", embedding, "(B, E) pred_head(pooled) divided by its length")


def _y_encoder(model: Mamba3Jepa, probe: Probe, golden: Golden) -> None:
    add, encoder = golden.add, model.y_encoder
    ids = add("ids", probe.text_ids, "(B, L) token ids: bos, text, eos, pad")
    mask = add("mask", probe.text_mask, "(B, L)")
    tokens = add("tokens", encoder.embed_tokens(ids), "(B, L, D) rows of the embedding")
    with captured(encoder.backbone) as inner:
        embedding = encoder(ids, mask)
    _add_layers(golden, inner, encoder.backbone, "nothing is done before the norm")
    add("pooled", masked_mean(inner["hidden"], mask), "(B, D) mean of hidden over mask")
    add("embedding", embedding, "(B, E) projection(pooled) divided by its length")
    steps, _ = trace_steps(encoder.backbone, tokens[0])
    golden.add_all("step", steps, "(L, D) sample 0 one token at a time: residual stream after the layer; final norm")


def _angn(model: Mamba3Jepa, probe: Probe, golden: Golden) -> None:
    assert model.angn is not None
    rows: list[tuple[Tensor, Tensor]] = []
    handle = model.angn.register_forward_hook(
        lambda _, arguments, output: rows.append((arguments[1][0, :TRACED], output[0, :TRACED]))
    )
    try:
        model(probe.pixels, probe.has_image, probe.query_ids, probe.query_mask)
    finally:
        handle.remove()
    _angn_activity(model, probe, golden)
    for i, (before, after) in enumerate(rows):
        golden.add(f"gates.{i}.input", before, "(T, D) residual stream before the layer, in a real prediction")
        golden.add(f"gates.{i}.output", after, "(T, D) input * sigmoid(weight * input + bias)")


def _angn_activity(model: Mamba3Jepa, probe: Probe, golden: Golden) -> None:
    """What the gates say of themselves over two passes: both samples of the probe, then the first alone."""
    assert model.angn is not None
    model.angn.reset_context()
    rows: dict[str, list[Tensor]] = {"activity": [], "activity_ema": [], "context_reset_due": []}
    for samples in (slice(0, 2), slice(0, 1)):
        has_image = probe.has_image[samples]
        pixels = probe.pixels[: int(has_image.sum())]
        model(pixels, has_image, probe.query_ids[samples], probe.query_mask[samples])
        rows["activity"].append(model.angn.activity())
        rows["activity_ema"].append(model.angn.activity_ema())
        rows["context_reset_due"].append(torch.tensor(model.angn.context_reset_due()))
    model.angn.reset_context()
    passes = "of a pass over both samples, then of one over the first alone"
    golden.add("activity", torch.stack(rows["activity"]), f"(2, layers) mean gate over the valid positions {passes}")
    golden.add("activity_ema", torch.stack(rows["activity_ema"]), f"(2, layers) its moving average, {passes}")
    golden.add("context_reset_due", torch.stack(rows["context_reset_due"]), f"(2,) whether to reset, {passes}")


def _y_decoder(model: Mamba3Jepa, probe: Probe, golden: Golden) -> None:
    assert model.y_decoder is not None
    add, decoder = golden.add, model.y_decoder
    predicted = model(probe.pixels, probe.has_image, probe.query_ids, probe.query_mask).embedding
    embedding = add("embedding", predicted, "(B, E) predicted embeddings, what the decoder speaks")
    prefix = add("prefix", decoder._prefix(embedding), "(B, prefix_tokens, D) embed_to_prefix(embedding), reshaped")
    length = int(probe.text_mask[0].sum()) - 1
    ids = add("ids", probe.text_ids[:1, :length], "(1, L) bos and the tokens of the answer to sample 0, without eos")
    add("logits", decoder(embedding[:1], ids), "(1, L, V) for sample 0; position t predicts the token after ids[:, t]")
    state = decoder.prefill(embedding[:1])
    for i, layer_state in enumerate(state):
        golden.add_all(
            f"prefill.{i}", layer_state._asdict(), "state of the layer after the prefix of sample 0, as in layer0.state"
        )
    stepped = []
    for t in range(length):
        step_logits, state = decoder.step(ids[:, t], state)
        stepped.append(step_logits[0])
    add("step.logits", torch.stack(stepped), "(L, V) the same logits, one token at a time after the prefill")
    whole = torch.cat([prefix[0], decoder.embedding(ids[0])])
    steps, _ = trace_steps(decoder.backbone, whole)
    golden.add_all(
        "step", steps, "(prefix_tokens + L, D) residual stream after the layer, a token at a time; final norm"
    )
    _add_layer0(golden, decoder.backbone, whole)
    _answers(model, embedding, golden)


def _answers(model: Mamba3Jepa, embedding: Tensor, golden: Golden) -> None:
    """What the decoder says to embeddings (B, E), by the two methods that draw no random numbers."""
    for name, config, how in (
        ("greedy", GenerationConfig(), "greedily"),
        ("beam", GenerationConfig(method="beam"), "with 4 beams and length_penalty 0"),
    ):
        for b, answer in enumerate(model.say(embedding, config)):
            ids, log_probs = torch.tensor(answer.ids, dtype=torch.int64), torch.tensor(answer.log_probs)
            where = f"decoded {how} from the embedding of this sample"
            golden.add(f"{name}_ids.{b}", ids, f"tokens {where}, without bos and eos")
            golden.add(f"{name}_log_probs.{b}", log_probs, f"their log-probabilities, eos last if it was said, {where}")


def _recursion(model: Mamba3Jepa, probe: Probe, golden: Golden) -> None:
    assert model.recursion is not None
    add, monitor, injector = golden.add, model.recursion.confusion_probe, model.recursion.injector
    retriever = model.recursion.retriever
    predicted = model(probe.pixels, probe.has_image, probe.query_ids, probe.query_mask)
    pooled = add("pooled", predicted.pooled, "(B, D) pooled states of the predictor")
    add("normed", monitor.norm(pooled), "(B, D) LayerNorm with weight and bias, eps of config.json")
    doubts = None
    if monitor.hears_answer:
        doubts = add(
            "doubt", answer_doubts(model, predicted.embedding), "(B, 2) of the greedy answers to these samples"
        )
    add("logit", monitor(pooled, doubts), "(B,) linear(silu(hidden(normed, then doubt if there is)))")
    score = add("score", monitor.score(pooled, doubts), "(B,) P(confused) = sigmoid(logit / temperature)")
    previous = add("previous_score", torch.full_like(score, PREVIOUS_SCORE), "(B,) the smoothed score so far")
    add("smoothed_score", monitor.smooth(score, previous), "(B,) ema_decay * previous + (1 - ema_decay) * score")
    text_embedding = model.y_encoder(probe.text_ids, probe.text_mask)
    knowledge = add("knowledge", knowledge_vectors(model, text_embedding), "(B, K) knowledge vectors")
    injected = add("injected", injector(pooled, knowledge), "(B, D) pooled with the knowledge added")
    if model.recursion.knowledge_probe is not None:
        answers = model.recursion.knowledge_probe.score(pooled, knowledge)
        add("knowledge_answers", answers, "(B,) P(the knowledge answers) = sigmoid(linear(silu(hidden)))")
    if model.recursion.tool_selector is not None:
        add("tools", model.recursion.tool_selector.score(pooled), "(B, T) probabilities of the tools")
    add("embedding", predicted.embedding, "(B, E) predicted from pooled")
    add("embedding_injected", model.predictor.embed(injected), "(B, E) predicted from injected")
    if retriever is None and not model.recursion.config.episodes:
        return
    asked = add("question_embedding", model.embed_text(probe.questions), "(B, E) the questions by the Y-Encoder")
    told = add("text_embedding", text_embedding, "(B, E) the texts by the Y-Encoder")
    if model.recursion.config.episodes:
        seen, keys, what = pooled, injected, "the states injected"
        if model.recursion.config.episode_key == "picture":
            tokens = model.encode_images(probe.pixels, probe.has_image)
            add("visual_tokens", tokens, "(B, N, V) from the X-Encoder, zeros without image")
            add("has_image", probe.has_image, "(B,) whether a sample has an image")
            seen = add("picture", picture_keys(tokens, probe.has_image), "(B, 4 V) what the pictures look like")
            keys, what = seen, "the same pictures"
        scores = model.recursion.episode_scores(seen, asked, keys, told)
        add("episode_scores", scores, f"(B, B) with question_embedding, of episodes of {what} and text_embedding")
    if retriever is not None:
        add("retriever_question", retriever.question(asked), "(B, R) unit vectors that look up")
        add("retriever_text", retriever.text(told), "(B, R) unit vectors that are looked up")


def _add_layers(golden: Golden, inner: dict[str, Tensor], backbone: Mamba3Backbone, before: str) -> None:
    """The inside of a whole pass, and one layer in detail."""
    for name, tensor in inner.items():
        kind = name.rpartition(".")[2]
        description = {
            "input": f"(B, L, D) residual stream into the layer's norm, {before}",
            "mixer_output": "(B, L, D) what the Mamba-3 layer adds to it",
            "mlp_output": "(B, L, D) what the MLP behind the layer adds to it",
            "hidden": "(B, L, D) after the final norm",
        }[kind]
        golden.add(name, tensor, description)
    _add_layer0(golden, backbone, inner["layers.0.input"][0])


def _add_layer0(golden: Golden, backbone: Mamba3Backbone, stream_ld: Tensor) -> None:
    """Layer 0 on the first tokens of a residual stream (L, D)."""
    tokens = backbone.norms[0](stream_ld[:TRACED])
    for name, (tensor, description) in trace_layer(cast(Mamba3, backbone.layers[0]), tokens).items():
        golden.add(f"layer0.{name}", tensor, f"layer 0 on the first tokens of sample 0: {description}")
