"""Early warning: gradients that are large for the second moment by which the optimizer divides them.

The loss shows only after a step that it was too large; the update that the optimizer is about to make shows it before.
Adam divides an average of gradients m by the square root of an average v of their squares. If gradients grow faster
than v, because the weights are leaving the good region or because v is stale after a lull, updates become larger than
the learning rate says (Wortsman et al., 2023, "Stable and low-precision training for large-scale vision-language
models", https://arxiv.org/abs/2304.13013).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_optim.core.fragment import PARAMETER, Fragment
from lightning_optim.core.stats import DECAYS, GradStats
from lightning_optim.core.transfer import upload
from lightning_optim.core.typed import typed

_NAMED = 4
_TO_SIGMA = 1.4826
"""Standard deviation over median absolute deviation, for a normal distribution."""
_LEAST_SPREAD = 0.02
"""Smallest standard deviation of a logarithm that counts: gradients that hardly change must not raise alarms."""
_SMALLEST = 1e-3
"""Value that stands for anything below it, as of a group whose gradients are all 0."""


@typed
@dataclass(frozen=True)
class EarlyWarning:
    """When gradients are too large for their second moment; see `EarlySigns`.

    Args:
        threshold: Number of robust standard deviations above the median of the last values, on a logarithmic scale,
            above 0.
        min_value: Smallest value that is a sign, above 1, which is the value of gradients that do not change.
        window: Number of values that are kept.
        warmup: Number of values before the first sign, from 2 to ``window``.
        every: Number of steps without a sign after which the next one is worth a warning, at least 1.

    Raises:
        ValueError: An argument is out of range.
    """

    threshold: float = 6.0
    min_value: float = 1.8
    window: int = 128
    warmup: int = 64
    every: int = 500

    def __post_init__(self) -> None:
        if not (math.isfinite(self.threshold) and self.threshold > 0):
            raise ValueError(
                f"Invalid threshold={self.threshold!r}: must be a finite number of standard deviations above 0, for "
                "instance 6."
            )
        if not (math.isfinite(self.min_value) and self.min_value > 1):
            raise ValueError(f"Invalid min_value={self.min_value!r}: must be a finite ratio above 1, for instance 1.8.")
        if not 2 <= self.warmup <= self.window:
            raise ValueError(
                f"Invalid warmup={self.warmup!r} with window={self.window!r}: must be at least 2 and at most the "
                "window, or there would never be a sign."
            )
        if self.every < 1:
            raise ValueError(f"Invalid every={self.every!r}: must be a number of steps above 0, for instance 500.")


@dataclass(frozen=True)
class EarlySign:
    """One parameter group whose gradients are too large for their second moment.

    Args:
        group: Name of the group.
        value: Root mean square of the last gradients over that of the second moment, of the worst tensor.
        usual: Median of the group's last values.
        worst: Indices in the optimizer of the tensors with the largest values, the worst first.
        is_news: Whether there was no sign for so long that it is worth a warning.
    """

    group: str
    value: float
    usual: float
    worst: tuple[int, ...]
    is_news: bool = True


class SecondMoments:
    """Averages of the square sums of gradients, on the device, with the decays by which the optimizer averages.

    An optimizer with v ← β₂ v + (1 − β₂) g², for each element, has Σ v ← β₂ Σ v + (1 − β₂) Σ g² over a tensor, and Σ g²
    is what a step has measured anyway. So the sums are known before the step without a read of v. Three averages are
    kept for each tensor, all with Adam's bias correction:

    - the gradients that the first moment averages, at least the last 10: f, with decay max(β₁, 0.9). By the inequality
      of Cauchy and Schwarz √(f / v̂) bounds the norm of the first moment over that of √v̂, and so stands for the update
      to come, in units of the learning rate;
    - those that the second moment averages: v̂, with β₂;
    - the last 100, with decay 0.99, which take its place where they are smaller. A short memory such as β₂ = 0.95
      follows gradients that grow, and so would never notice.

    A step that is skipped changes nothing.

    Example:
        >>> moments = SecondMoments()
        >>> for norm_sq in (1.0, 1.0, 100.0):
        ...     over, update = moments(GradStats(torch.tensor([norm_sq]), group_sizes=(1,))).sqrt()
        ...     moments.commit(torch.tensor(0.0))
        >>> over
        tensor([1.7067])
    """

    def __init__(self) -> None:
        self._averages: Tensor | None = None
        self._next: Tensor | None = None
        self._weights: tuple[Any, Tensor] | None = None

    def __call__(self, stats: GradStats) -> Tensor:
        """Return how large gradients are for their second moment, before the step.

        Args:
            stats: Statistics of the gradients.

        Returns:
            Squares of two ratios for each tensor, shape [2, tensors], on the device of ``stats``: of the gradient over
            the second moment, and of the last gradients over it. NaN where all gradients have been 0.
        """
        norm_sq = stats.clipped_norm_sq
        averages = self._averages_of(stats.parameters, norm_sq)
        known = averages if stats.places is None else averages.index_select(-1, stats.places)
        new = torch.stack([norm_sq, torch.ones_like(norm_sq)])
        known = torch.lerp(known, new, self._weights_of(stats, norm_sq))
        self._next = known if stats.places is None else averages.index_copy(-1, stats.places, known)
        last, own, usual = (known[:, 0] / known[:, 1]).unbind()
        return torch.stack([norm_sq / own, last / torch.minimum(own, usual)])

    def fragment(self) -> Fragment:
        """Return the same ratios, ``own_ratio`` and ``last_ratio``, and the next averages as lines of a program."""
        lines = ["clipped_sq = norm_sq / (divisor * divisor)"]
        for i, row in enumerate(_ROWS):
            total, weight = f"averages_{2 * i}", f"averages_{2 * i + 1}"
            lines.append(f"new_{total} = {total} + weight_{row} * (clipped_sq - {total})")
            lines.append(f"new_{weight} = {weight} + weight_{row} * (1.0 - {weight})")
            lines.append(f"{row} = new_{total} / new_{weight}")
        lines += ["own_ratio = clipped_sq / own", "last_ratio = last / minimum(own, usual)"]
        weights = tuple(f"weight_{row}" for row in _ROWS)
        return Fragment(tuple(lines), (), weights, (("averages", 2 * len(_ROWS) * PARAMETER),))

    def averages(self, parameters: int, device: torch.device) -> Tensor:
        """Return the state of the fragment, float64, shape [3, 2, parameters], on ``device``."""
        known = self._averages
        if known is None or known.shape[-1] != parameters or known.device != device:
            known = self._averages_of(parameters, torch.empty(0, dtype=torch.float64, device=device))
        return known

    def adopt(self, averages: Tensor) -> None:
        """End the step with averages that already are those after it."""
        self._averages, self._next = averages, None

    def commit(self, skip: Tensor) -> None:
        """End the step.

        Args:
            skip: Non-zero if the step did not happen, shape [].
        """
        if self._next is not None:
            assert self._averages is not None
            self._averages = torch.where(skip.to(self._next.device, non_blocking=True) != 0, self._averages, self._next)
            self._next = None

    def move(self, places: Sequence[int]) -> None:
        """Follow parameters to other places in the optimizer.

        Args:
            places: The new place of the parameter at each old place; -1 for one that is gone.
        """
        if self._averages is None:
            return
        moved = self._averages.new_zeros(*self._averages.shape[:-1], max(places, default=-1) + 1)
        kept = [(old, new) for old, new in enumerate(places) if new >= 0 and old < self._averages.shape[-1]]
        if kept:
            old, new = (list(side) for side in zip(*kept, strict=True))
            moved[..., new] = self._averages[..., old]
        self._averages = moved

    def state_dict(self) -> dict[str, Any]:
        """Return the averages, as a copy."""
        return {} if self._averages is None else {"averages": self._averages.detach().clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        averages = state.get("averages")
        self._averages = None if averages is None else averages.detach().clone()
        self._next = None

    def _averages_of(self, parameters: int, like: Tensor) -> Tensor:
        """Return the averages and their weights, shape [3, 2, parameters], as ``like``; 0 for new parameters."""
        known = self._averages
        if known is None:
            known = like.new_zeros(len(_ROWS), 2, parameters)
        elif known.shape[-1] < parameters:
            known = torch.cat([known, known.new_zeros(len(_ROWS), 2, parameters - known.shape[-1])], dim=-1)
        elif known.shape[-1] > parameters:
            known = known[..., :parameters]
        self._averages = known.to(like, non_blocking=True)
        return self._averages

    def _weights_of(self, stats: GradStats, like: Tensor) -> Tensor:
        """Return the weight of a new value in each average, shape [3, 1, tensors]; uploaded only if it has changed."""
        key = stats.decays, stats.group_sizes, like.device
        if self._weights is None or self._weights[0] != key:
            weights = weights_of(stats.decays, stats.group_sizes)
            self._weights = key, upload(weights[:, None], like.device, like.dtype)
        return self._weights[1]


_ROWS = ("last", "own", "usual")


def weights_of(decays: Sequence[tuple[float, float]], group_sizes: Sequence[int]) -> np.ndarray:
    """Return the weight of a new value in each average, shape [3, tensors].

    Args:
        decays: Decays of the averages of gradients and of their squares in each group.
        group_sizes: Number of tensors in each group.
    """
    first, second = np.repeat(np.array(decays).reshape(-1, 2), group_sizes, axis=0).T
    return 1 - np.stack([np.maximum(first, DECAYS[0]), second, np.full_like(second, DECAYS[1])])


class EarlySigns:
    """Signs, on the host, that gradients are too large for their second moment, each group by its own last values.

    The value of a group is that of its worst tensor, because one layer can ruin a network. It is a sign if it is above
    ``min_value``, and if its logarithm is more than ``threshold`` robust standard deviations (1.4826 · MAD) above the
    median of the last ``window``. It enters the window cut to that limit, so that a level that stays is soon no sign.

    Args:
        limits: When a value is a sign; None for the defaults.

    Attributes:
        last: The largest value of the last step, over all groups; NaN before the first.

    Example:
        >>> signs = EarlySigns()
        >>> for value in [1.0, 1.1] * 50 + [3.0]:
        ...     _, found = signs.update(np.array([value, 1.0]), sizes=(2,), names=("head",), accepted=True)
        >>> found[0].group, found[0].worst
        ('head', (0, 1))
    """

    def __init__(self, limits: EarlyWarning | None = None) -> None:
        self.limits = limits or EarlyWarning()
        self.last = math.nan
        self._ring = np.zeros((self.limits.window, 0))  # logarithms
        self._count = 0
        self._since = self.limits.every

    def update(
        self, values: np.ndarray, sizes: Sequence[int], names: Sequence[str], accepted: bool
    ) -> tuple[tuple[float, ...], tuple[EarlySign, ...]]:
        """Add a step.

        Args:
            values: Root mean square of the last gradients of each tensor over that of its second moment, [tensors].
            sizes: Number of tensors in each group.
            names: Name of each group, as far as they are known.
            accepted: Whether the step was taken: values of a skipped one do not enter.

        Returns:
            The largest value of each group, and the signs, whose ``worst`` are indices of ``values``.
        """
        largest = group_maxima(values, sizes)
        self.last = max(largest, default=math.nan)
        if len(largest) != self._ring.shape[1]:  # A group was added: all start again.
            self._ring, self._count = np.zeros((self.limits.window, len(largest))), 0
        now = np.log(np.maximum(largest, _SMALLEST))
        usual, limit = self._usual_and_limit()
        self._since += 1
        is_news, signs = self._since >= self.limits.every, []
        for index in np.flatnonzero(now > limit).tolist():
            start = sum(sizes[:index])
            worst = start + np.argsort(-values[start : start + sizes[index]], kind="stable")[:_NAMED]
            name = names[index] if index < len(names) else str(index)
            signs.append(EarlySign(name, largest[index], math.exp(usual[index]), tuple(worst.tolist()), is_news))
            self._since = 0
        if accepted:
            self._ring[self._count % len(self._ring)] = np.minimum(now, limit)
            self._count += 1
        return largest, tuple(signs)

    def _usual_and_limit(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the median and the limit of each group's logarithm, [groups]; infinite in the warmup."""
        known = self._ring[: self._count]
        if len(known) < self.limits.warmup:
            return np.full(known.shape[1], np.inf), np.full(known.shape[1], np.inf)
        middle = (len(known) - 1) // 2
        usual = np.partition(known, middle, axis=0)[middle]
        spread = _TO_SIGMA * np.partition(np.abs(known - usual), middle, axis=0)[middle]
        limit = usual + self.limits.threshold * np.maximum(spread, _LEAST_SPREAD)
        return usual, np.maximum(limit, math.log(self.limits.min_value))

    def state_dict(self) -> dict[str, Any]:
        """Return the window as lists of numbers, the oldest value first."""
        start = self._count % len(self._ring) if self._count > len(self._ring) else 0
        filled = min(self._count, len(self._ring))
        values = np.roll(self._ring, -start, axis=0)[:filled]
        return {"values": values.tolist(), "since": self._since, "last": self.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state returned by `state_dict`: the end of a longer window."""
        values = state["values"][-len(self._ring) :]
        self._ring = np.zeros((self.limits.window, len(values[0]) if values else 0))
        self._ring[: len(values)] = values
        self._count, self._since, self.last = len(values), state["since"], state["last"]


def group_maxima(values: np.ndarray, sizes: Sequence[int]) -> tuple[float, ...]:
    """Return the largest value in each group, 0 for one without tensors.

    Args:
        values: One value for each tensor, [tensors].
        sizes: Number of tensors in each group.
    """
    ends = np.cumsum(sizes)
    return tuple(float(values[e - n : e].max(initial=0.0)) for e, n in zip(ends, sizes, strict=True))
