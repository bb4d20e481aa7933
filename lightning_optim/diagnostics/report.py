"""The report of a step: the values of its record by tag, in one packed transfer to the host."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_optim.core.stats import StepCounts, StepRecord
from lightning_optim.core.transfer import PendingValues
from lightning_optim.diagnostics.base import Diagnostic

_HYPERPARAMETERS = ("lr", "weight_decay")
_START = StepCounts()
_INTERNAL = ("clipped", "skipped", "first_nonfinite", "steps_measured")


class StepReport:
    """The diagnostics of one step in transfer to the host, in one packed tensor.

    Args:
        record: The record of the step.
        diagnostics: The diagnostics to compute.
        since: The report before this one, or the counts at the start; rates are over the steps since then.
        at: Position of the step on the loggers' axis.
    """

    def __init__(
        self,
        record: StepRecord,
        diagnostics: Sequence[Diagnostic],
        since: StepReport | StepCounts = _START,
        at: int = 0,
    ) -> None:
        self.at = at
        self.steps = record.steps
        self.clipped = 0
        self.culprit: str | None = None
        """Name of the first gradient with a NaN or an infinity, available after `read`."""
        self.of_run: set[str] = set()
        """Tags of values that belong to the run rather than to this optimizer."""
        self.tables: dict[str, np.ndarray] = {}
        """The tables of `add_table` by name, available after `read`."""
        self._since: StepReport | StepCounts = since
        self.group_names = record.group_names
        self._param_names = record.param_names
        self._numel = record.update.numel
        self._group_sizes = record.update.group_sizes
        self._known: dict[str, float] = {}
        self._tags: list[str] = []
        self._columns: list[Tensor] = []
        self._tables: dict[str, Tensor] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._shows_nan: set[str] = set()
        self._pending: PendingValues | None = None
        finite = record.grad.norm_sq.isfinite()
        self.add(("clipped", "skipped"), record.counts)
        self.add(("first_nonfinite",), (~finite).to(torch.uint8).argmax().reshape(1))
        for diagnostic in diagnostics:
            tags = diagnostic.tags(record)
            self.add(tags, diagnostic.compute(record), shows_nan=diagnostic.shows_nan)
        if record.norms is not None:
            self.add(("steps_measured", "optim_grad_norm/interval_mean", "optim_grad_norm/interval_max"), record.norms)
        for name, group in zip(record.group_names, record.hyperparameters, strict=True):
            for key in _HYPERPARAMETERS:
                if isinstance(value := group.get(key), Tensor):
                    self.add((f"optim_{key}/{name}",), value.detach().reshape(1))
                elif value is not None:
                    self._known[f"optim_{key}/{name}"] = float(value)

    def add(
        self, tags: Sequence[str], values: Tensor | Sequence[float], shows_nan: bool = False, of_run: bool = False
    ) -> None:
        """Add values to the report, before it is sent.

        Args:
            tags: Tag of each value.
            values: One for each tag: a tensor on the device, shape [tags], or numbers that the host knows.
            shows_nan: Whether a NaN among the values is logged.
            of_run: Whether the values belong to the run rather than to this optimizer.
        """
        if of_run:
            self.of_run |= set(tags)
        if isinstance(values, Tensor):
            device = self._columns[0].device if self._columns else values.device
            self._tags += tags
            self._columns.append(values.detach().to(device, torch.float64, non_blocking=True))
        else:
            self._known |= dict(zip(tags, values, strict=True))
        if shows_nan:
            self._shows_nan |= set(tags)

    def add_table(self, name: str, values: Tensor) -> None:
        """Add a table of values, which is transferred with the others but not logged as scalars.

        Args:
            name: Name of the table.
            values: A tensor on the device, any shape.
        """
        self._tables[name] = values.detach()

    def send(self) -> StepReport:
        """Start the transfer, and return the report itself."""
        device = self._columns[0].device
        tables = [t.to(device, torch.float64, non_blocking=True).reshape(-1) for t in self._tables.values()]
        self._pending = PendingValues(torch.cat([*self._columns, *tables]))
        self._shapes = {name: table.shape for name, table in self._tables.items()}
        self._columns, self._tables = [], {}
        return self

    @property
    def tensors(self) -> tuple[list[str], list[str], Sequence[int]]:
        """Names, groups and numbers of elements of the tensors, three sequences of length [tensors]."""
        groups = [group for group, size in zip(self.group_names, self._group_sizes, strict=True) for _ in range(size)]
        names = self._param_names or [None] * len(groups)
        pairs = enumerate(zip(names, groups, strict=True))
        return [name or f"{group}: {place}" for place, (name, group) in pairs], groups, self._numel

    @property
    def sent(self) -> bool:
        """Whether the transfer has started."""
        return self._pending is not None

    def ready(self) -> bool:
        """Return whether `read` would return without waiting."""
        return self._pending is not None and self._pending.ready()

    def read(self) -> dict[str, float]:
        """Return every value by its tag, waiting for the transfer.

        Reports must be read in order, because rates are differences between them.
        """
        if self._pending is None:
            self.send()
        assert self._pending is not None
        packed = self._pending.read()
        values: dict[str, float] = dict(zip(self._tags, packed.tolist(), strict=False))
        rest = packed[len(self._tags) :]
        for name, shape in self._shapes.items():
            self.tables[name], rest = rest[: shape.numel()].reshape(shape), rest[shape.numel() :]
        internal = {tag: values.pop(tag) for tag in _INTERNAL if tag in values}
        self.clipped = int(internal["clipped"])
        clip_rate = (self.clipped - self._since.clipped) / (self.steps - self._since.steps)
        self._since = _START  # A chain of reports would keep those of the whole run alive.
        if values.get("optim_health/nonfinite_gradients", 0) > 0 and self._param_names:
            self.culprit = self._param_names[int(internal["first_nonfinite"])]
        values = {**self._known, **values}
        values = {tag: v for tag, v in values.items() if not math.isnan(v) or tag in self._shows_nan}
        return {**values, "optim_health/clip_rate": clip_rate, "optim_health/skipped_steps": internal["skipped"]}
