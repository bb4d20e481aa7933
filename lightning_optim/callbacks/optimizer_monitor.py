from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_optim.callbacks._followed import names_in
from lightning_optim.callbacks._hub import HubCallback
from lightning_optim.callbacks._lightning import logging_due, logging_step
from lightning_optim.callbacks._monitor.details import MonitorDetails
from lightning_optim.callbacks._monitor.meter import RunMeter, samples_in
from lightning_optim.callbacks._monitor.page import HP_METRICS, MonitorPage, log_scalars
from lightning_optim.callbacks._monitor.validation import OWN_LOSS, ValidationLooks, metric_tags
from lightning_optim.core.registry import one_or_several
from lightning_optim.core.stats import StepCounts, StepRecord
from lightning_optim.core.typed import typed
from lightning_optim.diagnostics import DEFAULT_DIAGNOSTICS, DIAGNOSTICS, Diagnostic, Histograms, PerTensor, StepReport
from lightning_optim.diagnostics.advice import BatchAdvice
from lightning_optim.step import StepPipeline

_MOST_ALARMS = 1000
"""Largest number of sentences in `OptimizerMonitor.alarms`, as in the guard's report."""


@typed(own=("diagnostics",))
class OptimizerMonitor(HubCallback):
    """Log the effect of the optimizer on each parameter group, to every logger.

    Every ``log_every_n_steps`` steps of the Trainer it logs learning rate and weight decay as the step used them,
    gradient norms before and after clipping, the change of the parameters, absolute and relative to their size and to
    the optimizer's moments, the loss between reports, clipped and skipped steps, and speed. Tags have the form
    ``optim_<quantity>/<group>``, with one section of TensorBoard per quantity; ``optim_<quantity>/<optimizer>.<group>``
    if there are several optimizers, by their names (`ConfigureOptimizers`) or else their numbers.

    All values of a report are transferred to the host in one packed tensor, and logged when it has arrived. Between
    reports the gradients are not read for the monitor, and nothing waits for the device.

    Args:
        diagnostics: Quantities per group: instances, or names given by `lightning_optim.register`; one, or several in a
            list; None for all built-in ones (`lightning_optim.diagnostics.DEFAULT_DIAGNOSTICS`). Learning rates, weight
            decay, loss, health and speed are always shown.
        hp_metrics: Tags by which TensorBoard's page of hyperparameters compares runs; add those that the module logs,
            for instance ``val_loss``. An empty list leaves that page to the user.
        per_tensor: Display of individual tensors, as a table of those that stand out and as images of all of them over
            time, on TensorBoard, Weights & Biases, MLflow and Comet; None for none.
        histograms: Histograms per group, in the same loggers; None for none.
        overfitting_patience: Number of validations in a row, in which validation got worse while training got better,
            after which advice is given; at least 1.
        progress_bar: Whether the progress bar shows gradient norm and skipped steps, with or without a logger.

    Attributes:
        latest: The last report that has arrived, by tag; with several optimizers, that of the first.
        alarms: A sentence for each report with a gradient that was not finite, which names the first of these;
            of more than a thousand the first and the last ones.
        advice: Sentences of advice: on the batch size, and on validation that gets worse while training gets better.

    Raises:
        ValueError: Two diagnostics have the same name, or a name is unknown; or ``overfitting_patience`` is below 1.
        TypeError: One of ``diagnostics`` is neither a diagnostic nor a name.

    Example:
        >>> trainer = L.Trainer(callbacks=[OptimizerMonitor()], logger=False, enable_checkpointing=False)
    """

    role = "OptimizerMonitor"
    only_watches = True

    def __init__(
        self,
        diagnostics: Sequence[Diagnostic | str] | Diagnostic | str | None = None,
        hp_metrics: Sequence[str] | str = HP_METRICS,
        progress_bar: bool = True,
        per_tensor: PerTensor | None = None,
        histograms: Histograms | None = None,
        overfitting_patience: int = 3,
    ) -> None:
        if (
            isinstance(overfitting_patience, bool)
            or not isinstance(overfitting_patience, int)
            or overfitting_patience < 1
        ):
            raise ValueError(
                f"Invalid overfitting_patience={overfitting_patience!r}: must be a whole number of at least 1, for "
                "instance 3."
            )
        self.diagnostics = (
            DEFAULT_DIAGNOSTICS if diagnostics is None else tuple(map(_diagnostic, one_or_several(diagnostics)))
        )
        names = [diagnostic.name for diagnostic in self.diagnostics]
        if duplicates := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"Two diagnostics are called {duplicates[0]!r}: names must be unique, because each is part of a tag."
            )
        self.hp_metrics = one_or_several(hp_metrics)
        self.progress_bar = progress_bar
        self.per_tensor, self.histograms = per_tensor, histograms
        self.overfitting_patience = overfitting_patience
        self.latest: dict[str, float] = {}
        self.alarms: list[str] = []
        self.advice: list[str] = []
        self._open: list[tuple[int, StepReport]] = []
        self._pending: deque[_Sent] = deque()
        self._last: dict[StepPipeline, StepReport | StepCounts] = {}
        self._batch_advice = BatchAdvice()
        self._meter: RunMeter | None = None
        self._page: MonitorPage | None = None
        self._details: MonitorDetails | None = None
        self._looks: ValidationLooks | None = None

    def _at_setup(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the last fit, and hold TensorBoard's record of hyperparameters until ours are known."""
        self.latest, self.alarms, self.advice = {}, [], []
        self._page = MonitorPage(trainer, self.hp_metrics)

    def report_due(self, trainer: L.Trainer) -> bool:
        """Return whether Lightning logs at this step and a logger or the progress bar shows the values."""
        return (bool(trainer.loggers) or self._bar(trainer)) and logging_due(trainer)

    def _at_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the interval of the first report, of a resumed run as well."""
        self._last = dict(zip(self.hub.pipelines, self.hub.counts(), strict=True))
        self._meter = RunMeter(trainer) if trainer.loggers or self._bar(trainer) else None
        self._batch_advice = BatchAdvice()
        self._looks = ValidationLooks(trainer, self.overfitting_patience) if self._meter is not None else None
        self._details = MonitorDetails(trainer, self.per_tensor, self.histograms)

    def _at_new_optimizers(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the interval of new optimizers."""
        counts = dict(zip(self.hub.pipelines, self.hub.counts(), strict=True))
        self._last = {pipeline: self._last.get(pipeline, counts[pipeline]) for pipeline in counts}
        if self._page is not None and self._page.has_started:
            self._page.show_groups()

    def _at_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None:
        """Begin the page before the first batch, count the samples of each, and complete looks at validation."""
        if self._page is not None and not self._page.has_started:
            self._page.start(samples_in(batch))
        if self._meter is not None:
            self._meter.begin_batch(batch)
            self._look(trainer)

    def _at_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Measure the gradient of this rank before it is averaged over ranks."""
        if self._meter is not None and self._meter.averages and self.report_due(trainer):
            self._meter.before_average()

    def _at_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the gradient of the first of several accumulated batches."""
        if self._meter is not None:
            self._meter.after_backward(trainer.accumulate_grad_batches > 1 and self.report_due(trainer))

    def _at_step(self, trainer: L.Trainer, optimizer_index: int) -> None:
        """Start the clock of the update."""
        if self._meter is not None and self.report_due(trainer):
            self._meter.begin_update()

    def writes_skip_count(self, trainer: L.Trainer) -> bool:
        """Return whether a report is due and there is one optimizer, because several have tags of their own."""
        return bool(trainer.loggers) and len(trainer.optimizers) == 1 and self.report_due(trainer)

    def writes_health(self, trainer: L.Trainer) -> bool:
        """Return whether a report is due and there is a logger."""
        return bool(trainer.loggers) and self.report_due(trainer)

    def histograms_due(self, trainer: L.Trainer) -> Sequence[str]:
        """Return the kinds of histograms that the coming report shows."""
        return () if self._details is None else self._details.histograms_due()

    def on_report(self, trainer: L.Trainer, optimizer_index: int, record: StepRecord) -> None:
        """Compute the diagnostics of one optimizer on the device."""
        if self._meter is None:
            return
        pipeline = self.hub.pipelines[optimizer_index]
        report = StepReport(record, self.diagnostics, self._last[pipeline], at=logging_step(trainer))
        self._meter.on_record(report, record, is_first=not self._open)
        if not self._open and self._looks is not None:
            self._looks.observe()
        if not self._open:  # The first report of a batch contains the values that belong to the run.
            health = self.hub.health_points()
            report.add([f"optim_health/{name}" for name in health], list(health.values()), of_run=True)
        if self._details is not None:
            self._details.add(report, record)
        self._last[pipeline] = report
        self._open.append((optimizer_index, report))

    def _at_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Send the reports of this batch, and log those that have arrived, each at its own step."""
        if self._meter is not None:
            self._meter.end_batch(outputs)
        self._send()
        while self._pending and self._pending[0].report.ready():
            self._write(trainer)

    def _at_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Pause the clock, because validation is not part of the time of a step."""
        if self._meter is not None:
            self._meter.clock.pause()

    def _at_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Resume the clock, and note that there are new metrics of validation."""
        if self._meter is not None:
            self._meter.clock.resume()
        if self._looks is not None:
            self._looks.validated()

    def _at_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the reports that have not arrived yet."""
        self._flush(trainer)
        self._look(trainer)
        if self._page is not None:
            self._page.end()

    def _at_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Log the reports that have not arrived yet, because the last steps before a crash matter most."""
        self._flush(trainer)

    def _at_close(self) -> None:
        if self._page is not None:
            self._page.close()
        self._meter = self._page = self._details = self._looks = None
        self._open, self._last = [], {}
        self._pending.clear()

    def _look(self, trainer: L.Trainer) -> None:
        """Log the gap of a validation that has ended, and advice."""
        if self._looks is None or (look := self._looks.complete()) is None:
            return
        step, gaps, advice = look
        for logger in trainer.loggers if gaps else ():
            log_scalars(logger, gaps, step)
        if self._page is not None:
            self._page.show_charts([*gaps, *metric_tags(trainer)])
        self._advise(advice, step)

    def _advise(self, advice: Sequence[str], step: int) -> None:
        for sentence in advice:
            self.advice.append(sentence)
            rank_zero_info(f"Step {step}: {sentence}")
            if self._page is not None:
                self._page.advise(sentence, step)

    def _bar(self, trainer: L.Trainer) -> bool:
        return self.progress_bar and trainer.progress_bar_callback is not None

    def _send(self) -> None:
        """Send the open reports, the first of which contains the values that belong to the run."""
        reports, self._open = self._open, []
        if reports and self._details is not None:
            self._details.next_batch()
        for number, (index, report) in enumerate(reports):
            assert self._meter is not None
            rest = self._meter.finish(report) if number == 0 else dict
            self._pending.append(_Sent(index, report.send(), rest))

    def _flush(self, trainer: L.Trainer) -> None:
        self._open = []  # The batch did not end, so its records may never be complete.
        while self._pending:
            self._write(trainer)
        if self._details is not None:
            self._details.end()

    def _write(self, trainer: L.Trainer) -> None:
        sent = self._pending.popleft()
        index, report, rest = sent.index, sent.report, sent.rest()
        values = report.read()
        if index == 0:
            self.latest = {**values, **rest}
        alarms: list[str] = []
        if report.culprit is not None:
            count = int(values["optim_health/nonfinite_gradients"])
            some = "1 gradient is" if count == 1 else f"{count} gradients are"
            alarms.append(f"Step {report.at}: {some} not finite, the first that of `{report.culprit}`.")
        several = len(trainer.optimizers) > 1  # Optimizers may share group names.
        names = names_in(trainer) if several else []

        def tag_of(tag: str) -> str:
            family, name = tag.split("/", 1)
            return f"{family}/{names[index]}.{name}" if several and tag not in report.of_run else tag

        values = {tag_of(tag): value for tag, value in values.items()} | rest
        for logger in trainer.loggers:
            log_scalars(logger, values, report.at)
        self.alarms += alarms
        if len(self.alarms) > _MOST_ALARMS:
            del self.alarms[_MOST_ALARMS // 2]
        advice = self._batch_advice.update(values.get("optim_grad/noise_scale"), values.get("optim_grad/batch_size"))
        self._advise([] if advice is None else [advice], report.at)
        if self._looks is not None and index == 0:
            self._looks.observe_loss(values.get(OWN_LOSS))
        if self._page is not None:
            self._page.report(values, report.at, alarms)
        if self._details is not None:
            self._details.write(report, index, tag_of)
        if self._bar(trainer) and index == 0:
            shown = {"grad_norm": "optim_grad_norm/total", "skipped": "optim_health/skipped_steps"}
            bar = {name: self.latest[tag] for name, tag in shown.items() if self.latest.get(tag)}
            trainer.progress_bar_metrics.update(bar)


@dataclass(frozen=True)
class _Sent:
    """A report of one optimizer in transfer, and a function that returns the values that only the host knows."""

    index: int
    report: StepReport
    rest: Callable[[], dict[str, float]]


def _diagnostic(given: Any) -> Diagnostic:
    if isinstance(given, str):
        return DIAGNOSTICS.make(given, {})
    if not isinstance(given, Diagnostic):
        raise TypeError(
            f"Invalid diagnostics=[{given!r}] of OptimizerMonitor: each must be an instance of "
            "lightning_optim.diagnostics.Diagnostic, or the name of a registered one."
        )
    return given
