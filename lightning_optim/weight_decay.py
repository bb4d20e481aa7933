"""What "weight decay" means: one enum, one coefficient function, one expression, shared by every optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, TypeVar

from lightning_optim.messages import nearest

T = TypeVar("T")


class WeightDecayKind(str, Enum):
    """How `weight_decay` λ acts on a weight w at learning rate lr.

    All but L2 multiply the weights by 1 − c before the update; they differ in how c follows a schedule of lr, whose
    peak is kept in each parameter group as `peak_lr`.

    References:
        Loshchilov & Hutter, Decoupled Weight Decay Regularization, 2019, https://arxiv.org/abs/1711.05101;
        Defazio, Why Gradients Rapidly Increase Near the End of Training, 2025, https://arxiv.org/abs/2506.02285
        (corrected).
    """

    DECOUPLED = "decoupled"
    """c = lr·λ, as torch's AdamW."""
    INDEPENDENT = "independent"
    """c = lr/peak·λ: λ is the fraction lost per step at peak, whatever the peak. λ is then far smaller (1e-4, say)."""
    CORRECTED = "corrected"
    """c = lr²·λ/peak: keeps the ratio of gradient norm to weight norm steady as lr falls."""
    L2 = "l2"
    """λ·w is added to the gradient and so enters the moments, as torch's Adam and SGD."""

    @classmethod
    def parse(cls, given: str | WeightDecayKind) -> WeightDecayKind:
        """The kind named ``given``; an unknown name is refused with the nearest.

        Example:
            >>> WeightDecayKind.parse("l2").name
            'L2'
        """
        try:
            return cls(given)
        except ValueError:
            names = [kind.value for kind in cls]
            raise ValueError(f"weight_decay_kind={given!r} is unknown. {nearest(str(given), names)}") from None

    @property
    def needs_peak(self) -> bool:
        """Whether the coefficient divides by `peak_lr`, which must then be positive."""
        return self in (WeightDecayKind.INDEPENDENT, WeightDecayKind.CORRECTED)


def decay_coefficients(kind: WeightDecayKind, lr: T, weight_decay: Any, peak_lr: float) -> tuple[T | float, T | float]:
    """The pair (c, l2): weights shrink by c·w, and l2·w is added to the gradient; one of them is always 0.

    Args:
        kind: The meaning of ``weight_decay``.
        lr: Learning rate of this step; a float, or a device tensor, which is then never read on the host.
        weight_decay: λ.
        peak_lr: The largest learning rate of the schedule. Only the kinds with `needs_peak` read it.

    Example:
        >>> decay_coefficients(WeightDecayKind.CORRECTED, 0.5, 0.1, 1.0)
        (0.025, 0.0)
    """
    if kind is WeightDecayKind.L2:
        return 0.0, weight_decay
    if kind is WeightDecayKind.DECOUPLED:
        return lr * weight_decay, 0.0
    if kind is WeightDecayKind.INDEPENDENT:
        return lr / peak_lr * weight_decay, 0.0  # type: ignore[operator]
    return lr * lr * weight_decay / peak_lr, 0.0  # type: ignore[operator]


def group_decay(group: Mapping[str, Any]) -> tuple[Any, Any]:
    """`decay_coefficients` of a parameter group.

    Example:
        >>> group_decay({"lr": 0.5, "weight_decay": 0.1, "peak_lr": 1.0, "weight_decay_kind": "decoupled"})
        (0.05, 0.0)
    """
    kind = WeightDecayKind(group["weight_decay_kind"])
    if kind is WeightDecayKind.L2 and group.get("decoupled_weight_decay"):  # torch's word in Adam, NAdam and RAdam
        kind = WeightDecayKind.DECOUPLED
    return decay_coefficients(kind, group["lr"], group["weight_decay"], group["peak_lr"])


def total_change(param: T, delta: T, decay: T) -> T:
    """What is subtracted from a weight: the update plus the decay, in one term.

    Run by every backend (its globals are rebound like those of a rule). One term, because a bf16 parameter rounds
    `w·(1 − 1e-5)` back to w: decay survives only inside the sum that Kahan compensation or stochastic rounding sees.
    """
    return delta + decay * param  # type: ignore[operator, no-any-return]
