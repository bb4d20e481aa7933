"""Where all our callbacks of one Trainer meet: one step pipeline per optimizer, patched once, undone once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import lightning.pytorch as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.clipping import ClipRule
from lightning_optim.divergence import Detector
from lightning_optim.durations import Horizon
from lightning_optim.flat_shards import FlatShards
from lightning_optim.freezing import freezing_of
from lightning_optim.gradients import group_names_of
from lightning_optim.schedules import Scheduler
from lightning_optim.schedules.plateau import Observer
from lightning_optim.stats import StepCounts, StepRecord
from lightning_optim.step import StepPipeline
from lightning_optim.training_length import horizon_of

CHECKPOINT_KEY = "lightning_optim"

_hubs: weakref.WeakKeyDictionary[L.Trainer, Hub] = weakref.WeakKeyDictionary()


class HubCallback(L.Callback):
    """A callback that contributes parts to the step pipeline. Only the first of a Trainer's drives the hub."""

    _hub: Hub | None = None
    _kept_state: dict[str, Any] | None = None
    """The hub's last state: Lightning saves checkpoints on request after the fit, too."""

    # What a subclass contributes.

    def clip_rule(self) -> ClipRule | None:
        """How gradients are clipped; asked once per optimizer."""
        return None

    def clip_limit(self, horizon: Horizon) -> Callable[[int], float] | None:
        """By what the rule's limit is multiplied at each step of a run that long; None for 1."""
        return None

    def detectors(self) -> Sequence[Detector]:
        """What makes a step be skipped; asked once per optimizer."""
        return ()

    def report_due(self, trainer: L.Trainer) -> bool:
        """Whether the step that is about to happen shall be reported to `on_report`."""
        return False

    def histograms_due(self, trainer: L.Trainer) -> Collection[str]:
        """Of what the step that is about to be reported shall count magnitudes (`lightning_optim.histograms.KINDS`)."""
        return ()

    def on_report(self, trainer: L.Trainer, optimizer_index: int, record: StepRecord) -> None:
        """Receives a step, still on the device."""

    def health_points(self) -> Mapping[str, float]:
        """Numbers about the run that the host knows, for a monitor to show as ``optim_health/<name>``."""
        return {}

    def tells_skips(self, trainer: L.Trainer) -> bool:
        """Whether it writes ``optim_health/skipped_steps`` at this step, so that nobody else has to."""
        return False

    # Lightning's hooks, passed on to the hub.

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Joins the Trainer's hub."""
        if stage == "fit":
            self._kept_state = None
            self._hub = _hubs.setdefault(trainer, Hub(trainer))
            self._hub.join(self)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the pipelines: optimizers are restored and the length of the run is known by now."""
        if (hub := self._led_hub) is not None:
            hub.start()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Announces the step."""
        if (hub := self._led_hub) is not None:
            hub.expect_step(optimizer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Accounts for a step that a GradScaler left out."""
        if (hub := self._led_hub) is not None:
            hub.settle()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Saves the counts of all pipelines."""
        if (hub := self._led_hub) is not None:
            self._kept_state = hub.state_dict()
        if self._kept_state is not None:
            checkpoint[CHECKPOINT_KEY] = self._kept_state

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remembers the saved counts for the pipelines to come."""
        if (hub := self._led_hub) is not None:
            hub.load_state_dict(checkpoint.get(CHECKPOINT_KEY, {}))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Undoes everything."""
        self._leave()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Undoes everything: Lightning does not call `teardown` after an exception."""
        self._leave()

    @property
    def hub(self) -> Hub:
        """The Trainer's hub, from `setup` to the end of the fit."""
        assert self._hub is not None, "only between setup and teardown of a fit"
        return self._hub

    @property
    def joined(self) -> bool:
        """Whether it is part of a hub now."""
        return self._hub is not None

    @property
    def _led_hub(self) -> Hub | None:
        """The hub, if this callback is the one that drives it."""
        return self._hub if self._hub is not None and self._hub.members[0] is self else None

    def _leave(self) -> None:
        try:
            if (hub := self._led_hub) is not None:
                self._kept_state = hub.state_dict()
        finally:  # reading counts can fail after an error on the device; what was patched is undone all the same
            if self._hub is not None:
                self._hub.close()
                self._hub = None


class Hub:
    """The pipelines of one Trainer's fit and the callbacks that contribute to them.

    Args:
        trainer: The Trainer.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self._trainer = weakref.ref(trainer)
        self.members: list[HubCallback] = []
        self.pipelines: list[StepPipeline] = []
        self._undo: list[Callable[[], None]] = []
        self._restored: list[StepCounts] = []
        self._restored_clip: list[dict[str, Any]] = []

    @property
    def trainer(self) -> L.Trainer:
        """The Trainer, which outlives its hub."""
        trainer = self._trainer()
        assert trainer is not None
        return trainer

    def join(self, callback: HubCallback) -> None:
        """Adds a contributor; refuses a second one of a kind, because both would own the same thing."""
        for other in self.members:
            if type(other) is type(callback):
                kind = type(callback).__name__
                raise MisconfigurationException(
                    f"Two {kind} callbacks on one Trainer: {other!r} and {callback!r}. Both would do the same thing to "
                    "every step, so remove one."
                )
        self.members.append(callback)

    def on_close(self, undo: Callable[[], None]) -> None:
        """Registers something to be undone at the end of the fit, however it ends."""
        self._undo.append(undo)

    def start(self) -> None:
        """Puts a pipeline on each optimizer and tells the schedulers how long the run is."""
        trainer = self.trainer
        self._check_schedulers()
        if has_engine(trainer):
            self._check_engine()
        else:
            self._start_pipelines()
        for config in trainer.lr_scheduler_configs:
            if isinstance(scheduler := config.scheduler, Scheduler) and scheduler.asks_for_horizon:
                # Again, if a tuner has run a shorter fit before this one.
                scheduler.resolve(horizon_of(trainer, fresh=scheduler.is_fresh))
        self.hold_schedules()
        for optimizer in trainer.optimizers:
            if (freezing := freezing_of(optimizer)) is not None:
                freezing.start()
                self.on_close(freezing.release)

    def hold_schedules(self) -> None:
        """Has our schedulers stand still for the steps that will be skipped from now on."""
        for config in self.trainer.lr_scheduler_configs:
            if not isinstance(scheduler := config.scheduler, Scheduler):
                continue
            if (pipeline := self._pipeline_of(scheduler.optimizer)) is not None:
                scheduler.hold_on(lambda pipeline=pipeline: pipeline.counts().skipped)  # type: ignore[misc]

    def _start_pipelines(self) -> None:
        trainer = self.trainer
        clipping = next((member for member in self.members if member.clip_rule() is not None), None)
        horizon = horizon_of(trainer)
        names: dict[Tensor, str] = {p: plain_name(key) for key, p in trainer.lightning_module.named_parameters()}
        shards = FlatShards.of(trainer.strategy.model) if trainer.strategy.model is not None else None
        group_names = {name for optimizer in trainer.optimizers for name in group_names_of(optimizer)}
        for index, optimizer in enumerate(trainer.optimizers):
            self.pipelines.append(
                StepPipeline(
                    optimizer,
                    clip=None if clipping is None else clipping.clip_rule(),
                    clip_limit=None if clipping is None else clipping.clip_limit(horizon),
                    clip_state=self._restored_clip[index] if index < len(self._restored_clip) else None,
                    names=names,
                    group_names=group_names,
                    shards=shards,
                    detectors=[detector for member in self.members for detector in member.detectors()],
                    report_due=self._report_due,
                    histograms=self._histograms_due,
                    on_report=lambda record, index=index: self._report(index, record),  # type: ignore[misc]
                    counts=self._restored[index] if index < len(self._restored) else None,
                )
            )

    def _check_engine(self) -> None:
        """DeepSpeed's engine clips by itself (`GradientClipping` has told it), and lets nobody look in between."""
        asking = [m for m in self.members if m.detectors() or type(m).on_report is not HubCallback.on_report]
        if asking:
            names = ", ".join(type(member).__name__ for member in asking)
            raise MisconfigurationException(
                f"{names} cannot be used with {type(self.trainer.strategy).__name__}: DeepSpeed's engine "
                "partitions the gradients, checks them and steps by itself, out of our sight. Use FSDP2 "
                "(ModelParallelStrategy) or DDP, or remove the callback."
            )

    def expect_step(self, optimizer: Optimizer) -> None:
        """Says that this optimizer's gradients are ready."""
        # Lightning hands over its own wrapper in manual optimization.
        optimizer = getattr(optimizer, "optimizer", optimizer)
        if (pipeline := self._pipeline_of(optimizer)) is not None:
            if self._others_look:
                unscale(self.trainer, optimizer)
            pipeline.expect_step()

    @cached_property
    def _others_look(self) -> bool:
        """Whether somebody else's hook looks at the gradients before a step."""
        trainer = self.trainer
        module = trainer.lightning_module
        return (
            is_overridden("configure_gradient_clipping", module)
            or is_overridden("on_before_optimizer_step", module)
            or any(
                type(callback).on_before_optimizer_step is not L.Callback.on_before_optimizer_step
                for callback in trainer.callbacks  # type: ignore[attr-defined]
                if not isinstance(callback, HubCallback)
            )
        )

    def health_points(self) -> dict[str, float]:
        """What all members know of the run's health, by name."""
        return {name: value for member in self.members for name, value in member.health_points().items()}

    def skips_are_told(self) -> bool:
        """Whether one of the members writes ``optim_health/skipped_steps`` at this step."""
        return any(member.tells_skips(self.trainer) for member in self.members)

    def settle(self) -> None:
        """Accounts for steps that did not come."""
        for pipeline in self.pipelines:
            pipeline.settle()

    def counts(self) -> list[StepCounts]:
        """The counts of each optimizer."""
        return [pipeline.counts() for pipeline in self.pipelines]

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and tensors, so that checkpoints load with ``weights_only=True``."""
        state: dict[str, Any] = {"counts": [[c.steps, c.clipped, c.skipped] for c in self.counts()]}
        clip = [pipeline.clip_state() for pipeline in self.pipelines]
        return {**state, "clip": clip} if any(clip) else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keeps counts and clip states for the pipelines, which do not exist yet."""
        self._restored = [StepCounts(*counts) for counts in state.get("counts", [])]
        self._restored_clip = state.get("clip", [])

    def close(self) -> None:
        """Undoes everything, newest first."""
        _hubs.pop(self.trainer, None)
        while self.pipelines:
            self.pipelines.pop().close()
        while self._undo:
            self._undo.pop()()

    def _report_due(self) -> bool:
        return any(member.report_due(self.trainer) for member in self.members)

    def _histograms_due(self) -> set[str]:
        return {kind for member in self.members for kind in member.histograms_due(self.trainer)}

    def _report(self, index: int, record: StepRecord) -> None:
        for member in self.members:
            member.on_report(self.trainer, index, record)

    def _pipeline_of(self, optimizer: Optimizer) -> StepPipeline | None:
        return next((pipeline for pipeline in self.pipelines if pipeline.optimizer is optimizer), None)

    def _check_schedulers(self) -> None:
        owners: dict[int, Any] = {}
        for config in self.trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            if isinstance(scheduler, Observer):  # sets nothing itself
                continue
            other = owners.setdefault(id(scheduler.optimizer), scheduler)
            if other is not scheduler and isinstance(scheduler, Scheduler) | isinstance(other, Scheduler):
                raise MisconfigurationException(
                    f"Two schedules for one optimizer: {_describe(other)} and {_describe(scheduler)}. Each would "
                    "overwrite the other's learning rates, so remove one."
                )


def unscale(trainer: L.Trainer, optimizer: Optimizer) -> None:
    """Takes the loss scale out of the gradients, as Lightning does except where an optimizer does so in its kernel.

    Hooks of the user then see the gradients they would see without 16-bit precision, at the price of one pass.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        scaler.unscale_(optimizer)


def has_engine(trainer: L.Trainer) -> bool:
    """Whether DeepSpeed steps in place of the optimizer. By name, because its strategy exists without the package."""
    return any(cls.__name__ == "DeepSpeedStrategy" for cls in type(trainer.strategy).__mro__)


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers of its modules add."""
    for wrapper in ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module."):
        name = name.replace(wrapper, "")
    return name


def _describe(scheduler: Any) -> str:
    return repr(scheduler.schedule) if isinstance(scheduler, Scheduler) else type(scheduler).__name__
