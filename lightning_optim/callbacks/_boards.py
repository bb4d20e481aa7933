"""Tables, pictures, histograms and alarms in loggers, through the types that each has of its own."""

from __future__ import annotations

import json
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import lightning.pytorch as L

from lightning_optim.callbacks._packages import is_lightning
from lightning_optim.diagnostics import tensorboard

_MOST_TEXTS = 200
_LONGEST_ALERT = 1000
"""Number of characters; the services cut longer ones, or refuse them."""


class Board(ABC):
    """A logger that shows more than scalars.

    Args:
        logger: The logger of Lightning.
    """

    logger_class: ClassVar[str]
    """Name of Lightning's class."""

    def __init__(self, logger: Any) -> None:
        self.logger = logger
        self._texts: dict[str, list[tuple[int, str]]] = {}

    @abstractmethod
    def table(self, tag: str, header: Sequence[str], rows: Sequence[Sequence[str]], step: int) -> None:
        """Show a table.

        Args:
            tag: Tag of it.
            header: Names of its columns.
            rows: Its cells.
            step: Step of it.
        """

    @abstractmethod
    def image(self, tag: str, pixels: Any, step: int) -> None:
        """Show a picture: uint8, shape [height, width, 3]."""

    @abstractmethod
    def histogram(self, tag: str, edges: Sequence[float], counts: Sequence[float], step: int) -> None:
        """Show a histogram whose elements have been counted: one edge more than there are counts."""

    @abstractmethod
    def text(self, tag: str, text: str, step: int, is_alarm: bool = False) -> None:
        """Show a text in Markdown.

        Args:
            tag: Tag of it.
            text: The text.
            step: Step of it.
            is_alarm: Whether somebody is to be notified of it, where the logger can do so.
        """

    def _with_earlier(self, tag: str, text: str, step: int) -> list[tuple[int, str]]:
        """Return the texts of a tag so far, for loggers that keep the last value only."""
        self._texts[tag] = [*self._texts.get(tag, []), (step, text)][-_MOST_TEXTS:]
        return self._texts[tag]


class Boards:
    """The boards of a Trainer's loggers: what one of them cannot show costs a warning, one for each kind.

    Args:
        boards: The boards.
    """

    def __init__(self, boards: Sequence[Board]) -> None:
        self._boards = boards
        self._failed: set[tuple[str, str]] = set()

    def __bool__(self) -> bool:
        return bool(self._boards)

    def table(self, tag: str, header: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Show a table, as `Board.table`."""
        texts = [[str(cell) for cell in row] for row in rows]
        self._each("table", lambda board: board.table(tag, header, texts, step))

    def image(self, tag: str, pixels: Any, step: int) -> None:
        """Show a picture, as `Board.image`."""
        self._each("picture", lambda board: board.image(tag, pixels, step))

    def histogram(self, tag: str, edges: Sequence[float], counts: Sequence[float], step: int) -> None:
        """Show a histogram, as `Board.histogram`."""
        self._each("histogram", lambda board: board.histogram(tag, edges, counts, step))

    def text(self, tag: str, text: str, step: int, is_alarm: bool = False) -> None:
        """Show a text, as `Board.text`."""
        self._each("text", lambda board: board.text(tag, text, step, is_alarm))

    def _each(self, what: str, show: Callable[[Board], None]) -> None:
        for board in self._boards:
            try:
                show(board)
            except Exception as error:
                name = type(board.logger).__name__
                if (what, name) not in self._failed:
                    self._failed.add((what, name))
                    warnings.warn(
                        f"A {what} cannot be shown by {name}: {type(error).__name__}: {error}. Training continues, and "
                        "this warning is not repeated.",
                        stacklevel=4,
                    )


class TensorBoardBoard(Board):
    """TensorBoard: its pages Text, Images and Histograms."""

    logger_class = "TensorBoardLogger"

    def table(self, tag: str, header: Sequence[str], rows: Sequence[Sequence[str]], step: int) -> None:
        self.logger.experiment.add_text(tag, tensorboard.markdown_table(header, rows), step)

    def image(self, tag: str, pixels: Any, step: int) -> None:
        self.logger.experiment.add_image(tag, pixels, step, dataformats="HWC")

    def histogram(self, tag: str, edges: Sequence[float], counts: Sequence[float], step: int) -> None:
        tensorboard.add_histogram(self.logger.experiment, tag, edges, counts, step)

    def text(self, tag: str, text: str, step: int, is_alarm: bool = False) -> None:
        self.logger.experiment.add_text(tag, text, step)


class WandbBoard(Board):
    """Weights & Biases: `wandb.Table`, `wandb.Image`, `wandb.Histogram`, and an alert for each alarm."""

    logger_class = "WandbLogger"

    def _log(self, tag: str, value: Any, step: int) -> None:
        self.logger.experiment.log({tag: value, "trainer/global_step": step})

    def table(self, tag: str, header: Sequence[str], rows: Sequence[Sequence[str]], step: int) -> None:
        import wandb

        self._log(tag, wandb.Table(columns=list(header), data=[list(row) for row in rows]), step)

    def image(self, tag: str, pixels: Any, step: int) -> None:
        import wandb

        self._log(tag, wandb.Image(pixels), step)

    def histogram(self, tag: str, edges: Sequence[float], counts: Sequence[float], step: int) -> None:
        import numpy as np
        import wandb

        self._log(tag, wandb.Histogram(np_histogram=(np.asarray(counts), np.asarray(edges))), step)

    def text(self, tag: str, text: str, step: int, is_alarm: bool = False) -> None:
        rows = [[str(at), line] for at, line in self._with_earlier(tag, text, step)]
        self.table(tag, ["step", "text"], rows, step)
        if is_alarm:
            self.logger.experiment.alert(title=tag[-63:], text=text[:_LONGEST_ALERT], level="WARN")


class MLFlowBoard(Board):
    """MLflow: time-stepped images, tables and texts as artifacts, and the last alarm as a tag of the run.

    It has no histograms: edges and counts are artifacts in JSON.
    """

    logger_class = "MLFlowLogger"

    def table(self, tag: str, header: Sequence[str], rows: Sequence[Sequence[str]], step: int) -> None:
        # The file that its `log_table` writes, which needs pandas.
        data = {"columns": list(header), "data": [list(row) for row in rows]}
        self.logger.experiment.log_text(self.logger.run_id, json.dumps(data), f"{tag}/step_{step:08}.json")

    def image(self, tag: str, pixels: Any, step: int) -> None:
        self.logger.experiment.log_image(self.logger.run_id, pixels, key=_plain(tag), step=step)

    def histogram(self, tag: str, edges: Sequence[float], counts: Sequence[float], step: int) -> None:
        data = {"log10 of the magnitude": list(edges), "count": list(counts)}
        self.logger.experiment.log_text(self.logger.run_id, json.dumps(data), f"{tag}/step_{step:08}.json")

    def text(self, tag: str, text: str, step: int, is_alarm: bool = False) -> None:
        lines = "\n\n".join(f"Step {at}: {line}" for at, line in self._with_earlier(tag, text, step))
        self.logger.experiment.log_text(self.logger.run_id, lines, f"{tag}.md")
        if is_alarm:
            self.logger.experiment.set_tag(self.logger.run_id, _plain(tag), text[:_LONGEST_ALERT])


class CometBoard(Board):
    """Comet: its tables, images, 3D histograms and texts; the last alarm also among the values of the experiment."""

    logger_class = "CometLogger"

    def table(self, tag: str, header: Sequence[str], rows: Sequence[Sequence[str]], step: int) -> None:
        name = f"{_plain(tag).replace('/', '_')}_step_{step:08}.csv"
        self.logger.experiment.log_table(name, tabular_data=[list(row) for row in rows], headers=list(header))

    def image(self, tag: str, pixels: Any, step: int) -> None:
        self.logger.experiment.log_image(pixels, name=tag, step=step)

    def histogram(self, tag: str, edges: Sequence[float], counts: Sequence[float], step: int) -> None:
        from comet_ml.data_structure import Histogram

        histogram: Any = Histogram()  # type: ignore[no-untyped-call]
        centres = [(low + high) / 2 for low, high in pairwise(edges)]
        histogram.add(centres, counts=[int(count) for count in counts])
        self.logger.experiment.log_histogram_3d(histogram, name=tag, step=step)

    def text(self, tag: str, text: str, step: int, is_alarm: bool = False) -> None:
        self.logger.experiment.log_text(text, step=step, metadata={"tag": tag})
        if is_alarm:
            self.logger.experiment.log_other(tag, text)


_BOARDS: tuple[type[Board], ...] = (TensorBoardBoard, WandbBoard, MLFlowBoard, CometBoard)


def boards_of(trainer: L.Trainer) -> list[Board]:
    """Return the boards of a Trainer's loggers, on the rank that logs; none on the others."""
    if not trainer.is_global_zero:
        return []
    return [board for logger in trainer.loggers if (board := board_of(logger)) is not None]


def board_of(logger: Any) -> Board | None:
    """Return the board of a logger; None if it shows scalars only, as far as we know."""
    found = next((board for board in _BOARDS if is_lightning(logger, board.logger_class)), None)
    return None if found is None else found(logger)


def shows_scalars_only(trainer: L.Trainer) -> list[str]:
    """Return the names of the loggers' classes that get scalars and hyperparameters, and nothing else."""
    return [type(logger).__name__ for logger in trainer.loggers if board_of(logger) is None]


def _plain(tag: str) -> str:
    """Return a tag of characters that every logger takes."""
    return re.sub(r"[^\w./ -]", "_", tag)
