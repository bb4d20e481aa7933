from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.callbacks.hub import Hub, HubCallback, plain_name
from lightning_optim.callbacks.lightning_private import averaged_models, logging_due, logging_step
from lightning_optim.divergence import (
    SIGNALS,
    Alarm,
    Detector,
    Health,
    HealthLimits,
    Judge,
    Ladder,
    LRCut,
    RateCut,
    Report,
    Rollback,
    Rows,
    SlowDivergence,
    Spikes,
    SpikeWindow,
    Watch,
)
from lightning_optim.divergence.health import pack
from lightning_optim.divergence.report import Entry
from lightning_optim.gradients import names_of
from lightning_optim.snapshots import OptimizerState, Part, SnapshotPair, StateDict, Tensors
from lightning_optim.stats import StepRecord

CHECKPOINT_KEY = "lightning_optim.divergence_guard"
"""Not as the callback's own state: of two callbacks that have some, Lightning says less than we do."""

_REMEMBERED = 64
"""Of so many steps it is known which batches they were made of."""
_MOST_FILES = 16
"""So many steps' batches are saved at most."""


@dataclass
class _Place:
    """Where a step was."""

    step: int
    epoch: int
    batches: list[int]
    samples: list[Any]


class _Guarded:
    """What belongs to one optimizer."""

    def __init__(
        self, optimizer: Optimizer, watch: Watch, judge: Judge, health: Health, names: dict[Tensor, str]
    ) -> None:
        self.optimizer, self.watch, self.judge, self.health = optimizer, watch, judge, health
        self.cut = RateCut(optimizer)
        found = [name for group in optimizer.param_groups for name in names_of(group, names)]
        self.names = {place: name for place, name in enumerate(found) if name is not None}
        self.places: dict[int, _Place] = {}
        self._looks = Rows()
        self._about: dict[int, tuple[Any, ...]] = {}

    def look(self, record: StepRecord) -> None:
        """Sends off what tells how each parameter is, and notes what the host knows of it."""
        names, without, place = [], [], 0
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                name = self.names.get(place, f"parameter {place}")
                place += 1
                if param.grad is not None:
                    names.append(name)
                elif not group.get("frozen_until"):
                    without.append(name)
        rates = [float(group["lr"]) if not isinstance(group["lr"], Tensor) else 1.0 for group in record.hyperparameters]
        groups = list(zip(record.group_names, rates, record.grad.group_sizes, strict=True))
        if len(names) != len(record.update.numel):  # flat shards, of which this rank may hold nothing
            return
        self._about[record.steps] = (names, record.update.numel, groups, without)
        self._looks.write(record.steps, pack(record))

    def looked(self, everything: bool) -> list[Alarm]:
        """What has come of it, once it is known."""
        rows = self._looks.read(everything)
        return [a for row in rows for a in self.health.update(row.step, row.values, *self._about.pop(row.step))]

    def state_dict(self) -> dict[str, Any]:
        return {
            "watch": self.watch.state_dict(),
            "judge": self.judge.state_dict(),
            "cut": self.cut.state_dict(),
            "health": self.health.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.watch.load_state_dict(state["watch"])
        self.judge.load_state_dict(state["judge"])
        self.cut.load_state_dict(state["cut"])
        self.health.load_state_dict(state["health"])


class DivergenceGuard(HubCallback):
    """Keeps a run alive through bad batches, spikes and divergence, and says what it did.

    A step is skipped if its loss or a gradient is not finite, or if loss or gradient norm stand far out from the last
    ones. Parameters, moments, step counters and the schedule stay bit for bit what they were. The decision is taken on
    the device from the reduced gradients and loss, so all ranks decide alike. It is exact for every optimizer; with
    optimizers that take the flag in their kernel (all fused ones) the host never waits. Each skip is warned about, with
    the parameters concerned, and logged as ``optim_health/skipped_steps``.

    Where skipping does not mend it (bad steps in a row, a jump of the loss that stays, a slow rise, a collapse of the
    loss scale) it climbs a ladder: a lower learning rate for a while; back to a snapshot of weights, optimizer,
    schedule, scaler and averages, going on with the next batches; the end of the run. What was seen and done is in
    ``divergence_report.md`` and ``.json`` beside the checkpoints, and in TensorBoard's text tab.

    Under 16-bit precision with a GradScaler, its overflows are skipped steps as well, but nothing to warn about.

    Args:
        spikes: What a spike is; None to skip only what is not finite.
        lr_cut: The first rung; None for none.
        rollback: The second rung; None for none, and no snapshots.
        stop: Whether to end the run when nothing else is left.
        patience: After how many bad steps in a row the first rung is taken.
        cooldown: For how many steps after it has done something it does nothing else but skip.
        health: When single parameters or groups are told of as dead, stalled, vanishing or exploding, and the learning
            rate as too high or too low; looked at when Lightning logs. None for never.
        report_dir: Where the report goes; None for the folder of the checkpoints, or else of the logs.
        save_batches: Whether the batches of skipped steps are saved beside the report, to be looked at; of at most 16
            steps, ``divergence_batches/step<step>_rank<rank>.pt``.

    Raises:
        ValueError: A threshold is out of range.

    Example:
        >>> guard = DivergenceGuard(lr_cut=LRCut(factor=0.3), rollback=Rollback(memory="disk"))
        >>> trainer = L.Trainer(callbacks=[guard], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        spikes: Spikes | None = Spikes(),  # noqa: B008 - frozen, as the others
        lr_cut: LRCut | None = LRCut(),  # noqa: B008
        rollback: Rollback | None = Rollback(),  # noqa: B008
        stop: bool = True,
        patience: int = 5,
        cooldown: int = 10,
        health: HealthLimits | None = HealthLimits(),  # noqa: B008
        report_dir: str | None = None,
        save_batches: bool = False,
    ) -> None:
        if patience < 1:
            raise ValueError(f"Invalid patience={patience!r}: a whole number of at least 1 is needed, for instance 5.")
        self.spikes, self.lr_cut, self.rollback, self.health = spikes, lr_cut, rollback, health
        self._patience = patience
        self._report_dir, self._save_batches = report_dir, save_batches
        self.ladder = Ladder(lr_cut, rollback, stop, cooldown)
        self.report = Report()
        self._skipped = 0
        self._guarded: list[_Guarded] = []
        self._snapshots: SnapshotPair | None = None
        self._parts: list[Part] = []
        self._loss: Tensor | None = None
        self._batches: list[int] = []
        self._samples: list[Any] = []
        self._files = 0
        self._restored: dict[str, Any] = {}
        self._reduce: Any = None
        self._overflows = 0
        self._folder = Path()

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps skipped so far, over all optimizers and resumes."""
        return self._skipped

    @property
    def overflow_steps(self) -> int:
        """Of these, overflows of the GradScaler."""
        return self._overflows

    def detectors(self) -> Sequence[Detector]:
        """A `Watch`."""
        spikes = self.spikes
        window: SpikeWindow | None = None if spikes is None else spikes.window_of(len(SIGNALS))
        return (Watch(window, SIGNALS if spikes is not None and spikes.skip else (), self._take_loss),)

    def report_due(self, trainer: L.Trainer) -> bool:
        """When Lightning logs."""
        return self.health is not None and logging_due(trainer)

    def on_report(self, trainer: L.Trainer, optimizer_index: int, record: StepRecord) -> None:
        """Has a look at each parameter, without waiting for it."""
        if self.health is not None and logging_due(trainer):
            self._guarded[optimizer_index].look(record)

    # The fit.

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes up where a resumed run was, and makes the first snapshot."""
        super().on_train_start(trainer, pl_module)
        names: dict[Tensor, str] = {param: plain_name(name) for name, param in pl_module.named_parameters()}
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        for pipeline in self.hub.pipelines:
            (watch,) = (detector for detector in pipeline.detectors if isinstance(detector, Watch))
            judge = Judge(SlowDivergence(), self._patience, scaled)
            health = Health(self.health)
            self._guarded.append(_Guarded(pipeline.optimizer, watch, judge, health, names))
        self._loss, self._batches, self._samples = None, [], []
        beside = getattr(trainer.checkpoint_callback, "dirpath", None)
        log_dir = trainer.log_dir  # ranks agree on it, so all have to ask
        self._folder = Path(self._report_dir or beside or log_dir or trainer.default_root_dir)
        self._reduce = trainer.strategy.reduce if trainer.world_size > 1 else None
        for guarded, state in zip(self._guarded, self._restored.get("optimizers", []), strict=False):
            guarded.load_state_dict(state)
        if "ladder" in self._restored:
            self.ladder.load_state_dict(self._restored["ladder"])
        self._restored = {}
        self._skipped = self._count()
        self._overflows = sum(guarded.judge.overflow_steps for guarded in self._guarded)
        if (rollback := self.rollback) is not None:
            self._parts = _parts(trainer, pl_module, self.hub, [guarded.watch for guarded in self._guarded])
            self._snapshots = SnapshotPair(rollback.memory, rollback.clean)
            self._snapshots.first(self._parts, logging_step(trainer))

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Adds up the loss of the micro-batches of a step, on the device."""
        loss = loss.detach().float()
        if (scaler := getattr(trainer.precision_plugin, "scaler", None)) is not None:
            loss = loss / scaler.scale(torch.ones_like(loss))
        self._loss = loss if self._loss is None else self._loss + loss

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """A cut of the learning rate ages."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        inner = getattr(optimizer, "optimizer", optimizer)  # Lightning's own wrapper in manual optimization
        for guarded, pipeline in zip(self._guarded, self.hub.pipelines, strict=True):
            if pipeline.optimizer is inner:
                guarded.cut.advance()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Judges what was seen, as soon as the host knows of it, and acts."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        stepped = self._note_place(trainer, batch, batch_idx)
        skipped_before, self._skipped = self._skipped, self._count()
        step = logging_step(trainer)
        alarms = self._new_alarms()
        if self._skipped > skipped_before:
            for logger in trainer.loggers:
                logger.log_metrics({"optim_health/skipped_steps": float(self._skipped)}, step)
        if (snapshots := self._snapshots) is not None:
            snapshots.trouble() if alarms else snapshots.passed(step)
        escalating = [(alarm, place) for alarm, place in alarms if alarm.escalates]
        if escalating:
            self._escalate(trainer, *escalating[0])
        elif self.rollback is not None and stepped and not alarms and (step + 1) % self.rollback.every == 0:
            assert snapshots is not None
            snapshots.take(self._parts, step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Judges what was still on its way, and writes the report if there is anything to tell."""
        self._new_alarms(everything=True)
        self._write_report(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Writes the report: what came before an error may explain it."""
        if self._guarded:
            self._write_report(trainer)
        super().on_exception(trainer, pl_module, exception)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Saves baselines, counts and budgets: plain numbers and tensors. Snapshots are not saved."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint[CHECKPOINT_KEY] = self._state()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps them until training starts: there are no optimizers yet."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self._restored = checkpoint.get(CHECKPOINT_KEY, {})

    def _leave(self) -> None:
        try:
            self._restored = self._state()  # Lightning saves checkpoints on request after the fit, too
        finally:
            for guarded in self._guarded:
                guarded.cut.close()
            if self._snapshots is not None:
                self._snapshots.close()
            self._guarded, self._parts, self._snapshots, self._reduce = [], [], None, None
            super()._leave()

    def _state(self) -> dict[str, Any]:
        if not self._guarded:
            return self._restored
        return {"optimizers": [g.state_dict() for g in self._guarded], "ladder": self.ladder.state_dict()}

    # What was seen.

    def _take_loss(self) -> Tensor | None:
        """The loss since the last optimizer step, the same on all ranks."""
        loss, self._loss = self._loss, None
        if loss is None or self._reduce is None:
            return loss
        reduced: Tensor = self._reduce(loss, reduce_op="mean")
        return reduced

    def _count(self) -> int:
        return sum(counts.skipped for counts in self.hub.counts())

    def _note_place(self, trainer: L.Trainer, batch: Any, batch_idx: int) -> bool:
        """Remembers which batches a step was made of; whether there was one."""
        self._batches.append(batch_idx)
        if self._save_batches:
            self._samples.append(batch)
        place = _Place(logging_step(trainer), trainer.current_epoch, self._batches, self._samples)
        stepped = False
        for guarded in self._guarded:
            if (number := guarded.watch.steps) not in guarded.places:
                guarded.places[number] = place
                guarded.places.pop(number - _REMEMBERED, None)
                stepped = True
        if stepped:
            self._batches, self._samples = [], []
        return stepped

    def _new_alarms(self, everything: bool = False) -> list[tuple[Alarm, _Place]]:
        found = []
        for index, guarded in enumerate(self._guarded):
            for seen in guarded.watch.read(everything):
                place = guarded.places.get(seen.step, _Place(-1, -1, [], []))
                self.report.see(place.step, index, seen)
                for alarm in guarded.judge.update(seen, guarded.names):
                    found.append((alarm, place))
                    self._tell(alarm, place, index, seen.skipped)
            for alarm in guarded.looked(everything):  # which hurts nobody yet
                self._tell(alarm, guarded.places.get(alarm.step, _Place(-1, -1, [], [])), index, False)
        self._overflows = sum(guarded.judge.overflow_steps for guarded in self._guarded)
        return found

    def _tell(self, alarm: Alarm, place: _Place, index: int, was_skipped: bool) -> None:
        self.report.add(Entry(place.step, place.epoch, place.batches, index, alarm.kind, alarm.text, list(alarm.names)))
        skipped = f" skipped: {alarm.text} ({self._skipped} skipped so far)." if was_skipped else f": {alarm.text}."
        rank_zero_warn(f"Step {place.step}{skipped}")
        if place.samples and was_skipped and self._files < _MOST_FILES:
            self._files += 1
            folder = self._folder / "divergence_batches"
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(place.samples, folder / f"step{place.step}_rank{self.hub.trainer.global_rank}.pt")

    # What is done.

    def _escalate(self, trainer: L.Trainer, alarm: Alarm, place: _Place) -> None:
        step = logging_step(trainer)
        snapshots = self._snapshots
        good = None if snapshots is None else snapshots.good
        action = self.ladder.act(step, can_roll_back=good is not None)
        if action is None:
            return
        if action == "lr_cut":
            cut = self.lr_cut
            assert cut is not None
            for guarded in self._guarded:
                guarded.cut.start(cut.factor, cut.steps, cut.recover)
            text = f"learning rate times {cut.factor:g} for {cut.steps} steps"
        elif action == "rollback":
            assert snapshots is not None
            assert good is not None
            assert self.rollback is not None
            self._roll_back(snapshots)
            text = f"back to the state after step {good.step}, on with the next batches"
            if (factor := self.rollback.lr_factor) != 1:
                for guarded in self._guarded:
                    guarded.cut.lower(factor)
                text += f", learning rate times {factor:g}"
        else:
            trainer.should_stop = True
            text = f"training is stopped, because everything else is used up ({self.ladder.why_stop()})"
        self.report.add(Entry(step, trainer.current_epoch, place.batches, 0, "did", text))
        path = self._write_report(trainer)
        rank_zero_warn(f"Step {step}: {alarm.text}: {text}." + ("" if path is None else f" Report: {path}"))

    def _roll_back(self, snapshots: SnapshotPair) -> None:
        good = snapshots.good
        assert good is not None
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # skips that are still on their way belong to before
        good.put_back(self._parts)
        snapshots.trouble()
        self.hub.hold_schedules()
        self._skipped = self._count()
        for guarded in self._guarded:
            guarded.watch.rows.drop()
            guarded.judge.rolled_back()

    def _write_report(self, trainer: L.Trainer) -> Path | None:
        if not self.report.entries or not trainer.is_global_zero:
            return None
        path = self.report.write(self._folder)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("optim_health/divergence", self.report.markdown(), logging_step(trainer))
        return path


def _parts(trainer: L.Trainer, pl_module: L.LightningModule, hub: Hub, watches: Sequence[Watch]) -> list[Part]:
    """All that a rollback brings back. The position in the data is not among it, nor the count of steps."""
    precision = trainer.precision_plugin
    parts: list[Part] = [
        Tensors(lambda: [pl_module, *averaged_models(trainer)]),
        *(OptimizerState(optimizer) for optimizer in trainer.optimizers),
        *(StateDict(c.scheduler.state_dict, c.scheduler.load_state_dict) for c in trainer.lr_scheduler_configs),
        StateDict(precision.state_dict, precision.load_state_dict),
        *(StateDict(pipeline.clip_state, pipeline.load_clip_state) for pipeline in hub.pipelines),
    ]
    windows = [watch.spikes for watch in watches if watch.spikes is not None]
    return [*parts, *(StateDict(window.state_dict, window.load_state_dict) for window in windows)]
