"""How well confusion is noticed: ranking (ROC) of each kind, calibration, and the threshold to act on.

Everything takes N logits or scores and what is true of the same N samples. Threshold and temperature are given, or
chosen on one half of the samples and their quality measured on the other, so that nothing is measured where it was
fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

WRONG_ANSWER = "wrong_answer"  # the kind of samples that the model itself answers wrongly
N_BINS = 15
DEFAULT_THRESHOLD = 0.5
_MIN_TEMPERATURE, _MAX_TEMPERATURE = 0.05, 20.0
_BISECTIONS = 60


@dataclass(frozen=True, kw_only=True)
class Bin:
    """One bin of a reliability diagram: mean score, share of confused samples, and how many samples."""

    score: float
    confused: float
    count: int


@dataclass(frozen=True, kw_only=True)
class Roc:
    """(points,) false and true positive rates, both ascending, and the area under them."""

    false_positive: Tensor
    true_positive: Tensor
    auroc: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What is stored beside the probe's weights: sigmoid(logit / temperature) > threshold means confused."""

    temperature: float = 1.0
    threshold: float = DEFAULT_THRESHOLD

    def confusion(self, logits: Tensor) -> Tensor:
        """P(confused) of logits (N,)."""
        return torch.sigmoid(logits / self.temperature)

    def notices(self, logits: Tensor) -> Tensor:
        """(N,) bool: whether a model with these logits takes itself for confused."""
        return self.confusion(logits) > self.threshold


@dataclass(frozen=True, kw_only=True)
class ConfusionReport:
    """The numbers of one evaluation; what needs both clear and confused samples is None without them.

    auroc: all confused samples against all others. rocs: for each kind of confusion its curve against the samples
    that are not confused and as much like it as the data allows: questions where the kind has only questions,
    labelled samples for the manifest's own labels. auroc_alike: the same against questions of the same types, such as
    "what color", so that what is asked tells little; kinds without questions have none.
    ece, ece_uncalibrated: expected calibration error with the fitted temperature and with 1; reliability likewise.
    balanced_accuracy: mean of the shares right among the confused and the others, at the threshold.
    scores: for each kind (also "clear" and what is labelled as not confused, "given_clear") the P(confused), after
    temperature.
    """

    n_samples: int
    calibration: Calibration
    auroc: float | None
    rocs: dict[str, Roc]
    auroc_alike: dict[str, float]
    ece: float | None
    ece_uncalibrated: float | None
    reliability: list[Bin]
    reliability_uncalibrated: list[Bin]
    balanced_accuracy: float | None
    scores: dict[str, Tensor] = field(repr=False)

    def judged_confused(self) -> dict[str, float]:
        """For each kind that has scores the share of its samples over the threshold."""
        threshold = self.calibration.threshold
        return {kind: float((scores > threshold).double().mean()) for kind, scores in self.scores.items()}

    def metrics(self, prefix: str = "val") -> dict[str, float]:
        """Flat numbers for `metrics.jsonl`. With the prefix `val`:

        - `val/auroc`, `val/auroc_{kind}`, `val/auroc_{kind}_alike`;
        - `val/ece`, `val/ece_uncalibrated`, `val/confusion_balanced_accuracy`;
        - `val/confusion_threshold`, `val/confusion_temperature`.
        """
        values: dict[str, float | None] = {"auroc": self.auroc}
        values |= {f"auroc_{kind}": roc.auroc for kind, roc in self.rocs.items()}
        values |= {f"auroc_{kind}_alike": value for kind, value in self.auroc_alike.items()}
        values["ece"], values["ece_uncalibrated"] = self.ece, self.ece_uncalibrated
        values["confusion_balanced_accuracy"] = self.balanced_accuracy
        values["confusion_threshold"] = self.calibration.threshold
        values["confusion_temperature"] = self.calibration.temperature
        return {f"{prefix}/{name}": value for name, value in values.items() if value is not None}


def evaluate_confusion(
    logits: Tensor,
    confused: Tensor,
    kinds: Sequence[str],
    types: Sequence[str | None],
    calibration: Calibration | None = None,
) -> ConfusionReport:
    """Everything about N logits of the confusion monitor.

    Args:
        logits: (N,) before any temperature.
        confused: (N,) bool.
        kinds: N kinds, as `ConfusionSource` names them.
        types: what is asked, see `question_type.asked_type`; None for captions.
        calibration: measure all samples with this one; by default one is fitted to half of them.

    Raises:
        ValueError: no samples, or lengths that differ.
    """
    logits, confused = logits.detach().float().cpu(), confused.cpu().bool()
    if not len(logits) or len({len(logits), len(confused), len(kinds), len(types)}) != 1:
        raise ValueError(
            f"{len(logits)} logits, {len(confused)} labels, {len(kinds)} kinds and {len(types)} question types"
        )
    measured_on = torch.arange(len(logits))
    if calibration is None:
        fitted_on, measured_on = _halves(confused)
        calibration = calibrate(logits[fitted_on], confused[fitted_on])
    scores = calibration.confusion(logits)
    measured, truth = scores[measured_on], confused[measured_on]
    unscaled = torch.sigmoid(logits[measured_on])
    both = bool(confused.any()) and not bool(confused.all())
    rocs, alike = _by_kind(logits, confused, kinds, types)
    return ConfusionReport(
        n_samples=len(logits),
        calibration=calibration,
        auroc=auroc(logits, confused) if both else None,
        rocs=rocs,
        auroc_alike=alike,
        ece=expected_calibration_error(measured, truth) if both else None,
        ece_uncalibrated=expected_calibration_error(unscaled, truth) if both else None,
        reliability=reliability_bins(measured, truth),
        reliability_uncalibrated=reliability_bins(unscaled, truth),
        balanced_accuracy=balanced_accuracy(measured > calibration.threshold, truth),
        scores=_scores_by_kind(scores, confused, kinds),
    )


def calibrate(logits: Tensor, confused: Tensor) -> Calibration:
    """Temperature, then threshold, for (N,) logits; the defaults where all samples are confused, or none is."""
    if not bool(confused.any()) or bool(confused.all()):
        return Calibration()
    temperature = fit_temperature(logits, confused)
    return Calibration(
        temperature=temperature, threshold=choose_threshold(torch.sigmoid(logits / temperature), confused)
    )


def fit_temperature(logits: Tensor, confused: Tensor) -> float:
    """The temperature, 0.05 to 20, that makes the labels (N,) most probable (Guo et al. 2017).

    With b = 1 / T the mean of log(1 + e^(b z)) - b z y is convex, so the zero of its derivative is found by halving.
    """
    z, y = logits.double(), confused.double()

    def slope(b: float) -> float:
        return float(((torch.sigmoid(b * z) - y) * z).mean())

    low, high = 1 / _MAX_TEMPERATURE, 1 / _MIN_TEMPERATURE
    if slope(low) >= 0:
        return 1 / low
    if slope(high) <= 0:
        return 1 / high
    for _ in range(_BISECTIONS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / low


def choose_threshold(scores: Tensor, confused: Tensor) -> float:
    """The threshold with the greatest balanced accuracy of `scores > threshold` (Youden's J), midway between scores.

    Of those that the samples cannot tell from the best, within one standard error (Breiman et al. 1984), that nearest
    to 0.5, where being wrong is as likely as being right. `confused` (N,) must have both values.
    """
    ordered, order = scores.double().sort()
    labels = confused[order].double()
    n_confused = labels.sum()
    # after the k lowest scores: so many confused ones are missed, so many others are right
    missed, right = labels.cumsum(0), (1 - labels).cumsum(0)
    n_others = len(labels) - n_confused
    noticed, passed = (n_confused - missed) / n_confused, right / n_others
    accuracy = (noticed + passed) / 2
    error = (noticed * (1 - noticed) / n_confused + passed * (1 - passed) / n_others).sqrt() / 2
    is_cut = torch.ones(len(ordered), dtype=torch.bool)
    is_cut[:-1] = ordered[1:] > ordered[:-1]
    is_cut[-1] = False  # a threshold above everything notices nothing
    if not bool(is_cut.any()):
        return DEFAULT_THRESHOLD
    middles = (ordered[:-1] + ordered[1:]) / 2
    candidates = is_cut[:-1].nonzero().squeeze(1)
    best = candidates[accuracy[candidates].argmax()]
    as_good = candidates[accuracy[candidates] >= accuracy[best] - error[best] - 1e-12]
    return float(middles[as_good[(middles[as_good] - DEFAULT_THRESHOLD).abs().argmin()]])


def balanced_accuracy(noticed: Tensor, confused: Tensor) -> float | None:
    """Mean of the shares noticed among the confused and not noticed among the others; None if one is empty."""
    if not bool(confused.any()) or bool(confused.all()):
        return None
    return float((noticed[confused].double().mean() + (~noticed[~confused]).double().mean()) / 2)


def auroc(scores: Tensor, confused: Tensor) -> float:
    """Probability that a confused sample scores above another one; ties count half."""
    from torchmetrics.functional.classification import binary_auroc

    return float(binary_auroc(_as_probabilities(scores), confused.long()))


def roc(scores: Tensor, confused: Tensor) -> Roc:
    """The curve of true against false positives over all thresholds."""
    from torchmetrics.functional.classification import binary_roc

    false_positive, true_positive, _ = binary_roc(_as_probabilities(scores), confused.long())
    return Roc(false_positive=false_positive, true_positive=true_positive, auroc=auroc(scores, confused))


def expected_calibration_error(scores: Tensor, confused: Tensor) -> float:
    """Mean distance between score and share of confused samples over 15 bins, weighted by their samples."""
    from torchmetrics.functional.classification import binary_calibration_error

    return float(binary_calibration_error(scores, confused.long(), n_bins=N_BINS, norm="l1"))


def reliability_bins(scores: Tensor, confused: Tensor) -> list[Bin]:
    """The 15 bins of equal width that have samples, from low scores to high."""
    number = (scores * N_BINS).long().clamp(0, N_BINS - 1)
    bins = []
    for n in number.unique().tolist():
        rows = number == n
        bins.append(
            Bin(
                score=float(scores[rows].double().mean()),
                confused=float(confused[rows].double().mean()),
                count=int(rows.sum()),
            )
        )
    return bins


def _by_kind(
    logits: Tensor, confused: Tensor, kinds: Sequence[str], types: Sequence[str | None]
) -> tuple[dict[str, Roc], dict[str, float]]:
    """The curve of each kind that has confused samples and something to compare them with."""
    is_question = torch.tensor([each is not None for each in types])
    rocs: dict[str, Roc] = {}
    alike: dict[str, float] = {}
    for kind in dict.fromkeys(kinds):
        of_kind = torch.tensor([each == kind for each in kinds])
        positive = of_kind & confused
        if not bool(positive.any()):
            continue
        negative = ~confused
        if kind == "given" and bool((negative & of_kind).any()):
            negative = negative & of_kind
        elif bool(is_question[positive].all()) and bool((negative & is_question).any()):
            negative = negative & is_question
        if not bool(negative.any()):
            continue
        rocs[kind] = roc(*_contrast(logits, positive, negative))
        asked = {types[row] for row in (positive & is_question).nonzero().squeeze(1).tolist()}
        same_words = ~confused & is_question & torch.tensor([each in asked for each in types])
        if bool(same_words.any()):
            alike[kind] = auroc(*_contrast(logits, positive & is_question, same_words))
    return rocs, alike


def _contrast(logits: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    rows = positive | negative
    return logits[rows], positive[rows]


def _scores_by_kind(scores: Tensor, confused: Tensor, kinds: Sequence[str]) -> dict[str, Tensor]:
    names = [
        "given_clear" if kind == "given" and not is_confused else kind
        for kind, is_confused in zip(kinds, confused.tolist(), strict=True)
    ]
    return {name: scores[torch.tensor([each == name for each in names])] for name in dict.fromkeys(names)}


def _halves(confused: Tensor) -> tuple[Tensor, Tensor]:
    """Two random halves of the rows; both everything if one would lack clear or confused samples."""
    order = torch.randperm(len(confused), generator=torch.Generator().manual_seed(0))
    halves = order[::2], order[1::2]
    if all(bool(confused[half].any()) and not bool(confused[half].all()) for half in halves):
        return halves
    return order, order


def _as_probabilities(scores: Tensor) -> Tensor:
    """Ranks in [0, 1] in the order of the scores: torchmetrics squashes logits in float32, where large ones tie."""
    values, ranks = scores.unique(return_inverse=True)
    return ranks.double() / max(1, len(values) - 1)
