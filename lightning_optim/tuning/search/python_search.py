"""`lo.search`: a search over fits that a function describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_optim.core.suggest import nearest
from lightning_optim.tuning.runs import Job, describe, python_fit
from lightning_optim.tuning.search.parameter import Params
from lightning_optim.tuning.search.result import SearchResult
from lightning_optim.tuning.search.search import Settings, run_search
from lightning_optim.tuning.search.space import Space

_PARTS = ("model", "data", "callbacks", "trainer")


def search(
    fit: Callable[[Params], Mapping[str, Any]],
    space: Mapping[str, Any],
    folder: str | Path = "search",
    *,
    metric: str = "val_loss",
    mode: str | None = None,
    trials: int = 40,
    sampler: str = "tpe",
    pruner: str = "median",
    storage: str | None = None,
    study: str = "search",
    workers: int | None = None,
    devices: Sequence[int] | None = None,
    steps: int | None = None,
    validations: int | None = None,
    seconds: float | None = None,
    timeout: float | None = None,
    seed: int | None = None,
    fit_seed: int = 0,
    progress: bool = True,
) -> SearchResult:
    """Search for the hyperparameters of a fit, with Optuna (extra ``tune``).

    Trials run in processes of their own, so that one that diverges, raises, runs out of memory or is killed leaves the
    others alone. The study is continued if there is one; several processes may work on it at once.

    Args:
        fit: A function of a module (with ``cloudpickle`` also of a notebook) that is given the hyperparameters by name
            and returns what is to be fitted: a mapping with ``model``, ``data`` (loaders, a pair of them, or a data
            module), ``callbacks`` and ``trainer``, further arguments of the Trainer.
        space: Names of hyperparameters and what to search: ``{"low": 1e-4, "high": 1e-1, "log": True}``, with ``step``
            or not, a list of choices, or ``"loguniform(1e-4, 1e-1)"``. With ``"when": {"optimizer": "adamw"}`` one is
            used with values of another only. If both ends are integers, so are all values.
        folder: Folder for trials, tables and pictures.
        metric: Metric of validation, of which the best value of a trial counts.
        mode: ``"min"`` or ``"max"``; None to tell it from the metric's name.
        trials: Number of trials of the study, with those of other processes and of earlier calls.
        sampler: ``"tpe"``, ``"random"``, ``"cmaes"``, ``"gp"``, ``"qmc"``, ``"grid"``, or the name of a class of
            ``optuna.samplers``.
        pruner: ``"median"``, ``"hyperband"``, ``"halving"``, ``"percentile"``, ``"none"``, or the name
            of a class of ``optuna.pruners``.
        storage: A URL of SQLAlchemy, ``journal:PATH`` or ``redis://...``; None for SQLite in the folder.
        study: Name of the study.
        workers: Number of trials at a time; None for one per GPU of ``devices``, else one per core, 8 at most.
        devices: Indices of GPUs, shared by the workers; None for the CPU.
        steps: Number of optimizer steps of a trial; None for what ``trainer`` says.
        validations: Number of validations within ``steps``.
        seconds: Seconds after which no trial starts.
        timeout: Seconds after which a trial is ended.
        seed: Seed of the sampler; None for a random one, which several processes need.
        fit_seed: Seed of each fit: that trials differ by their hyperparameters only.
        progress: Whether to show a progress bar.

    Returns:
        All trials of the study; ``result.best.params`` are the best hyperparameters. The folder has ``trials.csv`` and
        pictures of the search.

    Raises:
        ValueError: The space or an argument is wrong, or the study was made with another one.
        SearchError: The metric does not exist, or each trial fails.
        ModuleNotFoundError: Optuna is missing.
    """
    settings = Settings(
        metric, mode, trials, sampler, pruner, storage, study, workers, devices, seconds, seed, progress=progress
    )
    fixed = {"steps": steps, "validations": validations, "fit_seed": fit_seed}

    def make_job(name: str, params: Params) -> Job:
        arguments = {"make": fit, "params": params, **fixed}
        return Job(name, f"{__name__}:fit_trial", arguments, steps=steps, timeout=timeout)

    configuration = {"fit": describe(fit), **fixed}
    return run_search(make_job, Space.read(space), folder, settings, configuration)


def fit_trial(
    folder: Path,
    make: Callable[[Params], Mapping[str, Any]],
    params: Params,
    steps: int | None,
    validations: int | None,
    fit_seed: int,
) -> None:
    """Fit one trial; the target of its job.

    Args:
        folder: Folder of the job.
        make: The function that describes the fit.
        params: Its hyperparameters.
        steps: As for `search`.
        validations: As for `search`.
        fit_seed: As for `search`.

    Raises:
        TypeError: The function does not return a mapping with ``model`` and ``data``.
        ValueError: The mapping has another key.
    """
    import lightning.pytorch as L

    L.seed_everything(fit_seed, workers=True, verbose=False)
    parts = make(params)
    if not isinstance(parts, Mapping) or not {"model", "data"} <= parts.keys():
        raise TypeError(f"The function must return a mapping with 'model' and 'data', not {type(parts).__name__}.")
    for key in parts:
        if key not in _PARTS:
            raise ValueError(f"Invalid key {key!r} in what the function returns. {nearest(str(key), _PARTS)}")
    python_fit.fit(
        folder,
        model=parts["model"],
        data=parts["data"],
        callbacks=parts.get("callbacks", ()),
        trainer=parts.get("trainer", {}),
        seed=fit_seed,
        steps=steps,
        validations=validations,
        lr_factor=1.0,
        reseed=False,
        probe=None,
        events=True,
    )
