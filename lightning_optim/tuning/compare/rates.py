"""A rate for each variant before they are compared: a grid of factors in short runs, of which the best ones go on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lightning_optim.tuning.compare.metric import Metric, choose_metric
from lightning_optim.tuning.runs import Job, JobResult

FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Factors on the rates that a variant was given."""
_STEP = 10 / 3
_MOST_EXTENSIONS = 2
_FINALISTS = 2

MakeJob = Callable[..., Job]
"""``make(name, variant, seed, steps=..., lr_factor=..., probe=..., validations=...)``."""
RunJobs = Callable[[Sequence[Job], str], Mapping[str, JobResult]]
"""Runs jobs; the second argument is what the progress bar calls them."""


@dataclass(frozen=True)
class Trial:
    """A short run at one rate.

    Args:
        factor: Factor on the rates of the variant.
        steps: Number of steps.
        value: The metric at its end; infinite, in the bad direction, where the run failed.
        status: How it ended.
    """

    factor: float
    steps: int
    value: float
    status: str


@dataclass
class TunedRate:
    """The rate that was found for a variant.

    Args:
        factor: Factor on the rates that it was given.
        trials: The short runs.
        at_edge: Whether the best factor is the smallest or the largest one tried.
    """

    factor: float = 1.0
    trials: list[Trial] = field(default_factory=list)
    at_edge: bool = False


def tune_rates(
    variants: Sequence[str],
    make: MakeJob,
    run: RunJobs,
    *,
    seed: int,
    steps: Mapping[str, int],
    factors: Sequence[float] = FACTORS,
    metric: str | None = None,
    mode: str | None = None,
) -> dict[str, TunedRate]:
    """Find a rate for each variant, all with the same effort.

    Each factor gets a run of half of the steps, with the schedule of such a run. Where the best one is at the edge, the
    grid is extended, twice at most. The two best ones and the next smaller factor, because longer runs want smaller
    rates, get a run of all the steps, and the best of them wins.

    Args:
        variants: Names of the variants.
        make: Makes the job of a variant.
        run: Runs jobs.
        seed: Seed of all these runs, which is not one of those that are compared later.
        steps: Number of steps of the longer runs, by variant.
        factors: Factors to try; all rates of a variant are multiplied, so that its groups keep their ratios.
        metric: As for `choose_metric`.
        mode: As for `choose_metric`.

    Returns:
        The rates by variant.
    """
    tuned = {name: TunedRate() for name in variants}
    grids = {name: list(factors) for name in variants}
    chosen: Metric | None = None

    def measure(wanted: Mapping[str, Sequence[float]], share: int, title: str) -> None:
        nonlocal chosen
        length = {name: max(-(-steps[name] // share), 1) for name in variants}
        jobs = {
            (name, factor): make(
                f"rates/{name}/x{factor:.3g}_{length[name]}_steps",
                name,
                seed,
                steps=length[name],
                lr_factor=factor,
                validations=1,
                events=False,
            )
            for factor in sorted({f for fs in wanted.values() for f in fs})
            for name in variants
            if factor in wanted[name]
        }
        results = run(list(jobs.values()), title)
        if chosen is None:
            chosen = choose_metric([result for result in results.values() if result.ok], metric, mode)
        for (name, factor), job in jobs.items():
            result = results[job.name]
            tuned[name].trials.append(Trial(factor, length[name], _score(result, chosen), result.status))

    measure(grids, 2, "rates, short runs")
    for _ in range(_MOST_EXTENSIONS):
        more = {name: new for name in variants if (new := _beyond(tuned[name], grids[name], _sign(chosen)))}
        if not more:
            break
        for name, new in more.items():
            grids[name] += new
        measure({name: more.get(name, []) for name in variants}, 2, "rates beyond the grid")
    finalists = {name: _finalists(tuned[name], grids[name], _sign(chosen)) for name in variants}
    measure(finalists, 1, "rates, longer runs")
    for name in variants:
        best = _ranked([trial for trial in tuned[name].trials if trial.steps == max(steps[name], 1)], _sign(chosen))
        found = best or _ranked(tuned[name].trials, _sign(chosen)) or [1.0]
        tuned[name].factor = found[0]
        tuned[name].at_edge = found[0] in (min(grids[name]), max(grids[name]))
    return tuned


def _sign(metric: Metric | None) -> int:
    return -1 if metric is not None and metric.higher else 1


def _score(result: JobResult, metric: Metric) -> float:
    """Return the metric at the end of a run: a rate is to be judged by where it leads, not by where it passed."""
    value = metric.last(result) if result.ok else None
    return value if value is not None and math.isfinite(value) else _sign(metric) * math.inf


def _ranked(trials: Sequence[Trial], sign: int) -> list[float]:
    """Return the factors of trials that ended well, the best first."""
    known = [trial for trial in trials if math.isfinite(trial.value)]
    return [trial.factor for trial in sorted(known, key=lambda trial: sign * trial.value)]


def _finalists(tuned: TunedRate, grid: Sequence[float], sign: int) -> list[float]:
    """Return the best factors, and the one below the best."""
    ranked = _ranked(tuned.trials, sign)
    found = ranked[:_FINALISTS]
    below = max((factor for factor in grid if ranked and factor < ranked[0]), default=None)
    return found if below is None or below in found or below not in ranked else [*found, below]


def _beyond(tuned: TunedRate, grid: Sequence[float], sign: int) -> list[float]:
    """Return a factor beyond the grid if the best one is at its edge."""
    ranked = _ranked(tuned.trials, sign)
    if not ranked:
        return [min(grid) / _STEP]
    if ranked[0] == max(grid):
        return [max(grid) * _STEP]
    return [min(grid) / _STEP] if ranked[0] == min(grid) else []
