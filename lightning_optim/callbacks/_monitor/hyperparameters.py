"""The hyperparameters of a run in its loggers: ours together with the module's, and with the user's own metrics.

TensorBoard shows the first record of hyperparameters of a run and ignores all others, while Lightning, the module and
the monitor each have something to write. So those that come before the first batch are held, and written as one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_warn

from lightning_optim.callbacks._monitor.settings import FIRST
from lightning_optim.callbacks._packages import tensorboard_loggers

_TAGS = "_hparams_/"


class Hyperparameters:
    """The record of hyperparameters of a fit, in each logger of the Trainer.

    Args:
        trainer: The Trainer, before Lightning logs the module's hyperparameters.
        metrics: Tags by which TensorBoard compares runs, in addition to those that the user logs hyperparameters with;
            none leave TensorBoard's page of hyperparameters to the user.
    """

    def __init__(self, trainer: L.Trainer, metrics: Sequence[str]) -> None:
        self._trainer, self._metrics = trainer, metrics
        loggers = tensorboard_loggers(trainer) if trainer.is_global_zero and metrics else []
        self._held = [HeldRecords(logger.experiment) for logger in loggers]
        self._ends: list[tuple[Any, Any]] = []

    def log(self, settings: Mapping[str, Any]) -> None:
        """Log the settings of the run, once.

        Args:
            settings: Plain values by name.
        """
        boards = tensorboard_loggers(self._trainer)
        for logger in self._trainer.loggers if self._trainer.is_global_zero else ():
            if any(logger is board for board in boards):
                continue  # What it is given by this method is its record, and a file for the module's constructor.
            try:
                logger.log_hyperparams(dict(settings))
            except Exception as error:  # MLflow refuses a value that differs from that of a run which is continued
                rank_zero_warn(
                    f"{type(logger).__name__} has not taken the settings of the optimizer as hyperparameters: "
                    f"{type(error).__name__}: {error}. Training continues without."
                )
        for held in self._held:
            self._ends.append((held.writer, held.release(settings, self._metrics)))
        self._held = []

    def end(self) -> None:
        """Write the end of the session."""
        for writer, record in self._ends:
            writer._get_file_writer().add_summary(record)
        self._ends = []

    def close(self) -> None:
        """Write what is still held as it came, because training never began."""
        for held in self._held:
            held.give_back()
        self._held = []


class HeldRecords:
    """Records of hyperparameters that a writer of TensorBoard is given, held until they are written as one.

    Args:
        writer: A `torch.utils.tensorboard.SummaryWriter`.
    """

    def __init__(self, writer: Any) -> None:
        self.writer = writer
        self._file = writer._get_file_writer()
        self._held: list[tuple[Any, ...]] = []
        self._file.add_summary = self._add

    def _add(self, summary: Any, *args: Any, **kwargs: Any) -> None:
        if any(value.tag.startswith(_TAGS) for value in summary.value):
            self._held.append((summary, args, kwargs))
        else:
            type(self._file).add_summary(self._file, summary, *args, **kwargs)

    def give_back(self) -> None:
        """Stop holding, and write what is held as it came."""
        self._stop()
        for summary, args, kwargs in self._held:
            self._file.add_summary(summary, *args, **kwargs)
        self._held = []

    def release(self, settings: Mapping[str, Any], metrics: Sequence[str]) -> Any:
        """Stop holding, and write one record of ``settings`` and everything that is held.

        Args:
            settings: Plain values by name; values that are held under the same name take precedence.
            metrics: Tags by which runs are compared, after those that are held.

        Returns:
            The record of the end of the session.
        """
        from torch.utils.tensorboard.summary import hparams

        self._stop()
        values, theirs = self._read()
        both = dict.fromkeys([*theirs, *metrics])
        if "hp_metric" in both:  # Lightning's own, -1 until somebody logs it: never in the first column
            both["hp_metric"] = both.pop("hp_metric")
        flat = {**settings, **values}
        experiment, session, end = hparams(flat, dict.fromkeys(both, 0.0))  # type: ignore[no-untyped-call]
        _mark(experiment)
        self._file.add_summary(experiment)
        self._file.add_summary(session)
        self._held = []
        return end

    def _stop(self) -> None:
        vars(self._file).pop("add_summary", None)

    def _read(self) -> tuple[dict[str, Any], list[str]]:
        """Return the values and the tags of metrics in the records that are held."""
        values: dict[str, Any] = {}
        metrics: list[str] = []
        for summary, *_ in self._held:
            for value in summary.value:
                data = _data_of(value)
                metrics += [info.name.tag for info in data.experiment.metric_infos]
                for name, one in data.session_start_info.hparams.items():
                    values[name] = getattr(one, one.WhichOneof("kind"))
        return values, metrics


def _data_of(value: Any) -> Any:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    return HParamsPluginData.FromString(value.metadata.plugin_data.content)


def _mark(experiment: Any) -> None:
    """Mark the settings that runs mostly differ in, because TensorBoard sorts those before all others."""
    (value,) = experiment.value
    data = _data_of(value)
    for info in data.experiment.hparam_infos:
        prefix, _, name = info.name.rpartition("/")
        info.differs = prefix.split("/")[0] == "optim" and name in FIRST
    value.metadata.plugin_data.content = data.SerializeToString()
