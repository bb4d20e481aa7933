"""Kinds of weight decay, their coefficients and their arithmetic, shared by all optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_optim.core.suggest import nearest
from lightning_optim.kernels.decay_kind import DECAY_KINDS, own_form
from lightning_optim.kernels.rules import absolute, maximum, minimum, where

T = TypeVar("T")


class WeightDecayKind(str, Enum):
    """Action of `weight_decay` λ on a weight w at learning rate lr, for an update u (w ← w − u without decay).

    A [`DecayKind`][lightning_optim.optim.DecayKind] of your own has a name as well, once it is registered.

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
    """w ← w - u - c·w with c = lr·λ, as in torch's AdamW."""
    INDEPENDENT = "independent"
    """The same with c = lr/peak·λ: λ is the fraction lost per step at the peak of lr, independent of that peak, and far
    smaller than usual (for example 1e-4). Each parameter group stores the peak as `peak_lr`;
    `lightning_optim.kernels.peak_lr` describes its value under each scheduler."""
    CORRECTED = "corrected"
    """The same with c = lr²·λ/peak, which keeps the ratio of gradient norm to weight norm steady as lr falls."""
    L2 = "l2"
    """λ·w is added to the gradient and so enters the moments, as in torch's Adam and SGD."""
    L1 = "l1"
    """w ← S(w - u, lr·λ), where S moves its first argument towards 0 by the second and stops at exactly 0."""
    L2_SP = "l2_sp"
    """w ← w - u - lr·λ·(w - w₀): towards the weights at the optimizer's first step, for fine-tuning; one more state."""
    CAUTIOUS = "cautious"
    """Decoupled, but only where update and decay point the same way (u·w ≥ 0), so never against the gradient."""
    NORM = "norm"
    """Instead of decaying, each tensor is rescaled to a root mean square of λ after its update: w ← λ·v/rms(v) with
    v = w - u. λ is then about the root mean square at initialisation (for example 0.02); tensors with λ = 0 are not
    rescaled."""

    @classmethod
    def _missing_(cls, value: object) -> WeightDecayKind | None:
        """Return a member for the name of a registered `DecayKind`, which is equal to every other one of that name."""
        if not isinstance(value, str) or value not in DECAY_KINDS:
            return None
        name = value.lower().replace("-", "_")
        member = str.__new__(cls, name)
        member._name_, member._value_ = name.upper(), name
        return member

    @classmethod
    def parse(cls, given: str | WeightDecayKind) -> WeightDecayKind:
        """Return the kind called ``given``.

        Raises:
            ValueError: No kind has that name; the message suggests the nearest one.

        Example:
            >>> WeightDecayKind.parse("l2").name
            'L2'
        """
        try:
            return cls(given)
        except ValueError:
            names = [*(kind.value for kind in cls), *DECAY_KINDS.names()]
            raise ValueError(
                f"Invalid weight_decay_kind={given!r}: must be the name of a kind. {nearest(str(given), names)}"
            ) from None

    @property
    def needs_peak(self) -> bool:
        """Whether the coefficient divides by `peak_lr`, which must then be positive."""
        return self in (WeightDecayKind.INDEPENDENT, WeightDecayKind.CORRECTED)


def decay_coefficients(kind: WeightDecayKind, lr: T, weight_decay: Any, peak_lr: float) -> tuple[T | float, T | float]:
    """Compute the coefficients (c, l2) of weight decay.

    Args:
        kind: Kind of weight decay.
        lr: Learning rate of this step, a float or a device tensor of shape [], which the host never reads.
        weight_decay: λ.
        peak_lr: Largest learning rate of the schedule; used only by kinds with `needs_peak`.

    Returns:
        c, the argument `decay` of the kind's function in `APPLY_DECAY`, and the factor of w in the gradient. At least
        one of them is 0.

    Example:
        >>> decay_coefficients(WeightDecayKind.CORRECTED, 0.5, 0.1, 1.0)
        (0.025, 0.0)
    """
    if kind is WeightDecayKind.L2:
        return 0.0, weight_decay
    if kind.needs_peak:
        peak_lr = where(peak_lr != 0, peak_lr, 1.0)  # The peak is 0 while all learning rates so far were 0.
        if kind is WeightDecayKind.INDEPENDENT:
            return lr / peak_lr * weight_decay, 0.0  # type: ignore[operator]
        return lr * lr * weight_decay / peak_lr, 0.0  # type: ignore[operator]
    if kind is WeightDecayKind.NORM:
        return weight_decay, 0.0
    if kind not in _FORMS:
        return DECAY_KINDS.get(kind.value).coefficient(lr, weight_decay), 0.0
    return lr * weight_decay, 0.0


def group_decay(group: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return `decay_coefficients` of a parameter group.

    Example:
        >>> group_decay({"lr": 0.5, "weight_decay": 0.1, "peak_lr": 1.0, "weight_decay_kind": "decoupled"})
        (0.05, 0.0)
    """
    kind = _kind(group)
    return decay_coefficients(kind, group["lr"], group["weight_decay"], group["peak_lr"])


def decay_form(group: Mapping[str, Any]) -> str:
    """Return the name in `APPLY_DECAY` that a parameter group needs; `shrink` where nothing decays.

    Example:
        >>> decay_form({"weight_decay": 0.1, "weight_decay_kind": "independent"})
        'shrink'
    """
    decays = isinstance(group["weight_decay"], Tensor) or group["weight_decay"] != 0
    if not decays:
        return "shrink"
    kind = _kind(group)
    return _FORMS.get(kind) or own_form(DECAY_KINDS.get(kind.value), APPLY_DECAY, DECAY_TERM)


def decay_forms(groups: Iterable[Mapping[str, Any]]) -> list[str]:
    """`decay_form` of each group; asked at every step, of perhaps hundreds."""
    return list(map(decay_form, groups))


def _kind(group: Mapping[str, Any]) -> WeightDecayKind:
    return _meaning(group["weight_decay_kind"], bool(group.get("decoupled_weight_decay")))


@cache  # to convert a name to an enum member takes longer than everything else that a step does with it
def _meaning(name: str, decoupled: bool) -> WeightDecayKind:
    kind = WeightDecayKind(name)
    if kind is WeightDecayKind.L2 and decoupled:  # Adam, NAdam, RAdam
        return WeightDecayKind.DECOUPLED
    return kind


# The following functions return the amount to subtract from a weight: update plus decay in one term, because a bf16
# parameter rounds `w·(1 − 1e-5)` back to w, and decay survives only inside the sum that Kahan compensation or
# stochastic rounding receives. Every backend runs them with the named functions rebound like those of a rule, so they
# contain no literals.


def shrink(param: Any, delta: Any, decay: Any) -> Any:
    """Decay towards 0 in proportion to the weight."""
    return delta + decay * param


def shrink_to_zero(param: Any, delta: Any, decay: Any) -> Any:
    """Decay towards 0 by a fixed amount, and stop there."""
    return delta + minimum(maximum(param - delta, -decay), decay)


def shrink_where_aligned(param: Any, delta: Any, decay: Any) -> Any:
    """Decay towards 0 in proportion to the weight, except where the update points away from 0."""
    product = delta * param
    return where(product == absolute(product), delta + decay * param, delta)


def toward_initial(param: Any, delta: Any, decay: Any, initial: Any) -> Any:
    """Decay towards the initial weight in proportion to the distance."""
    return delta + decay * (param - initial)


def rescale(param: Any, delta: Any, decay: Any) -> Any:
    """Multiply the updated weight by a factor, which ``decay`` holds."""
    return param - decay * (param - delta)


APPLY_DECAY: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (shrink, shrink_to_zero, shrink_where_aligned, toward_initial, rescale)
}
"""Amount to subtract from a weight, by form; `own_form` adds those of registered kinds. `toward_initial` also takes
`INITIAL`; for `rescale`, `decay` is `norm_factor`."""

# For statistics, the part of the decay in the change of a weight is `decay_factor` times one of the following. It is
# not computed as the change minus the update, because a decay of 1e-8 next to an update of 1e-3 would be lost to
# rounding. Nor is the product computed in the kernel: a compiler that finds it twice would contract operations
# differently, and a step with statistics must equal one without them bit for bit.


def shrunk_to_zero(param: Any, delta: Any, decay: Any) -> Any:
    """Return the decay term of `shrink_to_zero`."""
    return minimum(maximum(param - delta, -decay), decay)


def shrunk_where_aligned(param: Any, delta: Any, decay: Any) -> Any:
    """Return the decay term of `shrink_where_aligned`."""
    product = delta * param
    return where(product == absolute(product), param, param - param)


def distance_from_initial(param: Any, delta: Any, decay: Any, initial: Any) -> Any:
    """Return the decay term of `toward_initial`."""
    return param - initial


def rescaled(param: Any, delta: Any, decay: Any) -> Any:
    """Return the decay term of `rescale`."""
    return param - delta


DECAY_TERM: dict[str, Callable[..., Any]] = {
    "shrink_to_zero": shrunk_to_zero,
    "shrink_where_aligned": shrunk_where_aligned,
    "toward_initial": distance_from_initial,
    "rescale": rescaled,
}
"""Decay term by form. That of `shrink` is the weight, whose square sum is collected in any case."""


def decay_factor(form: str, decay: Tensor) -> Tensor:
    """Return the factor that turns a value of `DECAY_TERM` into the part of the decay in the change of a weight.

    Args:
        form: Name in `APPLY_DECAY`.
        decay: Coefficients passed to the function in `APPLY_DECAY`, [tensors].

    Returns:
        Shape [tensors].
    """
    if form == "rescale":
        return 1 - decay
    return torch.ones_like(decay) if form == "shrink_to_zero" else decay


INITIAL = "initial_param"
"""Name of the state that `toward_initial` needs: the weight at the first step, in the dtype of the parameter."""

_FORMS = {
    WeightDecayKind.DECOUPLED: "shrink",
    WeightDecayKind.INDEPENDENT: "shrink",
    WeightDecayKind.CORRECTED: "shrink",
    WeightDecayKind.L2: "shrink",
    WeightDecayKind.L1: "shrink_to_zero",
    WeightDecayKind.L2_SP: "toward_initial",
    WeightDecayKind.CAUTIOUS: "shrink_where_aligned",
    WeightDecayKind.NORM: "rescale",
}


def norm_factor(target: Tensor, moved_sq: Tensor, numel: Tensor) -> Tensor:
    """Return the factor that rescales updated weights to a root mean square of ``target``.

    Args:
        target: λ of each tensor, [tensors].
        moved_sq: Square sum of each tensor after its update, over all shards, [tensors].
        numel: Number of elements of each tensor, over all shards, [tensors].

    Returns:
        Shape [tensors]; 1 where ``target`` is 0 or all weights of a tensor are 0.
    """
    rms = (moved_sq / numel).sqrt()
    return torch.where((target > 0) & (rms > 0), target / rms, 1.0)
