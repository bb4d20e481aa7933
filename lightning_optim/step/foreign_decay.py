"""Decoupled weight decay for optimizers that have none, or only one that passes through their moments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.core.host import is_set
from lightning_optim.core.step_hooks import after_closure, calls_already, closure_of, is_trial_step
from lightning_optim.core.suggest import nearest
from lightning_optim.core.uncompiled import uncompiled
from lightning_optim.kernels.peak_lr import follow_peak, say_peak, start_peak
from lightning_optim.kernels.weight_decay import WeightDecayKind, decay_coefficients
from lightning_optim.optim import FusedOptimizer
from lightning_optim.step.evaluations import updating_optimizer

_KINDS = (WeightDecayKind.DECOUPLED, WeightDecayKind.INDEPENDENT, WeightDecayKind.CORRECTED)


class ForeignDecay:
    """Decoupled weight decay for an optimizer of another package, applied right before each of its updates.

    All parameters are scaled in one foreach call, w ← (1 - c)·w. With `torch.optim.AdamW` and ``weight_decay=0`` the
    result is bit for bit that of its own decay. Parameters without a gradient are left unchanged, and so are all
    parameters on a skipped step.

    Args:
        optimizer: The optimizer; not one of `lightning_optim.optim`, which have every kind built in.
        weight_decay: λ, above 0.
        kind: `decoupled`, `independent` or `corrected`; see `WeightDecayKind`.
        groups: λ of individual parameter groups, by their ``name``; None for ``weight_decay`` in all of them.

    Raises:
        ValueError: The kind acts on more than the weights, a value is out of range, the optimizer has a weight decay of
            its own, or ``groups`` contains a name that is not one of its groups.

    Example:
        >>> weight = torch.nn.Parameter(torch.full((1,), 2.0))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> decay = ForeignDecay(optimizer, weight_decay=0.5)
        >>> weight.grad = torch.zeros(1)
        >>> optimizer.step()
        >>> weight.item()
        1.899999976158142
        >>> decay.close()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        weight_decay: float,
        kind: str | WeightDecayKind = "decoupled",
        groups: Mapping[str, float] | None = None,
    ) -> None:
        self.kind = check_decay(weight_decay, kind, groups)
        updates = updating_optimizer(optimizer)
        label = type(updates).__name__
        if isinstance(updates, torch.optim.LBFGS):
            raise ValueError(_several(label))
        if isinstance(updates, FusedOptimizer):
            raise ValueError(
                f"{label} has every kind of weight decay built in, in the same pass as its update. Set its "
                "weight_decay and weight_decay_kind instead."
            )
        for index, group in enumerate(optimizer.param_groups):
            if group.get("weight_decay"):
                raise ValueError(
                    f"Weights would decay twice: {label} has weight_decay={group['weight_decay']} in group "
                    f"{group.get('name', index)!r}, and this would add {weight_decay}. Set weight_decay=0 of the "
                    "optimizer."
                )
        names = [str(group.get("name", index)) for index, group in enumerate(optimizer.param_groups)]
        for name in groups or {}:
            if name not in names:
                raise ValueError(f"{label} has no parameter group {name!r}. {nearest(name, names)}")
        self.weight_decays = {name: float((groups or {}).get(name, weight_decay)) for name in names}
        self.weight_decay = float(weight_decay)
        self._peak_said = False
        self._optimizer, self._evaluations = updates, 0
        self._handle = updates.register_step_pre_hook(uncompiled(self._before))

    def close(self) -> None:
        """Remove the decay from the optimizer."""
        self._handle.remove()

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        if is_trial_step(optimizer, closure_of(args, kwargs)):
            return args, kwargs
        if not calls_already(closure_of(args, kwargs), self._decay):
            self._evaluations = 0
        return after_closure(args, kwargs, self._decay)

    @torch.no_grad()
    def _decay(self, loss: Any) -> None:
        optimizer = self._optimizer
        self._evaluations += 1
        if self._evaluations > 1:
            raise RuntimeError(_several(type(optimizer).__name__))
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and found_inf.device.type == "cpu":
            if is_set(found_inf):
                return
            found_inf = None
        params: list[Tensor] = []
        factors: list[float] = []
        for index, group in enumerate(optimizer.param_groups):
            decay = self._coefficient(group, str(group.get("name", index)), type(optimizer).__name__)
            taking_part = [param for param in group["params"] if param.grad is not None]
            if not taking_part or (decay == 0 and not isinstance(decay, Tensor)):
                continue
            if isinstance(decay, Tensor) or found_inf is not None:
                # The host does not know these numbers, so the factor is computed on the device.
                kept = 1 - (decay if found_inf is None else decay * (found_inf == 0))
                torch._foreach_mul_(taking_part, kept.to(taking_part[0].dtype))
            else:
                params += taking_part
                factors += [1 - decay] * len(taking_part)
        if params:
            torch._foreach_mul_(params, factors)

    def _coefficient(self, group: dict[str, Any], name: str, label: str) -> Any:
        weight_decay = self.weight_decays.get(name, self.weight_decay)
        if not weight_decay:
            return 0.0
        if self.kind.needs_peak and "peak_lr_from" not in group:
            start_peak(group, float(group["lr"]))
        if self.kind.needs_peak and follow_peak(group) and not self._peak_said:
            self._peak_said = True
            say_peak(label, group | {"weight_decay_kind": self.kind.value})
        return decay_coefficients(self.kind, group["lr"], weight_decay, group.get("peak_lr", 0.0))[0]


def _several(label: str) -> str:
    return (
        f"{label} evaluates its closure several times per step, so that its parameters cannot be shrunk once, right "
        "before its update. Use another optimizer, or its own weight decay."
    )


def check_decay(
    weight_decay: float, kind: str | WeightDecayKind, groups: Mapping[str, float] | None
) -> WeightDecayKind:
    """Check the arguments of `ForeignDecay` as far as that is possible without an optimizer.

    Args:
        weight_decay: λ of all groups.
        kind: The kind of weight decay.
        groups: λ of individual groups, by name.

    Returns:
        The parsed kind.

    Raises:
        ValueError: The kind acts on more than the weights, or a value is out of range.
    """
    parsed = WeightDecayKind.parse(kind)
    if parsed not in _KINDS:
        raise ValueError(
            f"Invalid kind={parsed.value!r} of weight decay: must be one of "
            f"{', '.join(repr(kind.value) for kind in _KINDS)} with an optimizer of another package, because the other "
            "kinds need access to its update. The optimizers of lightning_optim.optim have every kind."
        )
    given = {"weight_decay": weight_decay, **{f"groups[{name!r}]": value for name, value in (groups or {}).items()}}
    for label, value in given.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0 or (label == "weight_decay" and value == 0):
            least = "above 0" if label == "weight_decay" else "at least 0"
            raise ValueError(f"Invalid {label}={value!r}: must be a finite number {least}.")
    return parsed
