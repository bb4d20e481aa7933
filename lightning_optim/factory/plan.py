"""The plan of a run: its parameter groups, its schedule and its length."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_optim.core.durations import Horizon
from lightning_optim.factory.state_sizes import state_size
from lightning_optim.optim.base import FusedOptimizer
from lightning_optim.optim.shared_options import defaults_of
from lightning_optim.schedules import Schedule, Scheduler

_LONGEST_REPLAY = 200_000
"""Steps that take a second or so."""


@dataclass(frozen=True)
class GroupPlan:
    """A parameter group before training.

    Args:
        name: Its name, or its number.
        parameters: Name and shape of each tensor.
        numel: Numbers in all of them.
        lr: Peak learning rate.
        weight_decay: None if the optimizer has none.
        rule: Name of the optimizer whose update it uses.
        state_bytes: What the optimizer will keep for it, in bytes; None if shapes do not tell before it steps.
        frozen_until: As the rule has it; None if it is trained from the start.
        betas: Its betas, or its momentum; None if its rule has neither.
        schedule: The schedule of its own; None for that of all groups.
        not_hidden: By name, the kind of each parameter that an optimizer of hidden matrices leaves to AdamW.
        decay_kind: Kind of its weight decay, if that is not the usual one of the optimizer.
        forms: By name, the matrices that its rule takes each parameter to be; empty for a rule of single elements.
    """

    name: str
    parameters: tuple[tuple[str, tuple[int, ...]], ...]
    numel: int
    lr: float
    weight_decay: float | None
    rule: str
    state_bytes: int | None
    frozen_until: str | None
    betas: tuple[float, ...] | None = None
    schedule: str | None = None
    not_hidden: Mapping[str, str] = field(default_factory=dict)
    decay_kind: str | None = None
    forms: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Curve:
    """A hyperparameter over the run.

    Args:
        label: What it is, and whose.
        values: Its value for the update that follows ``step`` updates.
    """

    label: str
    values: Callable[[int], float]


@dataclass
class Plan:
    """Everything that is known about a run before it starts.

    Args:
        horizon: Its length.
        facts: What it is set to, by label: batch, optimizer, schedule, clipping, guard, snapshots.
        groups: All parameter groups, of each optimizer.
        curves: What its schedules do.
        conflicts: What prevents it, a sentence each; it can run if there is none.
        notes: What is worth knowing.
    """

    horizon: Horizon = field(default_factory=Horizon)
    facts: dict[str, str] = field(default_factory=dict)
    groups: list[GroupPlan] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def plan_groups(optimizer: Optimizer) -> list[GroupPlan]:
    """Describe the groups of an optimizer.

    Args:
        optimizer: The optimizer; it is not touched, and no other one is made of its class.

    Example:
        >>> from torch import nn
        >>> from lightning_optim import OptimizerFactory
        >>> optimizer, _ = OptimizerFactory("adamw", lr=1e-3).build(nn.Linear(3, 2))
        >>> [(group.name, group.numel, group.state_bytes) for group in plan_groups(optimizer)]
        [('no_decay', 2, 20), ('default', 6, 52)]
    """
    plans = []
    for index, group in enumerate(optimizer.param_groups):
        names = group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))]
        sizes = [state_size(optimizer, group, param) for param in group["params"]]
        known = [size for size in sizes if size is not None]
        decay = group.get("weight_decay")
        plans.append(
            GroupPlan(
                name=str(group.get("name", index)),
                parameters=tuple((n, _shape(p)) for n, p in zip(names, group["params"], strict=True)),
                numel=sum(map(_numel, group["params"])),
                lr=float(group.get("initial_lr", group["lr"])),
                weight_decay=None if decay is None else float(decay),
                rule=str(group.get("rule") or type(optimizer).__name__.lower()),
                state_bytes=sum(known) if len(known) == len(sizes) else None,
                frozen_until=group.get("frozen_until"),
                betas=_betas(group),
                schedule=None if group.get("schedule") is None else str(group["schedule"]),
                not_hidden=dict(group.get("not_hidden", {})),
                decay_kind=_decay_kind(optimizer, group),
                forms=dict(_forms(optimizer, group, names)),
            )
        )
    return plans


def _decay_kind(optimizer: Optimizer, group: Mapping[str, Any]) -> str | None:
    """Return the kind of weight decay of a group that decays; None if it is the usual one of the optimizer."""
    kind = group.get("weight_decay_kind")
    usual = defaults_of(type(optimizer)) if isinstance(optimizer, FusedOptimizer) else {}
    if kind is None or not group.get("weight_decay") or kind == usual.get("weight_decay_kind"):
        return None
    return str(getattr(kind, "value", kind))


def plan_curves(scheduler: Scheduler) -> list[Curve]:
    """Compute the curves of a scheduler: largest group, groups with their own schedule, other hyperparameters.

    Args:
        scheduler: Its horizon is that of the curves; an unknown one is unbounded.

    Raises:
        ValueError: A schedule does not fit the horizon.
    """
    horizon = scheduler.horizon or Horizon()
    groups = scheduler.optimizer.param_groups

    def curve(label: str, base: float, schedule: Schedule) -> Curve:
        multiplier = schedule.for_peak(base).over(horizon)
        return Curve(label, lambda step: base * multiplier(step))

    own = scheduler.group_schedules
    shared = [group for group in groups if group.get("name") not in own]
    curves = []
    if shared:
        largest = max(shared, key=lambda group: sum(map(_numel, group["params"])))
        label = f"lr of group {largest['name']!r}" if "name" in largest else "lr"
        curves.append(curve(label, float(largest["initial_lr"]), scheduler.schedule))
    for group in groups:
        if (schedule := own.get(group.get("name", ""))) is not None:
            curves.append(curve(f"lr of group {group['name']!r}", float(group["initial_lr"]), schedule))
    for hyperparameter, schedule in scheduler.others.items():
        base = max(float(hyperparameter.base(group)) for group in groups)
        curves.append(curve(hyperparameter.name, base, schedule))
    return curves


def replay(scheduler: LRScheduler, horizon: Horizon, per_epoch: bool = False) -> Curve:
    """Compute the curve of a torch scheduler for the largest group by stepping it to its end.

    Args:
        scheduler: One that depends on the step alone; it cannot be used afterwards.
        horizon: Length of the run.
        per_epoch: Whether it moves at the end of each epoch, not after each step.

    Raises:
        ValueError: The run has no end, is too long to be run through, or its epochs have no length; or the scheduler
            refuses to go so far.
    """
    total, length = horizon.total_steps, 1.0
    if per_epoch:
        if horizon.steps_per_epoch is None:
            raise ValueError("the length of an epoch is not known")
        length = horizon.steps_per_epoch
    if total is None or total / length > _LONGEST_REPLAY:
        raise ValueError("the run has no end" if total is None else f"the run has {total:,} steps")
    groups = scheduler.optimizer.param_groups
    index = max(range(len(groups)), key=lambda i: sum(map(_numel, groups[i]["params"])))
    rates = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*lr_scheduler\.step\(\)")  # no optimizer step came before
        for _ in range(math.ceil(total / length)):
            rates.append(float(groups[index]["lr"]))
            if len(rates) < total / length:
                scheduler.step()
    label = f"lr of group {groups[index].get('name', index)!r} ({type(scheduler).__name__})"
    return Curve(label, lambda step: rates[min(int(step / length), len(rates) - 1)])


def _betas(group: Mapping[str, Any]) -> tuple[float, ...] | None:
    """The averages' decay rates of a group."""
    betas = group.get("betas", group.get("momentum"))
    if betas is None or isinstance(betas, Tensor):
        return None
    return tuple(float(beta) for beta in betas) if isinstance(betas, tuple | list) else (float(betas),)


def _forms(optimizer: Optimizer, group: Mapping[str, Any], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield name and form of each parameter of a group whose rule updates matrices."""
    if not isinstance(optimizer, FusedOptimizer):
        return
    rule = optimizer.rule_of(group)
    for name, param in zip(names, group["params"], strict=True):
        if not isinstance(param, UninitializedParameter) and (form := rule.form(param, group)) is not None:
            yield name, form


def _shape(param: Tensor) -> tuple[int, ...]:
    """The shape; () as long as a lazy layer has none."""
    return () if isinstance(param, UninitializedParameter) else tuple(param.shape)


def _numel(param: Tensor) -> int:
    return 0 if isinstance(param, UninitializedParameter) else param.numel()
