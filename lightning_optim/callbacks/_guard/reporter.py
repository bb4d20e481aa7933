"""Everything that `DivergenceGuard` writes: warnings, the divergence report, the batches of skipped steps."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_optim.callbacks._guard.step_batches import StepLocation
from lightning_optim.callbacks._lightning import logging_step
from lightning_optim.callbacks._packages import tensorboard_loggers
from lightning_optim.divergence import Alarm, DivergenceReport
from lightning_optim.divergence.files import check_folder, write_file
from lightning_optim.divergence.report import Entry

_Result = TypeVar("_Result")

_MOST_FILES = 16
"""Largest number of steps whose batches are saved."""


class GuardReporter:
    """Notifications of one fit, each as a warning and as an entry of the report.

    Args:
        report: The report that entries are added to.
        trainer: The Trainer, at the start of training.
        report_dir: Where files go, local or remote; None for the folder of the checkpoints, or else of the logs.
    """

    def __init__(self, report: DivergenceReport, trainer: L.Trainer, report_dir: str | None) -> None:
        self._report = report
        self._rank = trainer.global_rank
        checkpoints = getattr(trainer.checkpoint_callback, "dirpath", None)
        log_dir = trainer.log_dir  # Ranks agree on it by a broadcast, so all of them have to ask.
        self._folder = str(report_dir or checkpoints or log_dir or trainer.default_root_dir)
        self._files = 0
        self._failed: set[str] = set()
        """What could not be written at the last attempt."""
        if trainer.is_global_zero:
            self._write_file("divergence report", lambda: check_folder(self._folder))

    def notify(
        self, alarm: Alarm, location: StepLocation, optimizer: int, skips: int | None, name: str | None = None
    ) -> None:
        """Report an alarm.

        Args:
            alarm: The alarm.
            location: Where its step took place.
            optimizer: Index of the optimizer.
            skips: Number of skipped steps so far, if the step of the alarm is one; then its batches are saved.
            name: Name of the optimizer; None if it has none.
        """
        text = alarm.text if name is None else f"{name}: {alarm.text}"
        self._add(location.step, location.epoch, location, optimizer, alarm.kind, text, alarm.names)
        skipped = f": {text}." if skips is None else f" skipped: {text} ({skips} skipped so far)."
        rank_zero_warn(f"Step {location.step}{skipped}")
        if skips is not None:
            self._save_samples(location)

    def notify_response(self, trainer: L.Trainer, alarm: Alarm, location: StepLocation, text: str) -> None:
        """Report what the guard has done about an alarm, and write the report.

        Args:
            trainer: The Trainer.
            alarm: The alarm.
            location: Where its step took place.
            text: What has been done.
        """
        step = logging_step(trainer)
        self._add(step, trainer.current_epoch, location, 0, "did", text)
        path = self.write(trainer)
        rank_zero_warn(f"Step {step}: {alarm.text}: {text}." + ("" if path is None else f" Report: {path}"))

    def write(self, trainer: L.Trainer) -> Path | str | None:
        """Write the report to its files and to TensorBoard, on the first rank and if it has any entry.

        Returns:
            The path or URL of the Markdown file; None if there is none.
        """
        if not self._report.entries or not trainer.is_global_zero:
            return None
        path = self._write_file("divergence report", lambda: self._report.write(self._folder))
        self._try("divergence report on TensorBoard", lambda: self._show(trainer))
        return path

    def _show(self, trainer: L.Trainer) -> None:
        for logger in tensorboard_loggers(trainer):
            logger.experiment.add_text("optim_health/divergence", self._report.markdown(), logging_step(trainer))

    def log_skips(self, trainer: L.Trainer, skipped: int) -> None:
        """Send the number of skipped steps to the loggers.

        Args:
            trainer: The Trainer.
            skipped: Number of skipped steps so far.
        """
        metrics = {"optim_health/skipped_steps": float(skipped)}
        for logger in trainer.loggers:
            self._try("number of skipped steps", partial(logger.log_metrics, metrics, logging_step(trainer)))

    def _write_file(self, what: str, write: Callable[[], Path | str]) -> Path | str | None:
        hint = f" to {self._folder}", " `DivergenceGuard: {report_dir: ...}` sets another folder."
        return self._try(what, write, *hint)

    def _try(self, what: str, write: Callable[[], _Result], where: str = "", advice: str = "") -> _Result | None:
        """Write something; if that fails, warn once until it succeeds, because a report must not end the run.

        Any error is caught: a remote file system raises those of its own client, and pickling those of the user's data.
        """
        try:
            result = write()
        except Exception as error:
            if what not in self._failed:
                self._failed.add(what)
                warnings.warn(  # on the rank that it concerns
                    f"The {what} cannot be written{where}: {type(error).__name__}: {error}. Training continues, and it "
                    f"is tried again at the next occasion.{advice}",
                    stacklevel=2,
                )
            return None
        self._failed.discard(what)
        return result

    def _add(
        self,
        step: int,
        epoch: int,
        location: StepLocation,
        optimizer: int,
        kind: str,
        text: str,
        names: tuple[str, ...] = (),
    ) -> None:
        self._report.add(Entry(step, epoch, location.batches, optimizer, kind, text, list(names)))

    def _save_samples(self, location: StepLocation) -> None:
        if not location.samples or self._files >= _MOST_FILES:
            return
        name = f"divergence_batches/step{location.step}_rank{self._rank}.pt"
        write = partial(_save, location.samples, self._folder, name)
        if self._write_file("batches of skipped steps", write) is not None:
            self._files += 1


def _save(samples: list[Any], folder: str, name: str) -> Path | str:
    buffer = io.BytesIO()
    torch.save(samples, buffer)
    return write_file(folder, name, buffer.getvalue())
