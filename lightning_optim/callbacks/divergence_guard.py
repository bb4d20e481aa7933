from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from lightning_optim.callbacks._guard.guarded import GuardedOptimizer
from lightning_optim.callbacks._guard.model_parameters import ModelParameters
from lightning_optim.callbacks._guard.reporter import GuardReporter
from lightning_optim.callbacks._guard.responses import Responses
from lightning_optim.callbacks._guard.snapshots import RunSnapshots, memory_for, not_finite, parts_of
from lightning_optim.callbacks._guard.step_batches import StepBatches, StepLocation
from lightning_optim.callbacks._hub import HubCallback
from lightning_optim.callbacks._lightning import logging_due, logging_step
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
    EarlyWarning,
    HealthLimits,
    Ladder,
    LRCut,
    Rollback,
    SlowDivergence,
    Spikes,
    SpikeWindow,
    StepGuard,
)
from lightning_optim.divergence.observation import single_value
from lightning_optim.factory.about import about
from lightning_optim.step import StepPipeline

CHECKPOINT_KEY = "lightning_optim.divergence_guard"
"""Key in a checkpoint; Lightning's own key for a callback's state contains the class and its arguments."""


class DivergenceGuard(HubCallback):
    """Keep a run alive through bad batches, spikes and divergence, and report all observations and responses.

    A step is skipped if its loss or a gradient is not finite, or, where the loss is expected to fall (``judge_loss``),
    if the loss or the gradient norm is far above the last values. Parameters, moments, step counters and the schedule
    are then bit for bit unchanged. The decision is made on the device from the reduced gradients and loss, so all ranks
    decide alike. It is exact for every optimizer; with optimizers that take the flag in their kernel (all fused ones)
    the host never waits. Each skip gives a warning with the parameters concerned, and is logged as
    ``optim_health/skipped_steps``.

    Where skipping is not enough (consecutive bad steps, a lasting jump of the loss, a slow rise, a collapse of the loss
    scale) there is a ladder of responses: a temporarily lower learning rate; a return to a snapshot of weights,
    optimizer, schedule, scaler and averages, continuing with the next batches; the end of the run. Observations and
    responses are in ``divergence_report.md`` and ``.json`` next to the checkpoints, and in TensorBoard's text tab, with
    the 64 steps before each incident and, with matplotlib, a picture of it.

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
        judge_loss: Whether the loss is expected to fall, so that a lasting rise leads to a response and a spike to a
            skip. None decides: in automatic optimization with one optimizer, once the loss has fallen, and if the
            weights are the cause as far as can be known (`DivergenceJudge`). The losses of adversaries, of several
            optimizers and of manual optimization may rise in a healthy run, so what is seen there is reported only.
            True takes every rise for a divergence, False none. A value that is not finite is always skipped, and leads
            to a response if it lasts.
        early_warning: When the gradients of a group are too large for the second moment that the optimizer divides
            them by, which is reported before the loss shows it; None for no such report.

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
        judge_loss: bool | None = None,
        early_warning: EarlyWarning | None = EarlyWarning(),  # noqa: B008
    ) -> None:
        if patience < 1:
            raise ValueError(f"Invalid patience={patience!r}: must be a whole number of at least 1, for instance 5.")
        self.spikes, self.lr_cut, self.rollback, self.health = spikes, lr_cut, rollback, health
        self._patience = patience
        self._report_dir, self._save_batches = report_dir, save_batches
        self.early_warning = early_warning
        self.extra_detectors = tuple(map(_detector, one_or_several(detectors)))
        self._stop, self._cooldown, self.judge_loss = stop, cooldown, judge_loss
        self._guarded: list[GuardedOptimizer] = []
        self._snapshots: RunSnapshots | None = None
        self._reporter: GuardReporter | None = None
        self._responses: Responses | None = None
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
        self._first_is_good = True
        self._wants_snapshots = False
        self._saved_snapshots: dict[str, Any] | None = None

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
        """Return counts of responses, the factor on the learning rate, spike scores, and the last early warning value.

        The latter is `StepObservation.update_to_come`, the largest of all groups and optimizers.
        """
        counts = {"rollbacks": self.rollback_count, "lr_cuts": self.ladder.used["lr_cut"]}
        counts["overflow_steps"] = self.overflow_steps
        known = self.report.spike_scores()
        scores = {f"spike_score_{signal}": known.get(signal, 0.0) for signal in SIGNALS}
        signs = [early for guarded in self._guarded if (early := guarded.watch.early) is not None]
        last = [early.last for early in signs if not math.isnan(early.last)]  # It is NaN before a step has arrived.
        over = {"update_to_come": max(last)} if last else {}
        cut = min((guarded.cut.factor for guarded in self._guarded), default=1.0)
        return {**counts, "lr_cut": cut, **scores, **over}

    def used_lrs(self) -> list[list[float]]:
        """Return the learning rates of each optimizer in its last step."""
        return [guarded.cut.used_lrs() for guarded in self._guarded]

    def detectors(self) -> Sequence[Detector]:
        """Return a new `StepGuard` for one optimizer, with its own copies of the user's detectors."""
        spikes = self.spikes
        window: SpikeWindow | None = None if spikes is None else spikes.window_of(len(SIGNALS))
        skip = SIGNALS if spikes is not None and spikes.skip else ()
        extra = copy.deepcopy(self.extra_detectors)
        return (StepGuard(window, skip, self._take_loss, detectors=extra, early_warning=self.early_warning),)

    def _judges(self, pl_module: L.LightningModule) -> bool | None:
        """Return whether losses are expected to fall; None if that depends on whether they have."""
        if self.judge_loss is not None:
            return self.judge_loss
        return None if pl_module.automatic_optimization and len(self.hub.pipelines) == 1 else False

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
        self._responses = Responses(self.ladder, self._reporter, lambda: self._guarded, lambda: self._snapshots)
        self._saved_snapshots = self._restored.get("snapshots")
        self._restore()
        self._wants_snapshots = self.rollback is not None
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
        if self.rollback is None or any(isinstance(p, UninitializedParameter) for p in pl_module.parameters()):
            return
        self._wants_snapshots = False
        of = trainer, pl_module, self.hub, self._guarded
        if (memory := memory_for(self.rollback.memory, parts_of(*of), trainer)) is not None:
            saved, self._saved_snapshots = self._saved_snapshots, None
            self._snapshots = RunSnapshots(self.rollback, memory, *of, self._first_is_good, saved)

    def _guard(self, pipeline: StepPipeline, trainer: L.Trainer, pl_module: L.LightningModule) -> GuardedOptimizer:
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        (watch,) = (detector for detector in pipeline.detectors if isinstance(detector, StepGuard))
        judge = DivergenceJudge(SlowDivergence(), self._patience, scaled, judge_loss=self._judges(pl_module))
        if judge.judge_loss is False:
            watch.skip = ()
        watch.follow_rate(partial(_highest_rate, pipeline.optimizer))
        batches = StepBatches(watch.steps, self._save_batches)
        return GuardedOptimizer(pipeline, watch, judge, self.health, ModelParameters(trainer, pl_module), batches)

    def _restore(self) -> None:
        """Restore the state of the last checkpoint that was loaded."""
        states = self._restored.get("optimizers", [])
        for guarded, place in zip(self._guarded, self.hub.restored_places(), strict=True):
            if place is not None and place < len(states):
                guarded.restore(states[place], self.hub.restored_names(place))
        if "report" in self._restored:  # Checkpoints of version 0.1 have none.
            self.report.load_state_dict(self._restored["report"])
        if "ladder" in self._restored:
            self.ladder.load_state_dict(self._restored["ladder"])
        if "responses" in self._restored and self._responses is not None:
            self._responses.load_state_dict(self._restored["responses"])
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
        if trainer.loggers and logging_due(trainer) and not self.hub.health_written():
            assert self._reporter is not None
            self._reporter.log_health(trainer, self.health_points())
        snapshots = self._snapshots
        if snapshots is not None:
            snapshots.observe(step, [alarm for alarm, _ in alarms])
        assert self._responses is not None
        if levels := [(alarm, location) for alarm, location in alarms if alarm.kind == "new_level"]:
            self._responses.undo(trainer, *levels[0])
        if escalating := [(alarm, location) for alarm, location in alarms if alarm.escalates]:
            if self._responses.respond(trainer, *escalating[0]) == "rollback":
                self._skipped = self._count()
        elif snapshots is not None and any(stepped) and not alarms:
            snapshots.capture_if_due(step)
        elif self._wants_snapshots and not alarms:
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
        """Save baselines, counts, budgets and small snapshots as plain numbers and tensors."""
        checkpoint[CHECKPOINT_KEY] = self._state()

    def _at_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Keep the state until training starts; during training, as when a tuner undoes a trial, restore it now."""
        self._restored = checkpoint.get(CHECKPOINT_KEY, {})
        known = ("optimizers", "ladder", "report", "responses", "snapshots")
        check_version(self._restored, "the state of DivergenceGuard", known)
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
        self._guarded, self._snapshots, self._reporter, self._responses = [], None, None, None
        self._reduce = self._loss = None

    def _state(self) -> dict[str, Any]:
        if not self._guarded:
            return self._restored
        optimizers = [guarded.state_dict() for guarded in self._guarded]
        assert self._responses is not None
        state: dict[str, Any] = {"version": VERSION, "optimizers": optimizers, "ladder": self.ladder.state_dict()}
        state |= {"report": self.report.state_dict(), "responses": self._responses.state_dict()}
        snapshots = self._saved_snapshots if self._snapshots is None else self._snapshots.state_dict()
        return state if snapshots is None else {**state, "snapshots": snapshots}

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
                    if not alarm.is_repeated:
                        self._reporter.notify(alarm, location, index, self._skipped if seen.skipped else None, name)
            for alarm in guarded.health_alarms(everything):
                location = guarded.batches.of(alarm.step)
                self._reporter.notify(alarm, location, index, None, name)
                if alarm.escalates:  # Other alarms about individual parameters need no response.
                    found.append((alarm, location))
        return found


def _highest_rate(optimizer: Optimizer) -> float:
    """Return the largest learning rate of an optimizer; NaN if the device has to be asked."""
    rates = [group["lr"] for group in optimizer.param_groups if "lr" in group]
    if any(isinstance(rate, Tensor) and rate.device.type != "cpu" for rate in rates):
        return math.nan
    return max(map(float, rates), default=math.nan)


def _detector(given: Any) -> Detector:
    if isinstance(given, str):
        return DETECTORS.make(given, {})
    if not isinstance(given, Detector):
        raise TypeError(
            f"Invalid detectors=[{given!r}] of DivergenceGuard: each must be an instance of "
            "lightning_optim.divergence.Detector, or the name of a registered one."
        )
    return given
