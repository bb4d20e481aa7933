"""The optimizers that a Trainer has at present, each with its pipeline; matched by identity, because they change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

    Attributes:
        pipeline: Its pipeline.
        place: Its index in the Trainer's list.
        reporting: The members that get a report of the step that is under way.
        asked_at: The batch, by its place on the loggers' axis, in which members were last asked for reports.
    """

    pipeline: StepPipeline

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.place = -1
        self.reporting: list[Any] = []
        self.asked_at = -1
        self._reported_at: dict[int, tuple[int, int]] = {}
        self._owed: set[int] = set()

    @property
    def params(self) -> list[Tensor]:
        """All parameters of the optimizer."""
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def report_due(self, members: Sequence[Any], trainer: Trainer) -> bool:
        """Find who wants a report of the step that is about to happen, and gets it: one of each batch that is due.

        An optimizer steps once per batch, or never, or more than once. So a member that asked in a batch without a step
        is owed a report, and one that had a report in this batch gets no second at the same place on the loggers' axis.
        """
        now, step = logging_step(trainer), self.pipeline.steps
        self.asked_at = now
        self.reporting = []
        for member in members:
            key = id(member)
            batch, reported = self._reported_at.get(key, (-1, -1))
            # The same step may ask twice: torch calls the hooks anew for a `super().step()` within a step.
            wants = reported == step if batch == now else key in self._owed or member.report_due(trainer)
            if wants:
                self._reported_at[key] = now, step
                self._owed.discard(key)
                self.reporting.append(member)
        return bool(self.reporting)

    def owe(self, members: Sequence[Any]) -> None:
        """Owe these a report of the next step; called at the end of a batch in which the optimizer did not step."""
        self._owed |= set(map(id, members))


@dataclass(frozen=True)
class Left:
    """What an optimizer that is gone, or a checkpoint, has left at a place of the Trainer's list.

    Args:
        counts: Its steps.
        clip: What the clip rule remembers.
        params: Its parameters; None from a checkpoint, which has none.
        names: Their names; empty if they are not known.
    """

    counts: StepCounts
    clip: dict[str, Any] | None
    params: list[Tensor] | None = None
    names: Sequence[str | None] = ()


_NOTHING = Left(StepCounts(), None)


def places_of(present: Sequence[Sequence[str | None]], saved: Sequence[Sequence[str | None]]) -> list[int | None]:
    """Return for each optimizer which of the saved ones it continues: that with most of its parameters.

    Args:
        present: The names of each optimizer's parameters.
        saved: Those of the saved ones; where any has none, they are matched in order.

    Returns:
        Places among the saved ones; None for an optimizer whose parameters none of them has.

    Example:
        >>> places_of([["gen.w"], ["disc.w", "disc.b"]], [["disc.b", "disc.w"], ["gen.w", "gen.b"]])
        [1, 0]
    """
    sets = [{name for name in names if name is not None} for names in saved]
    wanted = [{name for name in names if name is not None} for names in present]
    if not all(sets) or not all(wanted):
        return [place if place < len(saved) else None for place in range(len(present))]
    shared = [(-len(mine & theirs), abs(i - j), i, j) for i, mine in enumerate(wanted) for j, theirs in enumerate(sets)]
    found: dict[int, int] = {}
    for overlap, _, i, j in sorted(shared):
        if overlap and i not in found and j not in found.values():
            found[i] = j
    return [found.get(place) for place in range(len(present))]


class FollowedOptimizers:
    """Gives each optimizer a pipeline, and takes it from those that are gone.

    An optimizer that comes in the place of another that is gone goes on with its name and counts, and with what the
    clip rule remembers if it has the same parameters. Counts of a place that stays empty are kept.

    Args:
        make: Makes a pipeline of an optimizer that is followed, and the counts and the clip state to go on from.
        names_of: Returns the names of an optimizer's parameters, in order.

    Attributes:
        present: The optimizers followed, in the Trainer's order.
        known: The ids of these.
        saved: What the checkpoint has that the run was resumed from, by its places.
        places: For each optimizer its place there; see `places_of`. None before there are optimizers.
    """

    def __init__(
        self,
        make: Callable[[Followed, StepCounts | None, Any], StepPipeline],
        names_of: Callable[[Optimizer], Sequence[str | None]],
    ) -> None:
        self._make, self._names_of = make, names_of
        self.saved: Sequence[Left] = ()
        self.places: list[int | None] | None = None
        self.present: list[Followed] = []
        self.known: set[int] = set()
        self._left: dict[int, Left] = {}
        self._gone = StepCounts()
        self._names: dict[int, str | None] = {}

    def restore(self, saved: Sequence[Left], gone: StepCounts) -> None:
        """Go on from a checkpoint: the pipelines there are, and those to come, matched by names of parameters."""
        self._gone, self.saved, self.places = gone, saved, None
        self._left = dict(enumerate(saved))
        if not self.present:
            return
        self._place([followed.optimizer for followed in self.present])
        for place, followed in enumerate(self.present):
            left = self._left.pop(place, None)
            if left is not None:
                followed.pipeline.load_counts(left.counts)
            if left is not None and left.clip is not None:
                followed.pipeline.load_clip_state(left.clip)

    def _place(self, optimizers: Sequence[Optimizer]) -> None:
        """Give what the checkpoint has left to the optimizers that continue it; the rest stays for later ones."""
        left = self._left
        self.places = places_of(list(map(self._names_of, optimizers)), [each.names for each in self.saved])
        found = {i: left[j] for i, j in enumerate(self.places) if j is not None}
        rest = [left[j] for j in sorted(left.keys() - set(self.places))]
        self._left = found | dict(enumerate(rest, len(optimizers)))

    def names(self) -> list[list[str | None]]:
        """The names of the parameters at each place."""
        if not self.present:
            return [list(left.names) for left in self._left_in_order()]
        return [list(self._names_of(followed.optimizer)) for followed in self.present]

    def counts(self, exact: bool = False) -> list[StepCounts]:
        """The counts of each place, or `exact` ones; of what was restored or left, while there are no pipelines."""
        if not self.present:
            return [left.counts for left in self._left_in_order()]
        return [followed.pipeline.counts(exact) for followed in self.present]

    def gone(self) -> StepCounts:
        """The counts of optimizers that are gone and have no successor, all together."""
        left = self._left.values() if self.present else ()
        return sum((each.counts for each in left), self._gone)

    def clip_states(self) -> list[dict[str, Any]]:
        """What the clip rule remembers at each place."""
        if not self.present:
            return [left.clip or {} for left in self._left_in_order()]
        return [followed.pipeline.clip_state() for followed in self.present]

    def find(self, optimizer: Any) -> Followed | None:
        """What is kept of an optimizer, or of what a wrapper of it holds; None if it is not followed.

        Raises:
            MisconfigurationException: It is none, and wraps none.
        """
        found = bare(optimizer)
        return next((followed for followed in self.present if followed.optimizer is found), None)

    def follows(self, optimizers: Sequence[Any]) -> bool:
        """Whether these are the optimizers followed, in this order, and their pipelines still on them."""
        return len(optimizers) == len(self.present) and all(
            bare(optimizer) is followed.optimizer and followed.pipeline.is_attached
            for optimizer, followed in zip(optimizers, self.present, strict=True)
        )

    def update(self, optimizers: Sequence[Any]) -> None:
        """Follow these and no others."""
        wanted = [bare(optimizer) for optimizer in optimizers]
        if self.places is None and wanted:
            self._place(wanted)
        self._names = {index: about(followed.optimizer).name for index, followed in enumerate(self.present)}
        self._pass_names_on(wanted)
        present = {id(followed.optimizer): followed for followed in self.present if followed.pipeline.is_attached}
        for index, followed in enumerate(self.present):
            gone = not any(followed.optimizer is optimizer for optimizer in wanted)
            if gone or id(followed.optimizer) not in present:
                before = self._left.get(index, _NOTHING).counts
                pipeline = followed.pipeline
                counts, names = before + pipeline.counts(exact=True), self._names_of(followed.optimizer)
                self._left[index] = Left(counts, pipeline.clip_state(), followed.params, names)
                pipeline.close()
        self.known = set()
        self.present = []  # should the next line refuse one, the others are still to be closed
        stay = [present.get(id(optimizer)) for optimizer in wanted]
        self.present = [followed for followed in stay if followed is not None]
        for index, optimizer in enumerate(wanted):
            if stay[index] is None:
                self.present.insert(index, self._new(optimizer, index))
        for place, followed in enumerate(self.present):
            followed.place = place
        self.known = {id(followed.optimizer) for followed in self.present}

    def close(self) -> None:
        """Take the pipelines off."""
        self.known.clear()
        while self.present:
            self.present.pop().pipeline.close()

    def _pass_names_on(self, wanted: Sequence[Optimizer]) -> None:
        used = {about(optimizer).name for optimizer in wanted}
        for index, optimizer in enumerate(wanted):
            name = self._names.get(index)
            if about(optimizer).name is None and name not in used:
                about(optimizer).name = name

    def _new(self, optimizer: Optimizer, place: int) -> Followed:
        followed, left = Followed(optimizer), self._left.pop(place, _NOTHING)
        before, params = left.params, followed.params
        same = before is None or (len(before) == len(params) and all(map(_is, before, params)))
        # State of single parameters is matched by name, where they have one.
        same = same or (set(map(id, before or ())) == set(map(id, params)) and None not in self._names_of(optimizer))
        followed.pipeline = self._make(followed, left.counts, left.clip if same else None)
        return followed

    def _left_in_order(self) -> list[Left]:
        return [self._left.get(index, _NOTHING) for index in range(max(self._left, default=-1) + 1)]


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
