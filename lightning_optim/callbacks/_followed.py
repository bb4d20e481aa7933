"""The optimizers that a Trainer has at present, each with its pipeline; matched by identity, because they change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.callbacks._lightning import logging_step
from lightning_optim.core.stats import StepCounts
from lightning_optim.core.wrappers import unwrap_optimizer
from lightning_optim.factory.about import about, optimizer_names
from lightning_optim.step import StepPipeline


class Followed:
    """One optimizer and what belongs to its place in the Trainer's list.

    Args:
        optimizer: The optimizer.
        pipeline: Its pipeline.

    """

    def __init__(self, optimizer: Optimizer, pipeline: StepPipeline) -> None:
        self.optimizer, self.pipeline = optimizer, pipeline
        self._reported_at: dict[int, tuple[int, int]] = {}
        self._owed: set[int] = set()

    @property
    def params(self) -> list[Tensor]:
        """All parameters of the optimizer."""
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def asking(self, members: Sequence[Any], trainer: Trainer) -> list[Any]:
        """Who wants a report of the step that is about to happen, and gets it: one of each batch that is due.

        An optimizer steps once per batch, or never, or more than once. So a member that asked in a batch without a step
        is owed a report, and one that had a report in this batch gets no second at the same place on the loggers' axis.
        """
        now, step = logging_step(trainer), self.pipeline.steps
        asking = []
        for member in members:
            key = id(member)
            batch, reported = self._reported_at.get(key, (-1, -1))
            # The same step may ask twice: torch calls the hooks anew for a `super().step()` within a step.
            wants = reported == step if batch == now else key in self._owed or member.report_due(trainer)
            if wants:
                self._reported_at[key] = now, step
                self._owed.discard(key)
                asking.append(member)
        return asking

    def owe(self, asking: Sequence[Any], trainer: Trainer) -> None:
        """Called at the end of a batch, with those for whom it was due."""
        now = logging_step(trainer)
        self._owed |= {id(member) for member in asking if self._reported_at.get(id(member), (-1, -1))[0] != now}


class FollowedOptimizers:
    """Gives each optimizer a pipeline, and takes it from those that are gone.

    An optimizer that comes in the place of another goes on with name and counts of that place, and with what the clip
    rule remembers if it has the same parameters.

    Args:
        make: Makes a pipeline from an optimizer, its place, and the counts and the clip state to go on from.
    """

    def __init__(self, make: Callable[[Optimizer, int, StepCounts | None, Any], StepPipeline]) -> None:
        self._make = make
        self._followed: list[Followed] = []
        self._counts: dict[int, StepCounts] = {}
        self._clip: dict[int, dict[str, Any]] = {}
        self._params: dict[int, list[Tensor]] = {}
        self._names: dict[int, str | None] = {}

    def __iter__(self) -> Iterator[Followed]:
        return iter(self._followed)

    def __len__(self) -> int:
        return len(self._followed)

    def __getitem__(self, index: int) -> Followed:
        return self._followed[index]

    def restore(self, counts: Sequence[StepCounts], clip: Sequence[dict[str, Any]]) -> None:
        """Go on from a checkpoint: the pipelines there are, and those to come."""
        self._counts, self._clip, self._params = dict(enumerate(counts)), dict(enumerate(clip)), {}
        for index, followed in enumerate(self._followed):
            if index < len(counts):
                followed.pipeline.load_counts(counts[index])
            if index < len(clip):
                followed.pipeline.load_clip_state(clip[index])

    def counts(self) -> list[StepCounts]:
        """The counts of each place; of what was restored, as long as there are no pipelines."""
        if not self._followed:
            return list(self._counts.values())
        return [followed.pipeline.counts() for followed in self._followed]

    def clip_states(self) -> list[dict[str, Any]]:
        """What the clip rule remembers at each place."""
        if not self._followed:
            return list(self._clip.values())
        return [followed.pipeline.clip_state() for followed in self._followed]

    def index(self, optimizer: Optimizer) -> int | None:
        """The place of an optimizer; None if it is not followed."""
        return next((i for i, followed in enumerate(self._followed) if followed.optimizer is optimizer), None)

    def follows(self, optimizers: Sequence[Any]) -> bool:
        """Whether these are the optimizers followed, in this order, and their pipelines still on them."""
        return len(optimizers) == len(self._followed) and all(
            bare(optimizer) is followed.optimizer and followed.pipeline.is_attached
            for optimizer, followed in zip(optimizers, self._followed, strict=True)
        )

    def update(self, optimizers: Sequence[Any]) -> None:
        """Follow these and no others."""
        wanted = [bare(optimizer) for optimizer in optimizers]
        for index, followed in enumerate(self._followed):  # a place may be empty for a while
            self._counts[index] = followed.pipeline.counts()
            self._clip[index] = followed.pipeline.clip_state()
            self._params[index] = followed.params
            self._names[index] = about(followed.optimizer).name
        self._pass_names_on(wanted)
        present = {id(followed.optimizer): followed for followed in self._followed if followed.pipeline.is_attached}
        for followed in self._followed:
            gone = not any(followed.optimizer is optimizer for optimizer in wanted)
            if gone or id(followed.optimizer) not in present:
                followed.pipeline.close()
        self._followed = []  # should the next line refuse one, the others are still to be closed
        stay = [present.get(id(optimizer)) for optimizer in wanted]
        self._followed = [followed for followed in stay if followed is not None]
        for index, optimizer in enumerate(wanted):
            if stay[index] is None:
                self._followed.insert(index, Followed(optimizer, self._new(optimizer, index)))

    def close(self) -> None:
        """Take the pipelines off."""
        while self._followed:
            self._followed.pop().pipeline.close()

    def _pass_names_on(self, wanted: Sequence[Optimizer]) -> None:
        used = {about(optimizer).name for optimizer in wanted}
        for index, optimizer in enumerate(wanted):
            name = self._names.get(index)
            if about(optimizer).name is None and name not in used:
                about(optimizer).name = name

    def _new(self, optimizer: Optimizer, index: int) -> StepPipeline:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        before = self._params.get(index)
        same = before is None or (len(before) == len(params) and all(map(_is, before, params)))
        return self._make(optimizer, index, self._counts.get(index), self._clip.get(index) if same else None)


def bare(optimizer: Any) -> Optimizer:
    """The optimizer with torch's step hooks in what a Trainer has: Lightning's wrapper in manual optimization, say.

    Raises:
        MisconfigurationException: There is none.
    """
    try:
        return unwrap_optimizer(optimizer)
    except TypeError as error:
        raise MisconfigurationException(str(error)) from None


def names_in(trainer: Trainer) -> list[str]:
    """Return the names of a Trainer's optimizers, in their order; of those that have none their numbers."""
    return optimizer_names([bare(optimizer) for optimizer in trainer.optimizers])


def prefixes_in(trainer: Trainer) -> list[str]:
    """Return what stands before the names of groups, which may repeat: each optimizer's name if there are several."""
    if len(trainer.optimizers) < 2:
        return [""] * len(trainer.optimizers)
    return [f"{name}." for name in names_in(trainer)]


def _is(one: Any, other: Any) -> bool:
    return one is other
