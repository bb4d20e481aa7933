"""Resume policy: whether checkpoint or configuration takes precedence. Whatever differs is reported."""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim.core.group_keys import CONFIGURED, IDENTITY, is_scheduled
from lightning_optim.factory.differences import HINT, Tell, differ, shown
from lightning_optim.factory.optimizer_identity import class_of_group, note_class, saved_class
from lightning_optim.factory.unnamed_state import fits_by_position, name_parameters
from lightning_optim.optim.base import class_of_rule


class OptimizerResume:
    """Applies the resume policy whenever an optimizer loads a state dict.

    Moments and step counts are always the checkpoint's. Hyperparameters are the checkpoint's or the configuration's.
    Where both sides name their parameters, state is matched by name, however the groups are cut and ordered. Where the
    checkpoint names none, as that of a stock optimizer, the names are found from the order of the model's parameters
    (`unnamed_state`), which is reported.

    State of another class of optimizer means something else, so it is never loaded: it is refused, or, where the
    configuration takes precedence, dropped. The class is saved with the state (`optimizer_identity`).

    Args:
        optimizer: As it was configured; its present hyperparameters are the configuration's.
        from_config: Whether the configuration takes precedence.
        tell: Reports what differs.
        model: The model, which the optimizer's names come from; None if it is not known, then a checkpoint without
            names is matched by position.
        order: Returns the names in the order that the model had when the checkpoint was saved; empty for its present
            order.

    Raises:
        ValueError: When a state dict is loaded that is of another class of optimizer, or lacks a parameter or has one
            too many, unless the configuration takes precedence: then these are named and have no state. Also when
            parameters without names could be matched in more than one way.

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

    def __init__(
        self,
        optimizer: Optimizer,
        from_config: bool,
        tell: Tell,
        model: nn.Module | None = None,
        order: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self._from_config = from_config
        self._tell = tell
        self._model = None if model is None else weakref.ref(model)
        self._order = order
        # Other callbacks may change the groups before a state is loaded: Lightning's BaseFinetuning does.
        self._configured = {_name(group, i): _configured(optimizer, group) for i, group in _enumerate(optimizer)}
        self._handle = optimizer.register_load_state_dict_pre_hook(self._before)
        optimizer.register_state_dict_post_hook(note_class)

    def _before(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        other = saved_class(optimizer, state_dict)
        if other is not None:
            self._check_class(optimizer, state_dict, other)
            if not any(group.get("rule") for group in (*optimizer.param_groups, *state_dict["param_groups"])):
                self._tell_dropped(optimizer, state_dict, other, len(state_dict["state"]))
                return {"state": {}, "param_groups": _packed(optimizer)}
        given, state_dict = state_dict, self._named(optimizer, state_dict)
        saved: list[dict[str, Any]] = state_dict["param_groups"]
        named = all("param_names" in group for group in (*optimizer.param_groups, *saved))
        now_names = [group.get("param_names") for group in optimizer.param_groups]
        regrouped = named and now_names != [group["param_names"] for group in saved]
        if not regrouped and len(saved) != len(optimizer.param_groups):
            return None  # the optimizer's own error says how many there are
        if regrouped:
            self._check_names(optimizer, saved)
        ids = _match(optimizer, saved) if regrouped else [group["params"] for group in saved]
        owner = type(optimizer).__name__
        classes = {i: class_of_group(group, other or owner) for group in saved for i in group["params"]}
        groups = []
        changes = []
        foreign: set[Any] = set()
        for index, group in _enumerate(optimizer):
            source = _source(group, ids[index], saved) if regrouped else saved[index]
            configured = self._configured.get(_name(group, index), {})
            cls = class_of_group({**group, **configured} if self._from_config else {**group, **source}, owner)
            of_others = {i: classes[i] for i in ids[index] if classes.get(i, cls) != cls}
            if of_others and not self._from_config:
                self._refuse_update(group, ids[index], of_others, cls)
            foreign |= of_others.keys()
            if len(of_others) == len(ids[index]):  # nothing of this group continues
                source = {}
            source = _with_peak(source, group)
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
        if foreign or other is not None:
            of = other or " and ".join(sorted({classes[i] for i in foreign}))
            self._tell_dropped(optimizer, state_dict, of, len(foreign & state_dict["state"].keys()))
        if changes and self._from_config:
            self._tell(f"Resumed with the configuration's hyperparameters: {'; '.join(changes)}.", False)
        elif changes:
            self._tell(
                "Resumed with the checkpoint's hyperparameters, though the configuration has others: "
                f"{'; '.join(changes)}. {HINT}",
                True,
            )
        if not regrouped and not self._from_config and state_dict is given:
            return None
        known = {saved_id for ids_of_group in ids for saved_id in ids_of_group} - foreign
        of_params = {saved_id for group in saved for saved_id in group["params"]}
        state = {key: value for key, value in state_dict["state"].items() if key in known or key not in of_params}
        return {**state_dict, "state": state, "param_groups": groups}

    def _check_class(self, optimizer: Optimizer, state_dict: Mapping[str, Any], other: str) -> None:
        """Refuse the state of another class of optimizer, unless the configuration takes precedence."""
        if self._from_config:
            return
        owner = type(optimizer).__name__
        raise ValueError(
            f"The checkpoint's optimizer is {other}, and {owner} is configured: its state{_kinds(state_dict)} means "
            f'something else there. Configure {other} to continue as before, or say on_resume="config" to go on with '
            f"{owner}: then that state is dropped, and hyperparameters are the configuration's."
        )

    def _refuse_update(
        self, group: Mapping[str, Any], ids: Sequence[Any], of_others: Mapping[Any, str], cls: str
    ) -> None:
        """Refuse parameters that another rule has updated so far."""
        names = group.get("param_names", ids)
        lost = [f"{name} ({of_others[i]})" for name, i in zip(names, ids, strict=True) if i in of_others]
        raise ValueError(
            f"The run cannot go on as it was: the group {group.get('name')!r} is updated by {cls}, and the checkpoint "
            f"has state of another rule for {', '.join(lost)}. Leave them in groups of that rule, or say "
            'on_resume="config" to start them afresh.'
        )

    def _tell_dropped(self, optimizer: Optimizer, state_dict: Mapping[str, Any], other: str, count: int) -> None:
        kept = len(state_dict["state"]) - count
        parts = []
        if count or not kept:
            parts.append(
                f"the state{_kinds(state_dict)} of {count} parameters is dropped, and they start with fresh state"
            )
        if kept:
            parts.append(f"the state of {kept} continues, because they are updated as before")
        self._tell(
            f"Resumed with {type(optimizer).__name__} and a checkpoint of {other}: {'; '.join(parts)}. Hyperparameters "
            "are the configuration's.",
            False,
        )

    def _named(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state dict with the names of its parameters, if it has none and they can be found out."""
        saved: list[dict[str, Any]] = state_dict["param_groups"]
        model = None if self._model is None else self._model()
        if model is None or any("param_names" in group for group in saved):
            return state_dict
        if not all("param_names" in group for group in optimizer.param_groups):
            return state_dict
        how = "the order of the model's parameters"
        names = name_parameters(state_dict, model, self._order())
        if isinstance(names, str):
            if not fits_by_position(state_dict, optimizer.param_groups):
                raise ValueError(
                    f"The checkpoint's optimizer cannot be matched with this one: {names}. Needed are the checkpoint's "
                    "groups, in its order (param_groups=[] makes one group of all), or a checkpoint with names, which "
                    "every optimizer made by OptimizerFactory or ConfigureOptimizers saves."
                )
            how = "their places in the groups"
            pairs = zip(saved, optimizer.param_groups, strict=True)
            names = [dict(zip(group["params"], own["param_names"], strict=True)) for group, own in pairs]
        self._tell(
            f"The checkpoint's optimizer has no names of parameters: its {sum(map(len, names))} have been matched by "
            f"{how}{', and the shapes of their state agree' if state_dict['state'] else ''}.",
            False,
        )
        groups = [
            {**group, "params": list(own), "param_names": list(own.values())}
            for group, own in zip(saved, names, strict=True)
        ]
        return {**state_dict, "param_groups": groups}

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
        if differ(configured[key], saved[key]):
            yield f"{key.removeprefix('initial_')} {shown(saved[key])} → {shown(configured[key])}"


def _with_peak(source: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """The saved group, with its rate as the peak if no scheduler has driven it and one drives the group now."""
    if "lr" not in source or "initial_lr" in source or "initial_lr" not in group:
        return dict(source)
    return {**source, "initial_lr": source["lr"]}


def _kinds(state_dict: Mapping[str, Any]) -> str:
    """The names of the state that there is, in brackets."""
    kinds = sorted({key for entry in state_dict["state"].values() if isinstance(entry, Mapping) for key in entry})
    return f" ({', '.join(kinds)})" if kinds else ""


def _packed(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The groups as they are, with numbers in place of parameters, as in a state dict."""
    numbers = itertools.count()
    return [{**group, "params": [next(numbers) for _ in group["params"]]} for group in optimizer.param_groups]


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
