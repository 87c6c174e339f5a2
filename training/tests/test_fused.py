"""The fused kernels are right or off: what their first use looks at, what it leaves alone, and what is kept of it."""

from __future__ import annotations

import dataclasses
import logging
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_kernels import fake_mimo, fake_siso
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mamba3_jepa.errors import UserError
from mamba3_jepa.files.checkpoint import load_checkpoint
from mamba3_jepa.models import fused as fused_module
from mamba3_jepa.models import kernel_tuning, kernels, mamba3
from mamba3_jepa.models.chunked import chunked_scan
from mamba3_jepa.models.fused import Fused, Shape
from mamba3_jepa.models.mamba3 import Mamba3
from mamba3_jepa.models.scan import Mamba3State, ScanInputs, widened
from mamba3_jepa.settings.training import Phase1Settings
from mamba3_jepa.training import loop, session
from mamba3_jepa.training.phase1 import train_phase1

LOGGER = "mamba3_jepa.models.fused"


class Kernel:
    """The chunked scan as a kernel gives it, in bfloat16; counts its calls, and may have a fault."""

    def __init__(self, fault: Callable[[Tensor], Tensor] = lambda y: y) -> None:
        self.calls, self.fault = 0, fault

    def __call__(
        self, inputs: ScanInputs, state: Mamba3State | None, z: Tensor | None, return_state: bool
    ) -> tuple[Tensor, Mamba3State | None]:
        self.calls += 1
        y, after = chunked_scan(widened(inputs), state, z=z, return_state=return_state)
        return self.fault(y).bfloat16(), after


class WrongGradient(torch.autograd.Function):
    """The value is right, and the gradient a tenth too large."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * 1.1


def wrong_tail(y: Tensor) -> Tensor:
    """Only what stands behind the last whole chunk is wrong, as where a mask was forgotten."""
    return torch.cat([y[:, :64], y[:, 64:] * 1.5], dim=1)


def fails(y: Tensor) -> Tensor:
    raise RuntimeError("out of resource: shared memory\nRequired: 168, limit: 101")


FAULTS = {
    "a wrong value": (lambda y: y * 1.05, "its output is off by 0.05 of its size"),
    "a wrong tail": (wrong_tail, "its output is off by"),
    "not a number": (lambda y: y.index_fill(1, torch.tensor([3]), torch.nan), "its output is off by inf"),
    "a wrong gradient": (WrongGradient.apply, "the gradient by q is off by 0.1 of its size"),
    "a failed launch": (fails, "it failed: RuntimeError: out of resource: shared memory Required: 168, limit: 101"),
}


def layer() -> Mamba3:
    torch.manual_seed(0)
    return Mamba3(32, d_state=16, headdim=16)


def run(layer: Mamba3, L: int = 70, B: int = 2, learns: bool = True) -> tuple[Tensor, list[Tensor]]:
    """Output and parameter gradients under autocast."""
    u = torch.randn(B, L, 32, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(learns):
        y = layer(u)
    return y.detach(), list(torch.autograd.grad(y.square().sum(), list(layer.parameters()))) if learns else []


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Fused]:
    """Makes the layers of this test ask a choice of its own, with a kernel that fits on the CPU."""

    def choice(kernel: Callable, use: str = "auto") -> Fused:
        made = Fused(use, scan=kernel, unfit=lambda *_: None, device_type="cpu")
        monkeypatch.setattr(mamba3, "fused", made)
        return made

    return choice


def test_a_right_kernel_is_looked_at_once_and_taken(use: Callable, caplog: pytest.LogCaptureFixture) -> None:
    kernel = Kernel()
    expected = run(layer())  # without: the process's own choice has no kernel here
    fused = use(kernel)
    found = [run(layer()) for _ in range(3)]
    assert kernel.calls == 1 + 3
    assert list(fused.wrong.values()) == [None]
    for one, other in zip([found[0][0], *found[0][1]], [expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(one, other, rtol=0.1, atol=0.1 * float(other.abs().max()))
    assert not caplog.records


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_kernel_is_off_for_its_shape(name: str, use: Callable, caplog: pytest.LogCaptureFixture) -> None:
    fault, said = FAULTS[name]
    kernel = Kernel(fault)
    expected = run(layer())
    fused = use(kernel)
    with caplog.at_level(logging.WARNING, LOGGER):
        found = [run(layer()), run(layer())]
    assert kernel.calls == 1  # never for the layer
    for y, gradients in found:  # what it would be without kernels, bit for bit
        assert torch.equal(y, expected[0])
        assert all(map(torch.equal, gradients, expected[1]))
    (record,) = caplog.records
    message = record.getMessage()
    assert said in message
    assert "SISO on cpu, 4 heads of 16, 1 groups, 1 ranks, d_state 16, 4 angles (seen with 2 x 70 tokens)" in message
    assert "`kernels` off" in message
    assert [wrong is None for wrong in fused.wrong.values()] == [False]


def test_a_wrong_gradient_matters_where_there_is_one(use: Callable) -> None:
    kernel = Kernel(WrongGradient.apply)
    fused = use(kernel)
    run(layer(), learns=False)
    assert list(fused.wrong.values()) == [None]
    run(layer())
    assert [shape.learns for shape, wrong in fused.wrong.items() if wrong] == [True]


def test_other_shapes_stay_on(use: Callable) -> None:
    kernel = Kernel(wrong_tail)
    fused = use(kernel)
    run(layer(), L=70)
    run(layer(), L=64)
    assert {(shape.chunks, shape.rest): wrong is None for shape, wrong in fused.wrong.items()} == {
        (2, 2): False,
        (1, 0): True,
    }


def test_lengths_share_their_checks(use: Callable) -> None:
    fused = use(Kernel())
    for L in (2, 15, 16, 48, 64, 65, 70, 80, 128, 129, 144, 192, 259):
        run(layer(), L=L, B=1 + L % 2, learns=False)
    assert len(fused.wrong) == 9


@pytest.mark.parametrize("name", FAULTS)
def test_required_kernels_that_are_wrong_are_an_error(name: str, use: Callable) -> None:
    fault, said = FAULTS[name]
    use(Kernel(fault), "require")
    for _ in range(2):
        with pytest.raises(UserError, match="`kernels` require: the fused kernel SISO on cpu") as error:
            run(layer())
        assert said in str(error.value)


def test_required_kernels_that_do_not_fit_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mamba3, "fused", Fused("require", scan=Kernel(), device_type="cpu"))
    small, match = (
        Mamba3(32, d_state=8, headdim=16),
        "`kernels` require: d_state 8 and headdim 16 must be powers of two",
    )
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UserError, match=match):
        small(torch.randn(1, 3, 32))
    monkeypatch.setattr(kernels, "siso_kernel", lambda: None)
    with pytest.raises(UserError, match="`kernels` require: mamba-ssm is not installed"):
        run(layer())
    layer()(torch.randn(1, 3, 32))  # in float32, as in validation: kernels do not come into question


def test_off_calls_none(use: Callable) -> None:
    kernel = Kernel()
    fused = use(kernel, "off")
    run(layer())
    assert kernel.calls == 0
    assert not fused.wrong


def test_a_launch_that_fails_later_is_made_up_for(use: Callable, caplog: pytest.LogCaptureFixture) -> None:
    expected = run(layer())
    kernel = Kernel()
    fused = use(kernel)
    run(layer())
    kernel.fault = fails
    with caplog.at_level(logging.WARNING, LOGGER):
        y, gradients = run(layer())
        run(layer())
    torch.testing.assert_close(y, expected[0])
    assert all(map(torch.equal, gradients, expected[1]))
    assert kernel.calls == 3
    assert len(caplog.records) == len([wrong for wrong in fused.wrong.values() if wrong]) == 1


def test_memory_that_runs_out_is_not_the_kernels_fault(use: Callable) -> None:
    def without_memory(y: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    fused = use(Kernel(without_memory))
    with pytest.raises(torch.OutOfMemoryError):
        run(layer())
    assert not fused.wrong


def test_a_device_that_is_left_unusable_ends_the_run(use: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def illegal(*arguments: object, **options: object) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    use(Kernel(fails))
    module = layer()
    monkeypatch.setattr(fused_module.torch, "ones", illegal)
    with pytest.raises(UserError, match="left the device unusable: start again with `kernels` off"):
        run(module)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_surroundings_stay_as_they_are(mode: Callable, use: Callable) -> None:
    fused = use(Kernel())
    module, u = layer(), torch.zeros(1, 5, 32)
    before = torch.get_rng_state()
    with mode(), torch.autocast("cpu", torch.bfloat16):
        y = module(u)
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
    assert y.is_inference() == (mode is torch.inference_mode)
    assert list(fused.wrong.values()) == [None]
    assert torch.equal(torch.get_rng_state(), before)


def test_checkpointed_activations_do_not_see_the_check(use: Callable) -> None:
    expected = run(layer())
    kernel = Kernel()
    use(kernel)
    module = layer()
    u = torch.randn(2, 70, 32, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        y = checkpoint(module, u, use_reentrant=False)
    gradients = torch.autograd.grad(y.square().sum(), list(module.parameters()))
    assert kernel.calls == 3  # the check, forward, and forward again
    for found, wanted in zip(gradients, expected[1], strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.1 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", ["a wrong gradient", None])
def test_compiled_layers_make_the_same_choice(name: str | None, use: Callable) -> None:
    kernel = Kernel(FAULTS[name][0]) if name else Kernel()
    use(kernel)
    expected = run(layer())
    calls = kernel.calls
    fused = use(kernel)
    torch._dynamo.reset()
    compiled = layer()
    compiled.compile(backend="eager")
    for _ in range(2):
        y, gradients = run(compiled)
        torch.testing.assert_close(y, expected[0])
        for found, wanted in zip(gradients, expected[1], strict=True):
            torch.testing.assert_close(found, wanted)
    assert kernel.calls - calls == (1 if name else 3)
    assert [wrong is None for wrong in fused.wrong.values()] == [name is None]


@pytest.mark.parametrize("kind", ["siso", "mimo"])
@pytest.mark.parametrize("state", [False, True])
def test_the_check_knows_a_kernel_in_bfloat16(kind: str, state: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the real ones' arguments, rounded as they are, pass with room to spare."""
    monkeypatch.setattr(kernels, "siso_kernel", lambda: fake_siso)
    monkeypatch.setattr(kernels, "mimo_kernel", lambda: fake_mimo)
    monkeypatch.setattr(kernels, "MIMO_STATES", (16,))
    monkeypatch.setattr(kernels, "MIMO_HEADS", (16,))
    for name in ("VALUE_ERROR", "GRADIENT_ERROR"):
        monkeypatch.setattr(f"mamba3_jepa.models.kernel_check.{name}", 0.02)
    fused = Fused("require", device_type="cpu")
    monkeypatch.setattr(mamba3, "fused", fused)
    module = Mamba3(32, d_state=16, headdim=16, is_mimo=kind == "mimo", mimo_rank=2)
    before = module.initial_state(2) if state and kind == "siso" else None
    with torch.autocast("cpu", torch.bfloat16):
        module(torch.randn(2, 70, 32), before, return_state=state and kind == "siso")
    ((shape, wrong),) = fused.wrong.items()
    assert (shape.kind.lower(), shape.learns, wrong) == (kind, True, None)


@pytest.fixture
def tuned() -> Iterator[types.ModuleType]:
    """A module of mamba-ssm's with a kernel that Triton tunes."""
    triton = pytest.importorskip("triton")

    def kernel(x, n):
        pass

    module = types.ModuleType("mamba_ssm.ops.triton.mamba3.test_tuned")
    configs = [triton.Config({"BLOCK": b}, num_warps=w, num_stages=s) for b in (1, 2) for w in (2, 4) for s in (1, 2)]
    module.kernel = triton.autotune(configs=configs, key=["n"])(triton.jit(kernel))
    module.other = 3
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


def test_tuning_is_kept_and_taken_up(tuned: types.ModuleType, use: Callable, caplog: pytest.LogCaptureFixture) -> None:
    tuner = tuned.kernel
    tuner.cache[(64, True, "torch.bfloat16")] = tuner.configs[5]
    tuner.cache[(128, None, "torch.bfloat16")] = tuner.configs[2]
    fused = use(Kernel(FAULTS["a wrong value"][0]))
    run(layer())
    kept = fused.kept()
    before, wrong = dict(tuner.cache), dict(fused.wrong)
    tuner.cache.clear()
    kernel = Kernel()
    other = use(kernel)
    other.begin("auto", kept)
    assert tuner.cache == before
    run(layer())
    assert kernel.calls == 0
    assert other.wrong == wrong
    assert other.kept() == kept

    tuner.cache.clear()
    other.begin("auto", kept | {"made_by": kept["made_by"] | {"device": "another"}})
    other.begin("off", kept)
    assert not tuner.cache
    assert not other.wrong
    assert other.kept() is None
    kernel_tuning.restrict(num_warps=8, most_stages=2)
    assert len(tuner.configs) == 8  # none is such
    kernel_tuning.restrict(num_warps=2, most_stages=2)
    assert {(each.num_warps, each.num_stages) for each in tuner.configs} == {(2, 1), (2, 2)}
    assert len(tuner.configs) == 4
    with caplog.at_level(logging.WARNING, "mamba3_jepa.models.kernel_tuning"):
        other.begin("auto", kept)
    assert list(tuner.cache) == [(64, True, "torch.bfloat16")]
    assert "no longer has the variant" in caplog.text
    assert kernel_tuning.chosen("mamba_ssm.ops.other.") == {}


def test_a_shape_survives_being_written() -> None:
    shape = Shape("cpu", "SISO", 4, 1, 1, 16, 16, 4, 2, 2, True, False, False, True)
    assert Shape(**shape._asdict()) == shape


def test_a_run_goes_on_with_the_kernels_it_had(
    tmp_path: Path, use: Callable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Phase1Settings(
        tiny=True, cpu=True, max_steps=1, batch_size=8, synthetic_scenes=8, val_samples=8, precision="bf16",
        output_dir=tmp_path,
    )  # fmt: skip
    broken, sound = Kernel(fails), Kernel()
    for kernel, settings in (
        (broken, run),
        (sound, dataclasses.replace(run, resume=True, max_steps=2)),
        (sound, dataclasses.replace(run, resume=True, max_steps=3, kernels="off")),
    ):
        made = use(kernel)
        for module in (loop, session):
            monkeypatch.setattr(module, "fused", made)
        train_phase1(settings)
        kept = load_checkpoint(tmp_path / "phase1_last.pt").trainer["kernels"]
        assert made.use == settings.kernels
        assert kept == [made.kept()]
        assert (kept == [None]) == (settings.kernels == "off")
    assert broken.calls > 0  # once for each shape
    assert sound.calls == 0  # what was off stays off
    assert "as before, the fused kernel SISO on cpu" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [({}, "this computes on cpu"), ({"precision": "bf16"}, "the kernels are for CUDA GPUs")],
)
def test_kernels_that_nothing_can_have_are_not_required(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        train_phase1(Phase1Settings(tiny=True, cpu=True, kernels="require", output_dir=tmp_path, **changes))
    with pytest.raises(UserError, match="the kernels compute in bfloat16: give `precision` bf16"):
        fused_module.demand_possible("require", torch.device("cuda"), bfloat16=False)
    fused_module.demand_possible("require", torch.device("cuda"), bfloat16=True)
