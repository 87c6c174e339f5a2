"""Does the export say what the checkpoint says? The files are read back and compared with it, tensors and outputs.

Rounding to 16 bits is what was asked for, so it is not a difference: the checkpoint's weights are rounded too before
its outputs are compared. Both models then compute the same numbers in float32, and one bound serves every type, size
and kind of model. What the rounding does to the outputs is another matter, and told beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mamba3_jepa.errors import UserError, shorten
from mamba3_jepa.export.probe import Probe, answer_doubts, knowledge_vectors, scene_probe
from mamba3_jepa.export.writer import as_stored, round_as_stored
from mamba3_jepa.models.episodes import picture_keys
from mamba3_jepa.models.key_map import Component, key_map
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.export import DtypeName

# Of the largest value of an output, and at least of 1. The same operations on the same numbers, which need not lie at
# the same alignment in memory: sums may be taken in another order.
_ALLOWED = 1e-6


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far one output of the exported model is from the checkpoint's.

    Attributes:
        output: its name.
        largest: largest absolute difference from the checkpoint with its weights rounded as the files have them.
        allowed: the most that is accepted.
        rounding: largest absolute difference between the checkpoint's outputs with and without rounded weights.
    """

    output: str
    largest: float
    allowed: float
    rounding: float

    @property
    def ok(self) -> bool:
        """Whether it is accepted; NaN is not."""
        return self.largest <= self.allowed


def compare(
    reference: Mamba3Jepa, exported: Mamba3Jepa, components: Sequence[Component], dtype: DtypeName
) -> list[Difference]:
    """The outputs of every exported component, beside the reference's, on the same inputs.

    The decoder and the recursion are given the reference's embedding and pooled state, so that each component answers
    for itself; ANGN acts inside the predictor.

    Args:
        reference: the checkpoint's model; its weights are rounded here, in place, as they are in the files.
        exported: the model of the files.
        components: those that were exported.
        dtype: what they were exported as.

    Raises:
        UserError: a tensor of the exported model is not the reference's, rounded.
    """
    _demand_same_tensors(reference, exported, components, dtype)
    probe = scene_probe(reference)
    with torch.inference_mode():
        exact = _outputs(reference, probe, None, exported)
        round_as_stored(reference, components, dtype)
        expected = _outputs(reference, probe, exact, exported)
        actual = _outputs(exported, probe, exact, exported)
    return [
        Difference(
            output=name,
            largest=_largest(actual[name], value),
            allowed=_ALLOWED * max(1.0, value.abs().max().item()),
            rounding=_largest(value, exact[name]),
        )
        for name, value in expected.items()
    ]


def _demand_same_tensors(
    reference: Mamba3Jepa, exported: Mamba3Jepa, components: Sequence[Component], dtype: DtypeName
) -> None:
    """Every number, for no input reaches each of them: a token that the probe does not have has a row of its own."""
    left, right = reference.state_dict(), exported.state_dict()
    keys = [pair for component in components for pair in key_map(component, reference.config).items()]
    wrong = [name for key, name in keys if not torch.equal(as_stored(key, left[name], dtype).float(), right[name])]
    if wrong:
        raise UserError(f"the exported model differs from the checkpoint in {shorten(wrong)}. Nothing was exported.")


def demand_equal(differences: Sequence[Difference]) -> None:
    """
    Raises:
        UserError: an output differs by more than is allowed; names each that does.
    """
    failed = [f"{d.output} by {d.largest:.3g} (allowed {d.allowed:.3g})" for d in differences if not d.ok]
    if failed:
        raise UserError(f"the exported model differs from the checkpoint: {'; '.join(failed)}. Nothing was exported.")


def _outputs(
    model: Mamba3Jepa, probe: Probe, given: dict[str, Tensor] | None, exported: Mamba3Jepa
) -> dict[str, Tensor]:
    """Outputs by name; where `given` holds a reference's outputs, later components start from those."""
    embedding, pooled = model(probe.pixels, probe.has_image, probe.query_ids, probe.query_mask)
    outputs = {
        "predicted embedding": embedding,
        "pooled state": pooled,
        "text embedding": model.y_encoder(probe.text_ids, probe.text_mask),
    }
    start = outputs if given is None else given
    if exported.y_decoder is not None:
        assert model.y_decoder is not None
        outputs["decoder logits"] = model.y_decoder(start["predicted embedding"], probe.text_ids)
    if exported.recursion is not None:
        assert model.recursion is not None
        monitor = model.recursion.confusion_probe
        if monitor.hears_answer:
            outputs["doubt of the answer"] = answer_doubts(model, start["predicted embedding"])
        outputs["confusion score"] = monitor.score(start["pooled state"], start.get("doubt of the answer"))
        outputs["confusion threshold"] = monitor.threshold
        outputs["memory floor"] = model.recursion.memory_floor
        knowledge = knowledge_vectors(model, start["text embedding"])
        outputs["injected state"] = model.recursion.injector(start["pooled state"], knowledge)
        if model.recursion.knowledge_probe is not None:
            outputs["answer in the knowledge"] = model.recursion.knowledge_probe.score(start["pooled state"], knowledge)
        if model.recursion.tool_selector is not None:
            outputs["choice of tool"] = model.recursion.tool_selector.score(start["pooled state"])
        retriever = model.recursion.retriever
        if model.recursion.config.episodes:
            outputs["episode floor"] = model.recursion.episode_floor
            asked = start["text embedding"]
            tokens = model.encode_images(probe.pixels, probe.has_image)
            seen = model.recursion.episode_key(start["pooled state"], picture_keys(tokens, probe.has_image))
            outputs["episode scores"] = model.recursion.episode_scores(seen, asked, seen, asked)
        if retriever is not None:
            outputs["question embedding"] = model.embed_text(probe.questions)
            outputs["retriever's question"] = retriever.question(start["question embedding"])
            outputs["retriever's text"] = retriever.text(start["text embedding"])
    return outputs


def _largest(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()
