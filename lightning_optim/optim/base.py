"""FusedOptimizer: a torch optimizer whose step is one pass of a backend over all tensors."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT
from typing_extensions import Unpack

from lightning_optim.core.group_keys import PARAMS
from lightning_optim.core.ranges import FRACTION, NON_NEGATIVE, Range
from lightning_optim.core.registry import Registry
from lightning_optim.core.sharding import local
from lightning_optim.core.stats import StepStats
from lightning_optim.core.step_hooks import is_trial_step
from lightning_optim.core.uncompiled import leave_step_uncompiled
from lightning_optim.kernels.peak_lr import NEED_PEAK, follow_peak, say_peak, start_peak
from lightning_optim.kernels.rules import Rule
from lightning_optim.kernels.weight_decay import WeightDecayKind
from lightning_optim.optim import admission, low_precision, shared_options, update_pass
from lightning_optim.optim.batches import Batches
from lightning_optim.optim.checkpoint import load_state_dict
from lightning_optim.optim.hyperparameters import (
    check_lengths,
    check_values,
    number,
    own_tensors,
    plain_numbers,
    refuse_typos,
)
from lightning_optim.optim.param_checks import check_params
from lightning_optim.optim.ranges import is_number, ranges_of, refuse_unranged, require_ranges
from lightning_optim.optim.shared_options import OwnSignature, SharedOptions
from lightning_optim.optim.state import complete_state, tensor_names
from lightning_optim.optim.widening import say, widen

OPTIMIZERS: Registry[Optimizer] = Registry("optimizer", Optimizer)
"""Optimizers by name; `lightning_optim.register` adds a user's own."""


class FusedOptimizer(Optimizer):
    """Base of all optimizers here: state, checkpoints and the step pipeline's contract around a rule.

    A subclass has a typed `__init__` that hands its hyperparameters to this one, the `ranges` of those that are
    numbers, and `rule`. The attributes below steer a step. All are read after the closure has run, none is saved, and
    none is ever read on the host:

    - `grad_scale` (tensor []): gradients are divided by it. Set and removed by `torch.amp.GradScaler`.
    - `found_inf` (tensor []): non-zero makes the step a no-op, bit for bit, step counts included.
    - `divisor` (tensor [] or [tensors]): gradients are divided by it, too. Tensors are the parameters that have a
      gradient, in the order of `param_groups`.
    - `collect_step_stats`: also fill `step_stats`, in the same pass. NaN where a step was skipped.

    `p.grad` is never written; a DTensor that lies otherwise than its parameter is replaced by the same gradient,
    redistributed (`core.placements.gradient_of`). Parameter groups may override every hyperparameter, and hold any
    further keys; a group's `rule` names another optimizer whose update to use for it
    (`{"params": ..., "rule": "lion"}`). Of a tensor lr that several groups are given, the first keeps the tensor itself
    and each other a copy, so that what drives one (schedulers fill tensors in place) leaves the others alone.

    Args:
        params: Parameters, groups, or (name, parameter) pairs.
        defaults: Hyperparameters by name.
        **options: Options that all optimizers share; see `SharedOptions`.

    Raises:
        ValueError: A value is out of its range, values contradict each other, or a parameter cannot be updated.
        TypeError: An option is unknown; or, when a subclass is made, a number in its constructor has no range.
    """

    when_to_use: ClassVar[str]
    """One line for `list_optimizers`."""
    memory: ClassVar[str]
    """State per parameter, in words."""
    paper: ClassVar[str]
    """Where it comes from."""
    ranges: ClassVar[Mapping[str, Range]] = MappingProxyType(
        {"lr": NON_NEGATIVE, "weight_decay": NON_NEGATIVE, "eps": NON_NEGATIVE, "betas": FRACTION}
    )
    """The range of each number that the constructor takes; of a tuple, of each of its parts. Those of base classes
    hold, too."""
    option_defaults: ClassVar[SharedOptions] = {}
    """Defaults of shared options where they are not the usual ones."""
    refused_options: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Shared options that are not offered, with the reason; no base class's."""
    __signature__ = OwnSignature()

    grad_scale: Tensor  # no values here: GradScaler multiplies into what it finds, and deletes it afterwards
    found_inf: Tensor
    divisor: Tensor | None = None
    collect_step_stats: bool = False
    step_stats: StepStats | None = None

    _peak_said: bool = False  # that a peak of the learning rate was exceeded
    _batches: Batches | None = None  # of the last step; not part of the state

    _step_supports_amp_scaling: bool  # of the object, as torch's: Lightning's wrapper would not find a change to it

    def __init__(self, params: ParamsT, defaults: dict[str, Any], **options: Unpack[SharedOptions]) -> None:
        owner = type(self)
        shared_options.check_names(owner, options)
        given: dict[str, Any] = {**shared_options.defaults_of(owner), **defaults, **options}
        self.backend = given.pop("backend")
        # The constructor's own arguments have been looked at when the class was made.
        known = ranges_of(owner).keys() | shared_options.DEFAULTS.keys() | inspect.signature(owner).parameters.keys()
        refuse_unranged(owner, [name for name, value in defaults.items() if is_number(value) and name not in known])
        super().__init__(params, plain_numbers(given))
        self._step_supports_amp_scaling = True
        leave_step_uncompiled(owner)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        require_ranges(cls)
        shared_options.spell_out_docs(cls)

    @classmethod
    def __subclasses__(cls) -> list[type]:
        """None, to jsonargparse: short names in LightningCLI (`--optimizer SGD`) go on meaning torch's classes.

        It looks for all subclasses of torch's Optimizer, and refuses a name that two of them have. Full paths
        (`lightning_optim.optim.SGD`) are resolved without this list.
        """
        return []

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> Rule:
        """The rule for a parameter group with these hyperparameters."""
        raise NotImplementedError

    @classmethod
    def check(cls, group: Mapping[str, Any]) -> None:
        """Check that hyperparameters, each of them valid by itself, agree with each other.

        Args:
            group: The parameter group, complete.

        Raises:
            ValueError: They do not agree.
        """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as torch's optimizers do.

        Args:
            param_group: Parameters under "params", and settings where they are not the optimizer's.

        Raises:
            ValueError: A value or a parameter is not valid; the optimizer is then as it was before.
        """
        group = {**param_group, **plain_numbers({k: v for k, v in param_group.items() if k not in PARAMS})}
        owner = type(self)
        if group.get("rule") is not None:
            owner = class_of_rule(group["rule"])
            shared = {"lr", "weight_decay", *shared_options.DEFAULTS}  # the optimizer's, where the group has none
            own = {name: value for name, value in owner.hyperparameters().items() if name not in shared}
            group = own | group
        filled = self.defaults | group
        filled["weight_decay_kind"] = WeightDecayKind.parse(filled["weight_decay_kind"]).value
        group["weight_decay_kind"] = filled["weight_decay_kind"]
        start_peak(group, number(owner.__name__, filled, "lr"))
        filled["peak_lr"] = group["peak_lr"]
        refuse_typos(type(self).__name__, param_group, self.defaults.keys() | owner.hyperparameters().keys())
        check_lengths(owner.__name__, filled, owner.hyperparameters())
        own_names = owner.hyperparameters()
        own_ranges = {name: allowed for name, allowed in ranges_of(owner).items() if name in own_names}
        check_values(owner.__name__, filled, ranges_of(type(self)) | own_ranges, self.defaults | own_names)
        shared_options.check_offered(owner, filled)
        owner.check(filled)
        low_precision.check(owner.__name__, filled, self.rule_of(filled))
        count = len(self.param_groups)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="optimizer contains a parameter group with duplicate")
            super().add_param_group(group)
        own_tensors(self.param_groups, filled.keys() - PARAMS)
        try:
            check_params(self, self.param_groups[-1])
        except Exception:
            del self.param_groups[count:]
            raise

    @classmethod
    def hyperparameters(cls) -> dict[str, Any]:
        """Names and defaults of what the constructor takes, `params` and `backend` aside."""
        return {
            name: parameter.default
            for name, parameter in inspect.signature(cls).parameters.items()
            if name not in ("params", "backend") and parameter.kind is not parameter.VAR_KEYWORD
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient, once.

        Args:
            closure: Recomputes gradients and returns the loss.

        Returns:
            What ``closure`` returned; None without one.

        Raises:
            ValueError: `divisor` has a wrong shape.
            RefusedError: A gradient or a state cannot be used for an update.
        """
        trial = is_trial_step(self, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rules = list(map(self.rule_of, self.param_groups))
        for group, rule in zip(self.param_groups, rules, strict=True):
            self._prepare(group, rule, count=not trial)
        if self._batches is None or not self._batches.refill(self, rules):
            self._batches = Batches(self)
        try:
            if not trial:  # whose state is made now: some kinds of decay act at a rate of 0, too
                self._apply(self._batches)
        finally:
            self._batches.release()
        return loss

    def _prepare(self, group: dict[str, Any], rule: Rule, *, count: bool) -> None:
        """Count the call, if it counts, and make the numbers that groups share, where the rule wants them."""
        if count and rule.counts_calls and any(param.device.type != "cpu" for param in group["params"]):
            group["calls"] = group.get("calls", 0) + 1
        if count and group["weight_decay_kind"] in NEED_PEAK and follow_peak(group) and not self._peak_said:
            self._peak_said = True
            say_peak(type(self).__name__, group)
        if update_pass.shares(rule) and group["params"]:
            update_pass.init_shared(self, group, rule)

    def _apply(self, batches: Batches) -> None:
        self.step_stats = update_pass.update(self, batches)

    def make_state(self, params: Iterable[Tensor]) -> None:
        """Create the state that the first step of parameters would; existing state is kept.

        Args:
            params: Some of this optimizer's parameters.

        Raises:
            RefusedError: Existing state does not fit its parameter.
        """
        wanted = {id(param) for param in params}
        everything = [(group, index) for group in self.param_groups for index in range(len(group["params"]))]
        for position, (group, index) in enumerate(everything):
            param = group["params"][index]
            if id(param) in wanted:
                rule, state = self.rule_of(group), self.state[param]
                here = {name: local(value) for name, value in state.items()}
                admission.check_state(admission.Subject(self, group, index), local(param), rule, here)
                complete_state(state, param, group, rule, position)

    def rule_of(self, group: Mapping[str, Any]) -> Rule:
        """The rule that updates ``group``: its own choice, or this optimizer's."""
        name = group.get("rule")
        return self.rule(group) if name is None else class_of_rule(name).rule(group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict` of this class, or of torch's optimizer of the same name.

        Unlike torch's: moments of bf16 parameters stay in float32, or come to it, with a warning, where the state dict
        has them in bf16 (16- and 8-bit state of our own stays); tensors are copied, so the dict is not changed by later
        steps; and where both sides name their parameters, these are matched by name, whatever their order and grouping.

        Raises:
            ValueError: Parameters do not match, or a state does not fit its parameter. Nothing has been loaded then.
        """
        load_state_dict(self, state_dict)
        changes = set()
        for group in self.param_groups:
            rule = self.rule_of(group | {"train_mode": True})  # averaged weights can be loaded, too
            for param in group["params"]:
                if state := self.state.get(param):
                    changes |= widen(state, tensor_names(rule, state), param, group, rule)
        say(changes)

    def __getstate__(self) -> dict[str, Any]:
        # torch's keeps defaults, state and groups alone. What shadows a method (a wrapped `step`) is of this object,
        # and what GradScaler has set is of this step: nothing would remove it from a copy.
        own = {name for name in vars(self) if callable(getattr(type(self), name, None))} | {"grad_scale", "found_inf"}
        public = {k: v for k, v in vars(self).items() if not k.startswith("_") and k not in own}
        return super().__getstate__() | public

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._step_supports_amp_scaling = True
        leave_step_uncompiled(type(self))

    def label(self, group: Mapping[str, Any], index: int) -> str:
        """Text that identifies a parameter in messages: its name, or its index and shape."""
        names = group.get("param_names")
        return (
            f"parameter {names[index]!r}"
            if names
            else f"parameter {index} (shape {tuple(group['params'][index].shape)})"
        )


def class_of_rule(name: str) -> type[FusedOptimizer]:
    """The class whose update a group's `rule` names.

    Raises:
        ValueError: No optimizer has that name, or it is no FusedOptimizer.
    """
    try:
        cls = OPTIMIZERS.get(name)
    except ValueError as error:
        raise ValueError(f"A parameter group has rule={name!r}: {error}") from None
    if not issubclass(cls, FusedOptimizer):
        raise ValueError(f"Invalid rule={name!r} of a group: {cls.__name__} must be a FusedOptimizer, and is not.")
    return cls
