"""Resume policy: whether checkpoint or configuration takes precedence. Whatever differs is reported."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_optim.core.group_keys import CONFIGURED, IDENTITY, is_scheduled
from lightning_optim.optim.base import class_of_rule

Tell = Callable[[str, bool], None]
"""Receives a message, and whether it is a warning, that is, whether the configuration was overruled."""

HINT = 'Say on_resume="config" to have the configuration\'s.'
_POSITION = {"last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial"}
_METRICS = {"best", "num_bad_epochs", "cooldown_counter", "mode_worse"}


class OptimizerResume:
    """Applies the resume policy whenever an optimizer loads a state dict.

    Moments and step counts are always the checkpoint's. Hyperparameters are the checkpoint's or the configuration's.
    Where both sides name their parameters, state is matched by name, however the groups are cut and ordered.

    Args:
        optimizer: As it was configured; its present hyperparameters are the configuration's.
        from_config: Whether the configuration takes precedence.
        tell: Reports what differs.

    Raises:
        ValueError: When a state dict is loaded that lacks a parameter or has one too many, unless the configuration
            takes precedence: then these are named and have no state.

    Example:
        >>> import torch
        >>> def make(lr):
        ...     return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)
        >>> optimizer = make(0.2)
        >>> _ = OptimizerResume(optimizer, from_config=True, tell=lambda message, warn: print(message))
        >>> optimizer.load_state_dict(make(0.1).state_dict())
        Resumed with the configuration's hyperparameters: group 0: lr 0.1 → 0.2.
        >>> optimizer.param_groups[0]["lr"]
        0.2
    """

    def __init__(self, optimizer: Optimizer, from_config: bool, tell: Tell) -> None:
        self._from_config = from_config
        self._tell = tell
        # Other callbacks may change the groups before a state is loaded: Lightning's BaseFinetuning does.
        self._configured = {_name(group, i): _configured(optimizer, group) for i, group in _enumerate(optimizer)}
        self._handle = optimizer.register_load_state_dict_pre_hook(self._before)

    def _before(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        saved: list[dict[str, Any]] = state_dict["param_groups"]
        named = all("param_names" in group for group in (*optimizer.param_groups, *saved))
        now_names = [group.get("param_names") for group in optimizer.param_groups]
        regrouped = named and now_names != [group["param_names"] for group in saved]
        if not regrouped and len(saved) != len(optimizer.param_groups):
            return None  # the optimizer's own error says how many there are
        if regrouped:
            self._check_names(optimizer, saved)
        ids = _match(optimizer, saved) if regrouped else [group["params"] for group in saved]
        groups = []
        changes = []
        for index, group in _enumerate(optimizer):
            source = _source(group, ids[index], saved) if regrouped else saved[index]
            configured = self._configured.get(_name(group, index), {})
            changes += [f"group {_name(group, index)}: {change}" for change in _changes(source, configured)]
            merged: dict[str, Any] = dict(source)
            for key in group.keys() - {"params"} - source.keys():
                merged[key] = group[key]
            if self._from_config:
                gone = {k for k in merged if is_scheduled(k) or k == "frozen_until"} - configured.keys()
                merged = {k: v for k, v in merged.items() if k not in gone}
                merged |= configured
            names = {key: group[key] for key in IDENTITY if key in group}
            groups.append(merged | names | {"params": ids[index]})
        if changes and self._from_config:
            self._tell(f"Resumed with the configuration's hyperparameters: {'; '.join(changes)}.", False)
        elif changes:
            self._tell(
                "Resumed with the checkpoint's hyperparameters, though the configuration has others: "
                f"{'; '.join(changes)}. {HINT}",
                True,
            )
        if not regrouped and not self._from_config:
            return None
        known = {saved_id for ids_of_group in ids for saved_id in ids_of_group}
        of_params = {saved_id for group in saved for saved_id in group["params"]}
        state = {key: value for key, value in state_dict["state"].items() if key in known or key not in of_params}
        return {**state_dict, "state": state, "param_groups": groups}

    def _check_names(self, optimizer: Optimizer, saved: Sequence[Mapping[str, Any]]) -> None:
        """Names what only one side has, and refuses it unless the configuration takes precedence."""
        there = [name for group in saved for name in group["param_names"]]
        here = [name for group in optimizer.param_groups for name in group["param_names"]]
        missing = [name for name in here if name not in set(there)]
        surplus = [name for name in there if name not in set(here)]
        if not missing and not surplus:
            return
        lists = []
        if missing:
            lists.append(f"the checkpoint has no optimizer state of {', '.join(missing)}")
        if surplus:
            lists.append(f"this optimizer does not have {', '.join(surplus)}")
        if not self._from_config:
            raise ValueError(
                f"The run cannot go on as it was: {', and '.join(lists)}. Train the same parameters, or say "
                'on_resume="config" to start the former afresh and leave the latter out.'
            )
        self._tell(f"Resumed with other parameters: {', and '.join(lists)}.", False)


def resume_scheduler(scheduler: LRScheduler, from_config: bool, tell: Tell) -> None:
    """Apply the resume policy to a scheduler that is not ours.

    If the configuration takes precedence, the scheduler is stepped from its start to the saved position, so that no
    number of the old schedule is left in it.

    Args:
        scheduler: As it was configured, at its start.
        from_config: Whether the configuration takes precedence.
        tell: Reports what differs.

    Raises:
        ValueError: When the state of another kind of scheduler is loaded, unless the configuration takes precedence.
    """
    cls = type(scheduler)

    def load_state_dict(self: LRScheduler, state_dict: dict[str, Any]) -> None:
        if from_config and not isinstance(self, ReduceLROnPlateau):
            with warnings.catch_warnings():  # torch's, that the optimizer has not stepped
                warnings.simplefilter("ignore")
                for _ in range(state_dict["last_epoch"]):
                    self.step()
            return
        mine = cls.state_dict(self)
        if mine.keys() != state_dict.keys():
            raise ValueError(
                f"The checkpoint's scheduler is no {cls.__name__}: it has {', '.join(sorted(state_dict))}. {HINT}"
            )
        differing = sorted(
            f"{key} {_shown(state_dict[key])} (configured: {_shown(mine[key])})"
            for key in mine.keys() - _POSITION - _METRICS
            if _differ(mine[key], state_dict[key])
        )
        if differing:
            hint = "" if from_config else f" {HINT}"
            tell(f"Resumed with the checkpoint's {cls.__name__}: {', '.join(differing)}.{hint}", True)
        cls.load_state_dict(self, state_dict)

    # torch has no hook for this method of a scheduler, and saves all attributes of an instance in its state dict; so
    # the method is overridden in a subclass of its class.
    scheduler.__class__ = type(cls.__name__, (cls,), {"load_state_dict": load_state_dict, "__module__": cls.__module__})


def _enumerate(optimizer: Optimizer) -> Iterator[tuple[int, dict[str, Any]]]:
    return enumerate(optimizer.param_groups)


def _name(group: Mapping[str, Any], index: int) -> str:
    return str(group.get("name", index))


def _configured(optimizer: Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration in a group; the rest is state, or lists its parameters."""
    names = {*inspect.signature(type(optimizer)).parameters, *CONFIGURED}
    if group.get("rule") is not None:
        names |= class_of_rule(group["rule"]).hyperparameters().keys()
    names -= IDENTITY
    values = {key: value for key, value in group.items() if key in names or is_scheduled(key)}
    if "peak_lr" in group and (group.get("peak_lr_from") == "given" or not {"initial_lr", "max_lr"} & group.keys()):
        values["peak_lr"] = group["peak_lr"]
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in values.items()}


def _changes(saved: Mapping[str, Any], configured: Mapping[str, Any]) -> Iterator[str]:
    """The differences, from the checkpoint's value to the configuration's; of scheduled values those of their peaks."""
    driven = {key.removeprefix("initial_") for key in configured if key.startswith("initial_")}
    if driven & {"momentum", "beta1", "beta2", "beta3"}:
        driven.add("betas")
    for key in configured:
        if key in driven or key not in saved or (key == "peak_lr" and "lr" in driven):
            continue
        if _differ(configured[key], saved[key]):
            yield f"{key.removeprefix('initial_')} {_shown(saved[key])} → {_shown(configured[key])}"


def _match(optimizer: Optimizer, saved: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """For each group the saved ids of its parameters; of those without, ids that no state has."""
    ids = {name: i for group in saved for name, i in zip(group["param_names"], group["params"], strict=True)}
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    fresh = {name: f"new {name}" for name in names if name not in ids}
    return [[ids.get(name, fresh.get(name)) for name in group["param_names"]] for group in optimizer.param_groups]


def _source(group: Mapping[str, Any], ids: Sequence[Any], saved: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The saved group that this one continues: that of its name, or else one with a parameter of it."""
    same_name = [other for other in saved if "name" in group and other.get("name") == group["name"]]
    with_param = [other for other in saved if set(other["params"]) & set(ids)]
    found = (same_name or with_param or [{}])[0]
    return {key: value for key, value in found.items() if key not in IDENTITY}


def _differ(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return float(a) != float(b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):  # tuples become lists in some formats
        return len(a) != len(b) or any(_differ(x, y) for x, y in zip(a, b, strict=True))
    return bool(a != b)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        value = float(value)
    return f"{value:.6g}" if isinstance(value, float) else repr(value)
