"""What `DivergenceGuard` keeps for each optimizer: its step guard, its judge, and its cut of the learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from lightning_optim.callbacks._guard.model_parameters import ModelParameters
from lightning_optim.callbacks._guard.step_batches import StepBatches
from lightning_optim.core.stateful import Stateful
from lightning_optim.core.stats import StepRecord
from lightning_optim.divergence import (
    Alarm,
    DivergenceJudge,
    HealthLimits,
    Inspection,
    LRCutter,
    ParameterHealth,
    StepGuard,
    StepLog,
)
from lightning_optim.step import StepPipeline
from lightning_optim.step.gradients import names_of

_HALF = (torch.bfloat16, torch.float16)


_OF_THE_RATE = ("lr_too_high", "lr_too_low")
"""Advice that assumes a loss that is expected to fall."""


class GuardedOptimizer(Stateful):
    """The guard's parts of one optimizer.

    Args:
        pipeline: The pipeline of the optimizer.
        watch: Inspects each step before its update.
        judge: Judges each step afterwards.
        limits: Limits of the inspection of single parameters, when Lightning logs; None for the defaults.
        model: The parameters of the module.
        batches: Which batches made up each step.
    """

    PARTS = ("watch", "judge", "cut", "health")

    def __init__(
        self,
        pipeline: StepPipeline,
        watch: StepGuard,
        judge: DivergenceJudge,
        limits: HealthLimits | None,
        model: ModelParameters,
        batches: StepBatches,
    ) -> None:
        self.pipeline, self.optimizer = pipeline, (optimizer := pipeline.optimizer)
        self.watch, self.judge = watch, judge
        self.health = ParameterHealth(limits, history=watch.history)
        self.batches = batches
        self.cut = LRCutter(optimizer)
        self._model = model
        self._count = -1
        self._name()
        self._log = StepLog()
        self._inspections: dict[int, Inspection] = {}

    def _name(self) -> None:
        """Name the parameters, and again if groups have been added."""
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        if len(params) == self._count:
            return
        self._count = len(params)
        found = [name for group in self.optimizer.param_groups for name in names_of(group, self._model.names)]
        self.names = {place: name for place, name in enumerate(found) if name is not None}
        if any(isinstance(param, UninitializedParameter) for param in params):
            self._count = -1  # Those of lazy layers have no shape before the first batch.
        else:
            self.health.parameters = self._model.map_of(params, self.names)

    def inspect(self, record: StepRecord) -> None:
        """Send the statistics of each tensor to the host, without waiting for them."""
        self._name()
        names: list[str] = []
        without: list[tuple[int, str]] = []
        places, frozen, lossy, kept, place = [], [], [], [], -1
        for group in self.optimizer.param_groups:
            keeps = group.get("kahan_sum") or group.get("stochastic_rounding")
            for param in group["params"]:
                place += 1
                name = self.names.get(place, f"parameter {place}")
                if param.grad is not None:
                    is_half = param.dtype in _HALF
                    kept += [len(names)] if is_half and keeps else []
                    lossy.append(torch.finfo(param.dtype).eps if is_half and not keeps else 0.0)
                    names.append(name)
                    places.append(place)
                elif not (group.get("frozen_until") or self._model.is_frozen_on_purpose(param)):
                    without.append((place, name))
                    frozen += [] if param.requires_grad else [place]
        rates = [float(group["lr"]) if not isinstance(group["lr"], Tensor) else 1.0 for group in record.hyperparameters]
        groups = list(zip(record.group_names, rates, record.grad.group_sizes, strict=True))
        if len(names) != len(record.update.numel):  # This rank may hold nothing of a flat shard.
            return
        seen = Inspection(
            record.steps, (), names, record.update.numel, groups, places, without, frozen, lossy, frozenset(kept)
        )
        self._inspections[record.steps] = seen
        rows = record.per_tensor().reshape(-1)
        self._log.write(record.steps, torch.cat([rows, record.counts[:1].to(rows, non_blocking=True)]))

    def health_alarms(self, everything: bool) -> list[Alarm]:
        """Return the alarms of the inspections that have arrived.

        Args:
            everything: Whether to wait for those that have not.
        """
        if not self._inspections:
            return []
        alarms = []
        for row in self._log.read(everything):
            *values, clipped = row.values.tolist()
            seen = replace(self._inspections.pop(row.step), values=values, clipped=int(clipped))
            alarms += self.health.update(seen)
        # Adversaries follow each other around, so that oscillation and lasting directions say nothing about the rate.
        is_judged = self.judge.judge_loss is not False
        return [self.judge.assess(alarm) for alarm in alarms if is_judged or alarm.kind not in _OF_THE_RATE]

    def rolled_back(self) -> None:
        """Forget what belongs to weights that are gone."""
        self.discard_pending()
        self.judge.rolled_back()
        self.health.rolled_back()

    def discard_pending(self) -> None:
        """Forget steps that have not arrived: they do not count any more."""
        self.watch.discard()
        self._log.discard()
        self._inspections.clear()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        super().load_state_dict(state)
        self.batches.restart(self.watch.steps)

    def restore(self, state: Mapping[str, Any], names: Sequence[str | None]) -> None:
        """Restore the state of a checkpoint, in which the optimizer may have had its parameters in another order.

        Args:
            state: As `state_dict` returns it.
            names: Their names in the order they had; empty if they are not known.
        """
        self.load_state_dict(state)
        now = {name: place for place, name in self.names.items()}
        moved = tuple(-1 if name is None else now.get(name, -1) for name in names)
        if moved != tuple(range(len(moved))):
            self.watch.move(moved)
