"""Samplers, pruners and storages of Optuna by the names that a command line takes."""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_optim.core.suggest import nearest
from lightning_optim.tuning.search.space import Space

NEEDED = "A search needs Optuna: pip install 'lightning-optim[tune]'"

SAMPLERS = ("tpe", "random", "cmaes", "gp", "qmc", "grid")
PRUNERS = ("median", "hyperband", "halving", "percentile", "none")

_BUSY = 100
"""Seconds to wait for another process that writes into the same SQLite file."""


def require_optuna() -> Any:
    """Import Optuna.

    Raises:
        ModuleNotFoundError: It is missing; the message says what to install.
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(NEEDED) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def make_sampler(name: str, space: Space, seed: int | None = None) -> Any:
    """Return a sampler.

    Args:
        name: One of `SAMPLERS`, or the name of a class in ``optuna.samplers``.
        space: What is searched.
        seed: Its seed; None for a random one, which several processes on one study need.

    Raises:
        ValueError: The name is unknown, or the sampler does not fit the space.
        ModuleNotFoundError: The sampler needs a package that is missing.
    """
    optuna = require_optuna()
    if name == "grid" and space.size == float("inf"):
        open_ = next(p.path for p in space if not (p.choices or p.whole or p.step))
        raise ValueError(f"Invalid sampler='grid': the range of {open_} has no step. Give it one, or choices.")
    if name == "cmaes" and importlib.util.find_spec("cmaes") is None:
        raise ModuleNotFoundError("The sampler cmaes needs a package: pip install cmaes")
    if name in ("gp", "qmc") and importlib.util.find_spec("scipy") is None:
        raise ModuleNotFoundError(f"The sampler {name} needs a package: pip install scipy")
    samplers = optuna.samplers
    makers: dict[str, Callable[[], Any]] = {
        # Hyperparameters depend on each other, and running trials count as bad ones, so that workers spread.
        "tpe": lambda: samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True),
        "random": lambda: samplers.RandomSampler(seed=seed),
        "cmaes": lambda: samplers.CmaEsSampler(seed=seed),
        "gp": lambda: samplers.GPSampler(seed=seed),
        "qmc": lambda: samplers.QMCSampler(seed=seed, scramble=True),
        "grid": lambda: samplers.BruteForceSampler(seed=seed),
    }
    return _made("sampler", name, makers, samplers)


def make_pruner(name: str) -> Any:
    """Return a pruner, for which the step of a value is the number of validations so far.

    Args:
        name: One of `PRUNERS`, or the name of a class in ``optuna.pruners``.

    Raises:
        ValueError: The name is unknown.
    """
    pruners = require_optuna().pruners
    makers: dict[str, Callable[[], Any]] = {
        "median": lambda: pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1),
        "hyperband": lambda: pruners.HyperbandPruner(min_resource=1),
        "halving": lambda: pruners.SuccessiveHalvingPruner(min_resource=1),
        "percentile": lambda: pruners.PercentilePruner(25.0, n_startup_trials=5, n_warmup_steps=1),
        "none": lambda: pruners.NopPruner(),
    }
    return _made("pruner", name, makers, pruners)


def _made(kind: str, name: str, makers: dict[str, Callable[[], Any]], module: Any) -> Any:
    make = makers.get(name) or (getattr(module, name, None) if name[:1].isupper() else None)
    if make is None:
        raise ValueError(f"Unknown {kind} {name!r}. {nearest(name, makers)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is experimental in Optuna
        try:
            return make()
        except TypeError as error:
            raise ValueError(f"Invalid {kind}={name!r}: it needs arguments ({error}). {nearest('', makers)}") from error


def default_storage(folder: Path) -> str:
    """Return the storage of a search that is given none: SQLite, in the folder of the search."""
    return f"sqlite:///{(folder / 'study.db').resolve()}"


def open_storage(url: str) -> Any:
    """Return a storage.

    Args:
        url: A URL of SQLAlchemy (``sqlite:///study.db``, ``postgresql://...``), ``journal:PATH`` for a journal file, as
            for a network file system, or ``redis://...``.

    Raises:
        ValueError: The storage cannot be opened; the message has the reason.
    """
    optuna = require_optuna()
    try:
        if url.startswith("journal:"):
            from optuna.storages.journal import JournalFileBackend

            path = Path(url.removeprefix("journal:"))
            path.parent.mkdir(parents=True, exist_ok=True)
            return optuna.storages.JournalStorage(JournalFileBackend(str(path)))
        if url.startswith("redis"):
            from optuna.storages.journal import JournalRedisBackend

            return optuna.storages.JournalStorage(JournalRedisBackend(url))
        if url.startswith("sqlite:///"):
            Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
            return _patient(lambda: optuna.storages.RDBStorage(url, engine_kwargs=_SQLITE))
        return optuna.storages.RDBStorage(url)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"Cannot open the storage {without_password(url)}: {reason:.300}\n"
            "It is a URL of SQLAlchemy (sqlite:///study.db, postgresql://...), journal:PATH, or redis://..."
        ) from error


_SQLITE = {"connect_args": {"timeout": _BUSY}}


def _patient(make: Callable[[], Any]) -> Any:
    """Try again while another process makes the same tables."""
    for attempt in range(6):
        try:
            return make()
        except Exception as error:
            if attempt == 5 or not any(word in str(error) for word in ("already exists", "locked", "UNIQUE")):
                raise
            time.sleep(0.2 * 2**attempt)
    raise AssertionError


def without_password(url: str) -> str:
    """Return a URL as it may be shown.

    Example:
        >>> without_password("postgresql://me:secret@host/studies")
        'postgresql://me:***@host/studies'
    """
    before, at, after = url.rpartition("@")
    return f"{before.rpartition(':')[0]}:***@{after}" if at and before.count(":") > 1 else url
