"""What complex states are for: a Mamba-3 stack learns the parity of bit strings, and keeps it on longer ones.

The parity of a string flips with every 1. A state that only decays cannot flip for ever; one that turns by pi
for each 1 does nothing else. So a small stack is trained on strings of up to 40 bits to give the parity after
each bit, and then read at the last bit of much longer strings; the same stack with its rotation off (the
angle rows of in_proj held at zero) is trained beside it in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba3_jepa.files.json_file import write_json
from mamba3_jepa.models.mamba3 import Mamba3, RMSNorm
from mamba3_jepa.settings.bench import ParitySettings

START = 2  # the token before the first bit: what the rotation has to turn
EVALUATION_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class ParityResult:
    """Accuracy at the last bit of fresh strings, by length."""

    rotation: bool
    accuracy: dict[int, float]


class ParityModel(nn.Module):
    """Embedding, a residual stack of Mamba-3 layers, one logit per token.

    There is no norm before the logit: it would keep the sign and hide how far an angle is off.
    """

    def __init__(self, settings: ParitySettings, rotation: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, settings.d_model)
        self.norms = nn.ModuleList(RMSNorm(settings.d_model) for _ in range(settings.n_layers))
        self.layers = nn.ModuleList(
            Mamba3(
                settings.d_model,
                d_state=settings.d_state,
                headdim=settings.headdim,
                a_activation=settings.a_activation,
                dt_min=settings.dt_min,
                dt_max=settings.dt_max,
            )
            for _ in range(settings.n_layers)
        )
        self.head = nn.Linear(settings.d_model, 1)
        self.rotation = rotation
        self._initialize(settings)
        self.hold_still()

    @torch.no_grad()
    def _initialize(self, settings: ParitySettings) -> None:
        """States that last: the embeddings share a direction, and along it the decay's rows of in_proj start far
        in the negative. B and C start at random phases to each other: the output then feels a small error of the
        angle in first order, not in second, and training drives it out.
        """
        self.embedding.weight.normal_(mean=1.0, std=0.5)
        for layer in self.layers:
            assert isinstance(layer, Mamba3)
            layer.B_bias.normal_()
            layer.C_bias.normal_()
            decay_rows = layer.in_proj.weight.split(layer.split_sizes)[5]
            decay_rows.sub_(settings.initial_decay_logit / settings.d_model)

    @torch.no_grad()
    def hold_still(self) -> None:
        """Without rotation, sets the rows of in_proj that make the angles to zero."""
        if not self.rotation:
            for layer in self.layers:
                assert isinstance(layer, Mamba3)
                layer.in_proj.weight[-layer.n_angles :] = 0

    def forward(self, bits: Tensor) -> Tensor:
        """(B, L) of 0 and 1 -> (B, L) logits of the parity of the bits so far."""
        h = self.embedding(F.pad(bits, (1, 0), value=START))
        for norm, layer in zip(self.norms, self.layers, strict=True):
            h = h + layer(norm(h))
        return self.head(h)[:, 1:, 0]


def learn_parity(
    settings: ParitySettings, rotation: bool, report: Callable[[str], None] = lambda line: None
) -> ParityResult:
    """Trains one model from the seed and measures it. A seed and a thread count decide the result."""
    torch.manual_seed(settings.seed)
    torch.set_num_threads(settings.threads)
    model = ParityModel(settings, rotation)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr, betas=(0.9, 0.99))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step, settings))
    for step in range(settings.steps):
        length = _training_length(step, settings)
        bits = _training_bits(settings.batch_size, length)
        loss = F.binary_cross_entropy_with_logits(model(bits), _smoothed(_parity(bits)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        model.hold_still()
        if (step + 1) % 100 == 0:
            report(f"step {step + 1}/{settings.steps}, up to length {length}: loss {loss.item():.4f}")
    return ParityResult(rotation=rotation, accuracy={n: _accuracy(model, n, settings) for n in settings.test_lengths})


def _parity(bits: Tensor) -> Tensor:
    return bits.cumsum(1) % 2


def _smoothed(labels: Tensor) -> Tensor:
    """0.05 and 0.95: a logit is then wrong when it grows as well as when it shrinks, and the loss keeps its
    say about the angle after the last string of the batch is right.
    """
    return 0.05 + 0.9 * labels


def _schedule(step: int, settings: ParitySettings) -> float:
    """Warm-up, then cosine to zero."""
    if step < settings.warm_up:
        return (step + 1) / settings.warm_up
    done = (step - settings.warm_up) / max(1, settings.steps - settings.warm_up)
    return 0.5 * (1 + math.cos(math.pi * done))


def _training_length(step: int, settings: ParitySettings) -> int:
    """4 for the first fifth of the steps, then growing to `train_length` until half of them are done; every token
    has its own label, so that a string trains all shorter ones with it.
    """
    grown = (step / settings.steps - 0.2) / 0.3
    return 4 + round((settings.train_length - 4) * min(1.0, max(0.0, grown)))


def _training_bits(count: int, length: int) -> Tensor:
    """Strings of every density of ones: many ones show best whether a 1 turns the state by exactly pi."""
    return (torch.rand(count, length) < torch.rand(count, 1)).long()


@torch.no_grad()
def _accuracy(model: ParityModel, length: int, settings: ParitySettings) -> float:
    right = 0
    for start in range(0, settings.test_strings, EVALUATION_BATCH):
        count = min(EVALUATION_BATCH, settings.test_strings - start)
        bits = torch.randint(0, 2, (count, length))
        right += int(((model(bits)[:, -1] > 0) == _parity(bits)[:, -1].bool()).sum())
    return right / settings.test_strings


def write_results(results: list[ParityResult], settings: ParitySettings) -> tuple[Path, Path]:
    """A plot (PNG) of accuracy by length, and the numbers (JSON); returns their paths."""
    from mamba3_jepa.evaluation.figure import add_panel, legend_beside, new_figure, save_figure, set_title
    from mamba3_jepa.evaluation.palette import INK, REST, WITH_ROTATION, WITHOUT_ROTATION

    figure = new_figure(7.4, 3.6)
    axes = add_panel(figure)
    set_title(axes, "Parity of random bits", "bits", "accuracy at the last bit")
    for result in results:
        label, color = ("rotation on", WITH_ROTATION) if result.rotation else ("rotation off", WITHOUT_ROTATION)
        axes.plot(list(result.accuracy), list(result.accuracy.values()), color=color, marker="o", label=label)
    axes.axvline(settings.train_length, color=INK, linestyle=":", linewidth=1.0, label="longest in training")
    axes.axhline(0.5, color=REST, linestyle="--", linewidth=1.0, label="chance", zorder=1)
    axes.set(xscale="log", ylim=(0.4, 1.03))
    axes.set_xticks(settings.test_lengths, [str(n) for n in settings.test_lengths])
    axes.minorticks_off()
    legend_beside(axes)
    plot, numbers = settings.output_dir / "parity.png", settings.output_dir / "parity.json"
    save_figure(figure, plot)
    write_json(numbers, [asdict(result) for result in results])
    return plot, numbers
