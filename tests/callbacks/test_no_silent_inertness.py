"""Each callback in each way to train: it acts, which is seen in what it does, or the run is refused before a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

import lightning_optim as lo
from lightning_optim.callbacks._hub import state_of_last_fit
from lightning_optim.clipping import GlobalNorm
from lightning_optim.core.stats import StepRecord
from lightning_optim.diagnostics import DEFAULT_DIAGNOSTICS
from lightning_optim.diagnostics.report import StepReport
from lightning_optim.divergence import NonFiniteGradient
from lightning_optim.step.foreign_decay import ForeignDecay
from tests.helpers import Net, batches, make_trainer, read_events

WAYS = ("automatic", "manual", "two", "replaced", "replaced-by-hand")
BATCHES, EPOCHS = 4, 2
STEPS = BATCHES * EPOCHS
LIMIT, LR, DECAY = 1e-3, 0.1, 0.5

Make = Callable[[Any], torch.optim.Optimizer]


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=LR)


def free(params: Any) -> torch.optim.Optimizer:
    return lo.optim.ScheduleFreeAdamW(params, lr=LR)


def averaged(params: Any) -> Any:
    return lo.optim.AdamW(params, lr=LR, ema=0.9)


class Trained(Net):
    """Trains in one of the ways, and records the weights of each optimizer around each batch.

    Args:
        way: Which one; ``"two"`` has an optimizer of the body and one of the head.
        make: What makes an optimizer from parameters.
        factor: By what the loss is multiplied, from the number of the batch.
    """

    def __init__(self, way: str, make: Make = sgd, factor: Callable[[int], float] = lambda batch_idx: 100.0) -> None:
        super().__init__()
        self.automatic_optimization = way in ("automatic", "replaced")
        self.make, self.factor = make, factor
        self.parts: list[nn.Module] = [self.body, self.head] if way == "two" else [self]
        self.before: list[list[Tensor]] = []
        self.after: list[list[Tensor]] = []
        self.validated: list[list[Tensor]] = []

    def weights(self) -> list[Tensor]:
        """Those of each optimizer as one vector."""
        return [nn.utils.parameters_to_vector(part.parameters()).detach().clone() for part in self.parts]

    def moved(self) -> list[list[float]]:
        """How far each batch has moved the weights of each optimizer."""
        both = zip(self.before, self.after, strict=True)
        return [[float((b - a).norm()) for a, b in zip(before, after, strict=True)] for before, after in both]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        self.before.append(self.weights())
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx) * self.factor(batch_idx)
        made: Any = self.optimizers()
        optimizers = made if isinstance(made, list) else [made]
        if len(self.parts) == 2:
            _body, _head = optimizers
        for optimizer in optimizers:
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx) * self.factor(batch_idx))
            optimizer.step()
        return None

    def on_train_batch_end(self, *args: Any) -> None:
        self.after.append(self.weights())

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.validated.append(self.weights())
        super().validation_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return [self.make(part.parameters()) for part in self.parts]


class Replaces(L.Callback):
    """Gives the Trainer another optimizer at the start of the second epoch."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.optimizers = [pl_module.make(pl_module.parameters())]


def fit(way: str, callbacks: list[L.Callback], model: Trained, **options: Any) -> L.Trainer:
    more = [Replaces()] if way.startswith("replaced") else []
    trainer = make_trainer([*callbacks, *more], max_epochs=EPOCHS, **options)
    trainer.fit(model, batches(BATCHES), batches(1))
    return trainer


@contextmanager
def refused(error: type[Exception], match: str, model: Trained) -> Iterator[None]:
    """The run ends with this error, and nothing has been trained."""
    before = model.weights()
    with pytest.raises(error, match=match):
        yield
    assert all(torch.equal(a, b) for a, b in zip(before, model.weights(), strict=True))


# In a Trainer, each callback by what it does.


def configure_acts(way: str, folder: Path, capsys: Any) -> None:
    model = Trained(way)
    options: dict[str, Any] = {"optimizer": "sgd", "lr": LR, "schedule": "linear", "param_groups": []}
    if way == "two":
        with refused(ValueError, r"optimizers=\[\{\"name\": \"generator\"", model):
            fit(way, [lo.ConfigureOptimizers(**options)], model)
        model = Trained(way)
        model.norm.requires_grad_(False)
        parts = [{"name": name, "part": name, **options} for name in ("body", "head")]
        callback = lo.ConfigureOptimizers(optimizers=parts)
    else:
        callback = lo.ConfigureOptimizers(**options)
    rates: list[list[float]] = []

    class Rates(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            rates.append([optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers])

    trainer = fit(way, [callback, Rates()], model)
    cls = torch.optim.SGD if way.startswith("replaced") else lo.optim.SGD
    assert [type(optimizer) for optimizer in trainer.optimizers] == [cls] * len(model.parts)
    curve = [LR * (1 - step / STEPS) for step in range(1, STEPS + 1)]  # after each step, the rate of the next
    if way.startswith("replaced"):  # The user's own begins at its own rate, and goes down from there.
        curve[BATCHES:] = [LR * (1 - step / BATCHES) for step in range(1, BATCHES + 1)]
    assert rates == [[pytest.approx(rate, abs=1e-9)] * len(model.parts) for rate in curve]
    assert min(min(moved) for moved in model.moved()) > 0


def clipping_acts(way: str, folder: Path, capsys: Any) -> None:
    model = Trained(way)
    trainer = fit(way, [lo.GradientClipping(LIMIT)], model)
    assert state_of_last_fit(trainer)["lightning_optim"]["counts"] == [[STEPS, STEPS, 0]] * len(model.parts)
    for moved in model.moved():
        assert moved == pytest.approx([LR * LIMIT] * len(model.parts), rel=1e-2)


def guard_acts(way: str, folder: Path, capsys: Any) -> None:
    model = Trained(way, factor=lambda batch_idx: math.nan if batch_idx == 2 else 1.0)
    guard = lo.DivergenceGuard(spikes=None, rollback=None, lr_cut=None, health=None, report_dir=str(folder))
    with pytest.warns(UserWarning, match="skipped"):
        fit(way, [guard], model)
    assert guard.skipped_steps == EPOCHS * len(model.parts)
    for number, moved in enumerate(model.moved()):
        assert [distance > 0 for distance in moved] == [number % BATCHES != 2] * len(model.parts)
        assert all(map(math.isfinite, moved))


def monitor_acts(way: str, folder: Path, capsys: Any) -> None:
    model = Trained(way, factor=lambda batch_idx: 1.0)
    logger = TensorBoardLogger(folder, name="", version="")
    fit(way, [lo.OptimizerMonitor()], model, logger=logger)
    events = read_events(folder)
    prefixes = ["0.", "1."] if way == "two" else [""]
    for number, prefix in enumerate(prefixes):
        assert events[f"optim_lr/{prefix}0"] == [(step, pytest.approx(LR)) for step in range(STEPS)]
        norms = events[f"optim_update_norm/{prefix}0"]
        assert norms == [(step, pytest.approx(moved[number], rel=1e-3)) for step, moved in enumerate(model.moved())]


def summary_acts(way: str, folder: Path, capsys: Any) -> None:
    model = Trained(way)
    fit(way, [lo.GradientClipping(LIMIT), lo.RunSummary()], model)
    out = capsys.readouterr().out
    assert out.count(f"100.0% of {STEPS} ") == len(model.parts)  # of each optimizer
    assert "Parameter groups" in out


def schedule_free_acts(way: str, folder: Path, capsys: Any) -> None:
    model = Trained(way)
    with refused(Exception, r"needs an optimizer with train\(\) and eval\(\).*Change the optimizer", model):
        fit(way, [lo.ScheduleFree()], model)
    model = Trained(way, free)
    fit(way, [lo.ScheduleFree()], model)
    ends = model.after[BATCHES - 1 :: BATCHES]
    begins = [*model.before[BATCHES::BATCHES], None]
    for validated, end, begin in zip(model.validated, ends, begins, strict=True):
        for index in range(len(model.parts)):
            assert not torch.equal(validated[index], end[index]), "validated at the training point"
            # One that replaces another begins where the average was left.
            assert begin is None or way.startswith("replaced") or torch.equal(begin[index], end[index])
    assert all(torch.equal(a, b) for a, b in zip(model.weights(), model.validated[-1], strict=True))


def average_acts(way: str, folder: Path, capsys: Any) -> None:
    model = Trained(way)
    with refused(Exception, r"with the option ema, such as ema=0.9999.*this run has SGD", model):
        fit(way, [lo.WeightAverage()], model)
    model = Trained(way, averaged)
    fit(way, [lo.WeightAverage()], model)
    ends = model.after[BATCHES - 1 :: BATCHES]
    for validated, end in zip(model.validated, ends, strict=True):
        for index in range(len(model.parts)):
            assert not torch.equal(validated[index], end[index]), "validated with the weights of training"
    begins = model.before[BATCHES::BATCHES]
    for begin, end in zip(begins, ends[:-1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(begin, end, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.weights(), model.validated[-1], strict=True))


def decay_acts(way: str, folder: Path, capsys: Any) -> None:
    model = Trained(way, factor=lambda batch_idx: 0.0)
    fit(way, [lo.WeightDecay(DECAY)], model)
    for before, after in zip(model.before, model.after, strict=True):
        for a, b in zip(before, after, strict=True):
            torch.testing.assert_close(b, a * (1 - LR * DECAY))


def ours(params: Any) -> torch.optim.Optimizer:
    return lo.optim.SGD(params, lr=LR)


def release_acts(way: str, folder: Path, capsys: Any) -> None:
    class Kept(L.Callback):
        """Notes after each batch whether any gradient is left."""

        def __init__(self) -> None:
            self.any: list[bool] = []

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            self.any.append(any(param.grad is not None for param in pl_module.parameters()))

    model, kept = Trained(way, ours), Kept()
    if way == "two":
        with refused(Exception, "There are 2 optimizers", model):
            fit(way, [lo.GradientRelease()], model)
        return
    fit(way, [lo.GradientRelease(), kept], model)
    usual, without = Trained(way, ours), Kept()
    fit(way, [without], usual)
    assert (any(kept.any), all(without.any)) == (False, True)
    assert all(torch.equal(a, b) for a, b in zip(model.weights(), usual.weights(), strict=True))


# In Fabric, the building blocks that do the same.


class InFabric:
    """A module and an optimizer as Fabric hands them out, and a step.

    Args:
        make: What makes the optimizer from the module, or the optimizer and something else.
    """

    def __init__(self, make: Callable[[nn.Module], Any] = lambda module: sgd(module.parameters())) -> None:
        self.fabric = Fabric(accelerator="cpu", devices=1)
        inner = nn.Linear(8, 1, bias=False)
        made = make(inner)
        optimizer, self.made = made if isinstance(made, tuple) else (made, None)
        self.module, self.optimizer = self.fabric.setup(inner, optimizer)

    def step(self, value: float = 3.0, factor: float = 1.0) -> float:
        """Step once, and return how far the weights have moved."""
        before = self.module.weight.detach().clone()
        self.optimizer.zero_grad()
        self.fabric.backward(self.module(torch.full((2, 8), value)).square().sum() * factor)
        self.optimizer.step()
        return float((self.module.weight.detach() - before).norm())


def configure_in_fabric(capsys: Any) -> None:
    factory = lo.OptimizerFactory("sgd", lr=LR, schedule="linear")
    run = InFabric(lambda module: factory.build(module, lo.Horizon(total_steps=STEPS)))
    rates = []
    for _ in range(STEPS):
        rates.append(run.optimizer.param_groups[0]["lr"])
        assert run.step(value=0.1) > 0
        run.made.step()
    assert rates == pytest.approx([LR * (1 - step / STEPS) for step in range(STEPS)])


def clipping_in_fabric(capsys: Any) -> None:
    run = InFabric()
    pipeline = lo.StepPipeline(run.optimizer, clip=GlobalNorm(max_norm=LIMIT))
    assert [run.step() for _ in range(3)] == pytest.approx([LR * LIMIT] * 3, rel=1e-2)
    assert pipeline.counts().clipped == 3


def guard_in_fabric(capsys: Any) -> None:
    run = InFabric()
    pipeline = lo.StepPipeline(run.optimizer, detectors=[NonFiniteGradient()])
    assert [run.step(value) > 0 for value in (0.1, math.nan, 0.1)] == [True, False, True]
    assert pipeline.counts().skipped == 1


def monitor_in_fabric(capsys: Any) -> None:
    run, shown = InFabric(), []

    def show(record: StepRecord) -> None:
        shown.append(StepReport(record, DEFAULT_DIAGNOSTICS).send().read())

    lo.StepPipeline(run.optimizer, on_report=show)
    moved = [run.step() for _ in range(3)]
    assert [values["optim_update_norm/0"] for values in shown] == pytest.approx(moved, rel=1e-3)
    assert [values["optim_lr/0"] for values in shown] == [LR] * 3


def summary_in_fabric(capsys: Any) -> None:
    run = InFabric()
    pipeline = lo.StepPipeline(run.optimizer, clip=GlobalNorm(max_norm=LIMIT), detectors=[NonFiniteGradient()])
    for value in (3.0, math.nan, 3.0):
        run.step(value)
    counts = pipeline.counts()
    assert (counts.steps, counts.clipped, counts.skipped) == (3, 2, 1)


def schedule_free_in_fabric(capsys: Any) -> None:
    run = InFabric(lambda module: free(module.parameters()))
    for _ in range(3):
        run.step()
    point = run.module.weight.detach().clone()
    run.optimizer.eval()
    assert not torch.equal(run.module.weight, point)
    run.optimizer.train()
    assert torch.equal(run.module.weight, point)


def average_in_fabric(capsys: Any) -> None:
    run = InFabric(lambda module: averaged(module.parameters()))
    for _ in range(3):
        run.step()
    point = run.module.weight.detach().clone()
    with lo.optim.averaged_weights(run.optimizer):
        average = run.module.weight.detach().clone()
        assert not torch.equal(average, point)
    assert torch.equal(run.module.weight, point)
    assert torch.equal(lo.optim.ema_state_dict(run.module, run.optimizer)["weight"], average)


def decay_in_fabric(capsys: Any) -> None:
    run = InFabric()
    ForeignDecay(run.optimizer, DECAY)
    before = run.module.weight.detach().clone()
    run.step(factor=0.0)
    torch.testing.assert_close(run.module.weight.detach(), before * (1 - LR * DECAY))


def release_in_fabric(capsys: Any) -> None:
    run = InFabric(lambda module: ours(module.parameters()))
    usual = InFabric(lambda module: ours(module.parameters()))
    usual.module.load_state_dict(run.module.state_dict())
    handle = lo.release_gradients(run.optimizer)
    assert [run.step(0.1) for _ in range(3)] == [usual.step(0.1) for _ in range(3)]
    assert run.module.weight.grad is None
    assert handle.counts().steps == 3


TABLE: dict[type, tuple[Callable[[str, Path, Any], None], Callable[[Any], None]]] = {
    lo.ConfigureOptimizers: (configure_acts, configure_in_fabric),
    lo.GradientClipping: (clipping_acts, clipping_in_fabric),
    lo.GradientRelease: (release_acts, release_in_fabric),
    lo.DivergenceGuard: (guard_acts, guard_in_fabric),
    lo.OptimizerMonitor: (monitor_acts, monitor_in_fabric),
    lo.RunSummary: (summary_acts, summary_in_fabric),
    lo.ScheduleFree: (schedule_free_acts, schedule_free_in_fabric),
    lo.WeightAverage: (average_acts, average_in_fabric),
    lo.WeightDecay: (decay_acts, decay_in_fabric),
}
"""Each callback, and what shows that it acts in a Trainer, and its building block in Fabric."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("callback", TABLE, ids=lambda callback: callback.__name__)
def test_in_a_trainer_it_acts(callback: type, way: str, tmp_path: Path, capsys: Any) -> None:
    TABLE[callback][0](way, tmp_path, capsys)


@pytest.mark.parametrize("callback", TABLE, ids=lambda callback: callback.__name__)
def test_in_fabric_its_building_block_acts(callback: type, capsys: Any) -> None:
    TABLE[callback][1](capsys)


def test_the_table_has_every_public_callback() -> None:
    public = [getattr(lo, name) for name in lo.__all__ if not name.startswith("_")]
    callbacks = {each for each in public if isinstance(each, type) and issubclass(each, L.Callback)}
    assert callbacks - {lo.LRRangeTest} == set(TABLE)  # which acts before training: tests/tuning
