"""A fit that is described by Python objects, as a job."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Checkpoint, ProgressBar

from lightning_optim.callbacks.configure_optimizers import attach_first
from lightning_optim.tuning.runs.description import describe
from lightning_optim.tuning.runs.job import Job
from lightning_optim.tuning.runs.recorder import RateFactor, Recorder


def python_job(
    name: str,
    model: Any,
    data: Any,
    callbacks: Sequence[L.Callback] = (),
    trainer: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    steps: int | None = None,
    validations: int | None = None,
    lr_factor: float = 1.0,
    reseed: bool = False,
    probe: int | None = None,
    events: bool = True,
    timeout: float | None = None,
) -> Job:
    """Describe a fit of Python objects as a job.

    Args:
        name: Name of the job.
        model: A `LightningModule`, or a function without arguments that returns one, called after seeding.
        data: A `LightningDataModule` or dataloaders, as `Trainer.fit` takes them; a pair of training and validation
            dataloaders; or a function without arguments that returns one of these.
        callbacks: Callbacks of the Trainer; copies of them are used.
        trainer: Further arguments of the Trainer.
        seed: The seed.
        steps: Number of optimizer steps; None for what ``trainer`` says.
        validations: Number of validations within ``steps``; None for what ``trainer`` says.
        lr_factor: Factor on all learning rates.
        reseed: Whether random numbers get the seed again when training starts (`Recorder`).
        probe: Number of steps after which to end, to see how fast and how long the run is; None for the whole run.
        events: Whether to write TensorBoard's event files, which takes a second or two.
        timeout: Seconds after which the process is ended; None for no limit.

    Returns:
        The job, whose description has the source of functions and digests of weights.
    """
    arguments: dict[str, Any] = {
        "model": model,
        "data": data,
        "callbacks": list(callbacks),
        "trainer": dict(trainer or {}),
        "seed": seed,
        "steps": steps,
        "validations": validations,
        "lr_factor": lr_factor,
        "reseed": reseed,
        "probe": probe,
        "events": events,
    }
    target = f"{__name__}:fit"
    return Job(name, target, arguments, {key: describe(each) for key, each in arguments.items()}, steps, timeout)


def fit(
    folder: Path,
    model: Any,
    data: Any,
    callbacks: Sequence[L.Callback],
    trainer: Mapping[str, Any],
    seed: int,
    steps: int | None,
    validations: int | None,
    lr_factor: float,
    reseed: bool = False,
    probe: int | None = None,
    events: bool = True,
) -> None:
    """Fit; the target of `python_job`.

    Args:
        folder: Folder of the job.
        model: As for `python_job`.
        data: As for `python_job`.
        callbacks: As for `python_job`.
        trainer: As for `python_job`.
        seed: As for `python_job`.
        steps: As for `python_job`.
        validations: As for `python_job`.
        lr_factor: As for `python_job`.
        reseed: As for `python_job`.
        probe: As for `python_job`.
        events: As for `python_job`.
    """
    L.seed_everything(seed, workers=True, verbose=False)
    module = made(model)
    source = made(data)
    added = callbacks_of_job(folder, callbacks, seed if reseed else None, lr_factor, probe)
    accumulate = int(trainer.get("accumulate_grad_batches", 1))
    settings = {**trainer, **trainer_of_job(folder, steps, validations, accumulate, events=events)}
    fitting = L.Trainer(**settings, callbacks=added)
    attach_first(module, added)
    if isinstance(source, L.LightningDataModule):
        fitting.fit(module, datamodule=source)
    elif isinstance(source, tuple) and len(source) == 2:
        fitting.fit(module, *source)
    else:
        fitting.fit(module, source)


def made(value: Any) -> Any:
    """Return what a factory makes; anything else as it is."""
    is_factory = inspect.isfunction(value) or inspect.ismethod(value) or isinstance(value, type)
    is_factory |= hasattr(value, "func")  # functools.partial
    return value() if is_factory else value


def callbacks_of_job(
    folder: Path,
    callbacks: Sequence[L.Callback],
    seed: int | None,
    lr_factor: float,
    probe: int | None = None,
    checkpoints: bool = False,
) -> list[L.Callback]:
    """Return callbacks for a job: without progress bars and checkpoints, with a recorder.

    Args:
        folder: Folder of the job.
        callbacks: Callbacks of the configuration.
        seed: Seed of the recorder.
        lr_factor: Factor on all learning rates.
        probe: As for `Recorder`.
        checkpoints: Whether callbacks that save checkpoints stay.
    """
    unwanted: Any = ProgressBar if checkpoints else (ProgressBar, Checkpoint)
    kept = [copy.copy(callback) for callback in callbacks if not isinstance(callback, unwanted)]
    factor = [RateFactor(lr_factor)] if lr_factor != 1 else []
    return [*factor, *kept, Recorder(folder, seed, probe)]


def trainer_of_job(
    folder: Path,
    steps: int | None,
    validations: int | None,
    accumulate: int = 1,
    checkpoints: bool = False,
    events: bool = True,
) -> dict[str, Any]:
    """Return arguments of the Trainer of a job: everything in its folder, nothing on the screen, and the budget.

    Args:
        folder: Folder of the job.
        steps: Number of optimizer steps; None for what the configuration says.
        validations: Number of validations within ``steps``; None for what the configuration says.
        accumulate: Number of batches of one step.
        checkpoints: Whether to save checkpoints.
        events: Whether to write TensorBoard's event files.
    """
    from lightning.pytorch.loggers import TensorBoardLogger

    found: dict[str, Any] = {
        "default_root_dir": str(folder),
        "logger": TensorBoardLogger(str(folder), name="", version="events", default_hp_metric=False)
        if events
        else False,
        "enable_checkpointing": checkpoints,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    if steps is not None:
        found |= {"max_steps": steps, "max_epochs": -1, "max_time": None}
        if validations:
            every = max(1, -(-steps // validations)) * accumulate
            found |= {"val_check_interval": every, "check_val_every_n_epoch": None}
    return found


Factory = Callable[[], Any]
"""A function without arguments that makes a model or data."""
