"""What `DivergenceGuard` has for each optimizer: who watches it, who judges it, and its cut of the learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.callbacks._guard.step_batches import StepBatches
from lightning_optim.core.stats import StepRecord
from lightning_optim.divergence import Alarm, DivergenceJudge, LRCutter, ParameterHealth, StepGuard, StepLog
from lightning_optim.step.gradients import names_of


class GuardedOptimizer:
    """What belongs to one optimizer.

    Args:
        optimizer: The optimizer.
        watch: Looks at each step before the update.
        judge: Judges each step afterwards.
        health: Looks at single parameters, when Lightning logs.
        names: Names of parameters.
        places: Where each step was.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        watch: StepGuard,
        judge: DivergenceJudge,
        health: ParameterHealth,
        names: Mapping[Tensor, str],
        places: StepBatches,
    ) -> None:
        self.optimizer, self.watch, self.judge, self.health = optimizer, watch, judge, health
        self.places = places
        self.cut = LRCutter(optimizer)
        found = [name for group in optimizer.param_groups for name in names_of(group, names)]
        self.names = {place: name for place, name in enumerate(found) if name is not None}
        self._reports = StepLog()
        self._context: dict[int, tuple[Any, ...]] = {}

    def inspect(self, record: StepRecord) -> None:
        """Sends off what tells how each parameter is, and notes what the host knows of it."""
        names, without, place = [], [], 0
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                name = self.names.get(place, f"parameter {place}")
                place += 1
                if param.grad is not None:
                    names.append(name)
                elif not group.get("frozen_until"):
                    without.append(name)
        rates = [float(group["lr"]) if not isinstance(group["lr"], Tensor) else 1.0 for group in record.hyperparameters]
        groups = list(zip(record.group_names, rates, record.grad.group_sizes, strict=True))
        if len(names) != len(record.update.numel):  # flat shards, of which this rank may hold nothing
            return
        self._context[record.steps] = (names, record.update.numel, groups, without)
        self._reports.write(record.steps, record.per_tensor().reshape(-1))

    def inspected(self, everything: bool) -> list[Alarm]:
        """What has come of it, once it is known."""
        rows = self._reports.read(everything)
        alarms = []
        for row in rows:
            names, numel, groups, without = self._context.pop(row.step)
            numbers = row.values.tolist()
            alarms += self.health.update(row.step, numbers, names, numel, groups, without, self.watch.alive)
        return [self.judge.assess(alarm) for alarm in alarms]

    def rolled_back(self) -> None:
        """Forgets what was on its way and what belonged to weights that are gone."""
        self.discard_pending()
        self.judge.rolled_back()
        self.health.rolled_back()

    def discard_pending(self) -> None:
        """Of steps that do not count any more."""
        self.watch.discard()
        self._reports.discard()
        self._context.clear()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and tensors."""
        return {
            "watch": self.watch.state_dict(),
            "judge": self.judge.state_dict(),
            "cut": self.cut.state_dict(),
            "health": self.health.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there."""
        self.watch.load_state_dict(state["watch"])
        self.judge.load_state_dict(state["judge"])
        self.cut.load_state_dict(state["cut"])
        self.health.load_state_dict(state["health"])
        self.places.restart(self.watch.steps)
