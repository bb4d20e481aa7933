"""The course of a comparison: how long, at which rates, then all variants with all seeds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_optim.diagnostics.run_report.elements import made_folder
from lightning_optim.tuning.compare.metric import choose_metric
from lightning_optim.tuning.compare.outcome import Comparison, count
from lightning_optim.tuning.compare.rates import MakeJob, RunJobs, TunedRate, tune_rates
from lightning_optim.tuning.runs import Job, JobResult, run_jobs
from lightning_optim.tuning.runs.lock import lock
from lightning_optim.tuning.runs.runner import Pool
from lightning_optim.tuning.runs.slot import PRELOAD

_TUNING_SEED = 1000
"""Added to the largest seed: a rate is not chosen by the seeds that are compared."""
_PROBE = 40
"""Steps in which the speed of a variant is measured."""
_LEAST = 3
_TELLING = 20


@dataclass(frozen=True)
class Settings:
    """How a comparison is run.

    Args:
        seeds: Number of seeds, or the seeds themselves.
        steps: Budget of each run in optimizer steps; None for what the configuration says.
        seconds: Budget of each run in seconds of training: each variant gets the steps that it takes in this time, and
            a schedule of that length; None for no such budget.
        tune_lr: Whether each variant gets a rate of its own first.
        tune_steps: Number of steps of the longer runs of the tuning; None for half of each budget.
        metric: Name of the metric; None for a loss of validation.
        mode: ``"min"`` or ``"max"``; None for what the metric's name tells.
        validations: Number of validations of each run; 0 for what the configuration says.
        workers: Number of runs at a time, as for `run_jobs`.
        devices: GPUs, as for `run_jobs`.
        rerun: Whether runs of another configuration in the folder are replaced.
        progress: Whether to show progress.
        preload: Modules that the jobs need.

    Raises:
        ValueError: A number is out of range, or both budgets are given.
    """

    seeds: int | Sequence[int] = 3
    steps: int | None = None
    seconds: float | None = None
    tune_lr: bool = False
    tune_steps: int | None = None
    metric: str | None = None
    mode: str | None = None
    validations: int = 10
    workers: int | None = None
    devices: Sequence[int] | None = None
    rerun: bool = False
    progress: bool = True
    preload: Sequence[str] = field(default=PRELOAD)

    def __post_init__(self) -> None:
        if self.steps is not None and self.seconds is not None:
            raise ValueError("Invalid steps and seconds: give one of the two budgets; the page shows both axes.")
        for name in ("steps", "seconds", "tune_steps"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"Invalid {name}={value!r}: must be above 0.")
        if not self.seed_list:
            raise ValueError(f"Invalid seeds={self.seeds!r}: must be a whole number of at least 1, or a list of seeds.")
        if self.mode not in (None, "min", "max"):
            raise ValueError(f"Invalid mode={self.mode!r}: must be 'min' or 'max'.")

    @property
    def seed_list(self) -> list[int]:
        """The seeds: 0, 1, 2, ... if a number is given."""
        return list(range(self.seeds)) if isinstance(self.seeds, int) else list(self.seeds)


def check_names(names: Sequence[str]) -> None:
    """Refuse variants whose names cannot be folders, or too few of them.

    Args:
        names: Names of the variants.

    Raises:
        ValueError: A name has other characters than letters, digits and ``._+=-``, or there are fewer than two.
    """
    if len(names) < 2:
        raise ValueError(f"Invalid variants: a comparison needs two or more, got {list(names)}.")
    for name in names:
        if not re.fullmatch(r"[\w+=-][\w.+=-]*", name):
            raise ValueError(f"Invalid name of a variant {name!r}: it is a folder's name, of letters, digits and ._+=-")


def run_comparison(
    settings: Settings,
    variants: Mapping[str, str],
    make: MakeJob,
    folder: str | Path,
    changes_model: Sequence[str] = (),
) -> Comparison:
    """Run a comparison.

    Args:
        settings: How.
        variants: What each variant sets, as text, by its name.
        make: Makes the job of a variant.
        folder: Folder of all runs; runs in it that have finished are not repeated.
        changes_model: Variants that change the model or the data.

    Returns:
        The results, without a page.

    Raises:
        FileExistsError: The folder has runs of another configuration, or another process uses it.
        NotADirectoryError: ``folder`` is a file, or below one.
        ValueError: A setting does not fit the runs.
        RuntimeError: Not one run could start.
    """
    check_names(list(variants))
    folder = made_folder(folder).resolve()

    def check_metric(_: Job, result: JobResult) -> None:
        # A name that does not exist is known after one run; the others need not be waited for.
        if settings.metric is not None and result.ok and result.metrics:
            choose_metric([result], settings.metric, settings.mode)

    with lock(folder, "a comparison"), Pool(settings.workers, settings.devices, settings.preload) as pool:

        def run(jobs: Sequence[Job], title: str) -> dict[str, JobResult]:
            changed = "rerun" if settings.rerun else "refuse"
            return run_jobs(
                jobs,
                folder,
                pool=pool,
                changed=changed,
                title=title,
                progress=settings.progress,
                on_end=check_metric,
            )

        return _run(settings, variants, make, run, folder, changes_model)


def _run(
    settings: Settings,
    variants: Mapping[str, str],
    make: MakeJob,
    run: RunJobs,
    folder: Path,
    changes_model: Sequence[str],
) -> Comparison:
    names, seeds = list(variants), settings.seed_list
    tuning_seed = max(seeds) + _TUNING_SEED
    steps = dict.fromkeys(names, settings.steps)
    if settings.seconds is not None or (settings.steps is None and settings.tune_lr and settings.tune_steps is None):
        probed = run([make(f"speed/{name}", name, tuning_seed, probe=_PROBE, events=False) for name in names], "speed")
        _refuse_if_none(list(probed.values()))
        steps = {name: _length(probed[f"speed/{name}"], settings.seconds) for name in names}
        shortest = min((length for length in steps.values() if length), default=None)
        steps = {name: length or shortest for name, length in steps.items()}  # Of one that fails, not the whole run.
    rates: dict[str, TunedRate] | None = None
    if settings.tune_lr:
        known = {name: settings.tune_steps or _for_tuning(steps[name]) for name in names}
        rates = tune_rates(
            names, make, run, seed=tuning_seed, steps=known, metric=settings.metric, mode=settings.mode
        )  # fmt: skip
        _refuse_if_none([trial.status for rate in rates.values() for trial in rate.trials])
    budgeted = settings.steps is not None or settings.seconds is not None
    jobs = {
        (name, seed): make(
            f"{name}/seed_{seed}",
            name,
            seed,
            steps=steps[name] if budgeted else None,
            validations=settings.validations or None,
            lr_factor=1.0 if rates is None else rates[name].factor,
        )
        for seed in seeds
        for name in names
    }
    found = run(list(jobs.values()), "runs")
    results = {name: {seed: found[jobs[name, seed].name] for seed in seeds} for name in names}
    _refuse_if_none([result for each in results.values() for result in each.values()])
    trained = [result for result in found.values() if result.steps]
    metric = choose_metric(trained, settings.metric, settings.mode)
    budget = _budget(settings, steps, results)
    return Comparison(results, metric, dict(variants), rates, budget, folder, tuple(changes_model))


def _for_tuning(steps: int | None) -> int:
    """Return the number of steps of the longer runs of the tuning: half of the budget, but enough to judge a rate."""
    steps = steps or _LEAST
    return max(-(-steps // 2), min(steps, _TELLING))


def _length(result: JobResult, seconds: float | None) -> int | None:
    """Return how many steps a variant gets: those of its time, or of its configuration."""
    if seconds is None:
        total = result.facts.get("total_steps")
        if total is None and result.ok:
            raise ValueError("The length of the runs is not known: give --steps or --seconds (steps=, seconds=).")
        return total
    return None if not result.ms_per_step else max(int(1000 * seconds / result.ms_per_step), _LEAST)


def _refuse_if_none(results: Sequence[JobResult | str]) -> None:
    """Raise if no run has trained at all, with the reason of the first."""
    states = [each if isinstance(each, str) else each.status for each in results]
    if any(status in ("finished", "diverged", "timed out", "pruned") for status in states):
        return
    first = next((each for each in results if isinstance(each, JobResult)), None)
    if first is None:
        raise RuntimeError(f"No run could train: {', '.join(sorted(set(states)))}. See log.txt in their folders.")
    raise RuntimeError(f"No run could train. {first.name}: {first.status}. {first.error}\nSee {first.folder}/log.txt")


def _budget(settings: Settings, steps: Mapping[str, int | None], results: Mapping[str, Mapping[int, JobResult]]) -> str:
    seeds = count(len(settings.seed_list), "seed")
    if settings.seconds is not None:
        each = ", ".join(f"{name} {number:,} steps" for name, number in steps.items() if number)
        return f"{settings.seconds:g} seconds of training for each run, which are {each}; {seeds}"
    if settings.steps is not None:
        return f"{settings.steps:,} steps for each run; {seeds}"
    taken = {result.steps for each in results.values() for result in each.values() if result.ok}
    return (
        f"{' to '.join(f'{n:,}' for n in sorted({min(taken), max(taken)}))} steps for each run; {seeds}"
        if taken
        else seeds
    )
