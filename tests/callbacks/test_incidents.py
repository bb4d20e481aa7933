"""The report of a real run keeps the steps around each incident, in its files and on TensorBoard."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

import lightning_optim as lo
from lightning_optim.cli import main
from lightning_optim.divergence import LRCut, Rollback
from tests.helpers import Net, Ramp, SaveAt, TwoOptimizers, batches, file_size_limit, make_trainer, read_events


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Step ")
        yield


class Faulty(Net):
    """Its loss is multiplied by a factor at some steps of the run."""

    def __init__(self, factors: Mapping[int, float]) -> None:
        super().__init__()
        self.factors = factors

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * self.factors.get(batch_idx, 1.0)


NAN = float("nan")


def _fit(
    guard: lo.DivergenceGuard,
    factors: Mapping[int, float],
    steps: int,
    *others: Any,
    ckpt_path: Path | None = None,
    **options: Any,
) -> None:
    trainer = make_trainer([lo.ConfigureOptimizers("adamw", lr=1e-3), guard, *others], **options)
    trainer.fit(Faulty(factors), batches(steps), ckpt_path=ckpt_path)


def _report(folder: str | Path = ".") -> dict[str, Any]:
    report: dict[str, Any] = json.loads((Path(folder) / "divergence_report.json").read_text())
    return report


@pytest.mark.pictures
def test_the_incident_is_kept_with_its_picture_and_the_rates_that_its_steps_used() -> None:
    guard = lo.DivergenceGuard(rollback=None, lr_cut=LRCut(0.5, steps=100))
    _fit(guard, {200: 1e4} | dict.fromkeys(range(100, 107), NAN), 240)
    report = _report()
    burst, spike = report["incidents"]
    assert (burst["first_step"], burst["last_step"]) == (100, 106)
    assert burst["kinds"] == ["nonfinite", "did"]
    steps = {step["at"]: step for step in burst["steps"]}
    assert list(steps) == list(range(36, 123))
    assert [at for at, step in steps.items() if step["skipped"]] == list(range(100, 107))
    assert [at for at, step in steps.items() if step["values"]["loss"] is None] == list(range(100, 107))
    assert [step["lr"] for step in steps.values()] == [1e-3] * (105 - 36) + [5e-4] * (123 - 105)
    assert "spike" in spike["kinds"]
    at_spike = next(step for step in spike["steps"] if step["at"] == 200)
    assert at_spike["values"]["loss"] > at_spike["limits"]["loss"] > at_spike["medians"]["loss"]
    assert [step["at"] for step in report["last_steps"]] == list(range(176, 240))
    text = Path("divergence_report.md").read_text()
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert pictures == ["divergence_report_step100.png", "divergence_report_step200.png"]
    for name in pictures:
        assert imread(name).std() > 0.05
    rows = [line for line in text.split("## The last steps")[1].splitlines() if re.match(r"\| \d", line)]
    assert len(rows) == (123 - 36) + (217 - 136)


@pytest.mark.pictures
def test_tensorboard_has_pictures_scores_and_the_numbers_of_responses(
    logger: TensorBoardLogger, tmp_path: Path
) -> None:
    guard = lo.DivergenceGuard(rollback=Rollback(every=20, clean=5), lr_cut=LRCut(budget=1), cooldown=0)
    factors = {90: 1e4} | dict.fromkeys(range(100, 112), NAN)
    _fit(guard, factors, 140, logger=logger, log_every_n_steps=10)
    accumulator = EventAccumulator(logger.log_dir)
    accumulator.Reload()
    assert accumulator.Tags()["images"] == ["optim_health/incident_at_step_90"]
    (text, *_) = accumulator.Tensors("optim_health/divergence/text_summary")[-1].tensor_proto.string_val
    assert "### Steps 90 to 111" in text.decode()
    assert "png" not in text.decode()
    events = read_events(logger.log_dir)
    assert events["optim_health/lr_cuts"] == [(at, float(at > 104)) for at in range(9, 140, 10)]
    assert events["optim_health/rollbacks"] == [(at, float(at > 109)) for at in range(9, 140, 10)]
    loss = dict(events["optim_health/spike_score_loss"])
    assert [loss[at] for at in (9, 69, 89)] == [0, 0, 0]
    assert loss[99] == pytest.approx(1 / 36)
    assert loss[139] == pytest.approx(1 / 64)
    assert guard.report.spike_scores()["grad_norm"] == pytest.approx(1 / 64)
    main(["report", logger.log_dir, "--out", str(tmp_path / "out")])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Incident at step 90" in page
    assert (tmp_path / "out" / "incident_at_step_90_of_run_0.png").exists()
    row = re.search(r"<tr><td>run/0</td><td>(\d+)</td><td>(\d+)</td><td>(\d+)</td><td>([\d.]+)%", page)
    assert row is not None
    assert row.groups() == ("13", "1", "1", "1.562")


def test_with_a_monitor_each_number_is_logged_once(logger: TensorBoardLogger) -> None:
    _fit(lo.DivergenceGuard(), {}, 80, lo.OptimizerMonitor(), logger=logger, log_every_n_steps=10)
    for name in ("rollbacks", "lr_cuts", "spike_score_loss", "spike_score_grad_norm"):
        points = read_events(logger.log_dir)[f"optim_health/{name}"]
        assert len({at for at, _ in points}) == len(points) > 0


class RawSteps(Ramp):
    """Steps torch's optimizer itself, so that there is no closure; the learning rate is cut for steps 3 to 5."""

    def __init__(self, guard: lo.DivergenceGuard) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.guard, self.moves = guard, []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            self.guard._guarded[0].cut.start(0.5, hold=3, recover=0)
        optimizer = self.trainer.optimizers[0]
        optimizer.zero_grad()
        self.manual_backward(self.weight * 1.0)
        before = self.weight.item()
        optimizer.step()
        self.moves.append(before - self.weight.item())


def test_the_rate_of_a_step_without_a_closure_is_the_one_it_used() -> None:
    guard = lo.DivergenceGuard(rollback=None)
    model = RawSteps(guard)
    make_trainer([guard]).fit(model, batches(8))
    assert model.moves == [123.0] * 3 + [61.5] * 3 + [123.0] * 2
    assert [step.seen.rate for step in guard.report.incidents.last_steps()] == model.moves


def test_several_optimizers_share_incident_and_score() -> None:
    guard = lo.DivergenceGuard(report_dir=".")
    model = TwoOptimizers(
        lambda params: torch.optim.SGD(params, lr=1e-3),
        lambda params: torch.optim.SGD(params, lr=1e-2),
        factor=lambda index, batch_idx: NAN if (index, batch_idx) == (1, 90) else 1.0,
    )
    make_trainer([guard]).fit(model, batches(120))
    (incident,) = _report()["incidents"]
    for index, lr in enumerate((1e-3, 1e-2)):
        steps = [step for step in incident["steps"] if step["optimizer"] == index]
        assert set(range(27, 107)) <= {step["at"] for step in steps}
        assert {step["lr"] for step in steps} == {lr}
    assert sum(score.steps["loss"] for score in guard.report._scores.values()) == 2 * (120 - 64) - 1


def test_a_resumed_run_has_the_incidents_and_the_score_from_before(tmp_path: Path) -> None:
    factors = {80: 1e4, 90: NAN, 105: NAN}
    save = SaveAt(100, tmp_path / "middle.ckpt")
    whole = lo.DivergenceGuard(report_dir="whole")
    _fit(whole, factors, 130, save)
    resumed = lo.DivergenceGuard(report_dir="resumed")
    _fit(resumed, factors, 130, ckpt_path=tmp_path / "middle.ckpt")
    before, after = _report("whole"), _report("resumed")
    assert [entry["step"] for entry in after["entries"] if entry["kind"] != "exploding"] == [80, 90, 105]
    assert after["entries"] == before["entries"]
    assert after["spike_scores"] == before["spike_scores"]
    assert after["spike_scores"]["loss"] == pytest.approx(1 / (130 - 64 - 2))
    (incident,) = after["incidents"]
    assert [step["at"] for step in incident["steps"]] == list(range(16, 122))
    shared = [[step for step in part["steps"] if step["at"] < 100] for part in (incident, *before["incidents"])]
    assert shared[0] == shared[1]


def test_another_fit_starts_a_new_report() -> None:
    guard = lo.DivergenceGuard()
    _fit(guard, {80: NAN}, 100)
    _fit(guard, {40: NAN}, 100)
    assert [incident["first_step"] for incident in _report()["incidents"]] == [40]
    assert guard.report.spike_scores() == {"grad_norm": 0.0, "loss": 0.0}


def _told(*args: Any, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _fit(*args, **options)
    return [text for warning in caught if "cannot be written" in (text := str(warning.message))]


@pytest.mark.pictures
def test_pictures_that_do_not_fit_on_the_disk_cost_one_warning() -> None:
    with file_size_limit(30_000):
        told = _told(lo.DivergenceGuard(patience=1, cooldown=0), dict.fromkeys((2, 5, 8), NAN), 12)
    assert len(told) == 1, told
    text = told[0]
    assert text.startswith("The picture of an incident cannot be written to")
    assert "OSError" in text
    assert sorted(path.name for path in Path().iterdir()) == ["divergence_report.json", "divergence_report.md"]
    assert "![" not in Path("divergence_report.md").read_text()


@pytest.mark.pictures
def test_a_picture_is_written_as_soon_as_it_can_be() -> None:
    Path("divergence_report_step20.png").mkdir()

    class Space(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            Path("divergence_report_step20.png").rmdir()

    trainer = make_trainer([Space(), lo.ConfigureOptimizers("adamw", lr=1e-3), lo.DivergenceGuard(patience=1)])
    with pytest.warns(UserWarning, match="picture of an incident cannot be written"):
        trainer.fit(Faulty({20: NAN}), batches(22))
    assert imread("divergence_report_step20.png").std() > 0.05


@pytest.mark.pictures
def test_a_folder_that_cannot_be_written_still_has_its_pictures_on_tensorboard(logger: TensorBoardLogger) -> None:
    Path("a file").write_text("")
    (text,) = _told(lo.DivergenceGuard(report_dir="a file"), {20: NAN}, 40, logger=logger)
    assert text.startswith("The divergence report cannot")
    accumulator = EventAccumulator(logger.log_dir)
    accumulator.Reload()
    assert accumulator.Tags()["images"] == ["optim_health/incident_at_step_20"]


@pytest.mark.pictures
def test_pictures_that_tensorboard_does_not_take_cost_one_warning(tmp_path: Path) -> None:
    class Writer(SummaryWriter):
        def add_image(self, *args: Any, **kwargs: Any) -> None:
            raise OSError(28, "No space left on device")

    class Logger(TensorBoardLogger):
        @property
        def experiment(self) -> Any:
            return Writer(str(tmp_path / "events"))

    logger = Logger(str(tmp_path), name="logs")
    (text,) = _told(lo.DivergenceGuard(report_dir="here"), {20: NAN, 100: NAN}, 120, logger=logger)
    assert "picture of an incident on TensorBoard" in text
    assert len(list(Path("here").glob("*.png"))) == 2


@pytest.mark.pictures
def test_without_matplotlib_there_are_no_pictures_and_no_warnings(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        assert _told(lo.DivergenceGuard(patience=2), {20: NAN, 21: NAN, 100: NAN}, 120) == []
    assert [record.message for record in caplog.records if "matplotlib" in record.message] == [
        "The divergence report has no pictures without matplotlib: lightning-optim[plot]."
    ]
    assert "![" not in Path("divergence_report.md").read_text()
    assert len(_report()["incidents"]) == 2


@pytest.mark.pictures
def test_values_of_every_kind_can_be_drawn() -> None:
    """Losses below 0, beyond what axes take, missing ones, and many groups."""
    guard = lo.DivergenceGuard(health=None)

    class Strange(Faulty):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step([x.double() for x in batch], batch_idx)
            return loss - 2 if batch_idx % 2 else loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(
                [{"params": [p]} for _ in range(1) for p in self.parameters()], lr=torch.tensor(0.01)
            )

    model = Strange({20: 1e300, 21: float("inf"), 22: -1e30, 0: NAN}).double()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer([guard]).fit(model, batches(60))
    assert not [str(w.message) for w in caught if "cannot" in str(w.message) or "matplotlib" in str(w.filename)]
    assert len(list(Path().glob("*.png"))) == len(guard.report.incidents.kept) > 0
