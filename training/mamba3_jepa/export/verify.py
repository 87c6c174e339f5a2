"""Does the export say what the checkpoint says? Both models see the same rendered scenes; outputs are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mamba3_jepa.errors import UserError
from mamba3_jepa.export.probe import Probe, knowledge_vectors, scene_probe
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.export import DtypeName

# Rounding a weight to nearest changes it by at most u of itself: 2^-11 in float16, 2^-8 in bfloat16. The roundings are
# independent, so one matrix product moves its result by about u / sqrt(3) of its size, and n pre-norm layers of two
# products each by about u sqrt(2 n / 3) of the stream: 2.8 u for the twelve layers of `small`. The entries of the
# outputs scatter around that by a factor of four or so; 16 u leaves room for both and finds anything else: a wrong
# tensor moves the outputs by their own size.
_UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
_UNITS_ALLOWED = 16
_FLOAT32_ALLOWED = 1e-6


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far one output of the exported model is from the checkpoint's.

    Attributes:
        output: its name.
        largest: largest absolute difference.
        allowed: the most that is accepted.
    """

    output: str
    largest: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether it is accepted; NaN is not."""
        return self.largest <= self.allowed


def compare(reference: Mamba3Jepa, exported: Mamba3Jepa, dtype: DtypeName) -> list[Difference]:
    """The outputs of every exported component, beside the reference's, on the same inputs.

    The decoder and the recursion are given the reference's embedding and pooled state, so that each component answers
    for itself; ANGN acts inside the predictor.
    """
    probe = scene_probe(reference)
    with torch.inference_mode():
        expected = _outputs(reference, probe, None, exported)
        actual = _outputs(exported, probe, expected, exported)
    differences = []
    for name, value in expected.items():
        scale = 1.0 if name in ("confusion score", "confusion threshold", "memory floor") else value.abs().max().item()
        allowed = _FLOAT32_ALLOWED * max(1.0, scale) if dtype == "float32" else _UNITS_ALLOWED * _UNIT[dtype] * scale
        largest = (actual[name] - value).abs().max().item()
        differences.append(Difference(output=name, largest=largest, allowed=allowed))
    return differences


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
        outputs["confusion score"] = model.recursion.confusion_probe.score(start["pooled state"])
        outputs["confusion threshold"] = model.recursion.confusion_probe.threshold
        outputs["memory floor"] = model.recursion.memory_floor
        knowledge = knowledge_vectors(model, start["text embedding"])
        outputs["injected state"] = model.recursion.injector(start["pooled state"], knowledge)
    return outputs
