"""The hub of our callbacks of one Trainer: one private callback, which receives Lightning's hooks in their place."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import lightning.pytorch as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.callbacks._contributor import Contributor, Hearing, Hears, is_ours
from lightning_optim.callbacks._lightning import ModuleMethod, plain_name
from lightning_optim.callbacks._pipelines import Pipelines
from lightning_optim.core.stats import StepCounts
from lightning_optim.step import StepPipeline

CHECKPOINT_KEY = "lightning_optim"

_KEPT: weakref.WeakKeyDictionary[L.Trainer, dict[str, Any]] = weakref.WeakKeyDictionary()
"""State of each Trainer's last fit: a checkpoint can be saved by hand after it, too, and by then the callbacks may have
been given to another Trainer."""


def state_of_last_fit(trainer: L.Trainer) -> dict[str, Any]:
    """Return what a checkpoint gets that is saved by hand after a Trainer's fit; empty if it has not fitted."""
    return dict(_KEPT.get(trainer, {}))


class HubCallback(Contributor):
    """A contributor that finds its Trainer's hub."""

    log = ModuleMethod()
    log_dict = ModuleMethod()

    _hub: Hub | None = None

    def _attached(self, trainer: L.Trainer) -> None:
        """Join the hub when a run begins, before any hook (`ModuleMethod`): a subclass may override all of them."""
        if trainer.state.fn == TrainerFn.FITTING:
            present: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
            # Lightning sets `log` once in a run: a hub that this one is in by then is left of a fit that ended without
            # any hook, because another callback's `on_exception` raised.
            if self._hub is not None and any(callback is self for callback in present):
                self._hub.abandon()
            Hub.of(trainer)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Join the Trainer's hub, if that has not found this callback: another one may pass its hooks on."""
        if stage == "fit":
            Hub.of(trainer).join(self)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Refuse to train with this callback if it came after the start: no `setup` was called."""
        if self._hub is None:
            raise _late(self)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save, after a fit, the state that this Trainer's fit had."""
        if self._hub is None or self._hub.trainer is not trainer:
            checkpoint.update(state_of_last_fit(trainer))

    @property
    def joined(self) -> bool:
        """Whether it takes part in a fit: from `setup` until everything is undone."""
        return self._hub is not None

    @property
    def hub(self) -> Hub:
        """The Trainer's hub, from `setup` to the end of the fit."""
        assert self._hub is not None, "only between setup and teardown of a fit"
        return self._hub


class Hub(Hears):
    """The pipelines of one Trainer's fit and the callbacks that contribute to them.

    It stands in ``trainer.callbacks`` for the time of the fit, right behind the first of ours: there it comes before
    checkpoint callbacks, and what it does is done where users have put us among their own.

    Args:
        trainer: The Trainer.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self._trainer = weakref.ref(trainer)
        self.members: list[HubCallback] = []
        self._seen: list[Any] = []
        self._undo = ExitStack()
        self._hearing = Hearing()
        self._pipelines = Pipelines(trainer, self.members, self._hearing, self._undo)
        self._is_closed = self.has_configured = False
        """Whether the optimizers have been made."""

    @staticmethod
    def of(trainer: L.Trainer) -> Hub:
        """The hub of a Trainer that fits, which begins with the first call."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        hub = next((callback for callback in callbacks if type(callback) is Hub), None)
        if hub is None:
            hub = Hub(trainer)
            first = next((i for i, callback in enumerate(callbacks) if is_ours(callback)), len(callbacks))
            callbacks.insert(first + 1, hub)
        return hub

    @property
    def trainer(self) -> L.Trainer:
        """The Trainer, which outlives its hub."""
        trainer = self._trainer()
        assert trainer is not None
        return trainer

    @property
    def pipelines(self) -> list[StepPipeline]:
        """One for each of the Trainer's optimizers, in their order."""
        return self._pipelines.present

    # Members.

    def join(self, callback: HubCallback) -> None:
        """Add a member.

        Args:
            callback: The contributor.

        Raises:
            MisconfigurationException: Another member has its role, so that both would own the same thing.
        """
        if any(member is callback for member in self.members):
            return
        if callback._hub is not None:  # It is left of a fit that ended without any hook: a tuner's trial.
            callback._hub.abandon()
        for other in self.members:
            if shared := _roles(other) & _roles(callback):
                raise MisconfigurationException(
                    f"Two {min(shared)} callbacks on one Trainer: {other!r} and {callback!r}. Both would do the same "
                    "thing to every step, so remove one."
                )
        self.members.append(callback)
        self._hearing.update(self.members)
        callback._hub = self
        callback._at_setup(self.trainer, self.trainer.lightning_module)

    def on_close(self, undo: Callable[[], object]) -> None:
        """Register something to be undone at the end of the fit, however it ends; newest first."""
        self._undo.callback(undo)

    def _refuse_late(self, callbacks: list[Any]) -> None:
        for callback in callbacks:
            if is_ours(callback) and callback not in self.members:
                raise _late(callback)
        self._seen = list(callbacks)

    def _join_all(self) -> None:
        for callback in list(self.trainer.callbacks):  # type: ignore[attr-defined]
            if is_ours(callback):
                self.join(callback)

    # Lightning's hooks.

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let all of ours join."""
        if stage == "fit":
            self._join_all()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Pass the hook on; the optimizers have been made."""
        self.has_configured = True
        for member in self.members:
            member._at_fit_start(trainer, pl_module)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore counts and clip states, and pass the hook on."""
        self._pipelines.load_state_dict(checkpoint.get(CHECKPOINT_KEY, {}), names_in(checkpoint))
        for member in self.members:
            member._at_load_checkpoint(checkpoint)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the counts of all pipelines, and the state of members."""
        self._save(checkpoint)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the pipelines: optimizers are restored and the length of the run is known by now."""
        self._join_all()  # those that came after `setup`
        self._pipelines.start()
        for member in self.members:
            member._at_train_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Follow optimizers that have been replaced, and refuse callbacks of ours that came after the start."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if callbacks != self._seen:  # by identity, in C; a subclass may override the hook in which it would object
            self._refuse_late(callbacks)
        self._pipelines.begin_batch()
        for member in self._hearing.batch_start:
            member._at_batch_start(trainer, pl_module, batch)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Count announced steps that did not happen, of which these are not the gradients, and pass the hook on."""
        self._pipelines.settle()
        for member in self._hearing.before_backward:
            member._at_before_backward(trainer, pl_module, loss)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note that there are gradients, and pass the hook on."""
        self._pipelines.had_backward = True
        for member in self._hearing.after_backward:
            member._at_after_backward(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Announce the step to its pipeline."""
        self._pipelines.announce(optimizer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count announced steps that did not happen, and pass the hook on."""
        self._pipelines.settle()
        for member in self._hearing.batch_end:
            member._at_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._pipelines.owe_reports()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Pass the hook on."""
        for member in self.members:
            member._at_validation_start(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let schedules look at the metric that they follow, and pass the hook on."""
        self._pipelines.plateaus.validation_ended(trainer)
        for member in self.members:
            member._at_validation_end(trainer, pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let schedules look at metrics that modules log at the end of an epoch."""
        self._pipelines.plateaus.epoch_is_over(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let schedules look at the metric that they follow."""
        self._pipelines.plateaus.epoch_ended(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let schedules look at metrics of the last epoch, and pass the hook on."""
        self._pipelines.plateaus.epoch_is_over(trainer)
        for member in self.members:
            member._at_train_end(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Pass the hook on."""
        for member in self.members:
            member._at_fit_end(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Undo everything: Lightning does not call `teardown` after an exception. The user's must arrive, not ours."""
        self._pipelines.discard_announced()
        failed: list[str] = []
        members = [partial(member._at_exception, trainer, pl_module, exception) for member in self.members]
        last: list[Callable[[], None]] = [*members, self.close]
        for call in last:
            try:
                call()
            except Exception as error:
                failed.append(f"{type(error).__name__}: {error}")
        if failed:
            rank_zero_warn(f"After {type(exception).__name__}, while our callbacks were closed: {'; '.join(failed)}.")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Undo everything."""
        if stage == "fit":
            self.close()

    # What trials ask.

    @contextmanager
    def steps_alone(self) -> Iterator[None]:
        """Have steps clipped and skipped as ever, while nothing watches: no report, no alarm and no response."""
        self._hearing.update([member for member in self.members if not member.only_watches])
        try:
            yield
        finally:
            self._hearing.update(self.members)

    # What members ask.

    def start(self) -> None:
        """Start the pipelines, once; for a caller that needs them before the hub's own turn."""
        self._pipelines.start()

    def hold_schedules(self) -> None:
        """Let our schedulers stand still for the steps that are skipped from now on."""
        self._pipelines.hold_schedules()

    def health_points(self) -> dict[str, float]:
        """Return the numbers of all members about the run's health, by name."""
        return {name: value for member in self.members for name, value in member.health_points().items()}

    def skip_count_written(self) -> bool:
        """Return whether one of the members writes ``optim_health/skipped_steps`` at this step."""
        return any(member.writes_skip_count(self.trainer) for member in self.members)

    def health_written(self) -> bool:
        """Return whether one of the members writes `health_points` at this step."""
        return any(member.writes_health(self.trainer) for member in self.members)

    def used_lrs(self) -> Sequence[Sequence[float]]:
        """Return the rates of each optimizer's groups in its last step, if a member changes them; else nothing."""
        return next((rates for member in self.members if (rates := member.used_lrs())), ())

    def restored_places(self) -> list[int | None]:
        """Return for each optimizer its place in the checkpoint that was loaded; None for one that it has not."""
        return self._pipelines.restored_places()

    def restored_names(self, place: int) -> Sequence[str | None]:
        """Return the names of the parameters that the optimizer at that place had; empty if they are not known."""
        return self._pipelines.restored_names(place)

    def counts(self) -> list[StepCounts]:
        """The counts of each optimizer."""
        return self._pipelines.counts()

    def total(self) -> StepCounts:
        """The counts of all optimizers together, of those that are gone, too."""
        return self._pipelines.total()

    # The end.

    def close(self) -> None:
        """Undo everything, newest first, and once; every part, whatever another one raises."""
        if self._is_closed:
            return
        self._is_closed = True
        with ExitStack() as stack:
            stack.callback(self._leave)
            stack.push(self._undo)
            for member in self.members:
                stack.callback(member._at_close)
            if self.has_configured and (trainer := self._trainer()) is not None:
                # Else the Trainer still has the optimizers of its last fit.
                kept: dict[str, Any] = {}
                _KEPT[trainer] = kept
                self._save(kept)  # Reading counts can fail after an error on the device.

    def abandon(self) -> None:
        """Close what is left of a fit that ended without any hook; its errors have no receiver."""
        with suppress(Exception):
            self.close()

    def _save(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CHECKPOINT_KEY] = self._pipelines.state_dict()
        for member in self.members:
            member._at_save_checkpoint(checkpoint)

    def _leave(self) -> None:
        self._seen = []
        for member in self.members:
            member._hub = None
        self.members.clear()
        self._hearing.update(self.members)
        if (trainer := self._trainer()) is not None:
            # A new list: Lightning may be going through the old one, and would leave out the next callback.
            present: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
            trainer.callbacks = [callback for callback in present if callback is not self]  # type: ignore[attr-defined]


def names_in(checkpoint: Mapping[str, Any]) -> list[list[str]]:
    """Return the names of the parameters of each optimizer in a checkpoint of Lightning; empty if any has none."""
    states = checkpoint.get("optimizer_states", ())
    groups = [state["param_groups"] for state in states if "param_groups" in state]
    if len(groups) != len(states) or not all("param_names" in group for several in groups for group in several):
        return []
    return [[plain_name(name) for group in several for name in group["param_names"]] for several in groups]


def _late(callback: HubCallback) -> MisconfigurationException:
    return MisconfigurationException(
        f"{callback!r} was added to trainer.callbacks after training had started, and the optimizers had been prepared "
        "without it: it would do nothing. Give it to Trainer(callbacks=[...]), or add it in a callback's `setup`."
    )


def _roles(callback: HubCallback) -> set[str]:
    roles = {callback.role} if callback.role is not None else set()
    return roles | {"GradientClipping"} if callback.clip_rule() is not None else roles
