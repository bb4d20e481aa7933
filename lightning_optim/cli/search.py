"""`lightning-optim search`: hyperparameters of a configuration, by Optuna."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_optim.cli.own_parser import OwnParser

if TYPE_CHECKING:
    from lightning_optim.tuning.search.parameter import Parameter, Params
    from lightning_optim.tuning.search.result import SearchResult
    from lightning_optim.tuning.search.space import Space

_EXAMPLE = "Example: lightning-optim search --config run.yaml --space space.yaml --trials 40"


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``search``.

    Args:
        parser: A parser of argparse, or of a package whose parsers are such.
    """
    add = parser.add_argument
    add("--space", metavar="FILE", help="YAML file with what to search: paths as in flags, ranges or choices")
    add("--trials", type=int, default=40, help="trials of the study, those of other processes included (40)")
    add("--metric", default="val_loss", help="metric of validation, whose best value counts (val_loss)")
    add("--mode", choices=("min", "max"), help="which way is better (default: as the metric's name tells)")
    add("--sampler", default="tpe", help="tpe, random, cmaes, gp, qmc, grid, or a class of Optuna (tpe)")
    add(
        "--pruner", default="median", help="median, hyperband, halving, percentile, none, or a class of Optuna (median)"
    )
    add("--storage", help="sqlite:///PATH, postgresql://..., journal:PATH, redis://... (default: SQLite in --out)")
    add("--study", default="search", metavar="NAME", help="name of the study, which is continued if it exists (search)")
    add("--workers", type=int, help="trials at a time (default: one per core, or per device)")
    add("--devices", type=_devices, help="GPUs to share, as 0,1 (default: none)")
    add("--steps", type=int, help="optimizer steps of a trial (default: those of the configuration)")
    add("--validations", type=int, help="validations within --steps, which can end a trial (default: the run's)")
    add("--seconds", type=float, help="start no trial after so many seconds")
    add("--timeout", type=float, help="end a trial after so many seconds")
    add("--seed", type=int, help="seed of the sampler; leave it out with several processes")
    add("--out", default="search", metavar="DIR", help="folder for trials, tables and pictures (search)")


def _devices(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of devices such as 0,1") from None


def run_search_command(args: Sequence[str]) -> None:
    """Search hyperparameters of a configuration, and print the best ones with the command that runs them.

    Args:
        args: The command line after ``search``: its own flags, and any of ``fit``.

    Raises:
        SystemExit: The configuration, the space or a flag is wrong, or no trial trains.
    """
    from lightning_optim.cli.fail import fail, said_of

    parser = OwnParser(
        "search", "Search hyperparameters of a configuration with Optuna. Takes the flags of `fit` as well.", _EXAMPLE
    )
    add_search_arguments(parser)
    options, of_fit = parser.split(args)
    if options.space is None:
        fail("No --space: give a YAML file such as\n  optim.lr: auto\n  optim.weight_decay: [0, 0.01, 0.1]", code=2)
    try:
        _search(options, of_fit)
    except (ValueError, RuntimeError, ModuleNotFoundError, OSError) as error:
        fail(said_of(error))
    except KeyboardInterrupt:
        fail(f"Interrupted. The same command continues the study {options.study!r}.", code=130)


def _search(options: argparse.Namespace, of_fit: Sequence[str]) -> None:
    from lightning_optim.cli.fit_config import read_fit
    from lightning_optim.cli.job import PRELOAD, fit_job, hidden_by, note_on_loggers, refuse_hidden
    from lightning_optim.tuning.runs import Job
    from lightning_optim.tuning.search.methods import require_optuna
    from lightning_optim.tuning.search.search import Settings, run_search

    require_optuna()
    settings = Settings(
        options.metric,
        options.mode,
        options.trials,
        options.sampler,
        options.pruner,
        options.storage,
        options.study,
        options.workers,
        options.devices,
        options.seconds,
        options.seed,
    )
    base = read_fit(of_fit)
    space = read_space(options.space, of_fit)
    refuse_hidden(hidden_by(options.steps), of_fit, {parameter.path: None for parameter in space}, options.space)
    check_space(space, of_fit)
    if note := note_on_loggers(base.data["trainer"].get("logger")):
        print(note)

    def make_job(name: str, params: Params) -> Job:
        return fit_job(
            name,
            [*of_fit, *flags_of(params)],
            steps=options.steps,
            validations=options.validations,
            timeout=options.timeout,
        )

    configuration = {
        "config": {key: value for key, value in base.data.items() if key != "config"},
        "budget": [options.steps, options.validations],
    }
    found = run_search(make_job, space, options.out, settings, _data(configuration), PRELOAD)
    _show(found, space, options, of_fit)


def _data(value: Any) -> Any:
    """A configuration as data for JSON."""
    if isinstance(value, Mapping):
        return {str(key): _data(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_data(each) for each in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def flags_of(params: Mapping[str, Any]) -> list[str]:
    """Return the flags of ``fit`` that set hyperparameters.

    Args:
        params: Values by their paths.

    Example:
        >>> flags_of({"optim.lr": 1e-05, "optim.optimizer.betas": [0.9, 0.95], "optim.schedule": None})
        ['--optim.lr=1.0e-05', '--optim.optimizer.betas=[0.9, 0.95]', '--optim.schedule=null']
    """
    return [f"--{path}={_yaml(value)}" for path, value in params.items()]


def _yaml(value: Any) -> str:
    if isinstance(value, str):
        return value
    import yaml

    return str(yaml.safe_dump(value, default_flow_style=True, width=10**6)).removesuffix("...\n").strip()


def read_space(path: str, of_fit: Sequence[str]) -> Space:
    """Read the file of a space.

    Args:
        path: The file.
        of_fit: The command line of the fit, after ``fit``, for the ranges that are ``auto``.

    Raises:
        SpaceError: The file cannot be read, or an entry is wrong; the message begins with the file.
    """
    from jsonargparse import get_loader

    from lightning_optim.cli.fit_config import ConfigError
    from lightning_optim.cli.known_ranges import KnownRanges
    from lightning_optim.cli.sources import SourceError, read_mapping
    from lightning_optim.tuning.search.parameter import SpaceError
    from lightning_optim.tuning.search.space import Space

    try:
        read_mapping(path, "what to search: `optim.lr: auto`")  # for its messages
    except SourceError as error:
        raise SpaceError(str(error)) from None
    data = get_loader("yaml")(Path(path).read_text(encoding="utf-8-sig"))
    try:
        space = Space.read(data, KnownRanges(of_fit))
        return space.with_whole(lambda parameter: _takes_integers_only(parameter, of_fit))
    except ConfigError as error:
        raise SpaceError(f"{path}: {error}") from None
    except SpaceError as error:
        raise SpaceError(f"{path}: {error}") from None


def _takes_integers_only(parameter: Parameter, of_fit: Sequence[str]) -> bool:
    """Whether a number between two integers is refused: `dropout: {low: 0, high: 1}` is not about 0 and 1 alone."""
    from lightning_optim.cli.fit_config import ConfigError, read_fit

    if parameter.step is not None:
        return True
    assert parameter.low is not None
    try:
        read_fit([*of_fit, *flags_of({parameter.path: parameter.low + 0.5})])
    except ConfigError:
        return True
    return False


def check_space(space: Space, of_fit: Sequence[str]) -> None:
    """Refuse paths that do not exist, and values that are not accepted, before the first trial.

    The configuration is read with each end of each range and with each choice, several at a time.

    Args:
        space: What is searched.
        of_fit: The command line of the fit, after ``fit``.

    Raises:
        SpaceError: A value is refused; the message has the path, the value and the reason.
    """
    from lightning_optim.cli.fit_config import ConfigError, read_fit
    from lightning_optim.tuning.search.parameter import SpaceError

    failed = False
    for parameter, value, params in space.corners():
        if parameter is not None and not failed:
            return
        try:
            read_fit([*of_fit, *flags_of(params)])
        except ConfigError as error:
            if parameter is not None:
                raise SpaceError(f"{parameter.name}: {value} is refused. {error}") from None
            failed = True
    if failed:  # Each value is accepted alone, so the reason is how they meet, which a trial will say.
        return


def _show(found: SearchResult, space: Space, options: argparse.Namespace, of_fit: Sequence[str]) -> None:
    from lightning_optim.cli.best_config import write_best

    print(f"\nStudy {found.study} in {found.storage}\n")
    print(found.table())
    best = found.best
    if best is None:
        return
    path = Path(options.out) / "best.yaml"
    flags = write_best(path, of_fit, flags_of(best.params), f"Trial {best.number}: {found.metric} {best.value:.6g}")
    print(f"\nBest: trial {best.number}, {found.metric} {best.value:.6g}. Run it:")
    print(f"  {shlex.join(['lightning-optim', 'fit', *of_fit, '--config', str(path), *flags])}")
    for line in _edges(best.params, found, space):
        print(line)
    print(f"All trials: {found.folder / 'trials.csv'}{''.join(f', {picture}' for picture in found.pictures)}")


def _edges(best: Mapping[str, Any], found: SearchResult, space: Space) -> Iterator[str]:
    """Say of which ranges the best value is at an end."""
    from lightning_optim.tuning.search.pictures import share

    for parameter in space:
        if parameter.choices or parameter.path not in best or not parameter.applies(best):
            continue
        at = share(parameter, float(best[parameter.path]))
        if len(found.ranked) >= 10 and not 0.03 < at < 0.97:
            yield f"{parameter.path} is best at the {'lower' if at < 0.5 else 'upper'} end of its range: widen it."
