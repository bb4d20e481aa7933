from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from lightning_optim.callbacks._guard.guarded import GuardedOptimizer
from lightning_optim.callbacks._guard.model_parameters import ModelParameters
from lightning_optim.callbacks._guard.reporter import GuardReporter
from lightning_optim.callbacks._guard.snapshots import RunSnapshots, not_finite
from lightning_optim.callbacks._guard.step_batches import StepBatches, StepLocation
from lightning_optim.callbacks._hub import HubCallback
from lightning_optim.callbacks._lightning import logging_due, logging_step, minimum_left
from lightning_optim.core.registry import one_or_several
from lightning_optim.core.state_version import VERSION, check_version
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
    Rollback,
    SlowDivergence,
    Spikes,
    SpikeWindow,
    StepGuard,
)
from lightning_optim.divergence.watch import single_value
from lightning_optim.factory.about import about
from lightning_optim.step import StepPipeline

CHECKPOINT_KEY = "lightning_optim.divergence_guard"
"""Key in a checkpoint; Lightning's own key for a callback's state contains the class and its arguments."""


class DivergenceGuard(HubCallback):
    """Keep a run alive through bad batches, spikes and divergence, and report all observations and responses.

    A step is skipped if its loss or a gradient is not finite, or if the loss or the gradient norm is far above the last
    values. Parameters, moments, step counters and the schedule are then bit for bit unchanged. The decision is made on
    the device from the reduced gradients and loss, so all ranks decide alike. It is exact for every optimizer; with
    optimizers that take the flag in their kernel (all fused ones) the host never waits. Each skip gives a warning with
    the parameters concerned, and is logged as ``optim_health/skipped_steps``.

    Where skipping is not enough (consecutive bad steps, a lasting jump of the loss, a slow rise, a collapse of the loss
    scale) there is a ladder of responses: a temporarily lower learning rate; a return to a snapshot of weights,
    optimizer, schedule, scaler and averages, continuing with the next batches; the end of the run. Observations and
    responses are in ``divergence_report.md`` and ``.json`` next to the checkpoints, and in TensorBoard's text tab.

    Under 16-bit precision with a GradScaler, its overflows are skipped steps as well, but raise no warning.

    Args:
        spikes: Limits beyond which a loss or gradient norm is a spike; None to skip only values that are not finite.
        lr_cut: The first rung; None for none.
        rollback: The second rung; None for none, and no snapshots.
        stop: Whether to end the run when the other rungs are used up.
        patience: Number of consecutive bad steps after which the first rung is taken, at least 1.
        cooldown: Number of steps after a response in which bad steps are skipped without a further response, at least
            0.
        health: Limits beyond which individual parameters or groups are reported as dead, stalled, vanishing or
            exploding, and the learning rate as too high or too low, when Lightning logs; None for no such report, and
            none of clipping that scales down nearly every step.
        report_dir: Folder of the report, local or a URL that fsspec knows (``s3://...``); None for the folder of the
            checkpoints, or else of the logs. If it cannot be written, there is one warning, and training continues.
        save_batches: Whether to save the batches of skipped steps next to the report, for inspection; of at most 16
            steps, ``divergence_batches/step<step>_rank<rank>.pt``.
        detectors: Further detectors that may request the skip of a step, as instances, or as names given by
            `lightning_optim.register`; one, or several in a list. Each such step is reported with the detector's
            `reason`.

    Raises:
        ValueError: A threshold is out of range, or the name of a detector is unknown.
        TypeError: One of ``detectors`` is neither a detector nor a name.

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
        detectors: Sequence[Detector | str] | Detector | str = (),
    ) -> None:
        if patience < 1:
            raise ValueError(f"Invalid patience={patience!r}: must be a whole number of at least 1, for instance 5.")
        self.spikes, self.lr_cut, self.rollback, self.health = spikes, lr_cut, rollback, health
        self._patience = patience
        self._report_dir, self._save_batches = report_dir, save_batches
        self.extra_detectors = tuple(map(_detector, one_or_several(detectors)))
        self._stop, self._cooldown = stop, cooldown
        self._guarded: list[GuardedOptimizer] = []
        self._snapshots: RunSnapshots | None = None
        self._reporter: GuardReporter | None = None
        self._reduce: Any = None
        self._begin()

    def _begin(self) -> None:
        """Start as a new guard does: one object may serve many fits, of other folds or seeds."""
        self.ladder = Ladder(self.lr_cut, self.rollback, self._stop, self._cooldown)
        self.report = DivergenceReport()
        self._loss: Tensor | None = None
        self._had_step = False
        self._restored: dict[str, Any] = {}
        self._skipped = self._overflows = 0
        self._is_ending, self._first_is_good = False, True

    @property
    def skipped_steps(self) -> int:
        """Number of optimizer steps skipped so far, over all optimizers and resumes."""
        return self._skipped

    @property
    def overflow_steps(self) -> int:
        """Number of skipped steps that were overflows of the GradScaler."""
        if not self._guarded:  # between fits
            return self._overflows
        return sum(guarded.judge.overflow_steps for guarded in self._guarded)

    @property
    def rollback_count(self) -> int:
        """Number of returns to a snapshot so far, over all resumes."""
        return self.ladder.used["rollback"]

    def health_points(self) -> dict[str, float]:
        """Return the numbers of rollbacks and overflows so far, and the present factor on the learning rate."""
        counts = {"rollbacks": self.rollback_count, "overflow_steps": self.overflow_steps}
        return {**counts, "lr_cut": min((guarded.cut.factor for guarded in self._guarded), default=1.0)}

    def detectors(self) -> Sequence[Detector]:
        """Return a new `StepGuard` for one optimizer, with its own copies of the user's detectors."""
        spikes = self.spikes
        window: SpikeWindow | None = None if spikes is None else spikes.window_of(len(SIGNALS))
        skip = SIGNALS if spikes is not None and spikes.skip else ()
        return (StepGuard(window, skip, self._take_loss, detectors=copy.deepcopy(self.extra_detectors)),)

    def report_due(self, trainer: L.Trainer) -> bool:
        """Return whether Lightning logs at this step and the health of parameters is inspected."""
        return self.health is not None and logging_due(trainer)

    def on_report(self, trainer: L.Trainer, optimizer_index: int, record: StepRecord) -> None:
        """Inspect each parameter, without waiting for the device."""
        self._guarded[optimizer_index].inspect(record)

    # The fit.

    def _at_setup(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the last fit; a checkpoint may be loaded after this."""
        self._begin()

    def _at_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the state of a resumed run, and capture the first snapshot."""
        self._guarded = [self._guard(pipeline, trainer, pl_module) for pipeline in self.hub.pipelines]
        self._loss, self._had_step = None, False
        self._reporter = GuardReporter(self.report, trainer, self._report_dir)
        self._reduce = trainer.strategy.reduce if trainer.world_size > 1 else None
        self._restore()
        self._first_is_good = self._check_parameters(trainer, pl_module)
        self._start_snapshots(trainer, pl_module)

    def _check_parameters(self, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
        """Report parameters that are not finite before training has done anything; return whether there are none."""
        assert self._reporter is not None
        bad = not_finite(pl_module)
        if bad:
            some = ", ".join(bad[:8]) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
            text = (
                f"training starts with parameters that are not finite: {some}. Neither skipped steps nor a rollback "
                "help against that; look at their initialization, or at the checkpoint that they come from"
            )
            step = logging_step(trainer)
            location = StepLocation(step, trainer.current_epoch)
            self._reporter.notify(Alarm("nonfinite", step, text, tuple(bad[:8])), location, 0, None)
        return bool(trainer.strategy.reduce_boolean_decision(not bad))

    def _start_snapshots(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Capture the first snapshot, as soon as all parameters exist: those of lazy layers are made by a batch."""
        if self.rollback is not None and not any(isinstance(p, UninitializedParameter) for p in pl_module.parameters()):
            parts = self.rollback, trainer, pl_module, self.hub, self._guarded, self._first_is_good
            self._snapshots = RunSnapshots(*parts)

    def _guard(self, pipeline: StepPipeline, trainer: L.Trainer, pl_module: L.LightningModule) -> GuardedOptimizer:
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        (watch,) = (detector for detector in pipeline.detectors if isinstance(detector, StepGuard))
        judge = DivergenceJudge(SlowDivergence(), self._patience, scaled)
        batches = StepBatches(watch.steps, self._save_batches)
        return GuardedOptimizer(pipeline, watch, judge, self.health, ModelParameters(trainer, pl_module), batches)

    def _restore(self) -> None:
        """Restore the state of the last checkpoint that was loaded."""
        states = self._restored.get("optimizers", [])
        for guarded, place in zip(self._guarded, self.hub.restored_places(), strict=True):
            if place is not None and place < len(states):
                guarded.restore(states[place], self.hub.restored_names(place))
        if "ladder" in self._restored:
            self.ladder.load_state_dict(self._restored["ladder"])
        self._restored = {}
        self._skipped = self._count()

    def _at_new_optimizers(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Guard new optimizers with the baselines of those that they replace, and capture new snapshots."""
        before, self._guarded = self._guarded, []
        for index, pipeline in enumerate(self.hub.pipelines):
            detectors = pipeline.detectors
            found = next((guarded for guarded in before if any(guarded.watch is d for d in detectors)), None)
            if found is None:
                found = self._guard(pipeline, trainer, pl_module)
                if index < len(before):
                    found.load_state_dict(before[index].state_dict())
            self._guarded.append(found)
        for guarded in before:
            if guarded not in self._guarded:
                guarded.cut.close()
        if self._snapshots is not None:
            self._snapshots.close()
            self._start_snapshots(trainer, pl_module)

    def _at_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Add up the losses of the micro-batches of a step, on the device."""
        loss = single_value(loss)
        if (scaler := getattr(trainer.precision_plugin, "scaler", None)) is not None:
            loss = loss / scaler.scale(torch.ones_like(loss))
        if self._had_step:  # It was left out by a GradScaler, and its gradients were dropped before anything saw them.
            self._loss, self._had_step = None, False
        self._loss = loss if self._loss is None else self._loss + loss

    def _at_step(self, trainer: L.Trainer, optimizer_index: int) -> None:
        """Count a step for the cut of the learning rate; the losses so far are those of this step."""
        self._had_step = True
        self._guarded[optimizer_index].cut.advance()

    def _at_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Judge the steps that have arrived at the host, and respond."""
        step = logging_step(trainer)
        where = step, trainer.current_epoch, batch_idx, batch
        stepped = [guarded.batches.add(*where, guarded.watch.steps) for guarded in self._guarded]
        skipped_before, self._skipped = self._skipped, self._count()
        alarms = self._new_alarms()
        if self._skipped > skipped_before and not self.hub.skip_count_written():
            assert self._reporter is not None
            self._reporter.log_skips(trainer, self._skipped)
        snapshots = self._snapshots
        if snapshots is not None:
            snapshots.observe(step, [alarm for alarm, _ in alarms])
        if escalating := [(alarm, location) for alarm, location in alarms if alarm.escalates]:
            self._respond(trainer, *escalating[0])
        elif snapshots is not None and any(stepped) and not alarms:
            snapshots.capture_if_due(step)
        elif self.rollback is not None and snapshots is None and not alarms:
            self._start_snapshots(trainer, pl_module)

    def _at_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Judge the steps that have not arrived yet, and write the report."""
        self._new_alarms(everything=True)
        assert self._reporter is not None
        self._reporter.write(trainer)

    def _at_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write the report, because the steps before an error may explain it."""
        if self._reporter is not None:
            self._reporter.write(trainer)

    def _at_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save baselines, counts and budgets as plain numbers and tensors; snapshots are not saved."""
        checkpoint[CHECKPOINT_KEY] = self._state()

    def _at_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Keep the state until training starts; during training, as when a tuner undoes a trial, restore it now."""
        self._restored = checkpoint.get(CHECKPOINT_KEY, {})
        check_version(self._restored, "the state of DivergenceGuard", ("optimizers", "ladder"))
        if self._guarded:
            for guarded in self._guarded:
                guarded.discard_pending()
            self._restore()

    def _at_close(self) -> None:
        self._overflows = self.overflow_steps
        for guarded in self._guarded:
            guarded.cut.close()
        if self._snapshots is not None:
            self._snapshots.close()
        self._guarded, self._snapshots, self._reporter = [], None, None
        self._reduce = self._loss = None

    def _state(self) -> dict[str, Any]:
        if not self._guarded:
            return self._restored
        optimizers = [guarded.state_dict() for guarded in self._guarded]
        return {"version": VERSION, "optimizers": optimizers, "ladder": self.ladder.state_dict()}

    # Observations.

    def _take_loss(self) -> Tensor | None:
        """Return the loss since the last optimizer step, the same on all ranks, and forget it."""
        loss, self._loss = self._loss, None
        self._had_step = False
        if loss is None or self._reduce is None:
            return loss
        reduced: Tensor = self._reduce(loss, reduce_op="mean")
        return reduced

    def _count(self) -> int:
        return self.hub.total().skipped

    def _new_alarms(self, everything: bool = False) -> list[tuple[Alarm, StepLocation]]:
        """Judge the steps that have arrived, report what is wrong with them, and return what may need a response."""
        assert self._reporter is not None
        found = []
        for index, guarded in enumerate(self._guarded):
            name = about(guarded.optimizer).name if len(self._guarded) > 1 else None
            for seen in guarded.watch.read(everything):
                location = guarded.batches.of(seen.step)
                self.report.see(location.step, index, seen)
                for alarm in guarded.judge.update(seen, guarded.names):
                    found.append((alarm, location))
                    self._reporter.notify(alarm, location, index, self._skipped if seen.skipped else None, name)
            for alarm in guarded.health_alarms(everything):
                location = guarded.batches.of(alarm.step)
                self._reporter.notify(alarm, location, index, None, name)
                if alarm.escalates:  # Other alarms about individual parameters need no response.
                    found.append((alarm, location))
        return found

    # Responses.

    def _respond(self, trainer: L.Trainer, alarm: Alarm, location: StepLocation) -> None:
        """Take the rung of the ladder that is due."""
        assert self._reporter is not None
        back_to = None if self._snapshots is None else self._snapshots.back_to
        step = logging_step(trainer)
        rung = self.ladder.act(step, can_roll_back=back_to is not None, lost=alarm.lost)
        text: str | None = None
        if rung == "rollback":
            if (lower := self._roll_back()) is None:
                self.ladder.undo()
                rung = self.ladder.act(step, can_roll_back=False, lost=alarm.lost)
            else:
                text = f"back to the state after step {back_to}, continuing with the next batches{lower}"
        if rung == "lr_cut":
            text = self._cut_lr()
        elif rung == "stop":
            text = self._end(trainer)
        if text is not None:
            self._reporter.notify_response(trainer, alarm, location, text)

    def _end(self, trainer: L.Trainer) -> str | None:
        """End the run, as soon as the Trainer's minimum allows it; None if that has been reported."""
        trainer.should_stop = True
        if self._is_ending:
            return None
        self._is_ending = True
        minimum = minimum_left(trainer)
        once = "" if minimum is None else f" as soon as the Trainer's minimum ({minimum}) is reached, not before"
        return f"training is stopped{once}, because all other responses are used up ({self.ladder.why_stop()})"

    def _cut_lr(self) -> str:
        cut = self.lr_cut
        assert cut is not None
        for guarded in self._guarded:
            guarded.cut.start(cut.factor, cut.steps, cut.recover)
        return f"learning rate times {cut.factor:g} for {cut.steps} steps"

    def _roll_back(self) -> str | None:
        """Return to the last snapshot; None if it could not be read."""
        assert self._snapshots is not None
        assert self.rollback is not None
        times = self._snapshots.restore()
        if times is None:
            return None
        self._skipped = self._count()
        factor = self.rollback.lr_factor**times
        if factor == 1:
            return ""
        for guarded in self._guarded:
            guarded.cut.lower(factor)
        return f", learning rate times {factor:g}"


def _detector(given: Any) -> Detector:
    if isinstance(given, str):
        return DETECTORS.make(given, {})
    if not isinstance(given, Detector):
        raise TypeError(
            f"Invalid detectors=[{given!r}] of DivergenceGuard: each must be an instance of "
            "lightning_optim.divergence.Detector, or the name of a registered one."
        )
    return given
