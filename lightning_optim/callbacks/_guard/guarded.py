"""What `DivergenceGuard` keeps for each optimizer: its step guard, its judge, and its cut of the learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_optim.callbacks._guard.step_batches import StepBatches
from lightning_optim.core.stateful import Stateful
from lightning_optim.core.stats import StepRecord
from lightning_optim.divergence import Alarm, DivergenceJudge, LRCutter, ParameterHealth, StepGuard, StepLog
from lightning_optim.step import StepPipeline
from lightning_optim.step.gradients import names_of


class GuardedOptimizer(Stateful):
    """The guard's parts of one optimizer.

    Args:
        pipeline: The pipeline of the optimizer.
        watch: Inspects each step before its update.
        judge: Judges each step afterwards.
        health: Inspects single parameters, when Lightning logs.
        names: Names of parameters.
        batches: Which batches made up each step.
    """

    PARTS = ("watch", "judge", "cut", "health")

    def __init__(
        self,
        pipeline: StepPipeline,
        watch: StepGuard,
        judge: DivergenceJudge,
        health: ParameterHealth,
        names: Mapping[Tensor, str],
        batches: StepBatches,
    ) -> None:
        self.pipeline, self.optimizer = pipeline, (optimizer := pipeline.optimizer)
        self.watch, self.judge, self.health = watch, judge, health
        self.batches = batches
        self.cut = LRCutter(optimizer)
        found = [name for group in optimizer.param_groups for name in names_of(group, names)]
        self.names = {place: name for place, name in enumerate(found) if name is not None}
        self._log = StepLog()
        self._context: dict[int, tuple[Any, ...]] = {}

    def inspect(self, record: StepRecord) -> None:
        """Send the statistics of each tensor to the host, without waiting for them."""
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
        if len(names) != len(record.update.numel):  # This rank may hold nothing of a flat shard.
            return
        self._context[record.steps] = (names, record.update.numel, groups, without)
        self._log.write(record.steps, record.per_tensor().reshape(-1))

    def health_alarms(self, everything: bool) -> list[Alarm]:
        """Return the alarms of the inspections that have arrived.

        Args:
            everything: Whether to wait for those that have not.
        """
        if not self._context:
            return []
        alarms = []
        for row in self._log.read(everything):
            names, numel, groups, without = self._context.pop(row.step)
            numbers = row.values.tolist()
            alarms += self.health.update(row.step, numbers, names, numel, groups, without, self.watch.alive)
        return [self.judge.assess(alarm) for alarm in alarms]

    def rolled_back(self) -> None:
        """Forget what belongs to weights that are gone."""
        self.discard_pending()
        self.judge.rolled_back()
        self.health.rolled_back()

    def discard_pending(self) -> None:
        """Forget steps that have not arrived: they do not count any more."""
        self.watch.discard()
        self._log.discard()
        self._context.clear()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        super().load_state_dict(state)
        self.batches.restart(self.watch.steps)
