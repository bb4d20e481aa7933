"""Where all our callbacks of one Trainer meet: one private callback, which gets Lightning's hooks in place of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar

import lightning.pytorch as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_optim.callbacks.followed import FollowedOptimizers, bare
from lightning_optim.callbacks.followed_schedulers import FollowedSchedulers
from lightning_optim.callbacks.lightning_private import ModuleMethod
from lightning_optim.clipping import ClipRule
from lightning_optim.divergence import Detector
from lightning_optim.durations import Horizon
from lightning_optim.flat_shards import FlatShards
from lightning_optim.freezing import freezing_of
from lightning_optim.gradients import group_names_of
from lightning_optim.stats import StepCounts, StepRecord
from lightning_optim.step import StepPipeline
from lightning_optim.training_length import horizon_of

CHECKPOINT_KEY = "lightning_optim"


class HubCallback(L.Callback):
    """A callback that contributes parts to the step pipeline.

    What it does during a fit it does in the methods named ``_at_...``, which the Trainer's `Hub` calls. Lightning's own
    hooks are left to users: a subclass may override any of them and need not call ``super()``.
    """

    role: ClassVar[str | None] = None
    """What only one callback of a Trainer may be; subclasses have it, too."""

    log = ModuleMethod()
    log_dict = ModuleMethod()

    _hub: Hub | None = None
    _kept: Mapping[str, Any] = {}
    """What the last fit would save: Lightning saves checkpoints on request after the fit, too."""

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
        """Whether it wants a report of each optimizer's step in the present batch.

        An optimizer that does not step in this batch is reported at its next step, one that steps more than once is
        reported once.
        """
        return False

    def histograms_due(self, trainer: L.Trainer) -> Collection[str]:
        """Of what the step that is about to be reported shall count magnitudes (`lightning_optim.histograms.KINDS`)."""
        return ()

    def on_report(self, trainer: L.Trainer, optimizer_index: int, record: StepRecord) -> None:
        """Receives a step that it asked for, still on the device."""

    def health_points(self) -> Mapping[str, float]:
        """Numbers about the run that the host knows, for a monitor to show as ``optim_health/<name>``."""
        return {}

    def tells_skips(self, trainer: L.Trainer) -> bool:
        """Whether it writes ``optim_health/skipped_steps`` at this step, so that nobody else has to."""
        return False

    # A fit as the hub passes it on; as Lightning's hooks of these names, unless told otherwise.

    def _at_setup(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None: ...
    def _at_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None: ...
    def _at_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None: ...
    def _at_save_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...

    def _at_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """All pipelines stand."""

    def _at_new_optimizers(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The pipelines are others than before, in the middle of the run."""

    def _at_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None: ...
    def _at_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None: ...
    def _at_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None: ...

    def _at_step(self, trainer: L.Trainer, optimizer_index: int) -> None:
        """Lightning has announced the step of an optimizer, whose gradients are ready."""

    def _at_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None: ...

    def _at_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None: ...
    def _at_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None: ...
    def _at_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None: ...
    def _at_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None: ...
    def _at_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None: ...

    def _at_close(self) -> None:
        """The fit is over, however it ended: undoes what is its own."""

    # Who finds the hub.

    def _attached(self, trainer: L.Trainer) -> None:
        """A run begins, before any hook (`ModuleMethod`): a subclass may override them all."""
        if trainer.state.fn == TrainerFn.FITTING:
            Hub.of(trainer)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Joins the Trainer's hub, if that has not found it yet: a callback of somebody's passes its hooks on, say."""
        if stage == "fit":
            Hub.of(trainer).join(self)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Saves, after a fit, what that fit would have saved."""
        if self._hub is None:
            checkpoint.update(self._kept)

    @property
    def hub(self) -> Hub:
        """The Trainer's hub, from `setup` to the end of the fit."""
        assert self._hub is not None, "only between setup and teardown of a fit"
        return self._hub


class Hub(L.Callback):
    """The pipelines of one Trainer's fit and the callbacks that contribute to them.

    It stands in ``trainer.callbacks`` for the time of the fit, right behind the first of ours: there it comes before
    checkpoint callbacks, and what it does is done where users have put us among their own.

    Args:
        trainer: The Trainer.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self._trainer = weakref.ref(trainer)
        self.members: list[HubCallback] = []
        self._optimizers = FollowedOptimizers(self._make_pipeline)
        self._schedulers = FollowedSchedulers(self._optimizers)
        self._undo = ExitStack()
        self._is_started = self._is_closed = False
        self.has_configured = False
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
        return [followed.pipeline for followed in self._optimizers]

    # Members.

    def join(self, callback: HubCallback) -> None:
        """Takes a contributor in; refuses a second one in its role, because both would own the same thing."""
        if any(member is callback for member in self.members):
            return
        if callback._hub is not None:  # of a fit that broke off where no hook told of it, in a tuner's trial
            callback._hub.close()
        for other in self.members:
            if shared := _roles(other) & _roles(callback):
                raise MisconfigurationException(
                    f"Two {min(shared)} callbacks on one Trainer: {other!r} and {callback!r}. Both would do the same "
                    "thing to every step, so remove one."
                )
        self.members.append(callback)
        callback._hub, callback._kept = self, {}
        callback._at_setup(self.trainer, self.trainer.lightning_module)

    def on_close(self, undo: Callable[[], object]) -> None:
        """Registers something to be undone at the end of the fit, however it ends; newest first."""
        self._undo.callback(undo)

    def _join_all(self) -> None:
        for callback in list(self.trainer.callbacks):  # type: ignore[attr-defined]
            if is_ours(callback):
                self.join(callback)

    # Lightning's hooks.

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Takes in all of ours."""
        if stage == "fit":
            self._join_all()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Comes after `configure_optimizers`."""
        self.has_configured = True
        for member in self.members:
            member._at_fit_start(trainer, pl_module)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Goes on from saved counts."""
        self.load_state_dict(checkpoint.get(CHECKPOINT_KEY, {}))
        for member in self.members:
            member._at_load_checkpoint(checkpoint)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Saves the counts of all pipelines, and what members have."""
        self._save(checkpoint)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the pipelines: optimizers are restored and the length of the run is known by now."""
        self._join_all()  # those that came after `setup`
        self.start()
        for member in self.members:
            member._at_train_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Follows optimizers that have been replaced."""
        self.follow()
        for member in self.members:
            member._at_batch_start(trainer, pl_module, batch)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Passes it on."""
        for member in self.members:
            member._at_before_backward(trainer, pl_module, loss)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Passes it on."""
        for member in self.members:
            member._at_after_backward(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """The step is announced."""
        if has_engine(trainer):
            return
        optimizer = bare(optimizer)
        if (index := self._optimizers.index(optimizer)) is None:
            raise MisconfigurationException(
                f"{type(optimizer).__name__} is about to step, and this one is none of the Trainer's optimizers "
                f"({', '.join(type(o).__name__ for o in trainer.optimizers) or 'it has none'}), so that nothing would "
                "clip, guard or monitor it. Set `trainer.optimizers = [...]` before the batch in which it steps first; "
                "changing the list in place does not reach Lightning."
            )
        pipeline = self._optimizers[index].pipeline
        pipeline.settle()  # the last one of this batch may have been left out by a GradScaler
        if self._others_look(trainer):
            unscale(trainer, optimizer)
        pipeline.expect_step()
        for member in self.members:
            member._at_step(trainer, index)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Accounts for announced steps that did not come, and passes it on."""
        self._settle()
        for member in self.members:
            member._at_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        asking = [member for member in self.members if member.report_due(trainer)]
        for followed in self._optimizers:
            followed.owe(asking, trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Passes it on."""
        for member in self.members:
            member._at_validation_start(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Passes it on."""
        for member in self.members:
            member._at_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Passes it on."""
        for member in self.members:
            member._at_train_end(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Passes it on."""
        for member in self.members:
            member._at_fit_end(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Undoes everything: Lightning does not call `teardown` after an exception. That one must arrive, not ours."""
        failed: list[str] = []
        told = [partial(member._at_exception, trainer, pl_module, exception) for member in self.members]
        undo: list[Callable[[], None]] = [*told, self.close]
        for do in undo:
            try:
                do()
            except Exception as error:
                failed.append(f"{type(error).__name__}: {error}")
        if failed:
            rank_zero_warn(f"After {type(exception).__name__}, while our callbacks were closed: {'; '.join(failed)}.")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Undoes everything."""
        if stage == "fit":
            self.close()

    # Pipelines.

    def start(self) -> None:
        """Puts a pipeline on each optimizer and tells the schedulers how long the run is; once."""
        if self._is_started:
            return
        self._is_started = True
        if has_engine(self.trainer):
            self._check_engine()
            self._schedulers.update(self.trainer)
            return
        this = weakref.ref(self)

        def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            # Of every optimizer of the process: one that has just come is followed before it steps.
            if (hub := this()) is not None and not hub._is_closed and hub._optimizers.index(optimizer) is None:
                hub._follow_if_new(optimizer)

        handle = register_optimizer_step_pre_hook(before_step)
        self._undo.callback(handle.remove)
        weakref.finalize(self, handle.remove)
        self._undo.callback(self._optimizers.close)
        self._optimizers.update(self.trainer.optimizers)
        self._schedulers.update(self.trainer)
        for followed in self._optimizers:
            self._start_freezing(followed.optimizer)

    def follow(self) -> None:
        """Matches pipelines and schedulers with those that the Trainer has now."""
        trainer = self.trainer
        if not self._is_started:
            return
        changed = not has_engine(trainer) and not self._optimizers.follows(trainer.optimizers)
        if changed:
            known = [followed.optimizer for followed in self._optimizers]
            self._optimizers.update(trainer.optimizers)
        if changed or not self._schedulers.follows(trainer):
            self._schedulers.update(trainer)
        if changed:
            for followed in self._optimizers:
                if not any(followed.optimizer is optimizer for optimizer in known):
                    self._start_freezing(followed.optimizer)
            for member in self.members:
                member._at_new_optimizers(trainer, trainer.lightning_module)

    def _follow_if_new(self, optimizer: Optimizer) -> None:
        trainer = self._trainer()
        if trainer is not None and any(bare(present) is optimizer for present in trainer.optimizers):
            self.follow()

    def _make_pipeline(self, optimizer: Optimizer, index: int, counts: StepCounts | None, clip: Any) -> StepPipeline:
        trainer = self.trainer
        clipping = next((member for member in self.members if member.clip_rule() is not None), None)
        model = trainer.strategy.model
        names: dict[Tensor, str] = {p: plain_name(key) for key, p in trainer.lightning_module.named_parameters()}
        asking: list[HubCallback] = []

        def due() -> bool:
            place = self._optimizers.index(optimizer)
            assert place is not None
            asking[:] = self._optimizers[place].asking(self.members, trainer)
            return bool(asking)

        def report(record: StepRecord) -> None:
            place = self._optimizers.index(optimizer)
            assert place is not None
            for member in asking:
                member.on_report(trainer, place, record)

        return StepPipeline(
            optimizer,
            clip=None if clipping is None else clipping.clip_rule(),
            clip_limit=None if clipping is None else clipping.clip_limit(horizon_of(trainer)),
            clip_state=clip,
            names=names,
            group_names={name for each in trainer.optimizers for name in group_names_of(bare(each))},
            shards=None if model is None else FlatShards.of(model),
            detectors=[detector for member in self.members for detector in member.detectors()],
            report_due=due,
            histograms=lambda: {kind for member in asking for kind in member.histograms_due(trainer)},
            on_report=report,
            counts=counts,
        )

    def _start_freezing(self, optimizer: Optimizer) -> None:
        if (freezing := freezing_of(optimizer)) is not None:
            freezing.start()
            self.on_close(freezing.release)

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

    def _others_look(self, trainer: L.Trainer) -> bool:
        """Whether somebody else's hook looks at the gradients before a step."""
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            return False  # nothing to hide from them
        module = trainer.lightning_module
        if is_overridden("configure_gradient_clipping", module) or is_overridden("on_before_optimizer_step", module):
            return True
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        hooks = [getattr(c, "on_before_optimizer_step", None) for c in callbacks if c is not self]
        return any(getattr(hook, "__func__", hook) is not L.Callback.on_before_optimizer_step for hook in hooks)

    def _settle(self) -> None:
        """Accounts for announced steps that did not come, as when a GradScaler finds an overflow."""
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        for followed in self._optimizers:
            if followed.pipeline.is_expecting and not scaled:
                raise RuntimeError(
                    f"{type(followed.optimizer).__name__} was announced to step, and its step hooks were not called, "
                    "so that nothing has clipped, guarded or monitored it. Something that wraps it steps in its place; "
                    "needed is a subclass of torch.optim.Optimizer whose __init__ calls super().__init__(params, "
                    "defaults), or a wrapper that calls the optimizer's own step."
                )
            followed.pipeline.settle()

    # What members ask.

    def hold_schedules(self) -> None:
        """Has our schedulers stand still for the steps that will be skipped from now on."""
        self._schedulers.hold()

    def health_points(self) -> dict[str, float]:
        """What all members know of the run's health, by name."""
        return {name: value for member in self.members for name, value in member.health_points().items()}

    def skips_are_told(self) -> bool:
        """Whether one of the members writes ``optim_health/skipped_steps`` at this step."""
        return any(member.tells_skips(self.trainer) for member in self.members)

    def counts(self) -> list[StepCounts]:
        """The counts of each optimizer."""
        return self._optimizers.counts()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and tensors, so that checkpoints load with ``weights_only=True``."""
        state: dict[str, Any] = {"counts": [[c.steps, c.clipped, c.skipped] for c in self._optimizers.counts()]}
        clip = self._optimizers.clip_states()
        return {**state, "clip": clip} if any(clip) else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from counts and clip states, by the places of the optimizers."""
        self._optimizers.restore([StepCounts(*counts) for counts in state.get("counts", [])], state.get("clip", []))

    # The end.

    def close(self) -> None:
        """Undoes everything, newest first, and once; every part, whatever another one raises."""
        if self._is_closed:
            return
        self._is_closed = True
        with ExitStack() as stack:
            stack.callback(self._leave)
            stack.push(self._undo)
            for member in self.members:
                stack.callback(member._at_close)
            kept: dict[str, Any] = {}
            for member in self.members:
                member._kept = kept
            # Reading counts can fail after an error on the device.
            self._save(kept)

    def _save(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CHECKPOINT_KEY] = self.state_dict()
        for member in self.members:
            member._at_save_checkpoint(checkpoint)

    def _leave(self) -> None:
        for member in self.members:
            member._hub = None
        self.members = []
        if (trainer := self._trainer()) is not None:
            # A new list: Lightning may be going through the old one, and would leave out the next callback.
            present: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
            trainer.callbacks = [callback for callback in present if callback is not self]  # type: ignore[attr-defined]


def is_ours(callback: Any) -> bool:
    """Whether it is one of our callbacks, and no mock that says it were."""
    return issubclass(type(callback), HubCallback)


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


def _roles(callback: HubCallback) -> set[str]:
    roles = {callback.role} if callback.role is not None else set()
    return roles | {"GradientClipping"} if callback.clip_rule() is not None else roles
