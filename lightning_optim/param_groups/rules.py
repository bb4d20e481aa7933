"""A rule of a parameter group: criteria for its parameters, and its settings."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from torch import nn

from lightning_optim.core.durations import Duration
from lightning_optim.core.group_keys import RESERVED
from lightning_optim.core.suggest import nearest
from lightning_optim.core.typed import typed
from lightning_optim.param_groups.parts import NamedParameter, list_parts
from lightning_optim.schedules import Schedule, get_schedule

REST = "default"
"""Name of the group of all parameters that no rule takes."""

CRITERIA = ("pattern", "glob", "module_types", "part", "max_ndim", "min_ndim", "predicate")


@typed(own=("module_types",))
@dataclass(frozen=True, kw_only=True)
class ParamGroupRule:
    r"""Rule of a parameter group: the criteria for its parameters, and the settings in which it differs.

    A parameter matches if it meets every given criterion. A tied weight matches under any of its names.

    Args:
        name: Name of the group, shown in logs and kept in checkpoints.
        pattern: Regular expression searched for in the parameter's full name; anchor it with ``^`` and ``$``.
        glob: Shell-style pattern for the whole name: ``"blocks.*.weight"``; ``*`` crosses dots.
        module_types: Class names of the module that holds the parameter, bare (``LayerNorm``) or full
            (``torch.nn.LayerNorm``); subclasses match as well.
        part: A part of the model by its kind, such as ``"head"`` or ``"hidden_matrix"``
            (`lightning_optim.param_groups.list_parts`).
        max_ndim: Largest number of dimensions of the parameter; 1 selects biases, norms and other vectors.
        min_ndim: Smallest number of dimensions of the parameter; 2 selects matrices and convolution kernels.
        predicate: Any other criterion, a function of a `NamedParameter`.
        overlay: Whether the rule only changes settings of the parameters that it matches, in whichever group another
            rule puts them. That group is split in two, so that a head can learn faster and still have undecayed
            biases. Each setting is that of the first matching rule in the list; learning-rate multipliers multiply.
        lr_multiplier: The group's learning rate over the optimizer's, at least 0.
        lr: The group's own peak learning rate, at least 0; None for the optimizer's. The schedule multiplies it.
        weight_decay: The group's own weight decay; None for the optimizer's.
        betas: The group's own betas; None for the optimizer's.
        rule: Name of another optimizer of `lightning_optim.optim` whose update the group uses (`"lion"`), with its
            defaults. The optimizer must be one of these as well.
        options: Any further hyperparameters of the optimizer, for instance ``{"eps": 1e-6}``.
        frozen_until: Time for which the group is frozen: ``500``, ``"1 epoch"``, ``"10%"``; None for a group that is
            not frozen. The group is in the optimizer from the start, even if its parameters are frozen in the model,
            but until then it is neither updated nor decayed and has no state.
        schedule: The group's own schedule of the learning rate, a name or a `Schedule`; None for the optimizer's.

    Raises:
        ValueError: A criterion or value is invalid, or there is no criterion.

    Example:
        >>> from lightning_optim import build_param_groups
        >>> head = ParamGroupRule(name="head", part="head", lr_multiplier=10, overlay=True)
        >>> vectors = ParamGroupRule(name="no_decay", max_ndim=1, weight_decay=0)
        >>> model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
        >>> for group in build_param_groups(model, [head, vectors]):
        ...     print(group["name"], group["lr_multiplier"], [name for name, _ in group["params"]])
        no_decay 1.0 ['body.bias']
        head_no_decay 10.0 ['head.bias']
        default 1.0 ['body.weight']
        head 10.0 ['head.weight']
    """

    name: str
    pattern: str | None = None
    glob: str | None = None
    module_types: Sequence[str] = ()
    part: str | None = None
    max_ndim: int | None = None
    min_ndim: int | None = None
    predicate: Callable[[NamedParameter], bool] | None = None
    overlay: bool = False
    lr_multiplier: float = 1.0
    lr: float | None = None
    weight_decay: float | None = None
    betas: Sequence[float] | None = None
    rule: str | None = None
    options: Mapping[str, Any] | None = None
    frozen_until: int | str | None = None
    schedule: str | Schedule | None = None

    def __post_init__(self) -> None:
        if isinstance(self.schedule, str):
            object.__setattr__(self, "schedule", get_schedule(self.schedule)())
        if not self.name or "/" in self.name or self.name in ("total", REST):
            raise ValueError(
                f"Invalid ParamGroupRule name {self.name!r}: must not be empty, contain '/', or be 'total' or "
                f"{REST!r}, which stand for all groups and for the parameters that no rule takes."
            )
        self._check_criteria()
        for key in ("lr_multiplier", "lr", "weight_decay"):
            if (value := getattr(self, key)) is not None and not (math.isfinite(value) and value >= 0):
                raise self._invalid(key, "finite and at least 0")
        if self.lr is not None and self.lr_multiplier != 1:
            raise ValueError(
                f"ParamGroupRule {self.name!r} has lr={self.lr} and lr_multiplier={self.lr_multiplier}. Give one of "
                "them: its own rate, or one that follows the optimizer's."
            )
        if self.betas is not None and not (
            len(self.betas) > 0 and all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in self.betas)
        ):
            raise self._invalid("betas", "numbers in [0, 1), for instance [0.9, 0.95]")
        given = {"lr", "weight_decay", "betas", "rule"}
        for key in self.options or {}:
            if key in RESERVED or key in given:
                raise ValueError(
                    f"ParamGroupRule {self.name!r}: {key!r} is not an option. "
                    + (f"Write it outside of the options, as `{key}`." if key in given else "The rule itself sets it.")
                )
        if self.frozen_until is not None:
            try:
                Duration.parse(self.frozen_until)
            except ValueError as error:
                raise ValueError(f"ParamGroupRule {self.name!r}: frozen_until: {error}") from None

    def _check_criteria(self) -> None:
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise self._invalid("pattern", f"a regular expression ({error})") from None
        types = self.module_types
        if not isinstance(types, list | tuple) or not all(isinstance(name, str) for name in types):
            example = types if isinstance(types, str) else "LayerNorm"
            raise self._invalid("module_types", f"a list of class names, for instance [{example}]")
        if self.part is not None and self.part not in list_parts():
            raise ValueError(
                f"ParamGroupRule {self.name!r}: unknown part={self.part!r}. {nearest(self.part, list_parts())}"
            )
        for key in ("max_ndim", "min_ndim"):
            if (value := getattr(self, key)) is not None and value < 0:
                raise self._invalid(key, "a number of dimensions, at least 0")
        if not self._given_criteria():
            raise ValueError(
                f"ParamGroupRule {self.name!r} has no criterion, so it would take every parameter. Give it one of "
                f"{', '.join(f'`{key}`' for key in CRITERIA)}; for all parameters set the optimizer's values."
            )

    def _invalid(self, key: str, needed: str) -> ValueError:
        return ValueError(f"ParamGroupRule {self.name!r}: invalid {key}={getattr(self, key)!r}: must be {needed}.")

    def _given_criteria(self) -> dict[str, Any]:
        return {key: value for key in CRITERIA if (value := getattr(self, key)) not in (None, (), [], "")}

    def matches(self, parameter: NamedParameter) -> bool:
        """Return whether the parameter meets every criterion of the rule."""
        ndim = parameter.dim
        return (
            (self._regex is None or any(self._regex.search(name) for name in parameter.names))
            and (not self.glob or any(fnmatchcase(name, self.glob) for name in parameter.names))
            and (not self.module_types or any(self._holds(module) for module in parameter.modules))
            and (self.part is None or self.part in parameter.parts)
            and (self.max_ndim is None or ndim <= self.max_ndim)
            and (self.min_ndim is None or ndim >= self.min_ndim)
            and (self.predicate is None or self.predicate(parameter))
        )

    def settings(self) -> dict[str, Any]:
        """Return the settings of the group, except ``lr_multiplier`` and those that are the optimizer's."""
        settings: dict[str, Any] = {key: getattr(self, key) for key in ("lr", "weight_decay", "rule")}
        settings["betas"] = None if self.betas is None else tuple(self.betas)
        settings["frozen_until"] = None if self.frozen_until is None else str(self.frozen_until)
        return {**{key: value for key, value in settings.items() if value is not None}, **(self.options or {})}

    @cached_property
    def _regex(self) -> re.Pattern[str] | None:
        return re.compile(self.pattern) if self.pattern else None

    def _holds(self, module: nn.Module) -> bool:
        return any(name in self.module_types for name in _class_names(type(module)))

    def why_nothing(self, rules: Sequence[ParamGroupRule], parameters: Sequence[NamedParameter]) -> str:
        """Explain why the rule, one of ``rules``, takes none of ``parameters``, and name similar parameters."""
        criteria = ", ".join(f"{key}={value!r}" for key, value in self._given_criteria().items())
        start = f"ParamGroupRule {self.name!r} ({criteria}) matches no trainable parameter"
        matched = [parameter for parameter in parameters if self.matches(parameter)]
        if any(parameter.parameter.requires_grad for parameter in matched):
            takers = (other for other in rules if not other.overlay)
            earlier = next(other.name for other in takers if any(other.matches(parameter) for parameter in matched))
            return (
                f"{start} that an earlier rule has not taken: {matched[0].name!r} went to {earlier!r}. The first match "
                f"wins, so move {self.name!r} up or remove it."
            )
        if matched:
            return (
                f"{start}: {matched[0].name!r} matches but is frozen (requires_grad=False). To train it later, give "
                "the rule `frozen_until`."
            )
        if self.module_types:
            modules = {type(module).__name__ for parameter in parameters for module in parameter.modules}
            return f"{start}. Modules with parameters: {', '.join(sorted(modules))}."
        if self.part is not None and not self.pattern and not self.glob:
            parts = sorted({part for parameter in parameters for part in parameter.parts})
            return f"{start}. Parts that {len(parameters)} parameters belong to: {', '.join(parts) or 'none'}."
        words = re.sub(r"[^\w.]+", "", (self.pattern or self.glob or "").replace("\\.", "."))
        names = [name for parameter in parameters for name in parameter.names]
        close = difflib.get_close_matches(words, names, n=3, cutoff=0.0)
        return f"{start}. Similar names: {', '.join(map(repr, close))}."


def _class_names(cls: type) -> Iterator[str]:
    for base in cls.__mro__:
        yield base.__name__
        yield f"{base.__module__}.{base.__qualname__}"
        if base.__module__.startswith("torch.nn.modules."):  # torch.nn.LayerNorm is defined there.
            yield f"torch.nn.{base.__qualname__}"
