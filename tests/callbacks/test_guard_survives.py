"""The guard never ends the run that it protects: neither by what it writes, nor by losses and weights of any kind."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

import lightning_optim as lo
from lightning_optim.divergence import DivergenceReport, Rollback
from lightning_optim.divergence.files import write_file
from lightning_optim.divergence.report import Entry
from tests.helpers import Net, batches, file_size_limit, make_trainer


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert not [path.name for path in tmp_path.iterdir() if ":" in path.name]


TOLD = "cannot be written", "rollback leaves", "could not be kept"


def fit(
    model: L.LightningModule, guard: lo.DivergenceGuard, *others: L.Callback, steps: int = 12, **options: Any
) -> tuple[L.Trainer, list[str]]:
    """Fit, and return the warnings apart from those about steps."""
    trainer = make_trainer([lo.ConfigureOptimizers("adamw", lr=0.01), guard, *others], **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, batches(steps))
    texts = [str(warning.message) for warning in caught]
    return trainer, [text for text in texts if any(part in text for part in TOLD)]


def responses(guard: lo.DivergenceGuard) -> list[str]:
    return [entry.text for entry in guard.report.entries if entry.kind == "did"]


# Files.


class After(L.Callback):
    """Does something after a batch."""

    def __init__(self, batch: int, do: Callable[[], object]) -> None:
        self.batch, self.do = batch, do

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.batch:
            self.do()


@pytest.mark.parametrize("folder", ["a file", "a file/below", "unknown://bucket/run"])
def test_a_folder_that_cannot_be_written_costs_one_warning_before_training(folder: str) -> None:
    Path("a file").write_text("")
    guard = lo.DivergenceGuard(report_dir=folder, save_batches=True, patience=2)
    seen: list[int] = []
    with warnings.catch_warnings(record=True) as early:
        warnings.simplefilter("always")
        trainer = make_trainer([guard, After(0, lambda: seen.extend("cannot be" in str(w.message) for w in early))])
        trainer.fit(Net(nan_batches=range(4, 8)), batches(12))
    assert trainer.fit_loop.epoch_loop.total_batch_idx == 11
    assert sum(seen) == 1
    told = [str(w.message) for w in early if "cannot be written" in str(w.message)]
    assert [text.split(" cannot")[0] for text in told] == ["The divergence report", "The batches of skipped steps"]
    assert all("report_dir" in text for text in told)
    assert guard.skipped_steps == 4


def test_it_is_tried_again_and_written_as_soon_as_it_can_be() -> None:
    Path("a file").write_text("")
    guard = lo.DivergenceGuard(report_dir="a file/below", save_batches=True)
    _, told = fit(Net(nan_batches=[2, 8]), guard, After(5, Path("a file").unlink))
    assert len(told) == 2
    assert "| 2 | 0 | 2 | nonfinite |" in Path("a file/below/divergence_report.md").read_text()
    assert [path.name for path in Path("a file/below/divergence_batches").iterdir()] == ["step8_rank0.pt"]


class Full(L.Callback):
    """A disk that gets full in the middle of the run."""

    def __init__(self, limit: int) -> None:
        self.limit = file_size_limit(limit)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 5:
            self.limit.__enter__()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.limit.__exit__(None, None, None)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.limit.__exit__(None, None, None)


@pytest.mark.pictures
def test_a_full_disk_leaves_the_report_before_whole() -> None:
    guard = lo.DivergenceGuard(save_batches=True, patience=2, cooldown=0, lr_cut=lo.divergence.LRCut(budget=9))
    reports: list[str] = []
    note = After(9, lambda: reports.append(Path("divergence_report.json").read_text()))
    trainer, told = fit(Net(nan_batches=[1, 2, 6, 7, 8]), guard, Full(100), note)
    assert trainer.global_step == 12
    assert [text.split(" cannot")[0] for text in told] == ["The batches of skipped steps", "The divergence report"]
    assert json.loads(reports[0])["entries"][-1]["step"] <= 3
    assert sorted(path.name for path in Path().glob("*")) == [
        "divergence_batches",
        "divergence_report.json",
        "divergence_report.md",
        "divergence_report_step1.png",
    ]


def test_a_file_is_written_as_a_whole_or_not_at_all() -> None:
    report = DivergenceReport()
    report.add(Entry(1, 0, [1], 0, "nonfinite", "its loss is not finite"))
    before = report.write("here")
    assert isinstance(before, Path)
    text = before.read_text()
    report.add(Entry(2, 0, [2], 0, "nonfinite", "its loss is not finite"))
    with file_size_limit(20), pytest.raises(OSError, match="large"):
        report.write("here")
    assert before.read_text() == text
    assert len(list(Path("here").iterdir())) == 2
    with file_size_limit(20), pytest.raises(OSError, match="large"):
        write_file("there", "new.md", b"1" * 100)
    assert list(Path("there").iterdir()) == []


@pytest.mark.pictures
def test_files_go_to_a_remote_folder_of_checkpoints() -> None:
    remote = fsspec.filesystem("memory")
    checkpoints = ModelCheckpoint(dirpath="memory://bucket/run")
    guard = lo.DivergenceGuard(save_batches=True, patience=1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        make_trainer([guard, checkpoints], enable_checkpointing=True).fit(Net(nan_batches=[2]), batches(4))
    (text,) = [str(warning.message) for warning in told if "Report: " in str(warning.message)]
    assert text.endswith("Report: memory:///bucket/run/divergence_report.md")
    names = {path for path in remote.find("/bucket/run") if "divergence" in path}
    reports = {"/bucket/run/divergence_report.json", "/bucket/run/divergence_report.md"}
    reports.add("/bucket/run/divergence_report_step2.png")
    assert names == reports | {"/bucket/run/divergence_batches/step2_rank0.pt"}
    with remote.open("/bucket/run/divergence_batches/step2_rank0.pt", "rb") as file:
        assert len(torch.load(file)) == 1
    assert list(Path().iterdir()) == []


def test_a_text_that_tensorboard_does_not_take_costs_one_warning(tmp_path: Path) -> None:
    class Writer(SummaryWriter):
        def add_text(self, *args: Any, **kwargs: Any) -> None:
            raise OSError(28, "No space left on device")

    class Logger(TensorBoardLogger):
        @property
        def experiment(self) -> Any:
            return Writer(str(tmp_path / "events"))

    logger = Logger(str(tmp_path), name="logs")
    trainer, told = fit(Net(nan_batches=range(4, 8)), lo.DivergenceGuard(patience=2), logger=logger)
    assert trainer.fit_loop.epoch_loop.total_batch_idx == 11
    (text,) = told
    assert "on TensorBoard" in text


def test_a_logger_that_fails_when_a_skip_is_logged_costs_one_warning(tmp_path: Path) -> None:
    class Offline(CSVLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            raise ConnectionError("offline")

    trainer, told = fit(Net(nan_batches=[2, 5]), lo.DivergenceGuard(), logger=Offline(tmp_path))
    assert trainer.global_step == 12
    (text,) = told
    assert "number of skipped steps" in text


def test_a_first_snapshot_that_is_lost_is_reported_when_the_next_is_due() -> None:
    guard = lo.DivergenceGuard(rollback=Rollback(every=4, clean=2, memory="disk"))
    with file_size_limit(100):
        trainer, told = fit(Net(), guard)
    assert trainer.global_step == 12
    (text,) = told
    assert "TMPDIR" in text


def test_batches_that_cannot_be_pickled_cost_one_warning() -> None:
    class Unpicklable(Net):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [*batch, lambda: None]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch[:2], batch_idx)

    trainer, told = fit(Unpicklable(nan_batches=[2, 3]), lo.DivergenceGuard(save_batches=True))
    assert trainer.global_step == 12
    assert len(told) == 1


def test_the_users_exception_arrives_and_everything_is_undone() -> None:
    class Last(L.Callback):
        seen: BaseException | None = None

        def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
            self.seen = exception

    def fail() -> None:
        raise KeyError("the user's own")

    Path("a file").write_text("")
    guard, last, model = lo.DivergenceGuard(report_dir="a file"), Last(), Net(nan_batches=[2])
    trainer = make_trainer([guard, After(6, fail), last])
    with warnings.catch_warnings(action="ignore"), pytest.raises(KeyError, match="the user's own") as raised:
        trainer.fit(model, batches(12))
    assert last.seen is raised.value
    assert not guard.joined
    fit(Net(), guard)


# Losses and gradients.


class Shaped(Net):
    """Its loss has another shape."""

    def __init__(self, shape: tuple[int, ...], **options: Any) -> None:
        super().__init__(**options)
        self.shape = shape

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx).view(self.shape)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_of_one_element_may_have_any_shape(shape: tuple[int, ...], accumulate: int) -> None:
    guard, model = lo.DivergenceGuard(), Shaped(shape, nan_batches=[3])
    fit(model, guard, accumulate_grad_batches=accumulate)
    fit(twin := Net(nan_batches=[3]), lo.DivergenceGuard(), accumulate_grad_batches=accumulate)
    assert guard.skipped_steps == 1
    assert torch.equal(model.body.weight, twin.body.weight)


@pytest.mark.parametrize("way", ["per sample", "rows", "complex", "none", "empty"])
def test_losses_of_manual_optimization(way: str) -> None:
    class Manual(Net):
        automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            error = (self(batch[0]) - batch[1]).square() * (float("nan") if batch_idx == 3 else 1)
            if way == "none":
                error.mean().backward()
            else:
                loss = error.mean(1) if way == "per sample" else error
                loss = loss + 0j if way == "complex" else loss
                loss = loss[:0] if way == "empty" else loss
                self.manual_backward(loss, gradient=torch.ones_like(loss))
            optimizer.step()

    guard = lo.DivergenceGuard()
    trainer, _ = fit(Manual(), guard)
    assert trainer.global_step == 12
    assert guard.skipped_steps == 1
    losses = [seen.values["loss"] for seen in (row.seen for row in guard.report.incidents.last_steps())]
    assert len(losses) == 12
    with torch.no_grad():
        x, y = next(iter(batches(12)))
        expected = nn.functional.mse_loss(Net()(x), y).item()
    known = {"none": float("nan"), "empty": 0.0}
    assert losses[0] == pytest.approx(known.get(way, expected), nan_ok=True)


@pytest.mark.parametrize(("scale", "dtype"), [(1e25, torch.float32), (1e36, torch.float32), (1e100, torch.float64)])
@pytest.mark.parametrize("limit", [1.0, 1e-3])
@pytest.mark.parametrize("optimizer", ["adamw", torch.optim.AdamW])
def test_large_finite_gradients_and_losses_are_finite(
    scale: float, dtype: torch.dtype, optimizer: Any, limit: float
) -> None:
    class Large(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step([x.to(dtype) for x in batch], batch_idx) * scale

    model = Large().to(dtype)
    guard = lo.DivergenceGuard(spikes=None, health=lo.divergence.HealthLimits(warmup=0))
    monitor = lo.OptimizerMonitor()
    parts = [lo.ConfigureOptimizers(optimizer, lr=1e-3), lo.GradientClipping(max_norm=limit), guard, monitor]
    before = [param.detach().clone() for param in model.parameters()]
    make_trainer(parts).fit(model, batches(8))
    assert guard.skipped_steps == 0
    assert guard.report.entries == []
    for old, param in zip(before, model.parameters(), strict=True):
        assert 1e-3 < (param - old).abs().max() < 0.1
    norms = [seen.values["grad_norm"] for seen in (row.seen for row in guard.report.incidents.last_steps())]
    assert all(scale / 100 < norm < scale * 100 for norm in norms)


def test_a_spike_is_found_among_values_beyond_float32() -> None:
    class Large(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step([x.double() for x in batch], batch_idx)
            return loss * (1e64 if batch_idx == 35 else 1e60)

    guard = lo.DivergenceGuard(spikes=lo.divergence.Spikes(warmup=16, window=32), health=None)
    fit(Large().double(), guard, steps=40)
    assert [(entry.step, entry.kind) for entry in guard.report.entries] == [(35, "spike")]


def test_complex_gradients() -> None:
    class Complex(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, dtype=torch.complex64))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return (batch[0] * self.weight).abs().mean() * (float("nan") if batch_idx == 3 else 1)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    guard = lo.DivergenceGuard(lr_cut=None, patience=1, rollback=Rollback(every=2, clean=0))
    trainer = make_trainer([guard, lo.GradientClipping(max_norm=1.0), lo.OptimizerMonitor()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Complex(), batches(8))
    assert guard.skipped_steps == 1
    assert guard.rollback_count == 1


# Weights.


class Grows(Net):
    """Has a cache as long as the run so far."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("cache", None, persistent=False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.cache = torch.ones(batch_idx + 1)
        return super().training_step(batch, batch_idx)


def test_what_is_left_is_named_once() -> None:
    guard = lo.DivergenceGuard(lr_cut=None, patience=2, cooldown=0, rollback=Rollback(every=4, clean=2))
    _, told = fit(Grows(nan_batches=[12, 13, 16, 17]), guard, steps=20)
    assert guard.rollback_count == 2
    assert len(told) == 1
    assert ": cache. All other" in told[0]


@pytest.mark.parametrize("rollback", [Rollback(), None])
def test_weights_that_are_not_finite_from_the_start_are_named_at_once(rollback: Rollback | None) -> None:
    model = Net()
    model.head.weight.data[0, 0] = float("nan")
    model.register_buffer("mask", torch.full((3,), float("-inf")))
    guard = lo.DivergenceGuard(lr_cut=None, rollback=rollback)
    told: list[str] = []
    first = After(0, lambda: told.extend(str(w.message) for w in caught))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer([guard, first])
        trainer.fit(model, batches(40))
    assert [text for text in told if "training starts with parameters that are not finite: head.weight. " in text]
    assert guard.report.entries[0].names == ["head.weight"]
    assert guard.rollback_count == 0
    assert len(responses(guard)) == 1
    assert trainer.global_step < 10


def test_a_snapshot_that_cannot_be_read_leads_to_the_next_response(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = lo.DivergenceGuard(patience=2, cooldown=0, lr_cut=None, rollback=Rollback(memory="disk"))

    def damage() -> None:
        assert guard._snapshots is not None
        good: Any = guard._snapshots._pair.good
        good._file.truncate(10)

    _, _ = fit(Net(nan_batches=range(4, 12)), guard, After(2, damage), steps=20)
    assert guard.rollback_count == 0
    assert ["training is stopped" in text for text in responses(guard)] == [True]


# The end.


@pytest.mark.parametrize(
    ("options", "minimum", "steps"),
    [
        ({"max_epochs": 6, "min_epochs": 3}, "min_epochs=3", 24),
        ({"max_epochs": 6, "min_steps": 20}, "min_epochs=1, min_steps=20", 20),
        ({"max_epochs": 6}, None, 5),
    ],
)
def test_that_training_stops_is_reported_once_and_true(options: Any, minimum: str | None, steps: int) -> None:
    guard = lo.DivergenceGuard(lr_cut=None, rollback=None)
    trainer, _ = fit(Net(nan_batches=range(99)), guard, steps=8, **options)
    (text,) = responses(guard)
    assert text.startswith("training is stopped")
    assert (minimum is None) == ("not before" not in text)
    assert minimum is None or f"({minimum}) is reached" in text
    assert abs(trainer.global_step - steps) <= 3
