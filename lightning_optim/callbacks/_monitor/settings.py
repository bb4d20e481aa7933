"""The configuration of a run as one flat dictionary, with what matters first, for every logger and report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import lightning.pytorch as L
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.callbacks._followed import bare, names_in
from lightning_optim.callbacks._lightning import data_parallel_size
from lightning_optim.callbacks.divergence_guard import DivergenceGuard
from lightning_optim.callbacks.gradient_clipping import GradientClipping

FIRST = ("lr", "optimizer", "weight_decay", "schedule", "clipping")
"""Settings of an optimizer that a table of runs shows first."""

_PACKAGES = {"lightning_optim": "lightning-optim", "torch": "torch", "lightning": "lightning"}
"""Distribution of each package whose version is given, by the package's name."""


def settings(trainer: L.Trainer, batch_size: int | None = None) -> dict[str, Any]:
    """Return what a run trains with: its optimizers as they are, clipping, guard, and the module's hyperparameters.

    Names begin with ``optim/``, and for an optimizer's further hyperparameters with ``optim_options/``, so that tables
    in alphabetical order have the learning rate among their first columns. With several optimizers the name of one
    follows.

    Args:
        trainer: A Trainer whose optimizers have been made.
        batch_size: Number of samples of one micro-batch on one rank; None if it is not known.

    Returns:
        Plain values by name, the most important ones first.
    """
    optimizers = [bare(optimizer) for optimizer in trainer.optimizers]
    names = names_in(trainer)
    prefixes = [f"{name}/" for name in names] if len(optimizers) > 1 else [""]
    found: dict[str, Any] = {}
    clipping = clipping_of(trainer, names)
    for place, (prefix, optimizer) in enumerate(zip(prefixes, optimizers, strict=False)):
        main = main_settings(optimizer)
        main["schedule"] = _schedule_of(trainer, optimizer)
        main["clipping"] = clipping[place]
        found |= {f"optim/{prefix}{name}": main[name] for name in FIRST}
    found["optim/guard"] = _guard_of(trainer)
    for prefix, optimizer in zip(prefixes, optimizers, strict=False):
        if len(optimizer.param_groups) > 1:
            found[f"optim/{prefix}groups"] = _groups_of(optimizer)
    if batch_size is not None:
        accumulated = trainer.accumulate_grad_batches if trainer.lightning_module.automatic_optimization else 1
        found["trainer/batch_size"] = batch_size * accumulated * data_parallel_size(trainer)
    found |= _hparams_of(trainer)
    found |= {
        "trainer/precision": str(trainer.precision),
        "trainer/accumulate_grad_batches": trainer.accumulate_grad_batches,
        "trainer/world_size": trainer.world_size,
        "trainer/max_steps": trainer.max_steps,
        "trainer/max_epochs": trainer.max_epochs,
    }
    for prefix, optimizer in zip(prefixes, optimizers, strict=False):
        rest = {key: value for key, value in optimizer.defaults.items() if key not in FIRST}
        found |= {f"optim_options/{prefix}{key}": value for key, value in rest.items()}
    found |= {f"versions/{package}": _version_of(name) for package, name in _PACKAGES.items()}
    return {key: plain(value) for key, value in found.items() if value is not None}


def main_settings(optimizer: Optimizer) -> dict[str, Any]:
    """Return the class, the peak learning rate and the weight decay of an optimizer.

    The rate is that of the largest of the groups that the optimizer updates by its own rule.

    None stands for what it does not have.
    """
    groups, name = optimizer.param_groups, type(optimizer).__name__

    def size(group: Mapping[str, Any]) -> tuple[bool, int]:
        # Muon leaves most tensors to AdamW, whose rate is not the one that was chosen for it.
        return group.get("rule") in (None, name.lower()), len(group["params"])

    lrs = [_peak(group) for group in sorted(groups, key=size, reverse=True)]
    decays = [decay for group in groups if (decay := _number(group.get("weight_decay"))) is not None]
    return {
        "lr": lrs[0] if lrs else None,
        "optimizer": name,
        "weight_decay": max(decays) if decays else None,
    }


def _peak(group: Mapping[str, Any], shared: bool = True) -> float | None:
    """Return the peak learning rate of a group; if ``shared``, without the multiplier that it alone has."""
    lr = _number(group.get("initial_lr", group.get("lr")))
    if lr is None or not shared:
        return lr
    return float(f"{lr / (_number(group.get('lr_multiplier')) or 1.0):.12g}")


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float | Tensor) else None


def clipping_of(trainer: L.Trainer, names: Sequence[str]) -> list[str]:
    """Return what clips the gradients of each optimizer, in words.

    Args:
        trainer: The Trainer.
        names: Names of its optimizers.
    """
    callbacks: Iterable[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if issubclass(type(callback), GradientClipping):
            rules = [callback.rule if callback.rules is None else callback.rules.get(name) for name in names]
            return ["none" if rule is None else repr(rule) for rule in rules]
    if trainer.gradient_clip_val:
        kind = str(getattr(trainer.gradient_clip_algorithm, "value", None) or "norm")
        return [f"Trainer({kind} {trainer.gradient_clip_val:g})"] * len(names)
    return ["none"] * len(names)


def _guard_of(trainer: L.Trainer) -> str:
    callbacks: Iterable[Any] = trainer.callbacks  # type: ignore[attr-defined]
    guard: Any = next((callback for callback in callbacks if issubclass(type(callback), DivergenceGuard)), None)
    if guard is None:
        return "none"
    parts = ["skip"]
    if guard.spikes is not None:
        parts.append(f"spikes above {guard.spikes.threshold:g}")
    if guard.lr_cut is not None:
        parts.append(f"cut of the rate to {guard.lr_cut.factor:g}")
    if guard.rollback is not None:
        parts.append("rollback")
    return ", ".join([*parts, *(["stop"] if guard._stop else [])])


def _groups_of(optimizer: Optimizer) -> str:
    def described(index: int, group: Mapping[str, Any]) -> str:
        values = {"lr": _peak(group, shared=False), "weight decay": _number(group.get("weight_decay"))}
        text = ", ".join(f"{name} {value:g}" for name, value in values.items() if value is not None)
        return f"{group.get('name', index)}: {text}" if text else str(group.get("name", index))

    return "; ".join(described(index, group) for index, group in enumerate(optimizer.param_groups))


def _schedule_of(trainer: L.Trainer, optimizer: Optimizer) -> str:
    for config in trainer.lr_scheduler_configs:
        scheduler: Any = config.scheduler
        of = getattr(scheduler, "optimizer", None)
        if of is not None and bare(of) is optimizer:
            schedule = getattr(scheduler, "schedule", None)
            return type(scheduler).__name__ if schedule is None else repr(schedule).removesuffix("()")
    return "constant"


def _hparams_of(trainer: L.Trainer) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def add(prefix: str, values: Mapping[Any, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, Mapping):
                add(f"{prefix}{key}/", value)
            elif key != "_class_path":  # LightningCLI's own
                flat[f"{prefix}{key}"] = value

    add("", dict(trainer.lightning_module.hparams))
    return flat


def _version_of(distribution: str) -> str | None:
    if distribution == "torch":
        import torch

        return str(torch.__version__)
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def plain(value: Any) -> bool | int | float | str:
    """Return a value as loggers take it: a number, a truth value or a string."""
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    return value.__name__ if isinstance(value, type) else str(value)
