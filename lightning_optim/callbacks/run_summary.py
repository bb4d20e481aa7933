from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from lightning_optim.callbacks._hub import HubCallback
from lightning_optim.core.stats import StepCounts


class RunSummary(HubCallback):
    """Print a summary after training: metrics, speed, clipped and skipped steps, and the parameter groups.

    It needs ``rich``, which ``pip install lightning-optim[cli]`` installs.

    Args:
        metrics: Logged metrics of the module to show, each with its label; None for all of them.

    Raises:
        ModuleNotFoundError: ``rich`` is not installed.

    Example:
        >>> trainer = L.Trainer(
        ...     callbacks=[RunSummary({"val_loss": "validation loss"})], logger=False, enable_checkpointing=False
        ... )
    """

    role = "RunSummary"

    def __init__(self, metrics: Mapping[str, str] | None = None) -> None:
        try:
            import rich  # noqa: F401
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("RunSummary needs rich: pip install 'lightning-optim[cli]'") from error
        self.metrics = metrics

    def _at_setup(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reset the results of the last fit, because a fit with nothing left to train never starts or ends training."""
        self._first_step, self._start, self._seconds = trainer.global_step, 0.0, 0.0
        self._counts: list[StepCounts] = []

    def _at_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._first_step = trainer.global_step
        self._start = time.perf_counter()

    def _at_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock, and collect the counts, which are not available after the fit."""
        self._seconds = time.perf_counter() - self._start
        self._counts = self.hub.counts()

    @rank_zero_only
    def _at_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the tables, after the progress bar has closed."""
        from rich.console import Console
        from rich.table import Table

        console = Console(file=sys.stdout)
        run = Table(title="Run", title_justify="left", show_header=False)
        for name, label in self._labels(trainer).items():
            value = trainer.callback_metrics.get(name)
            run.add_row(label, "not logged" if value is None else f"{float(value):.4f}")
        steps = trainer.global_step - self._first_step
        run.add_row("steps per second", f"{steps / self._seconds:.1f}" if self._seconds > 0 else "-")
        total = sum(counts.steps for counts in self._counts)
        clipped = sum(counts.clipped for counts in self._counts)
        skipped = sum(counts.skipped for counts in self._counts)
        run.add_row("steps clipped", f"{clipped / total:.1%} of {total}" if total else "-")
        run.add_row("steps skipped", str(skipped))
        console.print(run)
        groups = Table("group", "tensors", "parameters", "lr", "peak lr", "weight decay", title="Parameter groups")
        groups.title_justify = "left"
        for column in groups.columns[1:]:
            column.justify = "right"
        for optimizer in trainer.optimizers:
            for index, group in enumerate(optimizer.param_groups):
                groups.add_row(
                    str(group.get("name", index)),
                    str(len(group["params"])),
                    f"{sum(p.numel() for p in group['params']):,}",
                    f"{float(group['lr']):.3g}",
                    f"{float(group.get('initial_lr', group['lr'])):.3g}",
                    f"{group['weight_decay']:g}" if "weight_decay" in group else "-",
                )
        console.print(groups)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                # A plain print keeps the command in one line, so that it can be copied.
                print(f"See the run:  tensorboard --logdir {_relative(logger.save_dir)}")

    def _labels(self, trainer: L.Trainer) -> Mapping[str, str]:
        if self.metrics is not None:
            return self.metrics
        return {name: name for name, value in trainer.callback_metrics.items() if isinstance(value, torch.Tensor)}


def _relative(path: str) -> str:
    """Return the path relative to the current directory if it is inside, else the absolute path."""
    absolute = Path(path).resolve()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)
