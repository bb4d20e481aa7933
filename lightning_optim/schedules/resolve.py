"""Resolution of a configuration to a schedule: a name, a `Schedule`, a scheduler of torch, or a function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_optim.core.durations import Duration
from lightning_optim.core.imports import import_object
from lightning_optim.core.suggest import nearest
from lightning_optim.schedules.base import Schedule
from lightning_optim.schedules.function import FromFunction
from lightning_optim.schedules.hyperparameters import hyperparameter
from lightning_optim.schedules.phases import Warmup
from lightning_optim.schedules.plateau import ReduceOnPlateau
from lightning_optim.schedules.registry import get_schedule

MakeScheduler = Callable[[Optimizer], LRScheduler]
_FORMS = (
    "give a name such as 'cosine', a Schedule, a torch LRScheduler (a class_path with init_args, or a callable from "
    "the optimizer to one), or a function from the step to a multiplier"
)


def resolve_schedule(
    given: Any, warmup: int | str | Duration | Warmup | None, trial: Optimizer
) -> Schedule | MakeScheduler:
    """Resolve a configuration to a `Schedule`, or to a function that makes another library's scheduler.

    Args:
        given: A name, an import path, a `Schedule`, an ``LRScheduler`` class, a mapping with ``class_path`` and
            ``init_args``, a callable from the optimizer to an ``LRScheduler``, or one from the step to a multiplier.
        warmup: The warmup, if it is given separately; None otherwise.
        trial: An optimizer on which a callable is tried.

    Returns:
        The schedule, or a function from an optimizer to an ``LRScheduler``.

    Raises:
        TypeError: ``given`` is none of these.
        ValueError: A name is unknown, arguments do not fit, or the warmup is given twice.
    """
    kwargs: dict[str, Any] = {}
    if isinstance(given, Mapping):
        if unknown := sorted(set(given) - {"class_path", "init_args"}):
            raise ValueError(
                f"Invalid schedule={dict(given)!r}: must have the keys class_path and init_args, not {unknown[0]!r}."
            )
        if "class_path" not in given:
            raise ValueError(
                f"Invalid schedule={dict(given)!r}: must have a class_path, such as torch.optim.lr_scheduler.StepLR."
            )
        kwargs, given = dict(given.get("init_args") or {}), given["class_path"]
    if isinstance(given, str):
        given = import_object(given, "schedule", (Schedule, LRScheduler)) if "." in given else get_schedule(given)
    elif isinstance(given, type) and issubclass(given, Schedule):
        raise TypeError(f"Invalid schedule={given!r}: {_FORMS}. For the class, write {given.__name__}().")
    if isinstance(given, Schedule):
        if warmup is not None:
            raise ValueError(
                f"The warmup is given twice: warmup={warmup!r} and in schedule={given!r}. Give it in the schedule."
            )
        return given
    if isinstance(given, type) and issubclass(given, Schedule):
        if warmup is not None and "warmup" in kwargs:
            raise ValueError(f"The warmup is given twice: warmup={warmup!r} and in schedule={given.__name__}.")
        _check_arguments(given, kwargs)
        return given(**kwargs) if warmup is None else given(**kwargs, warmup=warmup)
    if not callable(given) or (isinstance(given, type) and not issubclass(given, LRScheduler)):
        raise TypeError(f"Invalid schedule={given!r}: {_FORMS}.")
    return _from_callable(given, kwargs, warmup, trial)


def resolve_hyperparameter_schedules(
    schedule: Schedule | MakeScheduler,
    others: Mapping[str, str | Schedule],
    groups: Mapping[str, Schedule],
    trial: Optimizer,
) -> dict[str, Schedule]:
    """Resolve the schedules of other hyperparameters than the learning rate, and check these and those of groups.

    Args:
        schedule: Schedule of the learning rate of all groups.
        others: Schedules of other hyperparameters, by name.
        groups: Schedules of the learning rate of individual groups, by group.
        trial: An optimizer of the configured kind.

    Returns:
        The schedules of ``others``, by name.

    Raises:
        ValueError: A hyperparameter is unknown, schedules are combined with another library's scheduler, or a learning
            rate ends above its peak.
        TypeError: A value is not a `Schedule` or the name of one.
    """
    for name in others:
        hyperparameter(name, trial.defaults, type(trial).__name__)
    resolved = {name: get_schedule(given)() if isinstance(given, str) else given for name, given in others.items()}
    for name, given in {**resolved, **groups}.items():
        if not isinstance(given, Schedule) or isinstance(given, ReduceOnPlateau):
            raise TypeError(
                f"Invalid schedule={given!r} of {name}: must be a name such as 'cosine' or a Schedule; only the "
                "schedule of all learning rates can depend on a metric."
            )
    for name, given in resolved.items():
        given.check_no_rate(name)
    if (resolved or groups) and not isinstance(schedule, Schedule):
        raise ValueError(
            f"The schedules of {', '.join([*resolved, *groups])} require that the schedule of the learning rate is one "
            "of lightning_optim as well, but it is another library's."
        )
    for of_rate in (schedule, *groups.values()):
        if (final := getattr(of_rate, "final", 0.0)) > 1:
            raise ValueError(
                f"Invalid final={final!r} of schedule={of_rate!r}: must be in [0, 1] for a learning rate. Only other "
                "hyperparameters, such as weight decay, may rise."
            )
    return resolved


def _from_callable(
    given: Any, kwargs: dict[str, Any], warmup: int | str | Duration | Warmup | None, trial: Optimizer
) -> Schedule | MakeScheduler:
    label = getattr(given, "__name__", repr(given))
    if isinstance(given, type) and issubclass(given, LRScheduler):
        _check_arguments(given, kwargs, skip="optimizer")
    make = partial(given, **kwargs) if kwargs else given
    if _is_function_of_the_step(make):
        return FromFunction(make, warmup=0 if warmup is None else warmup)
    scheduler = make(trial)
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(f"Invalid schedule: {label} returned {scheduler!r}; {_FORMS}.")
    if isinstance(scheduler, ReduceLROnPlateau) and not hasattr(scheduler, "monitor"):
        raise ValueError(
            f"{label} does not specify its metric. Use lightning_optim.schedules.ReduceOnPlateau, or "
            "lightning.pytorch.cli.ReduceLROnPlateau, which have `monitor`."
        )
    if warmup is not None:
        raise ValueError(
            f"warmup={warmup!r} cannot be combined with {label}. Use a schedule of lightning_optim, or torch's "
            "SequentialLR."
        )
    return make


def _is_function_of_the_step(given: Any) -> bool:
    if isinstance(given, type) and issubclass(given, LRScheduler):
        return False
    try:
        return isinstance(given(0), int | float)
    except Exception:  # It takes an optimizer, or is invalid, which `given(trial)` detects.
        return False


def _check_arguments(cls: type, kwargs: Mapping[str, Any], skip: str = "") -> None:
    options = [name for name in inspect.signature(cls).parameters if name != skip]
    for key in kwargs:
        if key not in options:
            raise ValueError(f"{cls.__name__} has no option {key!r}. {nearest(key, options)}")
