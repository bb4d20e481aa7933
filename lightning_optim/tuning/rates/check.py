"""The configured learning rate put to the test: does it diverge, is it slow, and what would be better?"""

from __future__ import annotations

from lightning_optim.tuning.rates.halving import Trial, indistinguishable
from lightning_optim.tuning.rates.rate_trials import RateTrials, Run

FACTOR = 3.0
"""Between the rates that are compared; smaller differences a run hardly notices."""


def check_rate(run: Run, lr: float, steps: int, *, limit: int = 8) -> RateTrials:
    """Evaluate a rate, and go on to lower or higher ones as long as those are better beyond noise.

    A rate that diverges is divided by 3 until it does not. Otherwise three times the rate is tried, then a third of it;
    where one of them has the lower loss by more than the interval of the paired difference, it takes the place of the
    rate, and the next one in this direction is tried.

    Args:
        run: Trains from the same point, on the same batches, with a rate for so many steps, and returns the losses;
            fewer than asked for if the training was given up.
        lr: The configured rate.
        steps: Steps of a trial.
        limit: Most trials.

    Returns:
        The trials with the rate at which it ends, which is the configured one if neither neighbour is better.

    Example:
        >>> found = check_rate(lambda rate, steps: [(rate - 0.3) ** 2] * steps, 0.01, 20)
        >>> found.lr, found.reason
        (0.27, '0.01 is slow: after 20 steps the loss is 0.0841, and 0.0009 at 0.27')
    """
    done: dict[float, Trial[float]] = {}

    def trial(rate: float) -> Trial[float]:
        rate = float(f"{rate:.4g}")
        if rate not in done:
            done[rate] = Trial(rate, steps, tuple(map(float, run(rate, steps))))
        return done[rate]

    first = best = trial(lr)
    while best.diverged and len(done) < limit:
        best = trial(best.value / FACTOR)
    if best.diverged:
        return RateTrials(
            None, None, None, f"all rates from {best.value:.3g} to {lr:.3g} diverge", tuple(done.values())
        )
    for factor in (FACTOR, 1 / FACTOR) if best is first else (1 / FACTOR,):
        before = best
        while len(done) < limit and _is_better(trial(best.value * factor), best):
            best = done[float(f"{best.value * factor:.4g}")]
        if best is not before:
            break
    alike = indistinguishable(sorted((t for t in done.values() if not t.diverged), key=lambda each: each.score))
    inside = [rate for rate in alike if best.value in alike] or [best.value]
    return RateTrials(best.value, min(inside), max(inside), _verdict(first, best, steps), tuple(done.values()))


def _is_better(other: Trial[float], best: Trial[float]) -> bool:
    """Whether a trial has the lower loss beyond noise."""
    return not other.diverged and best.value not in indistinguishable([other, best])


def _verdict(first: Trial[float], best: Trial[float], steps: int) -> str:
    if first.diverged:
        return f"{first.value:.4g} diverges, {best.value:.4g} does not"
    if best is first:
        return f"neither a third of {first.value:.4g} nor three times as much is better after {steps} steps"
    wrong = "slow" if best.value > first.value else "too high"
    losses = f"after {steps} steps the loss is {first.score:.4g}, and {best.score:.4g} at {best.value:.4g}"
    return f"{first.value:.4g} is {wrong}: {losses}"
