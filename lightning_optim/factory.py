"""From a model and a configuration to parameter groups, an optimizer and a scheduler."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_optim import optim
from lightning_optim.durations import Horizon
from lightning_optim.messages import nearest
from lightning_optim.param_groups import ParamGroupRule, build_param_groups, check_rules
from lightning_optim.schedules import Schedule, Scheduler, Warmup, get_schedule
from lightning_optim.training_length import horizon_of

__all__ = ["OptimizerFactory"]


class OptimizerFactory:
    r"""Makes the optimizer of a model: groups by rules, fused where it can be, and a schedule per optimizer step.

    Args:
        optimizer: Which optimizer: a name (`lightning_optim.optim.list_optimizers`), an import path, a class, a mapping
            with ``class_path`` and ``init_args`` as in YAML, or any callable from parameter groups to an optimizer.
        lr: Peak learning rate of the groups without a multiplier, above 0. None for the optimizer's default. Not with a
            callable or ``init_args``, which bring their own.
        weight_decay: Weight decay of the groups without their own, at least 0. None for the optimizer's default.
        optimizer_kwargs: Further arguments of the optimizer, for instance ``{"betas": (0.9, 0.95)}``.
        schedule: A name (`lightning_optim.schedules.list_schedules`) or a `Schedule`. None keeps the rate constant,
            after the warmup if there is one.
        warmup: Length of the warmup for a schedule given by name: ``500``, ``"500 steps"``, ``"2 epochs"``, ``"5%"``;
            or a `Warmup`, which has a shape and a start, too.
        param_groups: Rules and presets, the first match wins. None means the preset ``no_decay``: no weight decay on
            biases, norms and embeddings, which is nearly always what is wanted. An empty list means one group.

    Raises:
        ValueError: Anything unknown, out of range or given twice; the message says what is near.

    Example:
        In a module, ``return OptimizerFactory("adamw", lr=3e-4, schedule="cosine", warmup="5%")(self)`` in
        ``configure_optimizers``. In a plain loop:

        >>> factory = OptimizerFactory("sgd", lr=0.1, schedule="cosine", warmup=10)
        >>> optimizer, scheduler = factory.build(nn.Linear(2, 2), Horizon(total_steps=100))
        >>> [(group["name"], round(group["lr"], 3)) for group in optimizer.param_groups]
        [('no_decay', 0.01), ('default', 0.01)]
    """

    def __init__(
        self,
        optimizer: str | Callable[[Iterable[Any]], Optimizer] | Mapping[str, Any] = "adamw",
        lr: float | None = None,
        weight_decay: float | None = None,
        optimizer_kwargs: dict[str, Any] | None = None,
        schedule: str | Schedule | None = None,
        warmup: int | str | Warmup | None = None,
        param_groups: Sequence[ParamGroupRule | str] | None = None,
    ) -> None:
        given = {"lr": lr, "weight_decay": weight_decay}
        self._kwargs = _merge(optimizer_kwargs or {}, {key: value for key, value in given.items() if value is not None})
        self._make, self._class = _resolve_optimizer(optimizer, self._kwargs)
        self._schedule = _resolve_schedule(schedule, warmup)
        self._rules: Sequence[ParamGroupRule | str] = ("no_decay",) if param_groups is None else param_groups
        check_rules(self._rules)

    def build(self, model: nn.Module, horizon: Horizon | None = None) -> tuple[Optimizer, Scheduler]:
        """Makes the optimizer and its scheduler, in a plain loop or wherever the length of the run is known.

        Args:
            model: The model to optimize.
            horizon: Length of the run; None if `Scheduler.resolve` will be told before the first step.

        Raises:
            ValueError: The rules do not fit the model, or the schedule the length of the run.
        """
        # Muon, for one, treats parts of a group differently, and sees which from the modules.
        groups_of = getattr(self._class, "groups_of", build_param_groups)
        groups = groups_of(model, self._rules)
        optimizer = self._make(groups)
        self._check_groups(optimizer, groups)
        for group in optimizer.param_groups:
            for key in {"lr", "peak_lr"} & group.keys():
                group[key] = group[key] * group["lr_multiplier"]
        return optimizer, Scheduler(optimizer, self._schedule, horizon)

    def __call__(self, module: Any) -> dict[str, Any]:
        """What Lightning wants from ``configure_optimizers``; the length of the run is asked of the Trainer later.

        Args:
            module: The LightningModule.
        """
        optimizer, scheduler = self.build(module)

        def resolve(*_: Any) -> None:
            if scheduler.horizon is None:
                scheduler.resolve(horizon_of(module.trainer, fresh=scheduler.is_fresh))

        # Without a callback of ours on the Trainer, the first step is the first to come by after the data are set up.
        optimizer.register_step_pre_hook(resolve)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def __repr__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self._kwargs.items())
        return f"{type(self).__name__}({self._class.__name__}({options}), {self._schedule!r})"

    def _check_groups(self, optimizer: Optimizer, groups: list[dict[str, Any]]) -> None:
        label = self._class.__name__
        for group in groups:
            if group.get("weight_decay") and "weight_decay" not in optimizer.defaults:
                raise ValueError(
                    f"Parameter group {group['name']!r} sets weight_decay={group['weight_decay']}, but {label} "
                    f"has no such option. It has: {', '.join(sorted(optimizer.defaults))}."
                )


_Make = Callable[[Iterable[Any]], Optimizer]


def _resolve_optimizer(given: Any, kwargs: dict[str, Any]) -> tuple[_Make, type[Optimizer]]:
    """A function from parameter groups to an optimizer, and the optimizer's class; tried out on a parameter of one."""
    if isinstance(given, Mapping):
        if unknown := sorted(set(given) - {"class_path", "init_args"}):
            raise ValueError(
                f"Unknown key {unknown[0]!r} in optimizer={dict(given)!r}: it takes class_path and init_args."
            )
        if "class_path" not in given:
            raise ValueError(f"optimizer={dict(given)!r} has no class_path, for instance torch.optim.AdamW.")
        kwargs = _merge(given.get("init_args") or {}, kwargs)
        given = given["class_path"]
    if isinstance(given, str):
        given = _import(given) if "." in given else optim.get_optimizer_class(given)
    if isinstance(given, type):
        if not issubclass(given, Optimizer):
            raise TypeError(f"Invalid optimizer={given!r}: the class is no torch.optim.Optimizer.")
        _check_kwargs(given, kwargs)
        make, label = _FusedIfPossible(partial(given, **kwargs)), given.__name__
    elif callable(given):
        if kwargs:
            raise ValueError(
                f"{', '.join(sorted(kwargs))} cannot be passed on to the optimizer callable {given!r}. Set it there, "
                "or give the optimizer as a name or a class."
            )
        # LightningCLI makes a partial of `class_path` and `init_args`.
        make = _FusedIfPossible(given) if isinstance(given, partial) else given
        label = getattr(given, "__name__", repr(given))
    else:
        raise TypeError(
            f"Invalid optimizer={given!r}: give a name such as 'adamw', a subclass of torch.optim.Optimizer, an import "
            "path, or a callable from parameter groups to an optimizer."
        )
    trial = make([{"params": [nn.Parameter(torch.zeros(1, 1))]}])  # refuses bad values now, not in the middle of fit
    if not isinstance(trial, Optimizer):
        raise TypeError(f"The optimizer callable {label} returned {trial!r}, which is no torch.optim.Optimizer.")
    if "lr" in trial.defaults:
        _check_number(type(trial).__name__, "lr", trial.defaults["lr"], above_zero=True)
    return make, type(trial)


_FUSED_DEVICES = ("cpu", "cuda")
"""Where torch has fused kernels worth having; torch checks this only in the first step."""


class _FusedIfPossible:
    """Makes the optimizer in its fused form where torch has one for these parameters, unless told otherwise."""

    def __init__(self, make: partial[Optimizer]) -> None:
        self._make = make
        options = inspect.signature(make.func).parameters.keys() | make.keywords.keys()
        forms = ("fused", "foreach", "capturable", "differentiable")
        undecided = make.keywords.get("fused") is None and not any(make.keywords.get(form) for form in forms)
        self._try_fused = "fused" in options and undecided

    def __call__(self, groups: Iterable[Any]) -> Optimizer:
        groups = list(groups)
        params = [param[-1] if isinstance(param, tuple) else param for group in groups for param in group["params"]]
        if self._try_fused and all(p.is_floating_point() and p.device.type in _FUSED_DEVICES for p in params):
            try:
                return self._make([{**group} for group in groups], fused=True)
            except RuntimeError:  # not for this optimizer
                pass
        return self._make(groups)


def _merge(given: Mapping[str, Any], beside: Mapping[str, Any]) -> dict[str, Any]:
    if twice := sorted(given.keys() & beside.keys()):
        raise ValueError(f"{twice[0]!r} is given twice: in the optimizer's own arguments and beside them.")
    return {**given, **beside}


def _check_kwargs(cls: type[Optimizer], kwargs: Mapping[str, Any]) -> None:
    parameters = inspect.signature(cls).parameters
    # A class that takes anything says itself what it cannot use.
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    options = [name for name in parameters if name not in ("self", "params")]
    for key, value in kwargs.items():
        if key not in options and not takes_all:
            raise ValueError(f"{cls.__name__} has no option {key!r}. {nearest(key, options)}")
        if key in ("lr", "weight_decay"):
            _check_number(cls.__name__, key, value, above_zero=key == "lr")


def _check_number(label: str, key: str, value: Any, above_zero: bool) -> None:
    needed = f"finite and {'above' if above_zero else 'at least'} 0"
    try:
        good = math.isfinite(value) and (value > 0 or (value == 0 and not above_zero))
    except TypeError:
        raise TypeError(f"Invalid {key}={value!r} of {label}: it must be a number, {needed}.") from None
    if not good:
        raise ValueError(f"Invalid {key}={float(value)!r} of {label}: it must be {needed}.")


def _import(path: str) -> Any:
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"Cannot import the optimizer {path!r}: {error}.") from error
    if not hasattr(module, name):
        options = [
            key for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, Optimizer)
        ]
        raise ValueError(f"{module_name} has no {name!r}. {nearest(name, options)}")
    return getattr(module, name)


def _resolve_schedule(schedule: str | Schedule | None, warmup: int | str | Warmup | None) -> Schedule:
    if isinstance(schedule, Schedule):
        if warmup is not None:
            raise ValueError(
                f"The warmup is given twice: warmup={warmup!r} and in schedule={schedule!r}. Give it in the schedule."
            )
        if (final := getattr(schedule, "final", 0.0)) > 1:
            raise ValueError(
                f"schedule={schedule!r} ends above the peak learning rate: final={final!r} must lie in [0, 1]. Only "
                "other hyperparameters, such as weight decay, may rise."
            )
        return schedule
    if schedule is not None and not isinstance(schedule, str):
        raise TypeError(f"Invalid schedule={schedule!r}: give a name such as 'cosine' or a Schedule.")
    return get_schedule(schedule or "constant")(warmup=0 if warmup is None else warmup)
