from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as L

from lightning_optim.callbacks.hub import HubCallback
from lightning_optim.callbacks.lightning_private import logging_due, logging_step
from lightning_optim.diagnostics import DEFAULT_DIAGNOSTICS, Diagnostic, Report
from lightning_optim.stats import StepCounts, StepRecord


class OptimizerMonitor(HubCallback):
    """Shows in every logger what the optimizer does to each parameter group.

    Every ``log_every_n_steps`` steps of the Trainer: learning rate and weight decay as the step used them, gradient
    norm before and after clipping, parameter norm, update over parameter norm, share of clipped steps since the last
    report, and skipped steps. Tags read ``optim_<quantity>/<group>``, one section of TensorBoard per quantity.

    All values of a report cross to the host in one packed transfer, written when it has arrived; between reports
    nothing is measured for the monitor and nothing waits for the device.

    Args:
        diagnostics: Quantities to show beside learning rate, weight decay, clip rate and skips; None for all that
            are built in (`lightning_optim.diagnostics.DEFAULT_DIAGNOSTICS`).

    Raises:
        ValueError: Two diagnostics have the same name.

    Example:
        >>> trainer = L.Trainer(callbacks=[OptimizerMonitor()], logger=False, enable_checkpointing=False)
    """

    def __init__(self, diagnostics: Sequence[Diagnostic] | None = None) -> None:
        self.diagnostics = DEFAULT_DIAGNOSTICS if diagnostics is None else tuple(diagnostics)
        names = [diagnostic.name for diagnostic in self.diagnostics]
        if duplicates := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"Two diagnostics are called {duplicates[0]!r}; each name makes a tag, so it must be unique."
            )
        self._pending: deque[tuple[int, Report]] = deque()
        self._last: dict[int, Report | StepCounts] = {}

    def report_due(self, trainer: L.Trainer) -> bool:
        """When Lightning logs, provided anything takes it."""
        return bool(trainer.loggers) and logging_due(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Rates start here, also on a resume."""
        super().on_train_start(trainer, pl_module)
        self._last = dict(enumerate(self.hub.counts()))

    def on_report(self, trainer: L.Trainer, optimizer_index: int, record: StepRecord) -> None:
        """Computes the diagnostics on the device and sends them off."""
        report = Report(record, self.diagnostics, self._last[optimizer_index], at=logging_step(trainer))
        self._last[optimizer_index] = report
        self._pending.append((optimizer_index, report))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Writes what has arrived, at the step it belongs to."""
        super().on_train_batch_end(trainer, pl_module, *args)
        while self._pending and self._pending[0][1].ready():
            self._write(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the rest."""
        self._flush(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Writes the rest: the last steps before a crash are the ones that matter."""
        self._flush(trainer)
        super().on_exception(trainer, pl_module, exception)

    def _flush(self, trainer: L.Trainer) -> None:
        while self._pending:
            self._write(trainer)

    def _write(self, trainer: L.Trainer) -> None:
        index, report = self._pending.popleft()
        values = report.read()
        if len(trainer.optimizers) > 1:  # group names repeat across optimizers
            values = {f"{family}/{index}.{name}": v for (family, name), v in _split(values)}
        for logger in trainer.loggers:
            logger.log_metrics(values, report.at)


def _split(values: dict[str, float]) -> list[tuple[list[str], float]]:
    return [(tag.split("/", 1), value) for tag, value in values.items()]
