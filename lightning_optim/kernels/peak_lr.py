"""The peak of a learning rate's schedule, which some kinds of weight decay refer to: known, announced, or seen so far.

Each parameter group keeps it as `peak_lr`. The rule, in this order:

1. A `peak_lr` that the group is given holds.
2. Else what a scheduler says: `max_lr` of the group (torch's OneCycleLR), or else its `initial_lr` (every other of
   torch's, and ours). When that changes, the peak is the new value.
3. Else the learning rate at construction, as without a scheduler, or under torch's ReduceLROnPlateau.

In all cases a step with a higher rate makes that the peak, with a warning: so no step ever decays by more than at the
peak. CyclicLR, or a LambdaLR that multiplies a tiny rate, announces nothing: while it first rises, each rate is the
peak so far, and from the first peak on all is as if it had been known. A caller who knows the peak in advance gives it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_optim.kernels.weight_decay import WeightDecayKind

NEED_PEAK = tuple(kind.value for kind in WeightDecayKind if kind.needs_peak)

GIVEN = "given"
_ROUNDING = 1 + 1e-6  # of a scheduler that computes its own peak


def start_peak(group: dict[str, Any], lr: float) -> None:
    """Give a new group its `peak_lr`, and `peak_lr_from`, which says where it is from.

    Args:
        group: Written.
        lr: Its learning rate.

    Example:
        >>> group = {"initial_lr": 0.1}
        >>> start_peak(group, 0.01)
        >>> group["peak_lr"]
        0.1
    """
    if "peak_lr" in group:
        group.setdefault("peak_lr_from", GIVEN)
        return
    announced = _announced(group)
    group["peak_lr"] = lr if announced is None else announced
    group["peak_lr_from"] = announced


def follow_peak(group: dict[str, Any]) -> bool:
    """Bring `peak_lr` of a group up to date, before a step.

    Args:
        group: Written. On devices whose memory the host must not read, the peak is a tensor there.

    Returns:
        Whether the rate is above all that was known of its peak, as far as the host may look.

    Example:
        >>> group = {"lr": 0.004, "peak_lr": 0.004, "peak_lr_from": None}
        >>> group["max_lr"] = 0.1
        >>> follow_peak(group), group["peak_lr"]
        (False, 0.1)
        >>> group["lr"] = 0.2
        >>> follow_peak(group), group["peak_lr"]
        (True, 0.2)
    """
    announced = _announced(group)
    if announced is not None and group.get("peak_lr_from") not in (GIVEN, announced):
        group["peak_lr"] = group["peak_lr_from"] = announced
    lr, peak = _host(group["lr"]), _host(group["peak_lr"])
    if isinstance(lr, Tensor) or isinstance(peak, Tensor):
        device = lr.device if isinstance(lr, Tensor) else peak.device
        lr, peak = (v.reshape(()) if isinstance(v, Tensor) else torch.full((), v, device=device) for v in (lr, peak))
        group["peak_lr"] = torch.maximum(lr, peak.to(lr))
        return False
    if lr > peak * _ROUNDING:
        group["peak_lr"] = lr
        return True
    return False


def say_peak(label: str, group: Mapping[str, Any]) -> None:
    """Warn that a rate exceeded what was known of its peak.

    Args:
        label: The optimizer's class.
        group: The group.
    """
    warnings.warn(
        f"{label}: lr={float(group['lr']):g} is above the peak known so far, to which weight_decay_kind="
        f"{group['weight_decay_kind']!r} refers; every higher rate is the peak from here on. If lr is still to "
        "rise (CyclicLR, or a function that multiplies a small lr), give the group the largest one as 'peak_lr'.",
        stacklevel=4,
    )


def _announced(group: Mapping[str, Any]) -> float | None:
    """What a scheduler of torch's, or ours, has written into the group; None if the host cannot read it."""
    value = group.get("max_lr", group.get("initial_lr"))
    value = value if value is None else _host(value)
    return None if isinstance(value, Tensor) else value


def _host(value: Any) -> Any:
    """A number as a float, unless it is in memory that the host must not wait for."""
    return value if isinstance(value, Tensor) and value.device.type != "cpu" else float(value)
