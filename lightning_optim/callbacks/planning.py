"""The way of a fit up to its first batch, to see what it would do, and everything that stands against it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import lightning.pytorch as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_optim.callbacks import _lightning as lightning_private
from lightning_optim.callbacks._contributor import is_ours
from lightning_optim.callbacks._followed import bare, prefixes_in
from lightning_optim.callbacks._hub import Hub, HubCallback
from lightning_optim.callbacks._packages import is_lightning
from lightning_optim.callbacks._plan_facts import (
    average_facts,
    batch_fact,
    clipping_fact,
    guard_facts,
    release_facts,
)
from lightning_optim.callbacks.configure_optimizers import ConfigureOptimizers
from lightning_optim.callbacks.schedule_free import schedule_free_notes
from lightning_optim.factory.about import about
from lightning_optim.factory.freezing import check_frozen_until
from lightning_optim.factory.plan import Plan, plan_curves, plan_groups, replay
from lightning_optim.factory.plan_advice import describe_optimizer, rate_notes
from lightning_optim.factory.run_length import horizon_of
from lightning_optim.schedules import Schedule, Scheduler
from lightning_optim.schedules.plateau import Observer


def make_plan(
    trainer: L.Trainer,
    model: L.LightningModule,
    train_dataloaders: Any = None,
    datamodule: L.LightningDataModule | None = None,
) -> Plan:
    """What ``trainer.fit(model, train_dataloaders)`` would do, without a step, a batch, a checkpoint or a log.

    The data are prepared and set up, because the length of the run is theirs; no batch is loaded. Of the callbacks,
    ours are set up, and Lightning's `BaseFinetuning`, which freezes parameters; all is undone at the end.

    Args:
        trainer: A Trainer that has not fitted yet.
        model: The module.
        train_dataloaders: The data as ``fit`` takes them: loaders, or a data module; None if the module has its own.
        datamodule: A data module, by its name.

    Returns:
        The plan, with all conflicts that were found: each step that fails is noted, and the others are taken all the
        same.

    Raises:
        ValueError: There are loaders and a data module.
    """
    if is_lightning(train_dataloaders, "LightningDataModule"):
        train_dataloaders, datamodule = None, train_dataloaders
    if train_dataloaders is not None and datamodule is not None:
        raise ValueError("make_plan takes train_dataloaders or a datamodule, not both, as fit does.")
    plan = Plan()
    present: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    others = [callback for callback in present if issubclass(type(callback), BaseFinetuning)]
    ours = [callback for callback in present if is_ours(callback)]
    if (hub := Hub.of(trainer)).members:  # It is left of a fit that ended without any hook.
        hub.abandon()
        hub = Hub.of(trainer)
    try:
        _walk(plan, trainer, model, train_dataloaders, datamodule, hub, ours, others)
    finally:
        for callback in (hub, *others):
            callback.teardown(trainer, model, "fit")
    plan.conflicts = list(dict.fromkeys(plan.conflicts))
    return plan


def _walk(
    plan: Plan,
    trainer: L.Trainer,
    model: L.LightningModule,
    loaders: Any,
    datamodule: L.LightningDataModule | None,
    hub: Hub,
    ours: list[HubCallback],
    others: list[BaseFinetuning],
) -> None:
    attempt = _collector(plan.conflicts)
    lightning_private.enter_fit(trainer, model, datamodule, loaders)
    with attempt():
        lightning_private.verify(trainer)
    with attempt():
        for part in (datamodule, model):
            if part is not None:
                part.prepare_data()
        for part in (datamodule, model):
            if part is not None:
                part.setup("fit")
    for callback in ours:
        with attempt():
            hub.join(callback)
    for other in others:
        with attempt():
            other.setup(trainer, model, "fit")
    with attempt():
        model.configure_model()
    with attempt():
        used = lightning_private.count_training_batches(trainer)
        plan.horizon = horizon_of(trainer)
        plan.facts["Batch"] = batch_fact(trainer, used)
    configured = False
    if not is_overridden("configure_optimizers", model):
        return  # which is among the conflicts: Lightning checks it, too
    with attempt():
        lightning_private.configure_optimizers(trainer, model)
        configured = True
    supplier = next((callback for callback in ours if isinstance(callback, ConfigureOptimizers)), None)
    if not configured:
        # The rules do not fit, say; the schedule may not fit the run either.
        if supplier is not None and isinstance(supplier.schedule, Schedule):
            with attempt():
                supplier.schedule.phases(plan.horizon)
        return
    with attempt():
        if ours:
            hub.start()
    _describe(plan, trainer, attempt)


def _describe(plan: Plan, trainer: L.Trainer, attempt: Callable[[], Any]) -> None:
    if not trainer.lightning_module.automatic_optimization and plan.horizon.total_steps is not None:
        plan.notes.append(
            "In manual optimization the module decides when its optimizers step. The curves are those of one step per "
            "batch; in the run each schedule follows the steps that its optimizer takes."
        )
    optimizers, prefixes = [bare(optimizer) for optimizer in trainer.optimizers], prefixes_in(trainer)
    for prefix, optimizer in zip(prefixes, optimizers, strict=True):
        plan.groups += [replace(group, name=prefix + group.name) for group in plan_groups(optimizer)]
        plan.notes += [_of(prefix, note) for note in (*about(optimizer).notes, *rate_notes(optimizer))]
        plan.facts[_label("Optimizer", prefix)] = describe_optimizer(optimizer)
    plan.notes += schedule_free_notes(trainer, optimizers)
    with attempt():
        facts, notes = average_facts(trainer, optimizers)
        plan.facts |= facts
        plan.notes += notes
    for config in trainer.lr_scheduler_configs:
        scheduler = config.scheduler
        if isinstance(scheduler, Observer):
            continue
        owner = getattr(scheduler, "optimizer", None)  # a scheduler of the user's own may have none
        owner = None if owner is None else bare(owner)
        prefix = next((p for p, each in zip(prefixes, optimizers, strict=True) if each is owner), "")
        plan.facts[_label("Schedule", prefix)] = _schedules(scheduler)
        if not isinstance(scheduler, Scheduler):
            _replay(plan, config)
            continue
        with attempt():
            if scheduler.horizon is None:
                scheduler.resolve(plan.horizon)
            plan.notes += scheduler.notes()
            curves = plan_curves(scheduler)
            last = max((plan.horizon.total_steps or 1) - 1, 0)
            for curve in curves:
                curve.values(last)  # refuses a run that it does not fit
            plan.curves += [replace(curve, label=_of(prefix, curve.label)) for curve in curves]
    plan.facts |= {"Clipping": clipping_fact(trainer), **release_facts(trainer)}
    plan.facts |= guard_facts(trainer, plan.groups)
    for group in plan.groups:
        if group.frozen_until is not None:
            with attempt():
                check_frozen_until(group.name, group.frozen_until, plan.horizon)


def _label(kind: str, prefix: str) -> str:
    return f"{kind} {prefix.removesuffix('.')}" if prefix else kind


def _schedules(scheduler: Any) -> str:
    """The schedules of one optimizer: of the rate, of single groups, of other hyperparameters."""
    if not isinstance(scheduler, Scheduler):
        return type(scheduler).__name__
    own = {f"group {name}": schedule for name, schedule in scheduler.group_schedules.items()}
    others = {hyperparameter.name: schedule for hyperparameter, schedule in scheduler.others.items()}
    return "; ".join([repr(scheduler.schedule), *(f"{what} {how!r}" for what, how in (own | others).items())])


def _of(prefix: str, text: str) -> str:
    """A text about one of several optimizers, of which the prefix is that of its groups."""
    return f"{prefix.removesuffix('.')}: {text}" if prefix else text


def _replay(plan: Plan, config: Any) -> None:
    name = type(config.scheduler).__name__
    if config.reduce_on_plateau:
        plan.notes.append(f"{name} follows a metric, so it cannot be drawn ahead.")
        return
    try:
        plan.curves.append(replay(config.scheduler, plan.horizon, per_epoch=config.interval == "epoch"))
    except ValueError as error:
        plan.notes.append(f"{name} cannot be drawn: {error}.")


def _collector(conflicts: list[str]) -> Callable[[], Any]:
    """A context that notes what refuses to go on, each line by itself, and goes on."""

    @contextmanager
    def attempt() -> Iterator[None]:
        try:
            yield
        except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
            conflicts.extend(line for line in str(error).splitlines() if line.strip())

    return attempt
