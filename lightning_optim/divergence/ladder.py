"""Responses to a divergence that skipping a step does not fix: the rungs of a ladder, each with a budget."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_optim.core.stateful import Stateful
from lightning_optim.core.typed import typed
from lightning_optim.divergence.memory import CHOICES, check_memory


@typed
@dataclass(frozen=True)
class LRCut:
    """First rung: a temporary cut of the learning rate.

    Args:
        factor: Factor on the learning rate, in (0, 1). GLM-130B and OPT continued at a half to a tenth.
        steps: Number of steps at the reduced rate, at least 1.
        recover: Number of steps over which the rate then returns, at least 0.
        budget: Largest number of cuts in a run, at least 1.

    Raises:
        ValueError: An argument is out of range.
    """

    factor: float = 0.5
    steps: int = 100
    recover: int = 100
    budget: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.factor < 1:
            raise ValueError(f"Invalid factor={self.factor!r} of LRCut: must be in (0, 1), for instance 0.5.")
        _at_least("LRCut", 1, steps=self.steps, budget=self.budget)
        _at_least("LRCut", 0, recover=self.recover)


@typed
@dataclass(frozen=True)
class Rollback:
    """Second rung: a return to the last snapshot of weights, optimizer, schedule, scaler and averages.

    The position in the data is not restored: the batches since the snapshot are skipped, as PaLM did to get past its
    spikes. ``global_step`` continues.

    Args:
        every: Number of steps from one snapshot to the next, at least 1.
        clean: Number of further steps without an alarm after which a snapshot can be restored, at least 0.
        memory: Where the two snapshots are kept. ``"cpu"``: in the memory of the host, or on disk, with a warning, if
            they do not fit into half of what is free when training starts. ``"auto"``: there as well; where they do not
            fit, there are none, with a warning, and a divergence leads to the other responses. ``"disk"``: in a
            temporary file. ``"device"``: on the accelerator.
        lr_factor: Permanent factor on the learning rate after a rollback, in (0, 1]; 1 keeps the rate. The second
            consecutive return to the same snapshot multiplies by its square, the third by its cube (1/2, then 1/8, then
            1/64 in all), because a divergence that recurs needs a stronger response.
        budget: Largest number of rollbacks in a run, at least 1.
        checkpoint_mb: Size of both snapshots together, in MB, up to which they are saved in checkpoints, so that a
            resumed run can return to them; ``math.inf`` for any, 0 for none. Where they are not saved, a divergence
            after a resume returns to the step at which the run was resumed; the resumed run reports that.

    Raises:
        ValueError: An argument is out of range.
    """

    every: int = 200
    clean: int = 100
    memory: str = "auto"
    lr_factor: float = 0.5
    budget: int = 3
    checkpoint_mb: float = 64.0

    def __post_init__(self) -> None:
        _at_least("Rollback", 1, every=self.every, budget=self.budget)
        _at_least("Rollback", 0, clean=self.clean)
        check_memory(self.memory, "Rollback", CHOICES)
        if not (math.isfinite(self.lr_factor) and 0 < self.lr_factor <= 1):
            raise ValueError(f"Invalid lr_factor={self.lr_factor!r} of Rollback: must be in (0, 1]; 1 keeps the rate.")
        limit = self.checkpoint_mb
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit >= 0:
            raise ValueError(
                f"Invalid checkpoint_mb={limit!r} of Rollback: must be a number of megabytes of at least 0: 64 saves "
                "small snapshots in checkpoints, 0 none, math.inf (in YAML .inf) all."
            )


class Ladder(Stateful):
    """Choice of the response to an alarm that skipping does not fix.

    The lowest rung is taken first; the next one if there is another such alarm within ``memory`` steps of the last
    response, if the budget of a rung is used up, or if the weights are lost, which a lower learning rate does not
    repair. For ``cooldown`` steps after a response there is no other, so that it can take effect.

    Args:
        lr_cut: The first rung; None for none.
        rollback: The second rung; None for none.
        stop: Whether the run ends when all budgets are used up.
        cooldown: Number of steps without a further response, at least 0.
        memory: Number of steps within which a second alarm takes the next rung, at least 0.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> ladder = Ladder(LRCut(budget=1), Rollback(budget=1), cooldown=0)
        >>> [ladder.act(step, can_roll_back=True) for step in (10, 11, 12)]
        ['lr_cut', 'rollback', 'stop']
    """

    STATE = ("used", "last")

    def __init__(
        self,
        lr_cut: LRCut | None,
        rollback: Rollback | None,
        stop: bool = True,
        cooldown: int = 10,
        memory: int = 500,
    ) -> None:
        _at_least("the ladder", 0, cooldown=cooldown, memory=memory)
        self.lr_cut, self.rollback = lr_cut, rollback
        self._budgets = {"lr_cut": lr_cut.budget if lr_cut else 0, "rollback": rollback.budget if rollback else 0}
        self._stop, self._cooldown, self._memory = stop, cooldown, memory
        self._used = dict.fromkeys(self._budgets, 0)
        self._last: tuple[int, str] | None = None
        self._before: tuple[int, str] | None = None

    @property
    def used(self) -> dict[str, int]:
        """Number of uses of each rung so far, by its name."""
        return dict(self._used)

    def act(self, step: int, can_roll_back: bool, lost: bool = False) -> str | None:
        """Choose a response and take it from its budget.

        Args:
            step: Number of optimizer steps so far.
            can_roll_back: Whether there is a snapshot.
            lost: Whether the weights have become worse.

        Returns:
            ``"lr_cut"``, ``"rollback"``, ``"stop"``, or None for no response.
        """
        since = math.inf if self._last is None else step - self._last[0]
        if since < self._cooldown:
            return None
        rungs = list(self._budgets)
        if lost or since < self._memory:  # The lower rung would not help, or has just been tried.
            rungs.append(rungs.pop(0))
        for rung in rungs:
            if self._used[rung] < self._budgets[rung] and (rung != "rollback" or can_roll_back):
                self._used[rung] += 1
                self._before, self._last = self._last, (step, rung)
                return rung
        return "stop" if self._stop else None

    def undo(self) -> None:
        """Give the last response back to its budget: it could not be carried out, or was undone."""
        assert self._last is not None
        self._used[self._last[1]] -= 1
        self._last = self._before

    def why_stop(self) -> str:
        """Return the budgets and the used part of each, as text for a message."""
        return ", ".join(f"{rung}: {self._used[rung]} of {self._budgets[rung]}" for rung in self._budgets)


def _at_least(of: str, least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"Invalid {name}={value!r} of {of}: must be a whole number of at least {least}.")
