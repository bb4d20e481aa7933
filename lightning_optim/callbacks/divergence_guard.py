from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_optim.callbacks._guard.guarded import GuardedOptimizer
from lightning_optim.callbacks._guard.snapshots import RunSnapshots
from lightning_optim.callbacks._guard.step_batches import StepBatches, StepLocation
from lightning_optim.callbacks._hub import HubCallback
from lightning_optim.callbacks._lightning import logging_due, logging_step, plain_name
from lightning_optim.core.stats import StepRecord
from lightning_optim.divergence import (
    DETECTORS,
    SIGNALS,
    Alarm,
    Detector,
    DivergenceJudge,
    DivergenceReport,
    HealthLimits,
    Ladder,
    LRCut,
    ParameterHealth,
    Rollback,
    SlowDivergence,
    Spikes,
    SpikeWindow,
    StepGuard,
)
from lightning_optim.divergence.report import Entry
from lightning_optim.step import StepPipeline

CHECKPOINT_KEY = "lightning_optim.divergence_guard"
"""Not as the callback's own state: of two callbacks that have some, Lightning says less than we do."""

_MOST_FILES = 16
"""So many steps' batches are saved at most."""


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
        detectors: Further detectors, which may ask for steps to be skipped; each such step is reported with the
            detector's `reason`. Instances, or names given by `lightning_optim.register`.

    Raises:
        ValueError: A threshold is out of range, or a detector's name is unknown.
        TypeError: A detector is none.

    Example:
        >>> guard = DivergenceGuard(lr_cut=LRCut(factor=0.3), rollback=Rollback(memory="disk"))
        >>> trainer = L.Trainer(callbacks=[guard], logger=False, enable_checkpointing=False)
    """

    role = "DivergenceGuard"

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
        detectors: Sequence[Detector | str] = (),
    ) -> None:
        if patience < 1:
            raise ValueError(f"Invalid patience={patience!r}: a whole number of at least 1 is needed, for instance 5.")
        self.spikes, self.lr_cut, self.rollback, self.health = spikes, lr_cut, rollback, health
        self._patience = patience
        self._report_dir, self._save_batches = report_dir, save_batches
        self.extra_detectors = tuple(_detector(given) for given in detectors)
        self.ladder = Ladder(lr_cut, rollback, stop, cooldown)
        self.report = DivergenceReport()
        self._skipped = 0
        self._guarded: list[GuardedOptimizer] = []
        self._snapshots: RunSnapshots | None = None
        self._loss: Tensor | None = None
        self._restored: dict[str, Any] = {}
        self._reduce: Any = None
        self._overflows = self._files = 0
        self._folder = Path()

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps skipped so far, over all optimizers and resumes."""
        return self._skipped

    @property
    def overflow_steps(self) -> int:
        """Of these, overflows of the GradScaler."""
        return self._overflows

    @property
    def rollback_count(self) -> int:
        """Returns to a snapshot so far, over all resumes."""
        return self.ladder.used["rollback"]

    def health_points(self) -> dict[str, float]:
        """Rollbacks and overflows so far, and what is left of the learning rate under a cut."""
        counts = {"rollbacks": self.rollback_count, "overflow_steps": self.overflow_steps}
        return {**counts, "lr_cut": min((guarded.cut.factor for guarded in self._guarded), default=1.0)}

    def detectors(self) -> Sequence[Detector]:
        """One `StepGuard` for each optimizer, with detectors of its own."""
        spikes = self.spikes
        window: SpikeWindow | None = None if spikes is None else spikes.window_of(len(SIGNALS))
        skip = SIGNALS if spikes is not None and spikes.skip else ()
        return (StepGuard(window, skip, self._take_loss, detectors=copy.deepcopy(self.extra_detectors)),)

    def report_due(self, trainer: L.Trainer) -> bool:
        """When Lightning logs."""
        return self.health is not None and logging_due(trainer)

    def on_report(self, trainer: L.Trainer, optimizer_index: int, record: StepRecord) -> None:
        """Has a look at each parameter, without waiting for it."""
        self._guarded[optimizer_index].inspect(record)

    # The fit.

    def _at_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes up where a resumed run was, and makes the first snapshot."""
        self._guarded = [self._guard(pipeline, trainer, pl_module) for pipeline in self.hub.pipelines]
        self._loss = None
        beside = getattr(trainer.checkpoint_callback, "dirpath", None)
        log_dir = trainer.log_dir  # ranks agree on it, so all have to ask
        self._folder = Path(self._report_dir or beside or log_dir or trainer.default_root_dir)
        self._reduce = trainer.strategy.reduce if trainer.world_size > 1 else None
        self._take_up()
        if self.rollback is not None:
            self._snapshots = RunSnapshots(self.rollback, trainer, pl_module, self.hub, self._guarded)

    def _guard(self, pipeline: StepPipeline, trainer: L.Trainer, pl_module: L.LightningModule) -> GuardedOptimizer:
        names: dict[Tensor, str] = {param: plain_name(name) for name, param in pl_module.named_parameters()}
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        (watch,) = (detector for detector in pipeline.detectors if isinstance(detector, StepGuard))
        judge, places = (
            DivergenceJudge(SlowDivergence(), self._patience, scaled),
            StepBatches(watch.steps, self._save_batches),
        )
        return GuardedOptimizer(pipeline.optimizer, watch, judge, ParameterHealth(self.health), names, places)

    def _take_up(self) -> None:
        """Goes on from what a checkpoint had."""
        for guarded, state in zip(self._guarded, self._restored.get("optimizers", []), strict=False):
            guarded.load_state_dict(state)
        if "ladder" in self._restored:
            self.ladder.load_state_dict(self._restored["ladder"])
        self._restored = {}
        self._skipped = self._count()
        self._overflows = sum(guarded.judge.overflow_steps for guarded in self._guarded)

    def _at_new_optimizers(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Guards those that have come, from the baselines of the place they take; snapshots begin anew with them."""
        before, self._guarded = self._guarded, []
        for index, pipeline in enumerate(self.hub.pipelines):
            found = next((guarded for guarded in before if guarded.optimizer is pipeline.optimizer), None)
            if found is None:
                found = self._guard(pipeline, trainer, pl_module)
                if index < len(before):
                    found.load_state_dict(before[index].state_dict())
            self._guarded.append(found)
        for guarded in before:
            if guarded not in self._guarded:
                guarded.cut.close()
        if self._snapshots is not None:
            assert self.rollback is not None
            self._snapshots.close()
            self._snapshots = RunSnapshots(self.rollback, trainer, pl_module, self.hub, self._guarded)

    def _at_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Adds up the loss of the micro-batches of a step, on the device."""
        loss = loss.detach().float()
        if (scaler := getattr(trainer.precision_plugin, "scaler", None)) is not None:
            loss = loss / scaler.scale(torch.ones_like(loss))
        self._loss = loss if self._loss is None else self._loss + loss

    def _at_step(self, trainer: L.Trainer, optimizer_index: int) -> None:
        """A cut of the learning rate ages."""
        self._guarded[optimizer_index].cut.advance()

    def _at_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Judges what was seen, as soon as the host knows of it, and acts."""
        step = logging_step(trainer)
        where = step, trainer.current_epoch, batch_idx, batch
        stepped = [guarded.places.note(*where, guarded.watch.steps) for guarded in self._guarded]
        skipped_before, self._skipped = self._skipped, self._count()
        alarms = self._new_alarms()
        if self._skipped > skipped_before and not self.hub.skip_count_written():
            for logger in trainer.loggers:
                logger.log_metrics({"optim_health/skipped_steps": float(self._skipped)}, step)
        snapshots = self._snapshots
        if snapshots is not None:
            snapshots.observe(step, [alarm for alarm, _ in alarms])
        if escalating := [(alarm, place) for alarm, place in alarms if alarm.escalates]:
            self._escalate(trainer, *escalating[0])
        elif snapshots is not None and any(stepped) and not alarms:
            snapshots.capture_if_due(step)

    def _at_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Judges what was still on its way, and writes the report if there is anything to tell."""
        self._new_alarms(everything=True)
        self._write_report(trainer)

    def _at_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Writes the report: what came before an error may explain it."""
        if self._guarded:
            self._write_report(trainer)

    def _at_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Saves baselines, counts and budgets: plain numbers and tensors. Snapshots are not saved."""
        checkpoint[CHECKPOINT_KEY] = self._state()

    def _at_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Keeps them until training starts: there are no optimizers yet. In a run, a tuner goes back after a trial."""
        self._restored = checkpoint.get(CHECKPOINT_KEY, {})
        if self._guarded:
            for guarded in self._guarded:
                guarded.discard_pending()
            self._take_up()

    def _at_close(self) -> None:
        for guarded in self._guarded:
            guarded.cut.close()
        if self._snapshots is not None:
            self._snapshots.close()
        self._guarded, self._snapshots, self._reduce, self._loss = [], None, None, None

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

    def _new_alarms(self, everything: bool = False) -> list[tuple[Alarm, StepLocation]]:
        found = []
        for index, guarded in enumerate(self._guarded):
            for seen in guarded.watch.read(everything):
                place = guarded.places.of(seen.step)
                self.report.see(place.step, index, seen)
                for alarm in guarded.judge.update(seen, guarded.names):
                    found.append((alarm, place))
                    self._notify(alarm, place, index, seen.skipped)
            for alarm in guarded.inspected(everything):
                place = guarded.places.of(alarm.step)
                self._notify(alarm, place, index, False)
                if alarm.escalates:  # others hurt nobody yet
                    found.append((alarm, place))
        self._overflows = sum(guarded.judge.overflow_steps for guarded in self._guarded)
        return found

    def _notify(self, alarm: Alarm, place: StepLocation, index: int, was_skipped: bool) -> None:
        self.report.add(Entry(place.step, place.epoch, place.batches, index, alarm.kind, alarm.text, list(alarm.names)))
        skipped = f" skipped: {alarm.text} ({self._skipped} skipped so far)." if was_skipped else f": {alarm.text}."
        rank_zero_warn(f"Step {place.step}{skipped}")
        if was_skipped:
            self._save_samples(place)

    def _save_samples(self, place: StepLocation) -> None:
        """Saves the batches of a step, unless there are enough."""
        if place.samples and self._files < _MOST_FILES:
            self._files += 1
            folder = self._folder / "divergence_batches"
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(place.samples, folder / f"step{place.step}_rank{self.hub.trainer.global_rank}.pt")

    # What is done.

    def _escalate(self, trainer: L.Trainer, alarm: Alarm, place: StepLocation) -> None:
        step = logging_step(trainer)
        back_to = None if self._snapshots is None else self._snapshots.back_to
        action = self.ladder.act(step, can_roll_back=back_to is not None, lost=alarm.lost)
        if action is None:
            return
        if action == "lr_cut":
            text = self._cut_rate()
        elif action == "rollback":
            text = f"back to the state after step {back_to}, on with the next batches" + self._roll_back()
        else:
            trainer.should_stop = True
            text = f"training is stopped, because everything else is used up ({self.ladder.why_stop()})"
        self.report.add(Entry(step, trainer.current_epoch, place.batches, 0, "did", text))
        path = self._write_report(trainer)
        rank_zero_warn(f"Step {step}: {alarm.text}: {text}." + ("" if path is None else f" Report: {path}"))

    def _cut_rate(self) -> str:
        cut = self.lr_cut
        assert cut is not None
        for guarded in self._guarded:
            guarded.cut.start(cut.factor, cut.steps, cut.recover)
        return f"learning rate times {cut.factor:g} for {cut.steps} steps"

    def _roll_back(self) -> str:
        assert self._snapshots is not None
        assert self.rollback is not None
        times = self._snapshots.restore()
        self._skipped = self._count()
        factor = self.rollback.lr_factor**times
        if factor == 1:
            return ""
        for guarded in self._guarded:
            guarded.cut.lower(factor)
        return f", learning rate times {factor:g}"

    def _write_report(self, trainer: L.Trainer) -> Path | None:
        if not self.report.entries or not trainer.is_global_zero:
            return None
        path = self.report.write(self._folder)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("optim_health/divergence", self.report.markdown(), logging_step(trainer))
        return path


def _detector(given: Any) -> Detector:
    if isinstance(given, str):
        return DETECTORS.make(given, {})
    if not isinstance(given, Detector):
        raise TypeError(
            f"Invalid detectors=[{given!r}] of DivergenceGuard: each must be an instance of "
            "lightning_optim.divergence.Detector, or the name of a registered one."
        )
    return given
