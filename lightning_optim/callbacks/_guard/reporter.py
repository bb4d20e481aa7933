"""Everything that `DivergenceGuard` writes: warnings, the divergence report with its pictures, batches, scalars."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_optim.callbacks._boards import boards_of
from lightning_optim.callbacks._followed import bare
from lightning_optim.callbacks._guard.step_batches import StepLocation
from lightning_optim.callbacks._lightning import logging_step
from lightning_optim.divergence import Alarm, DivergenceReport
from lightning_optim.divergence.files import check_folder, write_file
from lightning_optim.divergence.incident_picture import as_pixels, as_png, can_draw, draw
from lightning_optim.divergence.incidents import Incident
from lightning_optim.divergence.report import Entry
from lightning_optim.step.gradients import group_names_of

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
        self._boards = boards_of(trainer)
        self._files = 0
        self._said_no_pictures = False
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
        path = self.write(trainer, is_over=False)
        rank_zero_warn(f"Step {step}: {alarm.text}: {text}." + ("" if path is None else f" Report: {path}"))

    def write(self, trainer: L.Trainer, is_over: bool = True) -> Path | str | None:
        """Write the report to its files and to TensorBoard, on the first rank and if it has any entry.

        Args:
            trainer: The Trainer.
            is_over: Whether the run is over. Until then only the last incident is drawn, because drawing takes time.

        Returns:
            The path or URL of the Markdown file; None if there is none.
        """
        if not self._report.entries or not trainer.is_global_zero:
            return None
        path = self._write_file("divergence report", lambda: self._report.write(self._folder))
        incidents = self._report.incidents.kept
        drawn = [self._draw(trainer, one, path is not None) for one in (incidents if is_over else incidents[-1:])]
        if any(drawn):  # The report is written before, in case that drawing fails, and again with their names.
            self._write_file("divergence report", lambda: self._report.write(self._folder))
        self._try("divergence report on TensorBoard", lambda: self._show(trainer))
        return path

    def _draw(self, trainer: L.Trainer, incident: Incident, to_file: bool) -> bool:
        """Draw an incident, unless it is drawn; return whether there is a new file."""
        if not incident.rows or incident.picture_rows == incident.rows:
            return False
        if not can_draw():
            if not self._said_no_pictures:
                self._said_no_pictures = True
                rank_zero_info("The divergence report has no pictures without matplotlib: lightning-optim[plot].")
            return False
        names = [group_names_of(bare(optimizer)) for optimizer in trainer.optimizers]
        parts = incident, self._report.entries_of(incident), names
        figure = self._try("drawing of an incident", partial(draw, *parts))
        if figure is None:
            return False
        self._try("picture of an incident on TensorBoard", lambda: self._show_picture(trainer, incident, figure))
        name = f"divergence_report_step{incident.first_step}.png"
        write = partial(_save_picture, figure, self._folder, name)
        if not to_file or self._write_file("picture of an incident", write) is None:
            return False
        incident.picture, incident.picture_rows = name, incident.rows
        return True

    def _show(self, trainer: L.Trainer) -> None:
        text = self._report.markdown(as_file=False)
        for board in self._boards:
            board.text("optim_health/divergence", text, logging_step(trainer), is_alarm=True)

    def _show_picture(self, trainer: L.Trainer, incident: Incident, figure: Any) -> None:
        for board in self._boards:
            tag = f"optim_health/incident_at_step_{incident.first_step}"
            board.image(tag, as_pixels(figure), logging_step(trainer))

    def log_skips(self, trainer: L.Trainer, skipped: int) -> None:
        """Send the number of skipped steps to the loggers.

        Args:
            trainer: The Trainer.
            skipped: Number of skipped steps so far.
        """
        self._log(trainer, {"optim_health/skipped_steps": float(skipped)})

    def log_health(self, trainer: L.Trainer, health: Mapping[str, float]) -> None:
        """Send the numbers about the run's health to the loggers.

        Args:
            trainer: The Trainer.
            health: The numbers, by name.
        """
        self._log(trainer, {f"optim_health/{name}": float(value) for name, value in health.items()})

    def _log(self, trainer: L.Trainer, metrics: dict[str, float]) -> None:
        for logger in trainer.loggers:
            what = "number of skipped steps, or another of the guard,"
            self._try(what, partial(logger.log_metrics, metrics, logging_step(trainer)))

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


def _save_picture(figure: Any, folder: str, name: str) -> Path | str:
    return write_file(folder, name, as_png(figure))
