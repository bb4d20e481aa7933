"""Pictures of a search: its course, and which hyperparameters mattered."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_optim.tuning.search.methods import require_optuna
from lightning_optim.tuning.search.parameter import Parameter
from lightning_optim.tuning.search.result import SearchResult, Trial
from lightning_optim.tuning.search.space import Space

_LEAST = 4
"""Number of finished trials below which importances say nothing."""


def draw(result: SearchResult, space: Space) -> list[Path]:
    """Draw ``history.png`` and ``importance.png`` into the folder of a search.

    Args:
        result: The trials.
        space: What was searched.

    Returns:
        Paths of the pictures; none without matplotlib, or without a finished trial.
    """
    if importlib.util.find_spec("matplotlib") is None or not result.ranked:
        return []
    paths = [_history(result)]
    if found := importances(result, space):
        paths.append(_importance(result, found))
    return paths


def importances(result: SearchResult, space: Space) -> dict[str, float]:
    """Return how much of the differences between trials each hyperparameter explains, by fANOVA.

    A hyperparameter with several ranges counts by the position in its range. One that some trials do not have is left
    out.

    Args:
        result: The trials.
        space: What was searched.

    Returns:
        Shares that sum to 1, the largest first; empty with fewer than 4 finished trials, or if nothing differs.

    References:
        Hutter et al., An Efficient Approach for Assessing Hyperparameter Importance, 2014.
    """
    optuna = require_optuna()
    done = result.ranked
    paths = [path for path in result.paths if all(path in trial.params for trial in done)]
    paths = [path for path in paths if len({repr(trial.params[path]) for trial in done}) > 1]
    if len(done) < _LEAST or not paths or len({trial.value for trial in done}) == 1:
        return {}
    if len(paths) == 1:
        return {paths[0]: 1.0}
    study = optuna.create_study(direction="minimize")
    for trial in done:
        params, distributions = {}, {}
        for path in paths:
            params[path], distributions[path] = _position(space, path, trial, done)
        study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=trial.value))
    forest = importlib.util.find_spec("sklearn") is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is experimental in Optuna
        kinds = optuna.importance
        evaluator = kinds.FanovaImportanceEvaluator(seed=0) if forest else kinds.PedAnovaImportanceEvaluator()
        try:
            found: dict[str, float] = kinds.get_param_importances(study, evaluator=evaluator)
        except (RuntimeError, ValueError):
            return {}
    return {path: share for path, share in found.items() if math.isfinite(share)}


def _position(space: Space, path: str, trial: Trial, trials: Sequence[Trial]) -> tuple[Any, Any]:
    """A value as a position in its range, or as one of all choices."""
    distributions = require_optuna().distributions
    parameter = next(p for p in space if p.path == path and p.applies(trial.params))
    if parameter.choices:
        choices = list(dict.fromkeys(repr(each.params[path]) for each in trials))
        return repr(trial.params[path]), distributions.CategoricalDistribution(choices)
    return share(parameter, trial.params[path]), distributions.FloatDistribution(0.0, 1.0)


def share(parameter: Parameter, value: float) -> float:
    """Return where in the range of a hyperparameter a value is, from 0 at its lower end to 1 at its upper one.

    Args:
        parameter: The hyperparameter, with a range.
        value: The value.
    """
    low, high = parameter.low or 0.0, parameter.high or 0.0
    if parameter.log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return min(max((value - low) / (high - low), 0.0), 1.0)


def _history(result: SearchResult) -> Path:
    figure, axes = _figure(7.0, 4.0)
    done = sorted(result.ranked, key=lambda trial: trial.number)
    values = [trial.value for trial in done if trial.value is not None]
    better = min if result.mode == "min" else max
    numbers = [trial.number for trial in done]
    axes.scatter(numbers, values, s=22, color="#4477aa", label="finished", zorder=3)
    best = [better(values[: count + 1]) for count in range(len(values))]
    axes.step(numbers, best, where="post", color="#cc3311", label="best so far")
    others = [trial.number for trial in result.trials if trial.value is None and trial.status != "running"]
    if others:
        place = (max if result.mode == "min" else min)(values)
        axes.scatter(others, [place] * len(others), s=22, marker="x", color="#999999", label="pruned, diverged, failed")
    if result.mode == "min" and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("trial")
    axes.set_ylabel(result.metric)
    axes.set_title(f"{result.study}: {result.metric} of each trial")
    axes.legend(frameon=False)
    return _save(figure, result.folder / "history.png")


def _importance(result: SearchResult, found: dict[str, float]) -> Path:
    figure, axes = _figure(7.0, 1.2 + 0.4 * len(found))
    labels = list(found)[::-1]
    bars = axes.barh(labels, [found[label] for label in labels], color="#4477aa")
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set_xlim(0, 1.1)
    axes.set_xlabel(f"share of the differences in {result.metric} (fANOVA, {len(result.ranked)} trials)")
    axes.set_title("Importance of hyperparameters")
    return _save(figure, result.folder / "importance.png")


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    return path
