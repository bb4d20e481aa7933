from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from lightning_optim.callbacks._guard.checkpoint import check_guard_state, guard_state, restore_guard
from lightning_optim.callbacks._guard.guarded import GuardedOptimizer
from lightning_optim.callbacks._guard.model_parameters import ModelParameters
from lightning_optim.callbacks._guard.reporter import GuardReporter
from lightning_optim.callbacks._guard.responses import Responses
from lightning_optim.callbacks._guard.run_alarms import check_parameters, new_alarms
from lightning_optim.callbacks._guard.snapshots import RunSnapshots, memory_for, parts_of
from lightning_optim.callbacks._guard.step_batches import StepBatches, StepLocation
from lightning_optim.callbacks._guard.step_loss import StepLoss
from lightning_optim.callbacks._hub import HubCallback
from lightning_optim.callbacks._lightning import logging_due, logging_step
from lightning_optim.core.registry import one_or_several
from lightning_optim.core.stats import StepRecord
from lightning_optim.core.typed import typed
from lightning_optim.divergence import (
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
from lightning_optim.divergence.base import detector_of
from lightning_optim.divergence.rates import highest_lr
from lightning_optim.step import StepPipeline

CHECKPOINT_KEY = "lightning_optim.divergence_guard"
"""Key in a checkpoint; Lightning's own key for a callback's state contains the class and its arguments."""


@typed(own=("detectors",))
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
    only_watches = True

    def __init__(
        self,
        spikes: Spikes | None = Spikes(),  # noqa: B008 - frozen, as the others
        lr_cut: LRCut | None = LRCut(),  # noqa: B008
        rollback: Rollback | None = Rollback(),  # noqa: B008
        stop: bool = True,
        patience: int = 5,
        cooldown: int = 10,
        health: HealthLimits | None = HealthLimits(),  # noqa: B008
        report_dir: str | Path | None = None,
        save_batches: bool = False,
        detectors: Sequence[Detector | str] | Detector | str = (),
        judge_loss: bool | None = None,
        early_warning: EarlyWarning | None = EarlyWarning(),  # noqa: B008
    ) -> None:
        if patience < 1:
            raise ValueError(f"Invalid patience={patience!r}: must be a whole number of at least 1, for instance 5.")
        self.spikes, self.lr_cut, self.rollback, self.health = spikes, lr_cut, rollback, health
        self._patience = patience
        self._report_dir = None if report_dir is None else str(report_dir)
        self._save_batches = save_batches
        self.early_warning = early_warning
        self.extra_detectors = tuple(map(detector_of, one_or_several(detectors)))
        self._stop, self._cooldown, self.judge_loss = stop, cooldown, judge_loss
        self._guarded: list[GuardedOptimizer] = []
        self._snapshots: RunSnapshots | None = None
        self._reporter: GuardReporter | None = None
        self._responses: Responses | None = None
        self._loss = StepLoss()
        self._begin()

    def _begin(self) -> None:
        """Start as a new guard does: one object may serve many fits, of other folds or seeds."""
        self.ladder = Ladder(self.lr_cut, self.rollback, self._stop, self._cooldown)
        self.report = DivergenceReport()
        self._restored: dict[str, Any] = {}
        self._skipped = self._overflows = 0
        self._first_is_good = True
        self._wants_snapshots = False
        self._saved_snapshots: dict[str, Any] | None = None

    @property
    def stops(self) -> bool:
        """Whether the run ends when the other responses are used up."""
        return self._stop

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
        return (StepGuard(window, skip, self._loss.take, detectors=extra, early_warning=self.early_warning),)

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
        self._loss.start(trainer)
        self._reporter = GuardReporter(self.report, trainer, self._report_dir)
        self._responses = Responses(self.ladder, self._reporter, lambda: self._guarded, lambda: self._snapshots)
        self._saved_snapshots = self._restored.get("snapshots")
        self._restore()
        self._wants_snapshots = self.rollback is not None
        self._first_is_good = check_parameters(trainer, pl_module, self._reporter)
        self._start_snapshots(trainer, pl_module)

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
        watch.follow_rate(partial(highest_lr, pipeline.optimizer))
        batches = StepBatches(watch.steps, self._save_batches)
        return GuardedOptimizer(pipeline, watch, judge, self.health, ModelParameters(trainer, pl_module), batches)

    def _restore(self) -> None:
        """Restore the state of the last checkpoint that was loaded."""
        parts = self._guarded, self.ladder, self.report, self._responses
        restore_guard(self._restored, self.hub, *parts)
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
        self._loss.add(trainer, loss)

    def _at_step(self, trainer: L.Trainer, optimizer_index: int) -> None:
        """Count a step for the cut of the learning rate; the losses so far are those of this step."""
        self._loss.complete()
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
        check_guard_state(self._restored)
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
        self._loss.close()

    def _state(self) -> dict[str, Any]:
        if not self._guarded:
            return self._restored
        assert self._responses is not None
        snapshots = self._saved_snapshots if self._snapshots is None else self._snapshots.state_dict()
        return guard_state(self._guarded, self.ladder, self.report, self._responses, snapshots)

    def _count(self) -> int:
        return self.hub.total().skipped

    def _new_alarms(self, everything: bool = False) -> list[tuple[Alarm, StepLocation]]:
        assert self._reporter is not None
        return new_alarms(self._guarded, self.report, self._reporter, self._skipped, everything)
