"""FusedOptimizer, the base of torch optimizers whose step is one pass of a backend over all tensors."""

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
from lightning_optim.core.ranges import FRACTION, NON_NEGATIVE, Range, ranges_of
from lightning_optim.core.registry import Registry
from lightning_optim.core.stats import StepStats
from lightning_optim.core.step_hooks import is_trial_step
from lightning_optim.core.uncompiled import leave_step_uncompiled
from lightning_optim.kernels import averages
from lightning_optim.kernels.peak_lr import NEED_PEAK, follow_peak, say_peak, start_peak
from lightning_optim.kernels.rules import Rule, UpdateRule
from lightning_optim.kernels.weight_decay import WeightDecayKind
from lightning_optim.optim import admission, low_precision, other_names, shared_options, update_pass, weight_averages
from lightning_optim.optim.batches import Batches
from lightning_optim.optim.checkpoint import load_state_dict, without_defaults
from lightning_optim.optim.hyperparameters import (
    check_lengths,
    check_values,
    number,
    own_tensors,
    plain_numbers,
    refuse_typos,
)
from lightning_optim.optim.param_checks import check_params
from lightning_optim.optim.ranges import is_number, refuse_unranged, require_ranges
from lightning_optim.optim.shared_options import OwnSignature, SharedOptions
from lightning_optim.optim.state import complete_state, tensor_names
from lightning_optim.optim.widening import warn_of_conversions, widen

OPTIMIZERS: Registry[Optimizer] = Registry(
    "optimizer",
    Optimizer,
    aliases={name: ours for name, (ours, options) in other_names.NAMES.items() if not options and "." not in ours},
    known=other_names.REFUSED
    | {
        name: f"As an optimizer it is {ours!r}{' with ' if options else ''}{other_names.spelt(options)}: write that."
        for name, (ours, options) in other_names.NAMES.items()
        if options or "." in ours
    },
    group="lightning_optim.optimizers",
)
"""Optimizers by name; `lightning_optim.register` adds a user's own."""


class FusedOptimizer(Optimizer):
    """Base class of all optimizers of this package: state, checkpoints and the contract of a step around a rule.

    A subclass defines a typed `__init__` that passes its hyperparameters to this one, the `ranges` of those that are
    numbers, and `rule`. The following attributes control a step. They are read after the closure has run, are not part
    of the state, and their tensors are never read on the host:

    - `grad_scale` (tensor []): divisor of the gradients. Set and removed by `torch.amp.GradScaler`.
    - `found_inf` (tensor []): if non-zero, the step changes nothing, bit for bit, step counts included.
    - `divisor` (tensor [] or [tensors]): another divisor of the gradients. Tensors are the parameters that have a
      gradient, in the order of `param_groups`.
    - `divide_over` (`torch.distributed.ProcessGroup`): ranks that have the same parameters and gradients, among which
      the matrices of `Muon` and `NorMuon`, and the bases of `SOAP`, are divided where that is faster
      (`optim.division`). None for no division, unless a Trainer with DDP sets it; False for none at all.
    - `collect_step_stats`: whether to fill `step_stats` in the same pass, with NaN if the step is skipped.

    `p.grad` is never written; a DTensor gradient whose placements differ from those of its parameter is replaced by the
    same gradient, redistributed (`core.placements.gradient_of`). Parameter groups may override every hyperparameter and
    hold any further keys; the key `rule` of a group names another optimizer whose update it uses
    (`{"params": ..., "rule": "lion"}`). If several groups are given the same tensor as lr, the first keeps the tensor
    and the others get copies, because schedulers fill tensors in place.

    Args:
        params: Parameters, groups, or (name, parameter) pairs.
        defaults: Hyperparameters by name; `lr` is among them.
        **options: Options that all optimizers share; see `SharedOptions`.

    Raises:
        ValueError: A value is out of its range, values contradict each other, or a parameter cannot be updated.
        TypeError: An option is unknown, or there is no `lr`; or, when a subclass is defined, a number in its
            constructor has no range.
    """

    when_to_use: ClassVar[str]
    """One line for `list_optimizers`."""
    memory: ClassVar[str]
    """State per parameter, in words."""
    paper: ClassVar[str]
    """URL of the publication."""
    usual_lr: ClassVar[tuple[float, float] | None] = None
    """Smallest and largest peak of the learning rate in published recipes, fine-tuning included; None if unknown.
    `usual_lr_of` has that of a parameter group."""
    ranges: ClassVar[Mapping[str, Range]] = MappingProxyType(
        {"lr": NON_NEGATIVE, "weight_decay": NON_NEGATIVE, "eps": NON_NEGATIVE, "betas": FRACTION, "beta": FRACTION}
    )
    """Range of each number, or of each element of a tuple, that the constructor takes. The ranges of base classes are
    inherited; an annotation `Annotated[float, Range(0, 1)]` of an argument is the same as an entry."""
    structured: ClassVar[frozenset[str]] = frozenset()
    """Hyperparameters that are neither a number, a flag nor a tuple of fixed length, and that only `check` checks."""
    option_defaults: ClassVar[SharedOptions] = {}
    """Defaults of shared options that differ from `shared_options.DEFAULTS`."""
    refused_options: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Shared options that this class refuses, with the reason; a subclass that defines its own replaces them."""
    __signature__ = OwnSignature()

    grad_scale: Tensor  # Without default values, as GradScaler multiplies into existing ones and deletes them.
    found_inf: Tensor
    divisor: Tensor | None = None
    divide_over: Any = None
    collect_step_stats: bool = False
    step_stats: StepStats | None = None

    _warned_of_peak: bool = False
    _batches: Batches | None = None  # The batches of the last step are not part of the state.
    _updates_in_backward: bool = False
    """Whether hooks of the backward pass update the parameters (`step/released.py`), so that `step` has no update."""

    _step_supports_amp_scaling: bool  # of the object, as torch's: Lightning's wrapper would not find a change to it

    @classmethod
    def usual_lr_of(cls, group: Mapping[str, Any]) -> tuple[float, float] | None:
        """Return `usual_lr` with the settings of a parameter group, some of which change the scale of the rate.

        Args:
            group: A parameter group of this class.
        """
        return cls.usual_lr

    def __init__(self, params: ParamsT, defaults: dict[str, Any], **options: Unpack[SharedOptions]) -> None:
        owner = type(self)
        shared_options.check_names(owner, options)
        if "lr" not in defaults:
            raise TypeError(f"{owner.__name__} gives no default for 'lr', which schedules, decay and monitors read.")
        given: dict[str, Any] = {**shared_options.defaults_of(owner), "weight_decay": 0.0, **defaults, **options}
        self.backend = given.pop("backend")
        if not isinstance(self.backend, str):
            raise ValueError(f"{owner.__name__}: Invalid backend={self.backend!r}: must be the name of a backend.")
        # The constructor's own arguments were checked when the class was defined.
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
        """Return no subclasses, so that short names in LightningCLI (`--optimizer SGD`) still mean torch's classes.

        jsonargparse searches all subclasses of torch's Optimizer, and refuses a name that two of them share. Full paths
        (`lightning_optim.optim.SGD`) are resolved without this list.
        """
        return []

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> Rule:
        """Return the rule for a parameter group with the hyperparameters ``group``."""
        raise NotImplementedError

    @classmethod
    def check(cls, group: Mapping[str, Any]) -> None:
        """Check that hyperparameters, each valid by itself, are consistent.

        Args:
            group: The complete parameter group.

        Raises:
            ValueError: The hyperparameters contradict each other.
        """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in torch's optimizers.

        Args:
            param_group: Parameters under "params", and the settings that differ from those of the optimizer.

        Raises:
            ValueError: A value or a parameter is not valid; the optimizer is then unchanged.
        """
        group = {**param_group, **plain_numbers({k: v for k, v in param_group.items() if k not in PARAMS})}
        owner = type(self)
        if group.get("rule") is not None:
            owner = class_of_rule(group["rule"])
            shared = {"lr", "weight_decay", *shared_options.DEFAULTS}  # These default to the optimizer's.
            # So do all others of its own rule, which a group names to decide which parameters it updates.
            shared |= self.defaults.keys() if owner is type(self) else set()
            own = {name: value for name, value in owner.hyperparameters().items() if name not in shared}
            group = own | group
        filled = self.defaults | group
        filled["weight_decay_kind"] = WeightDecayKind.parse(filled["weight_decay_kind"]).value
        group["weight_decay_kind"] = filled["weight_decay_kind"]
        group["ema"] = filled["ema"] = averages.parse(filled["ema"])
        if group["ema"]:
            group.setdefault("averaged", "")
        start_peak(group, number(owner.__name__, filled, "lr"))
        filled["peak_lr"] = group["peak_lr"]
        refuse_typos(type(self).__name__, param_group, self.defaults.keys() | owner.hyperparameters().keys())
        own_names = owner.hyperparameters()
        free = owner.of_any_length()
        check_lengths(owner.__name__, filled, {n: v for n, v in own_names.items() if n not in free})
        # A name that two classes share, such as `split`, has the values of the class whose rule the group has.
        others = {name: allowed for name, allowed in ranges_of(type(self)).items() if name not in own_names}
        own_ranges = {name: allowed for name, allowed in ranges_of(owner).items() if name in own_names}
        check_values(owner.__name__, filled, others | own_ranges, self.defaults | own_names)
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
        """Return names and defaults of the constructor's arguments, except `params` and `backend`."""
        return {
            name: parameter.default
            for name, parameter in inspect.signature(cls).parameters.items()
            if name not in ("params", "backend") and parameter.kind is not parameter.VAR_KEYWORD
        }

    @classmethod
    def of_any_length(cls) -> frozenset[str]:
        """Return the names of hyperparameters that may be lists of any length: `structured`, and shared options."""
        return shared_options.LISTS.union(*(vars(base).get("structured", ()) for base in cls.__mro__))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient once.

        Args:
            closure: Function that recomputes gradients and returns the loss.

        Returns:
            The result of ``closure``; None without one.

        Raises:
            ValueError: `divisor` has a wrong shape.
            RefusedError: A gradient or a state cannot be used for an update.
        """
        trial = not self.state and is_trial_step(self, closure)  # state is there after the first step
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._updates_in_backward and not trial:
            return loss
        rules = list(map(self.rule_of, self.param_groups))
        for group, rule in zip(self.param_groups, rules, strict=True):
            self._prepare(group, rule, count=not trial)
        if self._batches is None or not self._batches.refill(self, rules):
            self._batches = Batches(self)
        try:
            if not trial:  # A trial step only creates state; some kinds of decay would act even at lr = 0.
                self._apply(self._batches)
        finally:
            self._batches.release()
        return loss

    def begin_in_backward(self) -> None:
        """Prepare all groups for a step whose updates are made one by one (`OneParam`), and count it."""
        for group in self.param_groups:
            self._prepare(group, self.rule_of(group), count=True)

    def _prepare(self, group: dict[str, Any], rule: Rule, *, count: bool) -> None:
        """Count the call if ``count``, follow the peak of lr, and create the values that groups share for a rule.

        Raises:
            RuntimeError: The parameters of the group are at an average.
        """
        if group.get("averaged"):
            weight_averages.refuse_step(type(self).__name__)
        if count and rule.counts_calls and any(param.device.type != "cpu" for param in group["params"]):
            group["calls"] = group.get("calls", 0) + 1
        if count and group["weight_decay_kind"] in NEED_PEAK and follow_peak(group) and not self._warned_of_peak:
            self._warned_of_peak = True
            say_peak(type(self).__name__, group)
        if isinstance(rule, UpdateRule) and rule.shared and group["params"]:
            update_pass.init_shared(self, group, rule)

    def _apply(self, batches: Batches) -> None:
        self.step_stats = update_pass.update(self, batches)

    def forget_step(self) -> None:
        """Let go of what is kept from the last step to make the next one quicker: tables of parameters and state.

        To be called when training is over: state that is then moved or dropped is freed. A further step makes them
        anew.
        """
        self._batches = None

    def make_state(self, params: Iterable[Tensor]) -> None:
        """Create the state that the first step would create for parameters, and keep existing state.

        Args:
            params: Parameters of this optimizer.

        Raises:
            RefusedError: Existing state does not match its parameter.
        """
        wanted = {id(param) for param in params}
        everything = [(group, index) for group in self.param_groups for index in range(len(group["params"]))]
        for position, (group, index) in enumerate(everything):
            param = group["params"][index]
            if id(param) in wanted:
                rule, state = self.rule_of(group), self.state[param]
                admission.check_present_state(admission.Subject(self, group, index), param, rule, state)
                complete_state(state, param, group, rule, position)

    def rule_of(self, group: Mapping[str, Any]) -> Rule:
        """Return the rule that updates ``group``: the one named by its key `rule`, or that of this optimizer."""
        name = group.get("rule")
        return self.rule(group) if name is None else class_of_rule(name).rule(group)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch's method does, without the settings of `checkpoint.UNSAVED_DEFAULTS`."""
        return without_defaults(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict` of this class, or of torch's optimizer of the same name.

        It differs from torch's method in three points. Moments of bf16 parameters are kept in float32, and converted to
        float32 with a warning if the state dict has them in bf16 (16-bit and 8-bit state saved with `state_bits` is not
        converted). Tensors are copied, so that later steps do not change the dict. If parameters are named on both
        sides, they are matched by name, regardless of order and grouping.

        Args:
            state_dict: State dict of this class, or of torch's optimizer of the same name.

        Raises:
            ValueError: Parameters do not match, or a state does not match its parameter. Nothing has been loaded then.
        """
        load_state_dict(self, state_dict)
        changes = set()
        for group in self.param_groups:
            rule = self.rule_of(group | {"train_mode": True})  # Averaged weights may be loaded.
            for param in group["params"]:
                if state := self.state.get(param):
                    changes |= widen(state, tensor_names(rule, state), param, group, rule)
        warn_of_conversions(changes)

    def __getstate__(self) -> dict[str, Any]:
        # torch's optimizers keep only defaults, state and groups. An attribute that shadows a method (a wrapped `step`)
        # belongs to this object, and those of GradScaler to the present step: nothing would remove them from a copy.
        own = {name for name in vars(self) if callable(getattr(type(self), name, None))} | {"grad_scale", "found_inf"}
        own |= {"divide_over"} if self.divide_over else set()  # A process group belongs to this process.
        public = {k: v for k, v in vars(self).items() if not k.startswith("_") and k not in own}
        return super().__getstate__() | public

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.forget_step()  # else the state that is replaced would stay in memory until the next one
        self._step_supports_amp_scaling = True
        leave_step_uncompiled(type(self))

    def label(self, group: Mapping[str, Any], index: int) -> str:
        """Return the text that identifies a parameter in messages: its name, or its index and shape."""
        names = group.get("param_names")
        return (
            f"parameter {names[index]!r}"
            if names
            else f"parameter {index} (shape {tuple(group['params'][index].shape)})"
        )


def class_of_rule(name: str) -> type[FusedOptimizer]:
    """Return the optimizer class that the key `rule` of a group names.

    Raises:
        ValueError: No optimizer has that name, or it is not a FusedOptimizer.
    """
    try:
        cls = OPTIMIZERS.get(name)
    except ValueError as error:
        raise ValueError(f"Invalid rule={name!r} of a group: {error}") from None
    if not issubclass(cls, FusedOptimizer):
        raise ValueError(f"Invalid rule={name!r} of a group: {cls.__name__} must be a FusedOptimizer.")
    return cls
