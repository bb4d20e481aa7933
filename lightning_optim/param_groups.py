"""Parameter groups from ordered rules: the first rule that matches a parameter takes it."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from lightning_optim.messages import nearest

__all__ = ["NamedParameter", "ParamGroupRule", "build_param_groups", "list_presets"]

REST = "default"
"""Name of the group of all parameters that no rule takes."""


@dataclass(frozen=True)
class NamedParameter:
    """A parameter as the rules see it.

    Args:
        parameter: The parameter itself.
        names: Every name the model has for it, the first one first; a tied weight has several.
        modules: The modules that hold it, in the order of ``names``.
    """

    parameter: nn.Parameter
    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]

    @property
    def name(self) -> str:
        """The name used in messages, checkpoints and ``param_names``."""
        return self.names[0]


@dataclass(frozen=True, kw_only=True)
class ParamGroupRule:
    r"""Which parameters form a group, and what is different about them.

    A parameter matches if it meets every criterion that is given. A tied weight matches under any of its names.

    Args:
        name: Name of the group, shown in logs and kept in checkpoints.
        pattern: Regular expression searched for in the parameter's full name; anchor it with ``^`` and ``$``.
        module_types: Class names of the module that holds the parameter, bare (``LayerNorm``) or full
            (``torch.nn.LayerNorm``); subclasses match too.
        max_ndim: Most dimensions the parameter may have; 1 is biases, norms and other vectors.
        min_ndim: Fewest dimensions the parameter may have; 2 is matrices and convolution kernels.
        predicate: Any other criterion, a function of a `NamedParameter`.
        lr_multiplier: The group's learning rate over the optimizer's, at least 0.
        weight_decay: The group's own weight decay; None for the optimizer's.

    Raises:
        ValueError: A criterion or value cannot be used, or there is no criterion at all.

    Example:
        >>> head = ParamGroupRule(name="head", pattern=r"^head\.", lr_multiplier=10)
        >>> vectors = ParamGroupRule(name="no_decay", max_ndim=1, weight_decay=0)
        >>> model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
        >>> [group["name"] for group in build_param_groups(model, [head, vectors])]
        ['head', 'no_decay', 'default']
    """

    name: str
    pattern: str | None = None
    module_types: Sequence[str] = ()
    max_ndim: int | None = None
    min_ndim: int | None = None
    predicate: Callable[[NamedParameter], bool] | None = None
    lr_multiplier: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name in ("total", REST):
            raise ValueError(
                f"Invalid ParamGroupRule name {self.name!r}: it must not be empty, contain '/', or be 'total' or "
                f"{REST!r}, which stand for all groups and for what no rule takes."
            )
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise self._invalid("pattern", f"a regular expression ({error})") from None
        if isinstance(self.module_types, str):
            raise self._invalid("module_types", f"a list of class names, for instance [{self.module_types}]")
        for key in ("max_ndim", "min_ndim"):
            if (value := getattr(self, key)) is not None and value < 0:
                raise self._invalid(key, "a number of dimensions, at least 0")
        if not math.isfinite(self.lr_multiplier) or self.lr_multiplier < 0:
            raise self._invalid("lr_multiplier", "finite and at least 0")
        if self.weight_decay is not None and (not math.isfinite(self.weight_decay) or self.weight_decay < 0):
            raise self._invalid("weight_decay", "finite and at least 0")
        if (
            not (self.pattern or self.module_types or self.predicate)
            and self.max_ndim is None
            and self.min_ndim is None
        ):
            raise ValueError(
                f"ParamGroupRule {self.name!r} has no criterion, so it would take every parameter. Give it `pattern`, "
                "`module_types`, `max_ndim`, `min_ndim` or `predicate`; for all parameters set the optimizer's values."
            )

    def _invalid(self, key: str, needed: str) -> ValueError:
        return ValueError(f"ParamGroupRule {self.name!r}: invalid {key}={getattr(self, key)!r}, it must be {needed}.")

    def matches(self, parameter: NamedParameter) -> bool:
        """Whether the parameter meets every criterion of the rule."""
        ndim = parameter.parameter.ndim
        return (
            (self._regex is None or any(self._regex.search(name) for name in parameter.names))
            and (not self.module_types or any(self._holds(module) for module in parameter.modules))
            and (self.max_ndim is None or ndim <= self.max_ndim)
            and (self.min_ndim is None or ndim >= self.min_ndim)
            and (self.predicate is None or self.predicate(parameter))
        )

    @cached_property
    def _regex(self) -> re.Pattern[str] | None:
        return re.compile(self.pattern) if self.pattern else None

    def _holds(self, module: nn.Module) -> bool:
        return any(name in self.module_types for name in _class_names(type(module)))


def build_param_groups(model: nn.Module, rules: Sequence[ParamGroupRule | str] = ()) -> list[dict[str, Any]]:
    """Sorts every trainable parameter of ``model`` into exactly one group.

    Frozen parameters are in none, tied weights once. Parameters that no rule takes form the last group, ``"default"``.

    Args:
        model: The model; its names are those of ``model.named_parameters()``.
        rules: Ordered rules or names of presets (`list_presets`); the first match wins.

    Returns:
        Groups for a torch optimizer: ``params`` as (name, parameter) pairs, from which torch makes ``param_names``,
        ``name``, ``lr_multiplier``, and ``weight_decay`` where a rule sets it. Empty groups are left out.

    Raises:
        ValueError: Nothing is trainable, two rules have the same name, a preset is unknown, or a rule matches nothing
            (presets may match nothing: they describe what is usual, not what is there).
    """
    check_rules(rules)
    resolved = [_PRESETS[rule](model) if isinstance(rule, str) else rule for rule in rules]
    names = [rule.name for rule in resolved]
    parameters = list(named_parameters(model))
    trainable = [parameter for parameter in parameters if parameter.parameter.requires_grad]
    if not trainable:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter: it has {len(parameters)}, "
            f"{'all frozen (requires_grad=False)' if parameters else 'so there is nothing to optimize'}."
        )
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {name: [] for name in [*names, REST]}
    for parameter in trainable:
        taker = next((rule.name for rule in resolved if rule.matches(parameter)), REST)
        groups[taker].append((parameter.name, parameter.parameter))
    for rule, given in zip(resolved, rules, strict=True):
        if not groups[rule.name] and isinstance(given, ParamGroupRule):
            raise _matches_nothing(rule, resolved, parameters)
    result: list[dict[str, Any]] = []
    for rule in resolved:
        group: dict[str, Any] = {"params": groups[rule.name], "name": rule.name, "lr_multiplier": rule.lr_multiplier}
        if rule.weight_decay is not None:
            group["weight_decay"] = rule.weight_decay
        result.append(group)
    result.append({"params": groups[REST], "name": REST, "lr_multiplier": 1.0})
    return [group for group in result if group["params"]]


def named_parameters(model: nn.Module) -> Iterator[NamedParameter]:
    """Every distinct parameter of the model with all of its names."""
    found: dict[nn.Parameter, list[tuple[str, nn.Module]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            found.setdefault(parameter, []).append((f"{prefix}.{name}" if prefix else name, module))
    for parameter, places in found.items():
        names, modules = zip(*places, strict=True)
        yield NamedParameter(parameter, names, modules)


def list_presets() -> list[str]:
    """Names that may stand in place of a rule."""
    return sorted(_PRESETS)


def check_rules(rules: Sequence[ParamGroupRule | str]) -> None:
    """Refuses what can be refused without a model: an unknown preset, something that is no rule, a name used twice."""
    if isinstance(rules, str):
        raise TypeError(f"Parameter group rules come as a list, got {rules!r}. Write [{rules!r}].")
    for rule in rules:
        if isinstance(rule, str):
            if rule not in _PRESETS:
                raise ValueError(f"Unknown parameter group preset {rule!r}. {nearest(rule, _PRESETS)}")
        elif not isinstance(rule, ParamGroupRule):
            raise TypeError(
                f"A parameter group rule is a ParamGroupRule or the name of a preset ({', '.join(_PRESETS)}), "
                f"got {rule!r}."
            )
    names = [rule if isinstance(rule, str) else rule.name for rule in rules]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Duplicate parameter group name {duplicates[0]!r}: each of {names} must be unique.")


_BIAS = re.compile(r"(^|[._])bias(_[^.]*)?$")  # bias, in_proj_bias, bias_ih_l0


def _no_decay(model: nn.Module) -> ParamGroupRule:
    """Biases, norms, embeddings, and what the model or a part of it names in timm's ``no_weight_decay()``."""
    named = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if callable(getattr(module, "no_weight_decay", None))
        for name in module.no_weight_decay()
    }

    def undecayed(parameter: NamedParameter) -> bool:
        return (
            any(_BIAS.search(name) for name in parameter.names)
            or any(_is_norm_or_embedding(module) for module in parameter.modules)
            or any(name in named for name in parameter.names)
        )

    return ParamGroupRule(name="no_decay", predicate=undecayed, weight_decay=0.0)


_PRESETS: dict[str, Callable[[nn.Module], ParamGroupRule]] = {"no_decay": _no_decay}


def _is_norm_or_embedding(module: nn.Module) -> bool:
    # By name, because every model family brings norms of its own (LlamaRMSNorm, LayerNorm2d, FrozenBatchNorm2d).
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) or any(
        re.search(r"Norm(\dd)?$", base.__name__) for base in type(module).__mro__
    )


def _class_names(cls: type) -> Iterator[str]:
    for base in cls.__mro__:
        yield base.__name__
        yield f"{base.__module__}.{base.__qualname__}"
        if base.__module__.startswith("torch.nn.modules."):  # where torch.nn.LayerNorm really lives
            yield f"torch.nn.{base.__qualname__}"


def _matches_nothing(
    rule: ParamGroupRule, rules: Sequence[ParamGroupRule], parameters: Sequence[NamedParameter]
) -> ValueError:
    criteria = ", ".join(
        f"{key}={value!r}"
        for key in ("pattern", "module_types", "max_ndim", "min_ndim", "predicate")
        if (value := getattr(rule, key)) not in (None, ())
    )
    start = f"ParamGroupRule {rule.name!r} ({criteria}) matches no trainable parameter"
    matched = [parameter for parameter in parameters if rule.matches(parameter)]
    if any(parameter.parameter.requires_grad for parameter in matched):
        earlier = next(other.name for other in rules if any(other.matches(parameter) for parameter in matched))
        return ValueError(
            f"{start} that an earlier rule has not taken: {matched[0].name!r} went to {earlier!r}. The first match "
            f"wins, so move {rule.name!r} up or remove it."
        )
    if matched:
        return ValueError(f"{start}: {matched[0].name!r} matches but is frozen (requires_grad=False).")
    if rule.module_types:
        modules = {type(module).__name__ for parameter in parameters for module in parameter.modules}
        return ValueError(f"{start}. Modules with parameters: {', '.join(sorted(modules))}.")
    words = re.sub(r"[^\w.]+", "", (rule.pattern or "").replace("\\.", "."))
    close = difflib.get_close_matches(words, [parameter.name for parameter in parameters], n=3, cutoff=0.0)
    return ValueError(f"{start}. Similar names: {', '.join(map(repr, close))}.")
