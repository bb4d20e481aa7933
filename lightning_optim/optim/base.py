"""FusedOptimizer: a torch optimizer whose step is one pass of a backend over all tensors."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from lightning_optim import kernels
from lightning_optim.core.host import is_set, widest_dtype
from lightning_optim.core.placements import is_partial, is_sharded, partial_refused
from lightning_optim.core.registry import Registry
from lightning_optim.core.sharding import local
from lightning_optim.core.stats import STEP_SUMS, StepStats
from lightning_optim.core.step_hooks import is_trial_step
from lightning_optim.core.transfer import upload
from lightning_optim.core.uncompiled import leave_step_uncompiled
from lightning_optim.kernels import Backend, Batch
from lightning_optim.kernels.peak_lr import NEED_PEAK, follow_peak, say_peak, start_peak
from lightning_optim.kernels.rules import Rule, TensorRule, UpdateRule
from lightning_optim.kernels.weight_decay import WeightDecayKind
from lightning_optim.optim import admission, low_precision
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
from lightning_optim.optim.state import complete_state, tensor_names
from lightning_optim.optim.widening import say, widen

NOT_NUMBERS = {"params", "param_names"}
SHARED = ("lr", "weight_decay", "weight_decay_kind", "maximize", "cautious", *low_precision.DEFAULTS)
"""What a group with a `rule` of its own takes from the optimizer, where it says nothing itself."""


OPTIMIZERS: Registry[Optimizer] = Registry("optimizer", Optimizer)
"""Optimizers by name; `lightning_optim.register` adds a user's own."""

_AS_IT_IS = nullcontext()


class FusedOptimizer(Optimizer):
    """Base of all optimizers here: state, checkpoints and the step pipeline's contract around a rule.

    A subclass has a typed `__init__` that hands its hyperparameters to this one, and `rule`. The attributes below steer
    a step. All are read after the closure has run, none is saved, and none is ever read on the host:

    - `grad_scale` (tensor []): gradients are divided by it. Set and removed by `torch.amp.GradScaler`.
    - `found_inf` (tensor []): non-zero makes the step a no-op, bit for bit, step counts included.
    - `divisor` (tensor [] or [tensors]): gradients are divided by it, too. Tensors are the parameters that have a
      gradient, in the order of `param_groups`.
    - `collect_step_stats`: also fill `step_stats`, in the same pass. NaN where a step was skipped.

    `p.grad` is never written; a DTensor that lies otherwise than its parameter is replaced by the same gradient,
    redistributed (`kernels.placements.gradient_of`). Parameter groups may override every hyperparameter, and hold any
    further keys; a group's `rule` names another optimizer whose update to use for it
    (`{"params": ..., "rule": "lion"}`). Of a tensor lr that several groups are given, the first keeps the tensor itself
    and each other a copy, so that what drives one (schedulers fill tensors in place) leaves the others alone.

    Args:
        params: Parameters, groups, or (name, parameter) pairs.
        defaults: Hyperparameters by name.
        backend: `auto`, or the name of one: then it is an error if that one cannot run on the parameters' device.
    """

    when_to_use: ClassVar[str]
    """One line for `list_optimizers`."""
    memory: ClassVar[str]
    """State per parameter, in words."""
    paper: ClassVar[str]
    """Where it comes from."""

    grad_scale: Tensor  # no values here: GradScaler multiplies into what it finds, and deletes it afterwards
    found_inf: Tensor
    divisor: Tensor | None = None
    collect_step_stats: bool = False
    step_stats: StepStats | None = None

    _peak_said: bool = False  # that a peak of the learning rate was exceeded
    _batches: Batches | None = None  # of the last step; not part of the state

    _step_supports_amp_scaling = True

    def __init__(self, params: ParamsT, defaults: dict[str, Any], *, backend: str = "auto") -> None:
        self.backend = backend
        super().__init__(params, plain_numbers(low_precision.DEFAULTS | defaults))
        leave_step_uncompiled(type(self))

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
        """Raise ValueError if hyperparameters, each valid by itself (`hyperparameters.check_values`), do not agree."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as torch's optimizers do; wrong values are refused before anything changes."""
        group = {**param_group, **plain_numbers({k: v for k, v in param_group.items() if k not in NOT_NUMBERS})}
        owner = type(self)
        if group.get("rule") is not None:
            owner = class_of_rule(group["rule"])
            own = {name: value for name, value in owner.hyperparameters().items() if name not in SHARED}
            group = own | group
        filled = self.defaults | group
        filled["weight_decay_kind"] = WeightDecayKind.parse(filled["weight_decay_kind"]).value
        group["weight_decay_kind"] = filled["weight_decay_kind"]
        start_peak(group, number(owner.__name__, filled, "lr"))
        filled["peak_lr"] = group["peak_lr"]
        refuse_typos(type(self).__name__, param_group, self.defaults.keys() | owner.hyperparameters().keys())
        check_lengths(owner.__name__, filled, owner.hyperparameters())
        check_values(owner.__name__, filled)
        owner.check(filled)
        low_precision.check(owner.__name__, filled, self.rule_of(filled))
        count = len(self.param_groups)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="optimizer contains a parameter group with duplicate")
            super().add_param_group(group)
        own_tensors(self.param_groups, filled.keys() - NOT_NUMBERS)
        try:
            self._check_params(self.param_groups[-1])
        except Exception:
            del self.param_groups[count:]
            raise

    @classmethod
    def hyperparameters(cls) -> dict[str, Any]:
        """Names and defaults of what the constructor takes, `params` and `backend` aside."""
        parameters = inspect.signature(cls).parameters
        return {n: p.default for n, p in parameters.items() if n not in ("params", "backend")}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient, once.

        Args:
            closure: Recomputes gradients and returns the loss, which is passed through.
        """
        trial = is_trial_step(self, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._prepare(group, count=not trial)
        if self._batches is None or not self._batches.refill(self):
            self._batches = Batches(self)
        try:
            if not trial:  # whose state is made now: some kinds of decay act at a rate of 0, too
                self._apply(self._batches)
        finally:
            self._batches.release()
        return loss

    def _prepare(self, group: dict[str, Any], *, count: bool) -> None:
        """Count the call, if it counts, and make the numbers that groups share, where the rule wants them."""
        rule = self.rule_of(group)
        if count and rule.counts_calls and any(param.device.type != "cpu" for param in group["params"]):
            group["calls"] = group.get("calls", 0) + 1
        if count and group["weight_decay_kind"] in NEED_PEAK and follow_peak(group) and not self._peak_said:
            self._peak_said = True
            say_peak(type(self).__name__, group)
        if _shares(rule) and group["params"]:
            self._init_shared(group, rule)

    def _apply(self, sorted_: Batches) -> None:
        count = len(sorted_.numel)
        if self.divisor is not None and self.divisor.shape not in ((), (count,)):
            raise ValueError(
                f"{type(self).__name__}: divisor has shape {tuple(self.divisor.shape)}; needed is [] or one value for"
                f" each parameter with a gradient, [{count}]."
            )
        new_shared = self._share(sorted_)
        collected: list[Tensor] = []
        for batch, rows in zip(sorted_.batches, sorted_.rows, strict=True):
            skip = _on(getattr(self, "found_inf", None), batch.device)
            backend, divisor = self._backend_of(batch), self._divisor(rows, batch.device)
            with _AS_IT_IS if batch.plain else admission.by_name(self, batch.full_params):
                sums = backend.apply(batch, divisor=divisor, skip=skip, collect=self.collect_step_stats)
            if not (batch.device.type == "cpu" and is_set(skip)):  # elsewhere only the device knows
                torch.autograd.graph.increment_version(batch.written)
            if sums is not None:
                collected.append(sums)
        for old, new in new_shared:
            old.copy_(new)
        self.step_stats = self._stats(sorted_, collected) if self.collect_step_stats else None

    def _backend_of(self, batch: Batch) -> Backend:
        backend = kernels.choose(self.backend, batch.device)
        able = batch.plain and backend.supports(batch)
        if not able or (batch.low_precision and not backend.low_precision):
            return kernels.get_backend("reference")
        return backend

    def _share(self, sorted_: Batches) -> list[tuple[Tensor, Tensor]]:
        """Give batches the new values of `shared`; pairs (old, new) to be written when all batches are through."""
        pairs = []
        rules = {type(batch.rule): batch.rule for batch in sorted_.batches if _shares(batch.rule)}
        for kind, rule in rules.items():
            assert isinstance(rule, UpdateRule)
            members = [(b, rows) for b, rows in zip(sorted_.batches, sorted_.rows, strict=True) if type(b.rule) is kind]
            groups = [g for g in self.param_groups if _has_shared(g, rule) and type(self.rule_of(g)) is kind]
            device = members[0][0].device
            skip = _on(getattr(self, "found_inf", None), device)
            totals: dict[str, Tensor] = {}
            for batch, rows in members:
                with _AS_IT_IS if batch.plain else admission.by_name(self, batch.full_params):
                    sums = self._backend_of(batch).sums(batch, self._divisor(rows, batch.device))
                for name, column in sums.items():
                    total = column.sum().to(device, non_blocking=True)
                    totals[name] = totals[name] + total if name in totals else total
            new = rule.share(groups[0], totals)
            for batch, _ in members:
                for name, value in new.items():
                    batch.shared[name] = value.to(batch.device, non_blocking=True)
            for group in groups:
                for name, value in new.items():
                    old = group[name]
                    value = value.to(old.device, non_blocking=True)
                    if skip is not None:
                        value = torch.where(skip.to(old.device) != 0, old, value)
                    pairs.append((old, value))
        return pairs

    def _init_shared(self, group: dict[str, Any], rule: UpdateRule) -> None:
        """Give ``group`` the values of `shared`, where it lacks them: those of another group, else the first ones."""
        device = group["params"][0].device
        first = group.get(rule.shared[0])  # a number there is another optimizer's hyperparameter of that name
        if isinstance(first, Tensor) and first.device == device:
            return
        given = [g for g in self.param_groups if _has_shared(g, rule) and type(self.rule_of(g)) is type(rule)]
        values = given[0] if given else rule.init_shared(group)
        for name in rule.shared:
            value = values[name]
            if not isinstance(value, Tensor):
                value = upload(value, device, widest_dtype(device))
            group[name] = value.to(device, widest_dtype(device), copy=True, non_blocking=True)

    def make_state(self, params: Iterable[Tensor]) -> None:
        """Give parameters the state that their first step would; what they have stays.

        Args:
            params: Some of this optimizer's.
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

    def _divisor(self, rows: list[int], device: torch.device) -> Tensor | None:
        """What the gradients in ``rows`` are divided by: [] or [rows], on ``device``."""
        scale = _on(getattr(self, "grad_scale", None), device)
        divisor = _on(self.divisor, device)
        if divisor is not None and divisor.dim() == 1 and len(rows) != divisor.numel():
            divisor = divisor[upload(rows, device)]
        if scale is None or divisor is None:
            return divisor if scale is None else scale.reshape(())
        return divisor * scale.reshape(())

    def _stats(self, sorted_: Batches, collected: list[Tensor]) -> StepStats:
        if len(collected) == 1:
            (sums,) = collected
        else:
            device = collected[0].device if collected else torch.device("cpu")
            sums = torch.empty(len(sorted_.numel), len(STEP_SUMS), device=device)
            for rows, part in zip(sorted_.rows, collected, strict=True):
                sums[upload(rows, device)] = part.to(device, non_blocking=True)
        return StepStats(sums, sorted_.group_sizes, sorted_.numel)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, or of torch's optimizer of the same name.

        Unlike torch's: moments of bf16 parameters stay in float32, or come to it, with a warning, where the state dict
        has them in bf16 (16- and 8-bit state of our own stays); tensors are copied, so the dict is not changed by later
        steps; and where both sides name their parameters, these are matched by name, whatever their order and grouping.
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
        # and what GradScaler has set is of this step: nobody would remove it from a copy.
        own = {name for name in vars(self) if callable(getattr(type(self), name, None))} | {"grad_scale", "found_inf"}
        public = {k: v for k, v in vars(self).items() if not k.startswith("_") and k not in own}
        return super().__getstate__() | public

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        leave_step_uncompiled(type(self))

    def _check_params(self, group: Mapping[str, Any]) -> None:
        seen: set[int] = set()
        rule = self.rule_of(group)
        for index, param in enumerate(group["params"]):
            label = f"{type(self).__name__}: {self.label(group, index)}"
            if not param.is_floating_point():
                raise ValueError(
                    f"{label} has dtype {param.dtype}; needed is a real floating-point one. Frozen "
                    "integers belong in buffers; view complex parameters as real."
                )
            if param.layout is not torch.strided:
                raise ValueError(f"{label} has the layout {param.layout}; needed is torch.strided (dense).")
            if id(param) in seen:  # torch warns; here two threads would update the same memory
                raise ValueError(f"{label} is in the group twice; needed is each parameter once.")
            seen.add(id(param))
            low_precision.check_param(label, group, param)
            if is_partial(param):
                raise ValueError(partial_refused(label, param))
            if isinstance(rule, TensorRule) and is_sharded(param):
                raise ValueError(
                    f"{label} is a DTensor sharded over ranks, and {type(rule).__name__} needs whole tensors. Leave it "
                    "out of FSDP2 and tensor parallelism, or choose an elementwise optimizer for it (a group with "
                    "rule='adamw')."
                )
            reason = rule.why_not(param, group)
            if reason is not None:
                raise ValueError(f"{label}: {reason}")
            kernels.choose(self.backend, param.device)

    def label(self, group: Mapping[str, Any], index: int) -> str:
        """How messages call a parameter: by its name, or by its place and shape."""
        names = group.get("param_names")
        return (
            f"parameter {names[index]!r}"
            if names
            else f"parameter {index} (shape {tuple(group['params'][index].shape)})"
        )


def class_of_rule(name: str) -> type[FusedOptimizer]:
    """The class whose update a group's `rule` names.

    Raises:
        ValueError: There is none of that name, or it is not one of ours, whose update can be taken by itself.
    """
    try:
        cls = OPTIMIZERS.get(name)
    except ValueError as error:
        raise ValueError(f"A parameter group has rule={name!r}: {error}") from None
    if not issubclass(cls, FusedOptimizer):
        raise ValueError(f"Invalid rule={name!r} of a group: {cls.__name__} must be a FusedOptimizer, and is not.")
    return cls


def _shares(rule: Rule) -> TypeGuard[UpdateRule]:
    return isinstance(rule, UpdateRule) and bool(rule.shared)


def _has_shared(group: Mapping[str, Any], rule: UpdateRule) -> bool:
    return isinstance(group.get(rule.shared[0]), Tensor)


def _on(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return tensor if tensor is None or tensor.device == device else tensor.to(device, non_blocking=True)
