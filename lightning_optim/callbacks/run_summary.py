from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_only

from lightning_optim.callbacks._followed import names_in, prefixes_in
from lightning_optim.callbacks._hub import HubCallback
from lightning_optim.callbacks._monitor.settings import clipping_of
from lightning_optim.callbacks._packages import tensorboard_loggers
from lightning_optim.core.stats import StepCounts
from lightning_optim.core.typed import typed

_HEALTH = {
    "rollbacks": "rollbacks",
    "lr_cuts": "cuts of the learning rate",
    "spike_score_loss": "spike score, loss",
    "spike_score_grad_norm": "spike score, gradient norm",
}
"""Label of each number about the run's health that is shown."""


@typed
class RunSummary(HubCallback):
    """Print a summary after training: metrics, speed, clipped and skipped steps, and the parameter groups.

    With several optimizers clipped and skipped steps are those of each, by its name.

    With a `DivergenceGuard` it also has the numbers of rollbacks and of cuts of the learning rate, and the spike score.
    The learning rate of a group is that of the last step, as the step used it: after the schedule, and after the cut.

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
    only_watches = True

    def __init__(self, metrics: Mapping[str, str] | None = None) -> None:
        try:
            import rich  # noqa: F401
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("RunSummary needs rich: pip install 'lightning-optim[cli]'") from error
        self.metrics = metrics

    def _at_setup(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reset the results of the last fit, because a fit with nothing left to train never starts or ends training."""
        self._first_step, self._start, self._seconds = trainer.global_step, 0.0, 0.0
        self._counts, self._each = StepCounts(), list[StepCounts]()
        self._names: list[str] = []
        self._clips: list[str] = []
        self._rates: dict[int, list[Any]] = {}
        self._used_lrs: Sequence[Sequence[float]] = ()

    def _at_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._first_step = trainer.global_step
        self._start = time.perf_counter()
        self._rates = {}

    def _at_step(self, trainer: L.Trainer, optimizer_index: int) -> None:
        """Note the learning rates of the step, because the schedule moves on behind it."""
        groups = self.hub.pipelines[optimizer_index].optimizer.param_groups
        self._rates[optimizer_index] = [group["lr"] for group in groups]

    def _at_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock, and collect the counts, which are not available after the fit."""
        self._seconds = time.perf_counter() - self._start
        self._counts, self._each = self.hub.total(), self.hub.counts()
        self._names = names_in(trainer)
        of_each = zip(self.hub.pipelines, clipping_of(trainer, self._names), strict=True)
        self._clips = ["" if pipeline.clipper is not None else clipping for pipeline, clipping in of_each]
        self._used_lrs = self.hub.used_lrs()

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
        several = len(self._each) > 1
        steps = trainer.global_step - self._first_step
        speed = f"{steps / self._seconds:.1f}" if self._seconds > 0 else "-"
        run.add_row("steps per second" + (" of all optimizers" if several else ""), speed)
        if not several:
            run.add_row("steps clipped", _clipped(self._counts, *self._clips))
        run.add_row("steps skipped", str(self._counts.skipped))
        health = self.hub.health_points()
        for name, label in _HEALTH.items():
            if name in health:
                run.add_row(label, f"{health[name]:.3%}" if name.startswith("spike_score") else f"{health[name]:.0f}")
        for name, of_one, clips in zip(self._names, self._each, self._clips, strict=True) if several else ():
            run.add_row(f"{name}: steps clipped", _clipped(of_one, clips))
            run.add_row(f"{name}: steps skipped", str(of_one.skipped))
        console.print(run)
        groups = Table("group", "tensors", "parameters", "lr", "peak lr", "weight decay", title="Parameter groups")
        groups.title_justify = "left"
        for column in groups.columns[1:]:
            column.justify = "right"
        for prefix, optimizer, rates in zip(prefixes_in(trainer), trainer.optimizers, self._used(trainer), strict=True):
            for index, (group, rate) in enumerate(zip(optimizer.param_groups, rates, strict=True)):
                groups.add_row(
                    f"{prefix}{group.get('name', index)}",
                    str(len(group["params"])),
                    f"{sum(p.numel() for p in group['params']):,}",
                    f"{rate:.3g}",
                    f"{float(group.get('initial_lr', group['lr'])):.3g}",
                    f"{group['weight_decay']:g}" if "weight_decay" in group else "-",
                )
        console.print(groups)
        for logger in tensorboard_loggers(trainer):
            # A plain print keeps the command in one line, so that it can be copied.
            print(f"See the run:  tensorboard --logdir {_relative(logger.save_dir)}")

    def _used(self, trainer: L.Trainer) -> list[list[float]]:
        """Return the learning rates of the groups of each optimizer in its last step; the present ones without any."""
        found = []
        for index, optimizer in enumerate(trainer.optimizers):
            now = [group["lr"] for group in optimizer.param_groups]
            known: Sequence[Any] = self._rates.get(index, ())
            if self._used_lrs:  # What was noted before the step may or may not be cut already.
                known = self._used_lrs[index]
            found.append([float(rate) for rate in (known if len(known) == len(now) else now)])
        return found

    def _labels(self, trainer: L.Trainer) -> Mapping[str, str]:
        if self.metrics is not None:
            return self.metrics
        return {name: name for name, value in trainer.callback_metrics.items() if isinstance(value, torch.Tensor)}


def _clipped(counts: StepCounts, clips: str = "") -> str:
    """Format how many steps were clipped.

    Args:
        counts: Counts of an optimizer, or of all of them.
        clips: What clips, if it is not us who count: "none" for nothing.
    """
    if clips == "none":
        return "no clipping"
    if clips:
        return f"not counted: {clips}"
    return f"{counts.clipped / counts.steps:.1%} of {counts.steps}" if counts.steps else "-"


def _relative(path: str) -> str:
    """Return the path relative to the current directory if it is inside, else the absolute path."""
    absolute = Path(path).resolve()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)
