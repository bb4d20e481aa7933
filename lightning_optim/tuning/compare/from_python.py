"""`lightning_optim.compare`: a comparison of Python objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_optim.core.suggest import nearest
from lightning_optim.tuning.compare.outcome import Comparison
from lightning_optim.tuning.compare.study import Settings, check_names, run_comparison

_KEYS = {
    "optim": "ConfigureOptimizers",
    "clip": "GradientClipping",
    "guard": "DivergenceGuard",
    "monitor": "OptimizerMonitor",
}
_OTHERS = ("callbacks", "trainer", "model", "data")


def compare(
    model: Any,
    data: Any,
    variants: Mapping[str, Any],
    *,
    base: Mapping[str, Any] | None = None,
    trainer: Mapping[str, Any] | None = None,
    seeds: int | Sequence[int] = 3,
    steps: int | None = None,
    seconds: float | None = None,
    tune_lr: bool = False,
    tune_steps: int | None = None,
    metric: str | None = None,
    mode: str | None = None,
    validations: int = 10,
    folder: str | Path = "compare",
    workers: int | None = None,
    devices: Sequence[int] | None = None,
    rerun: bool = False,
    progress: bool = True,
) -> Comparison:
    """Compare variants of a run, each with several seeds, in processes of their own, and write a page.

    For each seed all variants start from the same weights and see the same batches, which is checked. Nothing in this
    process changes: models, data and callbacks are copied into the others.

    Args:
        model: A function or class without arguments that returns a `LightningModule`, called after seeding; or a
            module, whose weights every run starts from, whatever its seed.
        data: A `LightningDataModule`, dataloaders as `Trainer.fit` takes them, a pair of training and validation
            dataloaders, or a function without arguments that returns one of these, which is best.
        variants: What each variant sets, by its name: keys as in YAML, ``{"optim": {"optimizer": "lion"}}``; or a
            callback, or a list of callbacks. The keys are ``optim``, ``clip``, ``guard``, ``monitor`` (arguments of
            the callbacks; False for none), ``callbacks`` (further ones), ``trainer`` (arguments of the Trainer),
            ``model`` and ``data`` (in place of those above).
        base: The same keys, for all variants.
        trainer: Arguments of the Trainer, for all variants.
        seeds: Number of seeds, or the seeds themselves.
        steps: Number of optimizer steps of each run; None for what the Trainer's arguments say.
        seconds: Seconds of training of each run, in place of ``steps``.
        tune_lr: Whether each variant gets its own rate first, the only fair way to compare optimizers: five factors on
            the rates given, in short runs with a seed of their own.
        tune_steps: Number of steps of the longer runs of the tuning; None for half of the budget.
        metric: Name of the metric to compare; None for a loss of validation.
        mode: ``"min"`` or ``"max"``; None for what the metric's name tells.
        validations: Number of validations of each run, if it has ``steps`` or ``seconds``.
        folder: Folder of the runs, ``compare.html`` and ``results.csv``. A comparison that was interrupted continues.
        workers: Number of runs at a time; None for one per GPU, else one per core.
        devices: Indices of GPUs; None or empty for the CPU.
        rerun: Whether runs of another configuration in the folder are replaced, rather than refused.
        progress: Whether to show progress.

    Returns:
        The results by variant and seed, with their verdict.

    Raises:
        FileExistsError: The folder has runs of another configuration.
        RuntimeError: Not one run could train.
        TypeError: An argument does not fit, or cannot be sent to another process.
        ValueError: A key or value is unknown.

    Example:
        ```python
        lo.compare(
            Model,
            make_data,
            {
                "adamw": {"optim": {"optimizer": "adamw", "lr": 1e-3}},
                "muon": {"optim": {"optimizer": "muon", "lr": 2e-2}},
            },
            steps=500,
            tune_lr=True,
            trainer={"accelerator": "cpu"},
        )
        ```
    """
    from lightning_optim.tuning.compare.page import write_comparison
    from lightning_optim.tuning.runs.python_fit import python_job

    settings = Settings(
        seeds, steps, seconds, tune_lr, tune_steps, metric, mode, validations, workers, devices, rerun, progress
    )
    check_names(list(variants))
    shared = {**_checked("base", base or {})}
    shared["trainer"] = {**shared.get("trainer", {}), **(trainer or {})}
    given = {name: _checked(name, _as_keys(name, each)) for name, each in variants.items()}
    if steps is not None or seconds is not None:
        for name, each in given.items():
            if hidden := [key for key in ("max_steps", "max_epochs", "max_time") if key in each.get("trainer", {})]:
                raise ValueError(f"Invalid trainer.{hidden[0]} of variant {name!r}: steps or seconds takes its place.")
    changed = [name for name, each in given.items() if "model" in each or "data" in each]
    # Made here once, so that what is wrong is refused before anything runs.
    ready = {name: (_callbacks(name, shared, each), _trainer(shared, each)) for name, each in given.items()}

    def make(name: str, variant: str, seed: int, **arguments: Any) -> Any:
        own = {**shared, **given[variant]}
        callbacks, trainer = ready[variant]
        return python_job(
            name,
            own.get("model", model),
            own.get("data", data),
            callbacks,
            trainer,
            seed=seed,
            reseed=bool(changed),
            **arguments,
        )

    texts = {name: _text(each) for name, each in given.items()}
    found = run_comparison(settings, texts, make, folder, changed)
    return replace(found, page=write_comparison(found))


def _as_keys(name: str, value: Any) -> Mapping[str, Any]:
    import lightning.pytorch as L

    if isinstance(value, Mapping):
        return value
    callbacks = [value] if isinstance(value, L.Callback) else value
    if isinstance(callbacks, list | tuple) and all(isinstance(each, L.Callback) for each in callbacks):
        return {"callbacks": list(callbacks)}
    raise TypeError(
        f"Invalid variant {name!r}: must be a mapping such as {{'optim': {{'optimizer': 'lion'}}}}, a callback or a "
        f"list of callbacks, got {value!r:.100}."
    )


def _checked(name: str, value: Mapping[str, Any]) -> Mapping[str, Any]:
    for key, each in value.items():
        if key not in _KEYS and key not in _OTHERS:
            raise ValueError(f"Unknown key {key!r} of variant {name!r}. {nearest(str(key), [*_KEYS, *_OTHERS])}")
        if key in _KEYS and not isinstance(each, Mapping | bool):
            raise TypeError(
                f"Invalid {key}={each!r:.100} of variant {name!r}: must be a mapping of arguments, or False."
            )
    return value


def _callbacks(name: str, shared: Mapping[str, Any], own: Mapping[str, Any]) -> list[Any]:
    """Return the callbacks of a variant; arguments of a key that both have are merged, the variant's win."""
    import lightning_optim.callbacks as ours

    found = [*shared.get("callbacks", ()), *own.get("callbacks", ())]
    for key, cls in _KEYS.items():
        both = [each[key] for each in (shared, own) if key in each]
        if not both or both[-1] is False:
            continue
        arguments = {k: v for each in both if isinstance(each, Mapping) for k, v in each.items()}
        try:
            found.append(getattr(ours, cls)(**arguments))
        except (TypeError, ValueError) as error:
            raise type(error)(f"Invalid {key} of variant {name!r}: {error}") from error
    if not any(isinstance(callback, ours.ConfigureOptimizers) for callback in own.get("callbacks", ())):
        return found
    # A variant with a whole ConfigureOptimizers takes the place of the shared keys.
    keyed = [each for each in found if isinstance(each, ours.ConfigureOptimizers) and each not in own["callbacks"]]
    return [each for each in found if each not in keyed]


def _trainer(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    import inspect

    import lightning.pytorch as L

    found = {**shared.get("trainer", {}), **own.get("trainer", {})}
    known = inspect.signature(L.Trainer.__init__).parameters
    for key in found:
        if key not in known:
            raise ValueError(f"Unknown argument of the Trainer {key!r}. {nearest(str(key), known)}")
    if found.get("devices", 1) not in (1, "1", "auto", -1) or found.get("num_nodes", 1) != 1:
        raise ValueError(
            f"Invalid devices={found.get('devices')!r}: each run of a comparison is on one device; several run side by "
            "side (workers=, devices= of compare)."
        )
    return found


def _text(value: Mapping[str, Any]) -> str:
    """Return what a variant sets, in one line."""
    parts = []
    for key, each in value.items():
        inner = ", ".join(f"{k}: {v}" for k, v in each.items()) if isinstance(each, Mapping) else f"{each}"
        parts.append(f"{key}: {inner}")
    return "; ".join(parts) or "as it is"
