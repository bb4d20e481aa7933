"""Details of `OptimizerMonitor` on request: single tensors, and histograms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_info

from lightning_optim.callbacks._boards import Boards, boards_of, shows_scalars_only
from lightning_optim.callbacks._lightning import plain_name
from lightning_optim.core.stats import StepRecord
from lightning_optim.diagnostics import StepReport
from lightning_optim.diagnostics.heat_map import HeatMap
from lightning_optim.diagnostics.magnitudes import TAGS, Histograms, buckets
from lightning_optim.diagnostics.tensors import PerTensor, TensorRows, table_of


class MonitorDetails:
    """Tables that reports carry for the details, and what is written of them.

    Args:
        trainer: The Trainer.
        per_tensor: Display of single tensors; None for none.
        histograms: Display of histograms; None for none.
    """

    def __init__(self, trainer: L.Trainer, per_tensor: PerTensor | None, histograms: Histograms | None) -> None:
        without = shows_scalars_only(trainer)
        some = len(without) < len(trainer.loggers)
        self._per_tensor = per_tensor if some else None
        self._histograms = histograms if some else None
        self._boards = Boards(boards_of(trainer))
        asked = [name for name, value in (("per_tensor", per_tensor), ("histograms", histograms)) if value is not None]
        if asked and without:
            rank_zero_info(
                f"{', '.join(without)} gets the scalars of OptimizerMonitor, but nothing of {' and '.join(asked)}: "
                "tables, pictures and histograms go to TensorBoard, Weights & Biases, MLflow and Comet."
            )
        names = trainer.lightning_module.named_parameters()
        self._order = {plain_name(name): place for place, (name, _) in enumerate(names)}
        self._batches = 0
        self._shown: dict[int, _Shown] = {}

    def histograms_due(self) -> Sequence[str]:
        """Return the kinds of magnitudes that the coming report counts; the same on all ranks."""
        wanted = self._histograms
        return wanted.of if wanted is not None and self._batches % wanted.every == 0 else ()

    def add(self, report: StepReport, record: StepRecord) -> None:
        """Add tables to a report before it is sent."""
        if not self._boards:
            return
        if self._per_tensor is not None:
            report.add_table("tensors", record.per_tensor())
        for kind, counts in record.histograms.items():
            report.add_table(kind, counts)

    def next_batch(self) -> None:
        """Count a batch with reports."""
        self._batches += 1

    def write(self, report: StepReport, index: int, tag_of: Callable[[str], str]) -> None:
        """Write the tables of a report.

        Args:
            report: A report that has been read.
            index: Index of the optimizer.
            tag_of: Turns a tag into that of this optimizer.
        """
        for kind, tag in TAGS.items():
            for group, counts in zip(report.group_names, report.tables.get(kind, ()), strict=False):
                if (found := buckets(counts)) is not None:
                    self._boards.histogram(tag_of(f"{tag}/{group}"), *found, report.at)
        if self._per_tensor is not None and "tensors" in report.tables:
            shown = self._shown.setdefault(index, _Shown(self._per_tensor, tag_of, self._order))
            shown.add(report)
            if shown.due():
                shown.write(self._boards)

    def end(self) -> None:
        """Write the last state of text and images."""
        for shown in self._shown.values():
            shown.write(self._boards)


class _Shown:
    """Text and images about the tensors of one optimizer."""

    def __init__(self, detail: PerTensor, tag_of: Callable[[str], str], order: Mapping[str, int]) -> None:
        self._detail, self._tag_of, self._order = detail, tag_of, order
        self._heat_maps = {name: HeatMap() for name in detail.heat_maps}
        self._reports = 0
        self._step = self._written = -1
        self._rows: TensorRows | None = None

    def add(self, report: StepReport) -> None:
        self._rows = rows = TensorRows(*report.tensors, report.tables["tensors"])
        self._step = report.at
        self._reports += 1
        for name, heat_map in self._heat_maps.items():
            heat_map.add(report.at, rows.names, rows.quantity(name))

    def due(self) -> bool:
        return self._reports % self._detail.every == 0

    def write(self, boards: Boards) -> None:
        if self._rows is None or self._written == self._step:
            return
        self._written = self._step
        if self._detail.worst:
            boards.table(self._tag_of("optim/tensors"), *table_of(self._rows, self._detail), self._step)
        for name, heat_map in self._heat_maps.items():
            if (image := _drawn(heat_map, name, self._order)) is not None:
                boards.image(self._tag_of(f"optim/tensors/{name}"), image, self._step)


def _drawn(heat_map: HeatMap, title: str, order: Mapping[str, int]) -> Any:
    try:
        return heat_map.draw(title, order)
    except ModuleNotFoundError:
        return None
