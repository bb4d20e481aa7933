"""A fit of the command line as a job: configuration files and flags, with changes by key."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import yaml

from lightning_optim.cli.optim_cli import OptimCLI
from lightning_optim.cli.sources import config_files
from lightning_optim.tuning.runs import Job
from lightning_optim.tuning.runs.python_fit import callbacks_of_job, trainer_of_job
from lightning_optim.tuning.runs.slot import PRELOAD as FIT

PRELOAD = (*FIT, "lightning_optim.cli.job")
"""What `run_jobs` imports once for such jobs."""


def fit_job(
    name: str,
    args: Sequence[str],
    overrides: Mapping[str, Any] | None = None,
    *,
    seed: int | None = None,
    steps: int | None = None,
    validations: int | None = None,
    lr_factor: float = 1.0,
    reseed: bool = False,
    probe: int | None = None,
    checkpoints: bool = False,
    events: bool = True,
    depends: Sequence[str] = (),
    timeout: float | None = None,
) -> Job:
    """Describe ``lightning-optim fit`` as a job.

    Args:
        name: Name of the job.
        args: Command line after ``fit``: ``["--config", "run.yaml", "--optim.lr", "1e-3"]``.
        overrides: Keys and values as a later configuration file has them, ``{"optim": {"lr": 1e-3}}``. They win over
            ``args``, apart from flags for an argument within an argument (``--optim.schedule.final``).
        seed: Value of ``seed_everything``; None for what the configuration says.
        steps: Number of optimizer steps; None for what the configuration says.
        validations: Number of validations within ``steps``; None for what the configuration says.
        lr_factor: Factor on all learning rates.
        reseed: Whether random numbers get the seed again when training starts.
        probe: Number of steps after which to end, to see how fast and how long the run is; None for the whole run.
        checkpoints: Whether callbacks save checkpoints.
        events: Whether to write TensorBoard's event files, which takes a second or two.
        depends: Files whose contents make this job another job, such as the source of the module.
        timeout: Seconds after which the process is ended; None for no limit.

    Returns:
        The job. Its description has a digest of each configuration file.
    """
    arguments: dict[str, Any] = {
        "args": absolute(args),
        "overrides": dict(overrides or {}),
        "seed": seed,
        "steps": steps,
        "validations": validations,
        "lr_factor": lr_factor,
        "reseed": reseed,
        "probe": probe,
        "checkpoints": checkpoints,
        "events": events,
    }
    read = [*config_files(args), *depends]
    files = {path: hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] for path in read}
    description = {**arguments, "args": list(args), "files": files}
    return Job(name, f"{__name__}:fit", arguments, description, steps, timeout)


def refuse_hidden(hidden: Mapping[str, str], args: Sequence[str], keys: Mapping[str, Any], where: str) -> None:
    """Refuse what an option of the command would replace without a word.

    Args:
        hidden: Keys of a configuration, ``trainer.max_steps``, and the option that replaces each.
        args: Command line after ``fit``; what its files say is meant to be replaced.
        keys: Keys and values as a configuration file has them, or paths with dots.
        where: What to call ``keys`` in the message.

    Raises:
        ValueError: A flag of ``args``, or one of ``keys``, is hidden.

    Example:
        >>> refuse_hidden({"trainer.max_steps": "--steps"}, ["--trainer.max_steps=3"], {}, "")
        Traceback (most recent call last):
        ValueError: Invalid --trainer.max_steps with --steps, which takes its place: give one of them.
    """
    flags = {arg.partition("=")[0].removeprefix("--") for arg in args if arg.startswith("--")}
    for path, option in hidden.items():
        inner: Any = keys
        for key in path.split("."):
            inner = inner.get(key) if isinstance(inner, Mapping) else None
        if path in flags:
            raise ValueError(f"Invalid --{path} with {option}, which takes its place: give one of them.")
        if path in keys or inner is not None:
            raise ValueError(f"Invalid {path} in {where} with {option}, which takes its place: give one of them.")


def hidden_by(steps: int | float | None, option: str = "--steps") -> dict[str, str]:
    """Return the keys that a budget of the command replaces, each with the option; none without a budget."""
    names = ("max_steps", "max_epochs", "max_time") if steps is not None else ()
    return {f"trainer.{name}": option for name in names}


def note_on_loggers(logger: Any) -> str:
    """Return what becomes of the loggers of a configuration; empty where it has none of its own."""
    if logger in (None, True, False):
        return ""
    return "Loggers of the configuration get nothing: each run writes TensorBoard's events into its own folder."


def absolute(args: Sequence[str]) -> list[str]:
    """Return a command line whose configuration files have absolute paths."""
    files = set(config_files(args))
    found = []
    for arg in args:
        flag, equals, value = arg.partition("=")
        if arg in files:
            arg = str(Path(arg).resolve())
        elif equals and flag == "--config" and value in files:
            arg = f"{flag}={Path(value).resolve()}"
        found.append(arg)
    return found


def with_overrides(args: Sequence[str], overrides: Mapping[str, Any], folder: Path) -> list[str]:
    """Return a command line that reads overrides from a file of its own, which is written into ``folder``."""
    if not overrides:
        return list(args)
    path = folder / "overrides.yaml"
    path.write_text(yaml.safe_dump(dict(overrides), sort_keys=False), encoding="utf-8")
    return [*args, "--config", str(path)]


def fit(
    folder: Path,
    args: Sequence[str],
    overrides: Mapping[str, Any],
    seed: int | None,
    steps: int | None,
    validations: int | None,
    lr_factor: float,
    reseed: bool,
    probe: int | None,
    checkpoints: bool,
    events: bool,
) -> None:
    """Fit; the target of `fit_job`.

    Args:
        folder: Folder of the job.
        args: As for `fit_job`.
        overrides: As for `fit_job`.
        seed: As for `fit_job`.
        steps: As for `fit_job`.
        validations: As for `fit_job`.
        lr_factor: As for `fit_job`.
        reseed: As for `fit_job`.
        probe: As for `fit_job`.
        checkpoints: As for `fit_job`.
        events: As for `fit_job`.
    """
    given = {**overrides, **({} if seed is None else {"seed_everything": seed})}

    class JobCLI(OptimCLI):
        """The command line of one job."""

        _at_shell = True

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {"fit": OptimCLI.subcommands()["fit"]}

        def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
            config = self.config_init["fit"]["trainer"]
            present = config.get("callbacks") or []
            present = present if isinstance(present, list) else [present]
            used = self.config_init["fit"].get("seed_everything")
            reset = used if reseed and isinstance(used, int) and not isinstance(used, bool) else None
            kwargs["callbacks"] = callbacks_of_job(folder, present, reset, lr_factor, probe, checkpoints)
            accumulate = int(config.get("accumulate_grad_batches") or 1)
            return super().instantiate_trainer(
                **kwargs, **trainer_of_job(folder, steps, validations, accumulate, checkpoints, events)
            )

    JobCLI(args=["fit", *with_overrides(args, given, folder)], save_config_kwargs={"overwrite": True})
