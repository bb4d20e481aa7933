"""A search: Optuna chooses, the processes of the runner train, validations prune."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_optim.core.suggest import nearest
from lightning_optim.diagnostics.metric_names import is_better_higher
from lightning_optim.diagnostics.run_report.elements import made_folder
from lightning_optim.tuning.runs import Job, JobResult, run_jobs
from lightning_optim.tuning.runs.result import DIVERGED, FINISHED, OUT_OF_MEMORY, PRUNED, TIMED_OUT
from lightning_optim.tuning.search import result as names
from lightning_optim.tuning.search.claims import LOST, SURPLUS, Claims
from lightning_optim.tuning.search.methods import (
    default_storage,
    make_pruner,
    make_sampler,
    open_storage,
    require_optuna,
    without_password,
)
from lightning_optim.tuning.search.parameter import Params
from lightning_optim.tuning.search.pictures import draw
from lightning_optim.tuning.search.result import SearchResult, read_trials
from lightning_optim.tuning.search.space import Space
from lightning_optim.tuning.search.study import open_study

_HOPELESS = 3
"""Number of trials that fail, before any has ended well, after which the search ends."""
_BAD = (PRUNED, DIVERGED, OUT_OF_MEMORY, TIMED_OUT)
"""Ends that follow from the hyperparameters, so that the sampler is to avoid their like."""


class SearchError(RuntimeError):
    """A search that cannot go on; the message is for users."""


@dataclass(frozen=True)
class Settings:
    """How to search.

    Args:
        metric: Metric of validation.
        mode: ``"min"`` or ``"max"``; None to tell it from the metric's name.
        trials: Number of trials of the study, with those of other processes and of earlier calls.
        sampler: Name of the sampler, as `make_sampler` takes it.
        pruner: Name of the pruner, as `make_pruner` takes it.
        storage: Storage, as `open_storage` takes it; None for SQLite in the folder.
        study: Name of the study.
        workers: Number of trials at a time, as `run_jobs` takes it.
        devices: Indices of GPUs, as `run_jobs` takes it.
        seconds: Seconds after which no trial starts; None for no limit.
        seed: Seed of the sampler; None for a random one.
        grace: Seconds without a sign of life after which the process of a trial counts as dead.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: A number is out of range, or the mode is not known.
    """

    metric: str = "val_loss"
    mode: str | None = None
    trials: int = 40
    sampler: str = "tpe"
    pruner: str = "median"
    storage: str | None = None
    study: str = "search"
    workers: int | None = None
    devices: Sequence[int] | None = None
    seconds: float | None = None
    seed: int | None = None
    grace: float = 120.0
    progress: bool = True

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ValueError(f"Invalid trials={self.trials!r}: must be a whole number of at least 1.")
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"Invalid seconds={self.seconds!r}: must be above 0.")
        if self.mode not in (None, "min", "max"):
            raise ValueError(f"Invalid mode={self.mode!r}: must be 'min' or 'max'.")
        if self.mode is None and is_better_higher(self.metric) is None:
            raise ValueError(
                f"Is a higher {self.metric} better? Its name does not tell: give mode='min' or 'max' (--mode min)."
            )

    @property
    def higher(self) -> bool:
        """Whether larger values are better."""
        return self.mode == "max" if self.mode is not None else bool(is_better_higher(self.metric))


def run_search(
    make_job: Callable[[str, Params], Job],
    space: Space,
    folder: str | Path,
    settings: Settings,
    configuration: Mapping[str, Any],
    preload: Sequence[str] | None = None,
) -> SearchResult:
    """Search for the hyperparameters with the best value of a metric of validation.

    A study that exists is continued; trials that ran when their process died are begun again. Several processes, on
    one machine or several, may work on one study at once.

    Args:
        make_job: Returns the job of a trial, given its name and hyperparameters.
        space: What is searched.
        folder: Folder for trials, tables and pictures.
        settings: How to search.
        configuration: What all trials have in common, as data for JSON; a study of another one is refused.
        preload: Modules that the jobs need, as `run_jobs` takes them.

    Returns:
        All trials of the study.

    Raises:
        ValueError: The study was made with another space or configuration, or the storage cannot be opened.
        SearchError: The metric does not exist, or each trial fails.
        ModuleNotFoundError: Optuna is missing, or what a sampler needs.
    """
    require_optuna()
    folder = Path(folder)
    sampler, pruner = make_sampler(settings.sampler, space, settings.seed), make_pruner(settings.pruner)
    made_folder(folder)
    url = settings.storage or default_storage(folder)
    storage = open_storage(url)
    direction = "maximize" if settings.higher else "minimize"
    configuration = {**configuration, "space": space.described(), "metric": settings.metric, "mode": direction}
    study = open_study(settings.study, direction, storage, sampler, pruner, configuration)
    search = _Search(study, storage, space, settings, make_job)
    options: dict[str, Any] = {} if preload is None else {"preload": preload}
    try:
        run_jobs(
            search.jobs(),
            folder / "trials",
            workers=settings.workers,
            devices=settings.devices,
            changed="rerun",
            title="trials",
            progress=settings.progress,
            on_values=search.on_values,
            on_end=search.on_end,
            **options,
        )
    finally:
        search.close()
    found = SearchResult(
        folder,
        settings.study,
        without_password(url),
        settings.metric,
        "max" if settings.higher else "min",
        read_trials(study),
    )
    found.write_csv()
    pictures = draw(found, space)
    return SearchResult(**{**vars(found), "pictures": tuple(pictures)})


class _Search:
    """The part of this process in a study."""

    def __init__(
        self, study: Any, storage: Any, space: Space, settings: Settings, make_job: Callable[[str, Params], Job]
    ) -> None:
        self._study, self._space, self._settings, self._make_job = study, space, settings, make_job
        self._claims = Claims(study, storage, interval=min(15.0, settings.grace / 8), grace=settings.grace)
        self._trials: dict[str, Any] = {}
        self._diverged: set[str] = set()
        self._reported: dict[str, int] = {}
        self._exhausted = False
        self._started = time.monotonic()
        self._failures: list[str] = []

    def close(self) -> None:
        """Give back what has not ended."""
        self._claims.close()
        self._claims.release()

    def jobs(self) -> Iterator[Job]:
        """The jobs of this process, each chosen when a worker is free."""
        while not self._exhausted:
            limit = self._settings.seconds
            if limit is not None and time.monotonic() - self._started > limit:
                return
            self._claims.recover()
            if self._count() >= self._settings.trials:
                return
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what is experimental in Optuna
                trial = self._study.ask()
                self._claims.take(trial)
                params = self._space.suggest(trial)
            if self._count(trial.number) >= self._settings.trials or self._is_repeated(trial.number, params):
                self._drop(trial)  # Another process asked in the same moment, or the grid is at its end.
                return
            trial.set_user_attr(names.PARAMS, params)
            name = f"trial_{trial.number:04d}"
            self._trials[name] = trial
            yield self._make_job(name, params)

    def _count(self, below: int | None = None) -> int:
        """The number of trials that run or have ended; only those before a number, if it is given."""
        from optuna.trial import TrialState

        trials = self._study.get_trials(deepcopy=False)[:below]
        return sum(
            trial.state != TrialState.WAITING and LOST not in trial.user_attrs and SURPLUS not in trial.user_attrs
            for trial in trials
        )

    def _is_repeated(self, number: int, params: Params) -> bool:
        if self._settings.sampler != "grid":
            return False
        trials = self._study.get_trials(deepcopy=False)
        others = [t for t in trials if t.number != number and LOST not in t.user_attrs and SURPLUS not in t.user_attrs]
        return any(trial.user_attrs.get(names.PARAMS) == params for trial in others)

    def _drop(self, trial: Any) -> None:
        trial.set_user_attr(SURPLUS, True)
        self._tell(trial, "FAIL")

    def on_values(self, job: Job, values: Mapping[str, Any]) -> bool:
        """Report a validation to the study; return whether the trial is to end."""
        trial, value = self._trials[job.name], values["metrics"].get(self._settings.metric)
        if value is None:
            return False
        self._reported[job.name] = step = self._reported.get(job.name, 0) + 1
        if not math.isfinite(value):
            self._diverged.add(job.name)
            return True
        trial.report(float(value), step)
        return bool(trial.should_prune())

    def on_end(self, job: Job, result: JobResult) -> None:
        """Tell the study how a trial has ended."""
        trial = self._trials[job.name]
        status, value = result.status, self._value(result)
        if status == PRUNED and job.name in self._diverged:
            status = DIVERGED
        trial.set_user_attr(names.STATUS, status)
        trial.set_user_attr(names.ERROR, result.error[:500])
        trial.set_user_attr(names.STEPS, result.steps)
        trial.set_user_attr(names.SECONDS, round(result.seconds, 3))
        if status == FINISHED and value is None:
            self._tell(trial, "FAIL")
            self._claims.leave(trial.number)
            raise SearchError(self._no_metric(result))
        good = status == FINISHED
        self._tell(trial, "COMPLETE" if good else "PRUNED" if status in _BAD else "FAIL", value if good else None)
        self._claims.leave(trial.number)
        if good or status in (PRUNED, DIVERGED):
            self._failures = []
            self._hope = True
        elif not self._hope:
            self._failures.append(f"{job.name}: {status}. {result.error}")
            if len(self._failures) >= _HOPELESS:
                log = Path(result.folder) / "log.txt"
                raise SearchError(f"The first {_HOPELESS} trials have failed. {self._failures[0]}\nSee {log}")

    _hope = False
    """Whether a trial has trained."""

    def _value(self, result: JobResult) -> float | None:
        metric = self._settings.metric
        found = result.best(metric, self._settings.higher)
        if found is not None:
            return found[1]
        loss = result.train_loss if metric == "train_loss" else None
        return loss if loss is not None and math.isfinite(loss) else None

    def _no_metric(self, result: JobResult) -> str:
        metric, there = self._settings.metric, [*result.validation(), "train_loss"]
        if len(there) == 1:
            return f"No validation has run, so there is no {metric}. It needs val_dataloader; or --metric train_loss"
        return f"Validation logs no {metric!r}. {nearest(metric, there)}"

    def _tell(self, trial: Any, state: str, value: float | None = None) -> None:
        from optuna.exceptions import OptunaError
        from optuna.trial import TrialState

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._study.tell(trial, value, state=TrialState[state])
        except (OptunaError, RuntimeError, ValueError):
            # The sampler says that the grid is at its end, or this process was taken for dead and its trial was begun
            # again elsewhere.
            self._exhausted = self._exhausted or self._settings.sampler == "grid"
