"""The schedulers that a Trainer has at present: they learn how long the run is, and stand still on skipped steps."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_optim.callbacks._followed import FollowedOptimizers, bare
from lightning_optim.factory.run_length import RunLength
from lightning_optim.schedules import Scheduler
from lightning_optim.schedules.plateau import Observer
from lightning_optim.step import StepPipeline


class FollowedSchedulers:
    """Matches schedulers by identity, because they change as optimizers do.

    Args:
        optimizers: The optimizers followed.
    """

    def __init__(self, optimizers: FollowedOptimizers) -> None:
        self._optimizers = optimizers
        self._known: list[Any] = []
        self._places: list[Any] = []  # the optimizers of the last update, in the Trainer's order
        self._held: list[tuple[Scheduler, StepPipeline]] = []
        self.has_returned = False
        """Whether there has been a rollback, in the run before a resume as well."""

    def follows(self, trainer: Trainer) -> bool:
        """Whether these are the schedulers of the last `update`."""
        present = trainer.lr_scheduler_configs
        return len(present) == len(self._known) and all(
            config.scheduler is known for config, known in zip(present, self._known, strict=True)
        )

    def update(self, trainer: Trainer) -> None:
        """Take in the schedulers there are.

        Raises:
            MisconfigurationException: Two of them set the rates of one optimizer, and one is ours.
        """
        present: list[Any] = [config.scheduler for config in trainer.lr_scheduler_configs]
        _check(present)
        self._move_on(trainer)
        if trainer.lightning_module.automatic_optimization:
            for config in trainer.lr_scheduler_configs:
                _have_moved_by_steps(config)
        before, self._known = self._known, present
        held, self._held = self._held, []
        for scheduler, pipeline in self._pairs():
            self._held.append((scheduler, pipeline))
            if not any(scheduler is one and pipeline is other for one, other in held):
                _hold(scheduler, pipeline)
        for scheduler in present:
            if isinstance(scheduler, Scheduler):
                if self.has_returned:
                    scheduler.note_return()
                if not any(scheduler is known for known in before) and not scheduler.is_following:
                    optimizer = bare(scheduler.optimizer)
                    scheduler.follow(RunLength(trainer, trainer.lightning_module, optimizer))
                scheduler.refresh()

    def _move_on(self, trainer: Trainer) -> None:
        """Have the scheduler of an optimizer that is gone drive the one that has come in its place.

        A scheduler of torch's goes on with the old one, as in Lightning, and this is reported.
        """
        before, self._places = self._places, [bare(optimizer) for optimizer in trainer.optimizers]
        driven = {id(bare(s.optimizer)) for s in _present(trainer)}
        for scheduler in _present(trainer):
            old = bare(scheduler.optimizer)
            place = next((place for place, optimizer in enumerate(before) if optimizer is old), len(self._places))
            if any(old is optimizer for optimizer in self._places) or place >= len(self._places):
                continue
            new = self._places[place]
            if id(new) in driven:
                continue
            if isinstance(scheduler, Scheduler):
                scheduler.move_to(new)
            else:
                rank_zero_warn(
                    f"{type(new).__name__} has come in the place of {type(old).__name__}, which "
                    f"{type(scheduler).__name__} still sets the learning rates of, so those of the new one stay as "
                    "they are. Put a scheduler of the new one into trainer.strategy.lr_scheduler_configs, or use a "
                    "schedule of lightning_optim, which follows."
                )

    def hold(self) -> None:
        """Have our schedulers stand still for the steps that will be skipped from now on, after a rollback."""
        for scheduler, pipeline in self._held:
            _hold(scheduler, pipeline)
        self.has_returned = True

    def _pairs(self) -> list[tuple[Scheduler, StepPipeline]]:
        found = []
        for scheduler in self._known:
            if isinstance(scheduler, Scheduler):
                followed = self._optimizers.find(scheduler.optimizer)
                if followed is not None:
                    found.append((scheduler, followed.pipeline))
        return found


def _present(trainer: Trainer) -> list[Any]:
    """The schedulers that set rates of an optimizer."""
    schedulers: list[Any] = [config.scheduler for config in trainer.lr_scheduler_configs]
    return [each for each in schedulers if not isinstance(each, Observer) and hasattr(each, "optimizer")]


def _hold(scheduler: Scheduler, pipeline: StepPipeline) -> None:
    scheduler.hold_on(pipeline.skipped)


def _have_moved_by_steps(config: Any) -> None:
    """Have Lightning move a scheduler of ours after each step, which it does not where the module returns a list."""
    scheduler, frequency = config.scheduler, config.frequency
    per = config.interval if frequency == 1 else f"{frequency} {config.interval}s"
    if not isinstance(scheduler, Scheduler) or (config.interval, frequency) == ("step", 1):
        return
    if scheduler.has_own_length:
        rank_zero_warn(
            f"{scheduler.schedule!r} moves once per {per}, as configure_optimizers says, and the Horizon that it has "
            'been given counts optimizer steps. Return {"scheduler": scheduler, "interval": "step"}.'
        )
        return
    rank_zero_info(
        f"{scheduler.schedule!r} counts optimizer steps, so it moves once per step, not once per {per}, as "
        'configure_optimizers says. To be rid of this message return {"scheduler": scheduler, "interval": "step"}.'
    )
    config.interval, config.frequency = "step", 1


def _check(schedulers: list[Any]) -> None:
    owners: dict[int, Any] = {}
    for scheduler in schedulers:
        if isinstance(scheduler, Observer) or not hasattr(scheduler, "optimizer"):  # sets nothing itself
            continue
        other = owners.setdefault(id(scheduler.optimizer), scheduler)
        if other is not scheduler and isinstance(scheduler, Scheduler) | isinstance(other, Scheduler):
            raise MisconfigurationException(
                f"Two schedules for one optimizer: {_describe(other)} and {_describe(scheduler)}. Each would "
                "overwrite the other's learning rates, so remove one."
            )


def _describe(scheduler: Any) -> str:
    return repr(scheduler.schedule) if isinstance(scheduler, Scheduler) else type(scheduler).__name__
