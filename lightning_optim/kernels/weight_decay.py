"""What "weight decay" means: one enum, one coefficient function, one expression, shared by every optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_optim.core.suggest import nearest
from lightning_optim.kernels.rules import absolute, maximum, minimum, where

T = TypeVar("T")


class WeightDecayKind(str, Enum):
    """How `weight_decay` λ acts on a weight w at learning rate lr, beside an update u (w ← w − u without decay).

    References:
        Loshchilov & Hutter, Decoupled Weight Decay Regularization, 2019, https://arxiv.org/abs/1711.05101
        (decoupled, and independent, which is Algorithm 2 as printed);
        Defazio, Why Gradients Rapidly Increase Near the End of Training, 2025, https://arxiv.org/abs/2506.02285
        (corrected);
        Parikh & Boyd, Proximal Algorithms, 2014, section 6.5.2 (l1);
        Li et al., Explicit Inductive Bias for Transfer Learning, 2018, https://arxiv.org/abs/1802.01483 (l2_sp);
        Chen et al., Cautious Weight Decay, 2025, https://arxiv.org/abs/2510.12402 (cautious);
        Kosson et al., Rotational Equilibrium, 2024, https://arxiv.org/abs/2305.17212 (norm).
    """

    DECOUPLED = "decoupled"
    """w ← w - u - c·w with c = lr·λ, as torch's AdamW."""
    INDEPENDENT = "independent"
    """The same with c = lr/peak·λ: λ is the fraction lost per step at peak, whatever the peak, and far smaller (1e-4,
    say). The peak of a schedule of lr is kept in each parameter group as `peak_lr`;
    `lightning_optim.kernels.peak_lr` says what it is under which scheduler."""
    CORRECTED = "corrected"
    """The same with c = lr²·λ/peak: keeps the ratio of gradient norm to weight norm steady as lr falls."""
    L2 = "l2"
    """λ·w is added to the gradient and so enters the moments, as torch's Adam and SGD."""
    L1 = "l1"
    """w ← S(w - u, lr·λ), where S moves towards 0 by its second argument and stops there: weights become exactly 0."""
    L2_SP = "l2_sp"
    """w ← w - u - lr·λ·(w - w₀): towards the weights at the optimizer's first step, for fine-tuning. One more state."""
    CAUTIOUS = "cautious"
    """Decoupled, where update and decay point the same way (u·w ≥ 0) only: decay never works against the gradient."""
    NORM = "norm"
    """Each tensor is scaled to a root mean square of λ after its update, instead of decaying: w ← λ·v/rms(v) with
    v = w - u. λ is then about what the weights were initialised with (0.02, say); tensors with λ = 0 are left alone."""

    @classmethod
    def parse(cls, given: str | WeightDecayKind) -> WeightDecayKind:
        """The kind named ``given``.

        Raises:
            ValueError: There is none of that name; the message names the nearest.

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
    """The pair (c, l2): the `decay` of the kind's function in `APPLY_DECAY`, and λ for the gradient; one is always 0.

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
    if kind.needs_peak:
        peak_lr = where(peak_lr != 0, peak_lr, 1.0)  # a peak of 0, so far, is of rates of 0
        if kind is WeightDecayKind.INDEPENDENT:
            return lr / peak_lr * weight_decay, 0.0  # type: ignore[operator]
        return lr * lr * weight_decay / peak_lr, 0.0  # type: ignore[operator]
    if kind is WeightDecayKind.NORM:
        return weight_decay, 0.0
    return lr * weight_decay, 0.0


def group_decay(group: Mapping[str, Any]) -> tuple[Any, Any]:
    """`decay_coefficients` of a parameter group.

    Example:
        >>> group_decay({"lr": 0.5, "weight_decay": 0.1, "peak_lr": 1.0, "weight_decay_kind": "decoupled"})
        (0.05, 0.0)
    """
    kind = _kind(group)
    return decay_coefficients(kind, group["lr"], group["weight_decay"], group["peak_lr"])


def decay_form(group: Mapping[str, Any]) -> str:
    """Which of `APPLY_DECAY` a parameter group needs; the plainest where nothing decays.

    Example:
        >>> decay_form({"weight_decay": 0.1, "weight_decay_kind": "independent"})
        'shrink'
    """
    decays = isinstance(group["weight_decay"], Tensor) or group["weight_decay"] != 0
    return _FORMS.get(_kind(group), "shrink") if decays else "shrink"


def decay_forms(groups: Iterable[Mapping[str, Any]]) -> list[str]:
    """`decay_form` of each group; asked at every step, of perhaps hundreds."""
    return list(map(decay_form, groups))


def _kind(group: Mapping[str, Any]) -> WeightDecayKind:
    return _meaning(group["weight_decay_kind"], bool(group.get("decoupled_weight_decay")))


@cache  # to make an enum of a name takes longer than everything else that a step does with it
def _meaning(name: str, decoupled: bool) -> WeightDecayKind:
    kind = WeightDecayKind(name)
    if kind is WeightDecayKind.L2 and decoupled:  # torch's word in Adam, NAdam and RAdam
        return WeightDecayKind.DECOUPLED
    return kind


# What is subtracted from a weight: the update plus the decay, in one term, because a bf16 parameter rounds
# `w·(1 − 1e-5)` back to w: decay survives only inside the sum that Kahan compensation or stochastic rounding sees.
# Run by every backend, with the named functions rebound like those of a rule; so there are no literals.


def shrink(param: Any, delta: Any, decay: Any) -> Any:
    """Towards 0 in proportion."""
    return delta + decay * param


def shrink_to_zero(param: Any, delta: Any, decay: Any) -> Any:
    """Towards 0 by a fixed amount, and no further."""
    return delta + minimum(maximum(param - delta, -decay), decay)


def shrink_where_aligned(param: Any, delta: Any, decay: Any) -> Any:
    """Towards 0 in proportion, where the update does not point away from it."""
    product = delta * param
    return where(product == absolute(product), delta + decay * param, delta)


def toward_initial(param: Any, delta: Any, decay: Any, initial: Any) -> Any:
    """Towards the initial weight in proportion."""
    return delta + decay * (param - initial)


def rescale(param: Any, delta: Any, decay: Any) -> Any:
    """To the moved weight times a factor, which is given in place of the decay."""
    return param - decay * (param - delta)


APPLY_DECAY: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (shrink, shrink_to_zero, shrink_where_aligned, toward_initial, rescale)
}
"""Amount to subtract from a weight, by form. `toward_initial` also takes `INITIAL`; `rescale` takes `norm_factor`."""

# What decay alone takes off a weight is, for statistics, `decay_factor` times one of these. Not the change minus the
# update, which for a decay of 1e-8 beside an update of 1e-3 would be rounding. Nor the product itself: a compiler that
# finds it twice multiplies and adds in another way, and a step that is measured must be bit for bit one that is not.


def shrunk_to_zero(param: Any, delta: Any, decay: Any) -> Any:
    """Of `shrink_to_zero`."""
    return minimum(maximum(param - delta, -decay), decay)


def shrunk_where_aligned(param: Any, delta: Any, decay: Any) -> Any:
    """Of `shrink_where_aligned`."""
    product = delta * param
    return where(product == absolute(product), param, param - param)


def distance_from_initial(param: Any, delta: Any, decay: Any, initial: Any) -> Any:
    """Of `toward_initial`."""
    return param - initial


def rescaled(param: Any, delta: Any, decay: Any) -> Any:
    """Of `rescale`."""
    return param - delta


DECAY_TERM: dict[str, Callable[..., Any]] = {
    "shrink_to_zero": shrunk_to_zero,
    "shrink_where_aligned": shrunk_where_aligned,
    "toward_initial": distance_from_initial,
    "rescale": rescaled,
}
"""By form, as `APPLY_DECAY`. Of `shrink` it is the weight, whose square sum is taken anyway."""


def decay_factor(form: str, decay: Tensor) -> Tensor:
    """What to multiply the value of `DECAY_TERM` by, for what decay takes off; ``decay`` as `APPLY_DECAY` has it."""
    if form == "rescale":
        return 1 - decay
    return torch.ones_like(decay) if form == "shrink_to_zero" else decay


INITIAL = "initial_param"
"""The state that `toward_initial` needs: the weight at the optimizer's first step, in the parameter's dtype."""

_FORMS = {
    WeightDecayKind.L1: "shrink_to_zero",
    WeightDecayKind.L2_SP: "toward_initial",
    WeightDecayKind.CAUTIOUS: "shrink_where_aligned",
    WeightDecayKind.NORM: "rescale",
}


def norm_factor(target: Tensor, moved_sq: Tensor, numel: Tensor) -> Tensor:
    """What brings moved weights to a root mean square of ``target``; 1 where that is 0, or they are all 0.

    Args:
        target: λ of each tensor, [tensors].
        moved_sq: Square sum of each (whole) tensor after its update, [tensors].
        numel: Number of elements of each (whole) tensor, [tensors].
    """
    rms = (moved_sq / numel).sqrt()
    return torch.where((target > 0) & (rms > 0), target / rms, 1.0)
