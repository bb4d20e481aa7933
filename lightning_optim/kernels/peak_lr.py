"""Peak of the learning rate schedule, on which some kinds of weight decay depend: given, announced or observed.

Each parameter group stores it as `peak_lr`. Its value is, in order of precedence:

1. The `peak_lr` given in the group.
2. The value that a scheduler announces: `max_lr` of the group (torch's OneCycleLR), otherwise its `initial_lr` (all
   other schedulers of torch, and ours). If the announced value changes, the peak changes with it.
3. The learning rate at construction, without a scheduler or with torch's ReduceLROnPlateau.

In all cases a step with a higher learning rate raises the peak to it, with a warning, so that no step decays by more
than it would at the peak. CyclicLR, and a LambdaLR that multiplies a tiny learning rate, announce no peak: while the
learning rate rises for the first time, each value is the peak so far, and afterwards the peak is correct. Give
`peak_lr` if you know it in advance.
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
_ROUNDING = 1 + 1e-6  # This tolerates the rounding error of a scheduler that computes its own peak.


def start_peak(group: dict[str, Any], lr: float) -> None:
    """Set `peak_lr` of a new group, and `peak_lr_from`, the source of that value.

    Args:
        group: The parameter group, modified in place.
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
    """Update `peak_lr` of a group before a step.

    Args:
        group: The parameter group, modified in place. On devices whose memory the host must not read, the peak is a
            tensor, shape [], on the device.

    Returns:
        Whether the learning rate exceeded the known peak; always False where the host must not read it.

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
    """Warn that the learning rate exceeded the known peak.

    Args:
        label: Name of the optimizer's class.
        group: The parameter group.
    """
    warnings.warn(
        f"{label}: lr={float(group['lr']):g} is above the peak known so far, on which weight_decay_kind="
        f"{group['weight_decay_kind']!r} depends; from now on the highest lr so far is used as the peak. If lr will "
        "rise further (CyclicLR, or a function that multiplies a small lr), give the group its largest lr as "
        "'peak_lr'.",
        stacklevel=4,
    )


def _announced(group: Mapping[str, Any]) -> float | None:
    """Return the peak that a scheduler has written into the group; None if there is none or the host cannot read it."""
    value = group.get("max_lr", group.get("initial_lr"))
    value = value if value is None else _host(value)
    return None if isinstance(value, Tensor) else value


def _host(value: Any) -> Any:
    """Convert a number to a float, unless it is a tensor on a device for which the host would have to wait."""
    return value if isinstance(value, Tensor) and value.device.type != "cpu" else float(value)
