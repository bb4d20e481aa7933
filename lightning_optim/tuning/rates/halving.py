"""Trials of several values of a hyperparameter by successive halving, compared on the same batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

__all__ = ["Halving", "Trial", "halve", "indistinguishable", "paired_difference"]

V = TypeVar("V", bound=Hashable)

TAIL = 0.2
"""Share of a trial's losses, the last ones, whose mean is its score."""

_COMPARED = 0.4
"""Share of a trial's losses, the last ones, that are compared: more than are scored, for a narrower interval."""

_BLOCK, _BLOCKS = 5, 4
"""Losses in a block: neighbouring differences of two trainings are alike, blocks of five hardly. And the least number
of blocks, of fewer losses each where a trial is short: the interval from two has little to say."""

_QUANTILES = {1: 6.31, 2: 2.92, 3: 2.35, 4: 2.13, 5: 2.02, 6: 1.94, 7: 1.89, 8: 1.86, 9: 1.83}
"""95 % of Student's t, by degrees of freedom; 1.7 from ten on."""


@dataclass(frozen=True)
class Trial(Generic[V]):
    """A short training with one value.

    Args:
        value: The value that was tried.
        steps: Steps that were asked for.
        losses: Losses of its steps; fewer than ``steps`` if it was given up.
    """

    value: V
    steps: int
    losses: tuple[float, ...]

    @property
    def diverged(self) -> bool:
        """Whether the trial was given up, or ended in a loss that is not finite."""
        return len(self.losses) < self.steps or not all(map(math.isfinite, self.tail))

    @property
    def tail(self) -> tuple[float, ...]:
        """The last fifth of the losses, at least one."""
        return self.losses[-max(round(TAIL * self.steps), 1) :]

    @property
    def compared(self) -> tuple[float, ...]:
        """The last two fifths of the losses, by which trials are told apart."""
        return self.losses[-max(round(_COMPARED * self.steps), 1) :]

    @property
    def score(self) -> float:
        """Mean of the last fifth of the losses; infinite if it diverged."""
        return math.inf if self.diverged else math.fsum(self.tail) / len(self.tail)


@dataclass(frozen=True)
class Halving(Generic[V]):
    """What successive halving has found.

    Args:
        trials: All trials, in the order they were run.
        ranking: Values from the best to the worst: those that got further first, then by their score.
        alike: Values that cannot be told apart from the best one, it included, in the order they were given.
        reason: What was found, as a sentence.
    """

    trials: tuple[Trial[V], ...]
    ranking: tuple[V, ...]
    alike: tuple[V, ...]
    reason: str = field(default="")

    @property
    def best(self) -> V | None:
        """The best value; None if every trial diverged."""
        return self.ranking[0] if self.alike else None

    def trial(self, value: V) -> Trial[V]:
        """Return the longest trial of a value.

        Raises:
            KeyError: The value was not tried.
        """
        own = [trial for trial in self.trials if trial.value == value]
        if not own:
            raise KeyError(value)
        return max(own, key=lambda trial: trial.steps)


def paired_difference(a: Sequence[float], b: Sequence[float], paired: bool = True) -> tuple[float, float]:
    """Return the mean of ``a - b`` and half of its 90 % interval.

    Args:
        a: Losses of one trial.
        b: Losses of another one; with ``paired`` of the same batches, in the same order.
        paired: Whether loss i of both is of the same batch, whose difficulty then cancels.
    """
    if paired and len(a) == len(b):
        return _mean_and_half(np.subtract(a, b))
    (mean_a, half_a), (mean_b, half_b) = _mean_and_half(np.asarray(a)), _mean_and_half(np.asarray(b))
    return mean_a - mean_b, math.hypot(half_a, half_b)


def _mean_and_half(values: np.ndarray) -> tuple[float, float]:
    """Mean of correlated values and half of its interval, from means of blocks."""
    blocks = [
        float(block.mean()) for block in np.array_split(values, max(len(values) // _BLOCK, min(len(values), _BLOCKS)))
    ]
    mean = float(np.mean(values))
    if len(blocks) < 2:
        return mean, math.inf
    degrees = len(blocks) - 1
    return mean, _QUANTILES.get(degrees, 1.7) * float(np.std(blocks, ddof=1)) / math.sqrt(len(blocks))


def halve(
    run: Callable[[V, int], Sequence[float]],
    values: Sequence[V],
    steps: int,
    *,
    keep: float = 0.5,
    rounds: int = 3,
    paired: bool = True,
) -> Halving[V]:
    """Try values in rounds: after each round the better part goes on, with twice the steps.

    Args:
        run: Trains from the same point with a value for so many steps, and returns the losses; fewer than asked for if
            the training was given up, because it diverged.
        values: Values to try, at least one; any hashable objects: rates, weight decays, pairs of batch size and rate.
        steps: Steps of a trial in the last round.
        keep: Share of the values that goes on, in (0, 1).
        rounds: Number of rounds, at least 1.
        paired: Whether all trials see the same batches in the same order; False where batch sizes differ.

    Raises:
        ValueError: A value is out of its range.

    Example:
        >>> found = halve(lambda rate, steps: [(rate - 0.3) ** 2] * steps, [0.01, 0.1, 0.3, 1.0], steps=40)
        >>> found.best, found.alike, [(trial.value, trial.steps) for trial in found.trials][-1]
        (0.3, (0.3,), (0.3, 40))
    """
    if not values:
        raise ValueError(f"Invalid values={values!r}: must be at least one.")
    if not 0 < keep < 1:
        raise ValueError(f"Invalid keep={keep!r}: must be in (0, 1).")
    if rounds < 1 or steps < 2**rounds:
        raise ValueError(f"Invalid rounds={rounds!r} with steps={steps!r}: must be at least 1, with 2**rounds steps.")
    trials: list[Trial[V]] = []
    order = list(dict.fromkeys(values))
    left, going = order, list[Trial[V]]()
    ranking: list[V] = []
    for number in range(rounds):
        length = max(steps >> (rounds - 1 - number), 1)
        tried = [Trial(value, length, tuple(map(float, run(value, length)))) for value in left]
        trials += tried
        ranked = sorted(tried, key=lambda trial: trial.score)
        ranking = [trial.value for trial in ranked] + [value for value in ranking if value not in left]
        going = [trial for trial in ranked if not trial.diverged]
        if not going or number == rounds - 1:
            break
        # What cannot be told apart from the best goes on as well, up to half as many again.
        count = max(math.ceil(keep * len(left)), 1)
        alike = indistinguishable(going, paired)
        survivors = {trial.value for trial in going[:count]}
        survivors |= {trial.value for trial in going[: math.ceil(1.5 * count)] if trial.value in alike}
        left = [value for value in order if value in survivors]
    alike = indistinguishable(going, paired)
    return Halving(
        tuple(trials),
        tuple(ranking),
        tuple(value for value in order if value in alike),
        _sentence(ranking, alike, order),
    )


def indistinguishable(ranked: Sequence[Trial[V]], paired: bool = True) -> set[V]:
    """Return the values whose losses do not differ from the best one's by more than the interval of the difference.

    Args:
        ranked: Trials of as many steps each, the best one first; none of them diverged.
        paired: Whether their losses are of the same batches.
    """
    alike: set[V] = set()
    for trial in ranked:
        difference, half = paired_difference(trial.compared, ranked[0].compared, paired)
        if trial is ranked[0] or difference <= half:
            alike.add(trial.value)
    return alike


def _sentence(ranking: Sequence[V], alike: set[V], order: Sequence[V]) -> str:
    if not alike:
        return "every trial diverged"
    if len(alike) == 1:
        return f"{ranking[0]} is best, beyond noise"
    others = ", ".join(str(value) for value in order if value in alike and value != ranking[0])
    return f"{ranking[0]} is best, and cannot be told apart from {others}"
