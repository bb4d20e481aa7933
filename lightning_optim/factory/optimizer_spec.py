"""Specification of an optimizer: a name, a class, an import path or a callable, tried out before there is a model."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_optim import optim
from lightning_optim.core.group_keys import RESERVED
from lightning_optim.core.imports import import_object
from lightning_optim.core.ranges import ranges_of
from lightning_optim.core.suggest import nearest
from lightning_optim.factory.sparse_gradients import UnfuseIfSparse, gives_sparse_gradients
from lightning_optim.optim import other_names
from lightning_optim.optim.base import OPTIMIZERS, class_of_rule
from lightning_optim.optim.hyperparameters import check_numbers
from lightning_optim.param_groups import Entry, ParamGroupRule


class OptimizerSpec:
    """An optimizer that is decided on but not made: its class, its arguments, and how to make it from groups.

    Args:
        spec: A name, an import path, a class, a mapping with ``class_path`` and ``init_args``, or a callable from
            parameter groups to an optimizer.
        kwargs: Further arguments of the optimizer.
        overrides: Arguments that the caller gives separately (lr, weight decay); none may be in ``kwargs`` as well.

    Attributes:
        cls: The optimizer's class.
        defaults: Its hyperparameters.

    Raises:
        TypeError: ``spec`` is no optimizer.
        ValueError: An argument is unknown, out of range or given twice.

    Example:
        >>> spec = OptimizerSpec("adamw", {"betas": (0.9, 0.95)}, {"lr": 0.1})
        >>> spec, spec.cls.__name__
        (AdamW(betas=(0.9, 0.95), lr=0.1), 'AdamW')
    """

    def __init__(
        self, spec: Any, kwargs: Mapping[str, Any] | None = None, overrides: Mapping[str, Any] | None = None
    ) -> None:
        self.kwargs = _merge(kwargs or {}, overrides or {})
        self.make, trial = _resolve_optimizer(spec, self.kwargs)
        self.cls = type(trial)
        self.defaults: dict[str, Any] = dict(trial.defaults)
        self._hyperparameters = {key for group in trial.param_groups for key in group.keys() - RESERVED}
        self._betas = next((group["betas"] for group in trial.param_groups if "betas" in group), ())

    def trial(self) -> Optimizer:
        """Make the optimizer for two small parameters, a matrix and a vector."""
        return self.make([{"params": _trial_params(self.defaults)}])

    def make_for(self, model: nn.Module, groups: Iterable[Any]) -> Optimizer:
        """The optimizer of ``model``, with groups of its parameters."""
        if not isinstance(self.make, _FusedIfPossible):
            return self.make(groups)
        if gives_sparse_gradients(model):
            return self.make.unfused(groups)
        optimizer = self.make(groups)
        if self.make.chooses_form:
            UnfuseIfSparse(optimizer)
        return optimizer

    @cached_property
    def why_one_group(self) -> str | None:
        """The error of an optimizer that takes no second parameter group, as LBFGS; None if it takes one."""
        if issubclass(self.cls, optim.FusedOptimizer):
            return None
        try:
            self.make([{"params": [param]} for param in _trial_params(self.defaults)])
        except ValueError as error:
            return str(error)
        return None

    def odd_rates(self, rules: Sequence[Entry]) -> list[str]:
        """Describe learning rates that are far off the usual ones of their optimizer, a sentence each.

        Args:
            rules: Rules of parameter groups; one with another update rule is compared with that rule's own rates.
        """
        found = []
        for group in [self.defaults, *(rule.settings() for rule in rules if isinstance(rule, ParamGroupRule))]:
            cls = self.cls if group.get("rule") is None else class_of_rule(group["rule"])
            rate = group.get("lr", self.defaults.get("lr"))
            own = group is self.defaults or group.keys() & {"lr", "rule"}
            if own and rate is not None and issubclass(cls, optim.FusedOptimizer):
                found.append(_odd_rate(cls, float(rate), self.defaults | group))
        return list(dict.fromkeys(filter(None, found)))

    def check_rules(self, rules: Sequence[Entry]) -> None:
        """Refuse rules that set options which the optimizer does not have, or values that it does not accept.

        Raises:
            ValueError: With one line for each invalid rule.
        """
        problems = []
        if rules and self.why_one_group:
            raise ValueError(
                f"Invalid param_groups={list(rules)!r}: {self.cls.__name__} must have one group "
                f"({self.why_one_group}). Leave param_groups out, or write []."
            )
        for rule in rules:
            if isinstance(rule, ParamGroupRule):
                try:
                    self._check_rule(rule)
                except (ValueError, TypeError) as error:
                    problems.append(f"ParamGroupRule {rule.name!r}: {error}")
        if problems:
            raise ValueError("\n".join(problems))

    def _check_rule(self, rule: ParamGroupRule) -> None:
        known = self._hyperparameters
        settings = {key: value for key, value in rule.settings().items() if key != "frozen_until"}
        if rule.rule is not None:
            if not issubclass(self.cls, optim.FusedOptimizer):
                raise ValueError(
                    f"rule={rule.rule!r} needs an optimizer from lightning_optim.optim, and {self.cls.__name__} is "
                    f"{self.cls.__module__}'s. {nearest(self.cls.__name__.lower(), optim.list_optimizers())}"
                )
            known = known | class_of_rule(rule.rule).hyperparameters().keys()
        for key in sorted(settings.keys() - {"rule"}):
            # Without decay is what an optimizer without the option is.
            if key not in known and not (key == "weight_decay" and not settings[key]):
                raise ValueError(
                    f"it sets {key}={settings[key]!r}, but {self.cls.__name__} has no such option. "
                    f"{nearest(key, known)}"
                )
        betas = self._betas if rule.rule is None else class_of_rule(rule.rule).hyperparameters().get("betas", ())
        if rule.betas is not None and not betas:
            raise ValueError(f"it sets betas={list(rule.betas)}, but {rule.rule or self.cls.__name__} has no betas.")
        if rule.betas is not None and len(rule.betas) != len(betas):
            raise ValueError(f"betas={list(rule.betas)} are {len(rule.betas)}; needed are {len(betas)}, as {betas}.")
        if issubclass(self.cls, optim.FusedOptimizer):  # torch's own check the values of defaults only
            problems: list[Exception] = []
            params = _trial_params({**self.defaults, **settings})
            for param in params:
                try:
                    self.make([{"params": [param], **settings}])
                except ValueError as error:
                    problems.append(error)
            if len(problems) == len(params):  # a rule for matrices does not take the vector
                raise problems[0]

    def __repr__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self.kwargs.items())
        return f"{self.cls.__name__}({options})"


def _trial_params(settings: Mapping[str, Any]) -> list[nn.Parameter]:
    """A matrix, which the `split` of ``settings`` fits, and a vector: some optimizers treat them differently."""
    split, repeats, dim = (settings.get(key) for key in ("split", "split_repeats", "split_dim"))
    sizes = split if isinstance(split, list | tuple) else [split]
    size = 2
    if all(type(number) is int and number > 0 for number in [*sizes, repeats or 1]):
        size = max(2, sum(sizes) * (repeats or 1))
    shape = (2, size) if dim in (-1, 1) else (1, 2, size) if dim == 2 else (size, 2)
    return [nn.Parameter(torch.zeros(shape, device="cpu")), nn.Parameter(torch.zeros(1, device="cpu"))]


_Make = Callable[[Iterable[Any]], Optimizer]


def _resolve_optimizer(given: Any, kwargs: dict[str, Any]) -> tuple[_Make, Optimizer]:
    """A function from parameter groups to an optimizer, and what it made of two small parameters."""
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
        given, options = (given, {}) if given in OPTIMIZERS else other_names.meaning(given)
        kwargs = {**options, **kwargs}
        given = import_object(given, "optimizer", Optimizer) if "." in given else optim.get_optimizer_class(given)
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
    if isinstance(given, partial) and isinstance(given.func, type) and issubclass(given.func, Optimizer):
        kwargs = given.keywords
        _check_kwargs(given.func, kwargs)
    trial = make([{"params": _trial_params(kwargs)}])  # refuses bad values now, not in the middle of fit
    if not isinstance(trial, Optimizer):
        raise TypeError(f"The optimizer callable {label} returned {trial!r}, which is no torch.optim.Optimizer.")
    if not isinstance(trial, optim.FusedOptimizer):  # ours have checked themselves, each group
        check_numbers(type(trial).__name__, trial.defaults, ranges_of(type(trial)))
    for key in trial.defaults.keys() & inspect.signature(type(trial)).parameters.keys():
        _check_length(type(trial), key, trial.defaults[key])
    if "lr" in trial.defaults:
        _check_number(type(trial).__name__, "lr", trial.defaults["lr"], above_zero=True)
    return make, trial


_FAR = 4.0
"""Factor beyond the usual learning rates from which on a rate is warned about: a name was swapped and the rate not."""


def _odd_rate(cls: type[optim.FusedOptimizer], rate: float, group: Mapping[str, Any]) -> str | None:
    usual = cls.usual_lr_of(group)
    if usual is None or usual[0] / _FAR <= rate <= usual[1] * _FAR:
        return None
    default = cls.hyperparameters().get("lr", usual[0])
    is_usual = usual[0] <= default <= usual[1]  # Settings such as `adjust_lr_fn` change the scale, not the default.
    return (
        f"lr={rate:g} of {cls.__name__} is far {'below' if rate < usual[0] else 'above'} what is usual for it, "
        f"{usual[0]:g} to {usual[1]:g}{f'; its default is {default:g}' if is_usual else ' with these settings'}. Each "
        f"optimizer has a scale of its own: with another one, choose lr anew{', or leave it out' if is_usual else ''}."
    )


_FUSED_DEVICES = ("cpu", "cuda")
"""Where torch has fused kernels worth having; torch checks this only in the first step."""


class _FusedIfPossible:
    """Makes the fused form where torch has one for these parameters, unless the arguments choose a form."""

    def __init__(self, make: partial[Optimizer]) -> None:
        self._make = make
        options = inspect.signature(make.func).parameters.keys() | make.keywords.keys()
        forms = ("fused", "foreach", "capturable", "differentiable")
        undecided = make.keywords.get("fused") is None and not any(make.keywords.get(form) for form in forms)
        self.chooses_form = "fused" in options and undecided

    def __call__(self, groups: Iterable[Any]) -> Optimizer:
        groups = list(groups)
        params = [param[-1] if isinstance(param, tuple) else param for group in groups for param in group["params"]]
        if self.chooses_form and all(p.is_floating_point() and p.device.type in _FUSED_DEVICES for p in params):
            with contextlib.suppress(RuntimeError):  # torch has no fused form of it for these parameters
                return self._make([{**group} for group in groups], fused=True)
        return self._make(groups)

    def unfused(self, groups: Iterable[Any]) -> Optimizer:
        """Make it as it is without being asked for a form."""
        return self._make(groups)


def _merge(kwargs: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    if twice := sorted(kwargs.keys() & overrides.keys()):
        raise ValueError(f"{twice[0]!r} is given twice: in the optimizer's own arguments and separately.")
    return {**kwargs, **overrides}


def _check_kwargs(cls: type[Optimizer], kwargs: Mapping[str, Any]) -> None:
    parameters = inspect.signature(cls).parameters
    # A class with **kwargs refuses itself what it cannot use.
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    options = [name for name in parameters if name not in ("self", "params")]
    refused = cls.refused_options if issubclass(cls, optim.FusedOptimizer) else {}  # which it explains itself
    for key, value in kwargs.items():
        if key not in options and key not in refused and not takes_all:
            raise ValueError(f"{cls.__name__} has no option {key!r}. {nearest(key, options)}")
        if key in parameters:
            _check_length(cls, key, value)
        if key in ("lr", "weight_decay"):
            _check_number(cls.__name__, key, value, above_zero=key == "lr")


def _check_length(cls: type[Optimizer], key: str, value: Any) -> None:
    """Refuse a value that is not as long as the default; torch's own look at the first elements, and fail in a step."""
    if key in getattr(cls, "structured", ()):  # It may have other forms, which the class itself checks.
        return
    default = inspect.signature(cls).parameters[key].default
    if issubclass(cls, optim.FusedOptimizer) and key in cls.of_any_length():
        return
    if isinstance(default, tuple) and not (isinstance(value, list | tuple) and len(value) == len(default)):
        raise ValueError(f"Invalid {key}={value!r} of {cls.__name__}: must be {len(default)} values, as {default}.")


def _check_number(label: str, key: str, value: Any, above_zero: bool) -> None:
    needed = f"finite and {'above' if above_zero else 'at least'} 0"
    try:
        good = math.isfinite(value) and (value > 0 or (value == 0 and not above_zero))
    except TypeError:
        raise TypeError(f"Invalid {key}={value!r} of {label}: it must be a number, {needed}.") from None
    if not good:
        raise ValueError(f"Invalid {key}={float(value)!r} of {label}: it must be {needed}.")
