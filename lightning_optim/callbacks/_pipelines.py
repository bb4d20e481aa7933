"""The step pipelines of a Trainer's fit: put on the optimizers there are, and on those that come."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import lightning.pytorch as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightning_optim.callbacks._contributor import Contributor, Hearing, Hears
from lightning_optim.callbacks._followed import Followed, FollowedOptimizers, Left, bare, names_in
from lightning_optim.callbacks._followed_schedulers import FollowedSchedulers
from lightning_optim.callbacks._lightning import logging_step, plain_name
from lightning_optim.callbacks._packages import callback_overrides, module_overrides
from lightning_optim.callbacks._plateau import PlateauLooks
from lightning_optim.core.flat_shards import FlatShards
from lightning_optim.core.operands_flag import unscales_itself
from lightning_optim.core.state_version import VERSION, check_version
from lightning_optim.core.stats import StepCounts, StepRecord
from lightning_optim.factory.division import divide_work, undivide_work
from lightning_optim.factory.freezing import freezing_of
from lightning_optim.factory.run_length import RunLength
from lightning_optim.factory.trainer_clipping import let_others_clip
from lightning_optim.step import StepPipeline
from lightning_optim.step.gradients import group_names_of, names_of


class Pipelines:
    """One pipeline for each of a Trainer's optimizers, made of the parts that members contribute.

    Which optimizers there are is asked before each batch, and before each step of one that is not known: so one that is
    replaced, added or made anew in mid-run has its pipeline before its first step, or the run stops with an error.

    Args:
        trainer: The Trainer.
        members: The callbacks that contribute; the list may grow until `start`.
        hearing: Those of them that hooks of every batch concern.
        undo: Takes what is to be undone at the end of the fit.
    """

    def __init__(self, trainer: L.Trainer, members: Sequence[Contributor], hearing: Hearing, undo: ExitStack) -> None:
        self._trainer_ref = weakref.ref(trainer)
        self._members, self._hearing = members, hearing
        self._undo = undo
        self._optimizers = FollowedOptimizers(self._make_pipeline, self._names_of)
        self._schedulers = FollowedSchedulers(self._optimizers)
        self.plateaus = PlateauLooks()
        self._is_started = False
        self._stepping: set[int] = set()
        """Optimizers followed that are in their ``step``: another one that steps meanwhile is a part of them."""
        self._strangers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        """Optimizers of this process that have no parameter of the module."""
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
        return [followed.pipeline for followed in self._optimizers.present]

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
            if (pipelines := this()) is not None:
                pipelines._before_step(optimizer)

        def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if (pipelines := this()) is not None:
                pipelines._stepping.discard(id(optimizer))

        self._undo.callback(self._optimizers.close)
        handles = register_optimizer_step_pre_hook(before_step), register_optimizer_step_post_hook(after_step)
        for handle in handles:
            weakref.finalize(self, handle.remove)  # should the fit end where no hook tells of it
            self._undo.callback(handle.remove)
        self._optimizers.update(self._trainer.optimizers)
        self._schedulers.update(self._trainer)
        for followed in self._optimizers.present:
            self._start_freezing(followed.optimizer)

    def begin_batch(self) -> None:
        """Follow the optimizers there are, in a batch that has not been through backward."""
        self.had_backward = False
        self.follow()

    def follow(self) -> None:
        """Match pipelines and schedulers with those that the Trainer has now."""
        if not self._is_started:
            return
        self._stepping.clear()  # A step that was left by an exception does not say so.
        trainer = self._trainer
        changed = not has_engine(trainer) and not self._optimizers.follows(trainer.optimizers)
        if changed:
            known = [followed.optimizer for followed in self._optimizers.present]
            self._refuse_copies(known)
            self._optimizers.update(trainer.optimizers)
        if changed or not self._schedulers.follows(trainer):
            self._schedulers.update(trainer)
        if changed:
            for followed in self._optimizers.present:
                if not any(followed.optimizer is optimizer for optimizer in known):
                    self._start_freezing(followed.optimizer)
            for member in self._members:
                member._at_new_optimizers(trainer, trainer.lightning_module)

    def announce(self, optimizer: Optimizer) -> None:
        """Lightning says that the optimizer's gradients are ready and its step follows."""
        trainer = self._trainer
        if has_engine(trainer):
            return
        if (followed := self._optimizers.find(optimizer)) is None:
            optimizer = bare(optimizer)
            raise MisconfigurationException(
                f"{type(optimizer).__name__} is about to step, and this one is none of the Trainer's optimizers "
                f"({', '.join(type(o).__name__ for o in trainer.optimizers) or 'it has none'}), so that nothing would "
                "clip, guard or monitor it. Set `trainer.optimizers = [...]` before the batch in which it steps first; "
                "changing the list in place does not reach Lightning."
            )
        if not self.had_backward and trainer.lightning_module.automatic_optimization and _has_scaler(trainer):
            return  # `training_step` returned None: Lightning neither unscales nor steps, and updates no scaler.
        if followed.pipeline.is_evaluating:
            return  # It is the same step, of which the optimizer evaluates the closure again.
        if self._others_look(trainer):
            followed.pipeline.settle()  # the last one of this batch may have been left out by a GradScaler
            unscale(trainer, followed.optimizer)
        if followed.pipeline.has_gradients():
            followed.pipeline.expect_step(may_be_left_out=_has_scaler(trainer))
        for member in self._hearing.step:
            member._at_step(trainer, followed.place)

    def settle(self) -> None:
        """Account for announced steps that did not come, as when a GradScaler finds an overflow."""
        scaled = _has_scaler(self._trainer)
        for followed in self._optimizers.present:
            if not followed.pipeline.is_expecting:
                continue
            if not scaled:
                raise RuntimeError(
                    f"{type(followed.optimizer).__name__} was announced to step, and its step hooks were not called, "
                    "so that nothing has clipped, guarded or monitored it. Something that wraps it steps in its place; "
                    "needed is a subclass of torch.optim.Optimizer whose __init__ calls super().__init__(params, "
                    "defaults), or a wrapper that calls the optimizer's own step."
                )
            followed.pipeline.settle()

    def discard_announced(self) -> None:
        """Forget announced steps: an exception has come before them."""
        for followed in self._optimizers.present:
            followed.pipeline.discard_announced()

    def owe_reports(self) -> None:
        """At the end of a batch: an optimizer that did not step in it reports at its next step."""
        trainer = self._trainer
        now = logging_step(trainer)
        if late := [followed for followed in self._optimizers.present if followed.asked_at != now]:
            due = [member for member in self._hearing.report_due if member.report_due(trainer)]
            for followed in late:
                followed.owe(due)

    def hold_schedules(self) -> None:
        """Have our schedulers stand still for the steps that will be skipped from now on."""
        self._schedulers.hold()

    def counts(self) -> list[StepCounts]:
        """The counts of each optimizer."""
        return self._optimizers.counts()

    def total(self) -> StepCounts:
        """The counts of all optimizers together, of those that are gone, too."""
        return sum(self._optimizers.counts(), self._optimizers.gone())

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, text and tensors, so that checkpoints load with ``weights_only=True``."""
        state: dict[str, Any] = {
            "version": VERSION,
            "counts": [[c.steps, c.clipped, c.skipped] for c in self._optimizers.counts(exact=True)],
            "names": self._optimizers.names(),
        }
        if any(clip := self._optimizers.clip_states()):
            state["clip"] = clip
        if (gone := self._optimizers.gone()) != StepCounts():
            state["gone"] = [gone.steps, gone.clipped, gone.skipped]
        if self._schedulers.has_returned:
            state["returned"] = True
        if (trainer := self._trainer_ref()) is not None and len(trainer.optimizers) > 1:
            state["optimizers"] = names_in(trainer)
        return state

    def load_state_dict(self, state: Mapping[str, Any], names: Sequence[Sequence[str | None]] = ()) -> None:
        """Go on from counts and clip states of the optimizers, matched by the names of their parameters.

        Args:
            state: As `state_dict` returns it; empty if there is none.
            names: Names of each optimizer's parameters, for a state of version 1, which has none.

        Raises:
            ValueError: The state is of a later version.
        """
        check_version(
            state, "step counts and clip states", ("counts", "clip", "names", "gone", "optimizers", "returned")
        )
        self._schedulers.has_returned = bool(state.get("returned"))
        counts = [StepCounts(*each) for each in state.get("counts", [])]
        names = state.get("names", names)
        if len(names) != len(counts):
            names = [()] * len(counts)
        clips = [*state.get("clip", []), *[None] * len(counts)][: len(counts)]  # no rule, no clip states
        clips = [
            {**clip, "names": list(own)} if clip and "version" not in clip and own and None not in own else clip
            for clip, own in zip(clips, names, strict=True)
        ]
        left = [Left(one, clip, names=own) for one, clip, own in zip(counts, clips, names, strict=True)]
        self._optimizers.restore(left, StepCounts(*state.get("gone", [])))

    def restored_places(self) -> list[int | None]:
        """Return for each optimizer its place in the checkpoint that the run was resumed from."""
        places = self._optimizers.places
        return list(range(len(self.present))) if places is None or not self._optimizers.saved else places

    def restored_names(self, place: int) -> Sequence[str | None]:
        """Return the names of the parameters that the optimizer at that place had; empty if they are not known."""
        saved = self._optimizers.saved
        return saved[place].names if place < len(saved) else ()

    def _names_of(self, optimizer: Optimizer) -> list[str | None]:
        names: dict[Tensor, str] = {p: name for name, p in self._trainer.lightning_module.named_parameters()}
        found = [name for group in optimizer.param_groups for name in names_of(group, names)]
        return [None if name is None else plain_name(name) for name in found]

    def _before_step(self, optimizer: Optimizer) -> None:
        """See each step of any optimizer: one that has just come is followed before it steps."""
        known = id(optimizer) in self._optimizers.known
        followed = self._optimizers.find(optimizer) if known else None
        if followed is None or not followed.pipeline.is_attached:
            trainer = self._trainer_ref()
            if trainer is None:
                return
            if any(bare(present) is optimizer for present in trainer.optimizers):
                self.follow()
            elif not self._stepping and trainer.training:
                self._refuse_unknown(trainer, optimizer)
                return
        self._stepping.add(id(optimizer))

    def _refuse_unknown(self, trainer: L.Trainer, optimizer: Optimizer) -> None:
        """Refuse, or report once, that an optimizer steps which Lightning does not have and we cannot follow."""
        if optimizer in self._strangers:
            return
        self._strangers.add(optimizer)
        params = {param for group in optimizer.param_groups for param in group["params"]}
        if params.isdisjoint(trainer.lightning_module.parameters()):
            return
        protecting = [m for m in self._members if m.clip_rule() is not None or m.detectors()]
        names = ", ".join(type(member).__name__ for member in protecting or self._members)
        module = type(trainer.lightning_module).__name__
        message = (
            f"{type(optimizer).__name__} is about to step parameters of {module}, and is none of the Trainer's "
            f"optimizers, so that {names} cannot act on it. Return it from configure_optimizers and take it from "
            "`self.optimizers()`; in mid-run set `trainer.optimizers = [...]`, as changing the list in place "
            "does not reach Lightning."
        )
        if protecting:
            raise MisconfigurationException(message)
        rank_zero_warn(message)

    def _refuse_copies(self, known: Sequence[Optimizer]) -> None:
        """Refuse what comes in mid-run with none of the module's parameters: it would train nothing."""
        trainer = self._trainer
        of_module = set(trainer.lightning_module.parameters())

        def has_some(optimizer: Optimizer) -> bool:
            return any(param in of_module for group in optimizer.param_groups for param in group["params"])

        for optimizer in map(bare, trainer.optimizers):
            new = not any(optimizer is each for each in known)
            if new and not has_some(optimizer) and all(map(has_some, known)):
                raise MisconfigurationException(
                    f"The Trainer has got another {type(optimizer).__name__}, and none of its parameters is one of "
                    f"{type(trainer.lightning_module).__name__}, so that it would train nothing. A deep copy of an "
                    "optimizer has copies of the parameters: make a new one of `model.parameters()` and load the state "
                    "dict of the old one, or copy module and optimizer together."
                )

    def _make_pipeline(self, followed: Followed, counts: StepCounts | None, clip: Any) -> StepPipeline:
        trainer = self._trainer
        let_others_clip(followed.optimizer, trainer.lightning_module)
        divide_work(followed.optimizer, trainer.lightning_module)
        self._undo.callback(undivide_work, followed.optimizer)
        clipping = next((member for member in self._members if member.clip_rule() is not None), None)
        model = trainer.strategy.model
        module = trainer.lightning_module
        names: dict[Tensor, str] = {p: plain_name(key) for key, p in module.named_parameters()}
        of_all = names_in(trainer)
        place = next(i for i, each in enumerate(trainer.optimizers) if bare(each) is followed.optimizer)
        rule = None if clipping is None else clipping.clip_rule_of(of_all[place], of_all)

        def report(record: StepRecord) -> None:
            for member in followed.reporting:
                member.on_report(trainer, followed.place, record)

        make = next((own for member in self._members if (own := member.pipeline()) is not None), StepPipeline)
        return make(
            followed.optimizer,
            clip=rule,
            clip_limit=None
            if clipping is None or rule is None
            else clipping.clip_limit(RunLength(trainer, module, followed.optimizer)),
            clip_state=clip,
            names=names,
            group_names={name for each in trainer.optimizers for name in group_names_of(bare(each))},
            shards=None if model is None else FlatShards.of(model),
            detectors=[detector for member in self._members for detector in member.detectors()],
            report_due=partial(followed.report_due, self._hearing.report_due, trainer),
            histograms=lambda: {kind for member in followed.reporting for kind in member.histograms_due(trainer)},
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
        if any(map(partial(module_overrides, module), ("configure_gradient_clipping", "on_before_optimizer_step"))):
            return True
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        others = (callback for callback in callbacks if not isinstance(callback, Hears))
        return any(callback_overrides(callback, "on_before_optimizer_step") for callback in others)


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
