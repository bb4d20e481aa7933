"""The step pipelines of a Trainer's fit: put on the optimizers there are, and on those that come."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_optim.callbacks._contributor import Contributor, Hears
from lightning_optim.callbacks._followed import FollowedOptimizers, bare
from lightning_optim.callbacks._followed_schedulers import FollowedSchedulers
from lightning_optim.callbacks._lightning import plain_name
from lightning_optim.callbacks._plateau import PlateauLooks
from lightning_optim.core.flat_shards import FlatShards
from lightning_optim.core.operands_flag import unscales_itself
from lightning_optim.core.stats import StepCounts, StepRecord
from lightning_optim.factory.freezing import freezing_of
from lightning_optim.factory.run_length import RunLength
from lightning_optim.factory.trainer_clipping import let_others_clip
from lightning_optim.step import StepPipeline
from lightning_optim.step.gradients import group_names_of


class Pipelines:
    """One pipeline for each of a Trainer's optimizers, made of the parts that members contribute.

    Which optimizers there are is asked before each batch, and before each step of one that is not known: so one that is
    replaced, added or made anew in mid-run has its pipeline before its first step, or the run stops with an error.

    Args:
        trainer: The Trainer.
        members: The callbacks that contribute; the list may grow until `start`.
        undo: Takes what is to be undone at the end of the fit.
    """

    def __init__(self, trainer: L.Trainer, members: Sequence[Contributor], undo: ExitStack) -> None:
        self._trainer_ref = weakref.ref(trainer)
        self._members = members
        self._undo = undo
        self._optimizers = FollowedOptimizers(self._make_pipeline)
        self._schedulers = FollowedSchedulers(self._optimizers)
        self.plateaus = PlateauLooks()
        self._is_started = False
        self.had_backward = False
        """Whether there was a backward pass in this batch."""

    @property
    def _trainer(self) -> L.Trainer:
        trainer = self._trainer_ref()
        assert trainer is not None
        return trainer

    @property
    def present(self) -> list[StepPipeline]:
        """In the order of the Trainer's optimizers."""
        return [followed.pipeline for followed in self._optimizers]

    def start(self) -> None:
        """Put a pipeline on each optimizer and tell the schedulers how long the run is; once."""
        if self._is_started:
            return
        self._is_started = True
        if has_engine(self._trainer):
            self._check_engine()
            self._schedulers.update(self._trainer)
            return
        this = weakref.ref(self)

        def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            # Of every optimizer of the process: one that has just come is followed before it steps.
            pipelines = this()
            if pipelines is not None and pipelines._optimizers.index(optimizer) is None:
                pipelines._follow_if_new(optimizer)

        handle = register_optimizer_step_pre_hook(before_step)
        weakref.finalize(self, handle.remove)  # should the fit end where no hook tells of it
        self._undo.callback(self._optimizers.close)
        self._undo.callback(handle.remove)
        self._optimizers.update(self._trainer.optimizers)
        self._schedulers.update(self._trainer)
        for followed in self._optimizers:
            self._start_freezing(followed.optimizer)

    def begin_batch(self) -> None:
        """Follow the optimizers there are, in a batch that has not been through backward."""
        self.had_backward = False
        self.follow()

    def follow(self) -> None:
        """Match pipelines and schedulers with those that the Trainer has now."""
        if not self._is_started:
            return
        trainer = self._trainer
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
            for member in self._members:
                member._at_new_optimizers(trainer, trainer.lightning_module)

    def announce(self, optimizer: Optimizer) -> None:
        """Lightning says that the optimizer's gradients are ready and its step follows."""
        trainer = self._trainer
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
        if not self.had_backward and trainer.lightning_module.automatic_optimization and _has_scaler(trainer):
            return  # `training_step` returned None: Lightning neither unscales nor steps, and updates no scaler
        pipeline = self._optimizers[index].pipeline
        if pipeline.is_evaluating:
            return  # the same step, of which the optimizer evaluates the closure again
        pipeline.settle()  # the last one of this batch may have been left out by a GradScaler
        if self._others_look(trainer):
            unscale(trainer, optimizer)
        pipeline.expect_step()
        for member in self._members:
            member._at_step(trainer, index)

    def settle(self) -> None:
        """Account for announced steps that did not come, as when a GradScaler finds an overflow."""
        scaled = _has_scaler(self._trainer)
        for followed in self._optimizers:
            if followed.pipeline.is_expecting and not scaled:
                raise RuntimeError(
                    f"{type(followed.optimizer).__name__} was announced to step, and its step hooks were not called, "
                    "so that nothing has clipped, guarded or monitored it. Something that wraps it steps in its place; "
                    "needed is a subclass of torch.optim.Optimizer whose __init__ calls super().__init__(params, "
                    "defaults), or a wrapper that calls the optimizer's own step."
                )
            followed.pipeline.settle()

    def discard_announced(self) -> None:
        """Forget announced steps: an exception has come before them."""
        for followed in self._optimizers:
            followed.pipeline.discard_announced()

    def owe_reports(self) -> None:
        """At the end of a batch: an optimizer that did not step in it reports at its next step."""
        asking = [member for member in self._members if member.report_due(self._trainer)]
        for followed in self._optimizers:
            followed.owe(asking, self._trainer)

    def hold_schedules(self) -> None:
        """Have our schedulers stand still for the steps that will be skipped from now on."""
        self._schedulers.hold()

    def counts(self) -> list[StepCounts]:
        """The counts of each optimizer."""
        return self._optimizers.counts()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and tensors, so that checkpoints load with ``weights_only=True``."""
        state: dict[str, Any] = {"counts": [[c.steps, c.clipped, c.skipped] for c in self._optimizers.counts()]}
        clip = self._optimizers.clip_states()
        return {**state, "clip": clip} if any(clip) else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from counts and clip states, by the places of the optimizers."""
        self._optimizers.restore([StepCounts(*counts) for counts in state.get("counts", [])], state.get("clip", []))

    def _follow_if_new(self, optimizer: Optimizer) -> None:
        trainer = self._trainer_ref()
        if trainer is not None and any(bare(present) is optimizer for present in trainer.optimizers):
            self.follow()

    def _make_pipeline(self, optimizer: Optimizer, index: int, counts: StepCounts | None, clip: Any) -> StepPipeline:
        trainer = self._trainer
        let_others_clip(optimizer, trainer.lightning_module)
        clipping = next((member for member in self._members if member.clip_rule() is not None), None)
        model = trainer.strategy.model
        module = trainer.lightning_module
        names: dict[Tensor, str] = {p: plain_name(key) for key, p in module.named_parameters()}
        asking: list[Contributor] = []

        def due() -> bool:
            place = self._optimizers.index(optimizer)
            assert place is not None
            asking[:] = self._optimizers[place].asking(self._members, trainer)
            return bool(asking)

        def report(record: StepRecord) -> None:
            place = self._optimizers.index(optimizer)
            assert place is not None
            for member in asking:
                member.on_report(trainer, place, record)

        return StepPipeline(
            optimizer,
            clip=None if clipping is None else clipping.clip_rule(),
            clip_limit=None if clipping is None else clipping.clip_limit(RunLength(trainer, module, optimizer)),
            clip_state=clip,
            names=names,
            group_names={name for each in trainer.optimizers for name in group_names_of(bare(each))},
            shards=None if model is None else FlatShards.of(model),
            detectors=[detector for member in self._members for detector in member.detectors()],
            report_due=due,
            histograms=lambda: {kind for member in asking for kind in member.histograms_due(trainer)},
            on_report=report if any(map(_reports, self._members)) else None,
            counts=counts,
        )

    def _start_freezing(self, optimizer: Optimizer) -> None:
        if (freezing := freezing_of(optimizer)) is not None:
            freezing.start()
            self._undo.callback(freezing.release)

    def _check_engine(self) -> None:
        """Refuse detectors and reports: DeepSpeed's engine clips by itself, and has no hook in between."""
        asking = [member for member in self._members if member.detectors() or _reports(member)]
        if asking:
            names = ", ".join(type(member).__name__ for member in asking)
            raise MisconfigurationException(
                f"{names} cannot be used with {type(self._trainer.strategy).__name__}: DeepSpeed's engine "
                "partitions the gradients, checks them and steps by itself, out of our sight. Use FSDP2 "
                "(ModelParallelStrategy) or DDP, or remove the callback."
            )

    def _others_look(self, trainer: L.Trainer) -> bool:
        """Return whether a hook that is not ours reads the gradients before a step."""
        if not _has_scaler(trainer):
            return False  # nothing to hide from them
        module = trainer.lightning_module
        if is_overridden("configure_gradient_clipping", module) or is_overridden("on_before_optimizer_step", module):
            return True
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        # By the object, not its class: a mock of a callback has its hooks there, and what is duck-typed may have none.
        others = [callback for callback in callbacks if not issubclass(type(callback), Hears)]
        hooks = [
            getattr(callback, "on_before_optimizer_step", L.Callback.on_before_optimizer_step) for callback in others
        ]
        return any(getattr(hook, "__func__", hook) is not L.Callback.on_before_optimizer_step for hook in hooks)


def _reports(member: Contributor) -> bool:
    return type(member).on_report is not Contributor.on_report


def _has_scaler(trainer: L.Trainer) -> bool:
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def unscale(trainer: L.Trainer, optimizer: Optimizer) -> None:
    """Take the loss scale out of the gradients, as Lightning does except where an optimizer does so in its kernel.

    Hooks of the user then see the gradients they would see without 16-bit precision, at the price of one pass.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and unscales_itself(optimizer):
        scaler.unscale_(optimizer)


def has_engine(trainer: L.Trainer) -> bool:
    """Whether DeepSpeed steps in place of the optimizer. By name, because its strategy exists without the package."""
    return any(cls.__name__ == "DeepSpeedStrategy" for cls in type(trainer.strategy).__mro__)
