"""Weight decay and batch size tried together with the learning rate, which either of them moves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch.optim import Optimizer

from lightning_optim.tuning.batch_size.rules import scale_lr
from lightning_optim.tuning.rates.halving import Halving, halve
from lightning_optim.tuning.rates.sweep import until_divergence
from lightning_optim.tuning.trials.fit import FitTrials

Pair = tuple[float, float]
"""A value of the other hyperparameter, and the rate."""

_STEP = 2.0
"""Between the rates that are tried with each weight decay."""


@dataclass(frozen=True)
class Grid:
    """What has been found about another hyperparameter and the rate.

    Args:
        name: ``"weight_decay"`` or ``"batch"``.
        pairs: The trials of pairs of value and rate, and how they rank.
        note: What to know about such trials, as a sentence.
    """

    name: str
    pairs: Halving[Pair]
    note: str

    def __str__(self) -> str:
        if self.pairs.best is None:
            return f"{self.name}: every trial diverged"
        alike = ", ".join(_shown(pair) for pair in self.pairs.alike if pair != self.pairs.best)
        others = f"; as good, as far as the losses tell: {alike}" if alike else ", beyond noise"
        return f"{self.name} {_shown(self.pairs.best)} is best{others}. {self.note}"


def try_weight_decays(trials: FitTrials, place: int, values: Sequence[float], lr: float, steps: int) -> Grid:
    """Try values of weight decay, each at the rate, half of it and twice as much.

    Args:
        trials: Trials from the present point.
        place: Which optimizer.
        values: The values, which take the place of the optimizer's own; groups keep their ratios to it, and those
            without decay have none.
        lr: The rate.
        steps: Steps of a trial of the last round.

    Raises:
        ValueError: The optimizer has no weight decay, or a value is below 0.
    """
    optimizer = trials.optimizers[place]
    own = optimizer.defaults.get("weight_decay")
    if own is None:
        raise ValueError(f"{type(optimizer).__name__} has no weight_decay to try.")
    if any(not 0 <= value < math.inf for value in values):
        raise ValueError(f"Invalid weight_decay={list(values)!r}: each must be finite and at least 0.")

    def run(pair: Pair, length: int) -> list[float]:
        def prepare(optimizer: Optimizer) -> None:
            for group in optimizer.param_groups:
                before = group["weight_decay"]
                # Of a group that is set apart only the ratio is known; where the default is 0, all have the value.
                group["weight_decay"] = pair[0] * (before / own) if own else pair[0]

        return _losses(trials, place, pair[1], length, prepare=prepare)

    pairs = [(float(value), lr * factor) for value in values for factor in (1 / _STEP, 1.0, _STEP)]
    note = "A short trial sees the training loss alone: it tells which decay hurts, not which generalizes."
    return Grid("weight_decay", halve(run, pairs, steps), note)


def try_batches(trials: FitTrials, place: int, multiples: Sequence[int], lr: float, steps: int) -> Grid:
    """Try larger batches, by accumulation, each at the rate, and at the rates of the square root and the linear rule.

    All have the same number of samples, so that a batch of four times as many has a quarter of the steps.

    Args:
        trials: Trials from the present point.
        place: Which optimizer.
        multiples: Multiples of the configured batch, at least 1.
        lr: The rate of the configured batch.
        steps: Steps of a trial of the last round, of the configured batch.

    Raises:
        ValueError: A multiple is no whole number above 0, or leaves a trial fewer than five steps.
    """
    if any(value != int(value) or value < 1 or steps // value < 5 for value in multiples):
        raise ValueError(
            f"Invalid batches={list(multiples)!r}: each must be a whole multiple of the configured batch, at least 1, "
            f"and at most {max(steps // 5, 1)}, so that a trial of {steps} steps has five of them."
        )

    def run(pair: Pair, length: int) -> list[float]:
        multiple = int(pair[0])
        losses = _losses(trials, place, pair[1], max(length // multiple, 1), accumulate=multiple)
        spread = [loss for loss in losses for _ in range(multiple)]  # by samples, in which all are as long
        return [*spread, *spread[-1:] * (length - len(spread))][:length] if losses else []

    pairs = [
        (float(value), rate) for value in multiples for rate in dict.fromkeys((lr, lr * math.sqrt(value), lr * value))
    ]
    scaled = scale_lr(lr, 1, max(int(value) for value in multiples), type(trials.optimizers[place]))
    source = "" if scaled.source is None else f" ({scaled.source})"
    note = (
        f"Each had as many samples. The rule for {type(trials.optimizers[place]).__name__} is {scaled.rule}{source}: "
        f"{scaled.lr:.3g} for {max(multiples)} times the batch."
    )
    return Grid("batch", halve(run, pairs, steps, paired=False), note)


def _losses(trials: FitTrials, place: int, rate: float, steps: int, **options: object) -> list[float]:
    trial = trials.at(place, rate, steps, until_divergence(), **options)  # type: ignore[arg-type]
    return list(trial.losses) if trial.ended == "finished" else []


def _shown(pair: Pair) -> str:
    return f"{pair[0]:.3g} at lr {pair[1]:.3g}"
