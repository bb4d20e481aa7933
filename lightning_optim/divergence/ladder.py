"""What is done when skipping a step is not enough: rungs, each with a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_optim.divergence.memory import check_memory


@dataclass(frozen=True)
class LRCut:
    """The learning rate reduced for a while.

    Args:
        factor: By what it is multiplied. GLM-130B and OPT went on at half to a tenth of it.
        steps: For how many steps.
        recover: Over how many it then returns.
        budget: How many times in a run.

    Raises:
        ValueError: An argument is out of range.
    """

    factor: float = 0.5
    steps: int = 100
    recover: int = 100
    budget: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.factor < 1:
            raise ValueError(f"Invalid factor={self.factor!r} of LRCut: it lies in (0, 1), for instance 0.5.")
        _at_least("LRCut", 1, steps=self.steps, budget=self.budget)
        _at_least("LRCut", 0, recover=self.recover)


@dataclass(frozen=True)
class Rollback:
    """Back to the last snapshot of weights, optimizer, schedule, scaler and averages, but not of the data.

    The batches since then are left behind, which is how PaLM got over its spikes; ``global_step`` goes on.

    Args:
        every: A snapshot is taken after so many steps.
        clean: It may be returned to once so many further steps have passed without an alarm.
        memory: Where snapshots are: ``"device"``, ``"cpu"`` or ``"disk"``.
        lr_factor: By what the learning rate is multiplied for good after it; 1 to keep it. The second return in a row
            to the same snapshot multiplies by its square, the third by its cube (1/2, then 1/8, then 1/64 in all),
            because trouble that comes back needs more than a gentle answer.
        budget: How many times in a run.

    Raises:
        ValueError: An argument is out of range.
    """

    every: int = 200
    clean: int = 100
    memory: str = "cpu"
    lr_factor: float = 0.5
    budget: int = 3

    def __post_init__(self) -> None:
        _at_least("Rollback", 1, every=self.every, budget=self.budget)
        _at_least("Rollback", 0, clean=self.clean)
        check_memory(self.memory, "Rollback")
        if not (math.isfinite(self.lr_factor) and 0 < self.lr_factor <= 1):
            raise ValueError(f"Invalid lr_factor={self.lr_factor!r} of Rollback: it lies in (0, 1]; 1 keeps the rate.")


class Ladder:
    """Chooses what to do about an alarm that skipping does not mend.

    The lowest rung first; the next one if there is another such alarm within ``memory`` steps of the last action, if a
    rung's budget is used up, or if the weights are lost, which a lower rate does not bring back. For ``cooldown`` steps
    after an action nothing is done, so that it can work.

    Args:
        lr_cut: Whether the first rung is there, and its budget.
        rollback: The same of the second.
        stop: Whether the run ends when nothing is left.
        cooldown: Steps.
        memory: Steps.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> ladder = Ladder(LRCut(budget=1), Rollback(budget=1), cooldown=0)
        >>> [ladder.act(step, can_roll_back=True) for step in (10, 11, 12)]
        ['lr_cut', 'rollback', 'stop']
    """

    def __init__(
        self,
        lr_cut: LRCut | None,
        rollback: Rollback | None,
        stop: bool = True,
        cooldown: int = 10,
        memory: int = 500,
    ) -> None:
        _at_least("the ladder", 0, cooldown=cooldown, memory=memory)
        self._budgets = {"lr_cut": lr_cut.budget if lr_cut else 0, "rollback": rollback.budget if rollback else 0}
        self._stop, self._cooldown, self._memory = stop, cooldown, memory
        self._used = dict.fromkeys(self._budgets, 0)
        self._last: tuple[int, str] | None = None

    @property
    def used(self) -> dict[str, int]:
        """How often each rung has been used."""
        return dict(self._used)

    def act(self, step: int, can_roll_back: bool, lost: bool = False) -> str | None:
        """What to do: ``"lr_cut"``, ``"rollback"``, ``"stop"``, or None.

        Args:
            step: Optimizer steps so far.
            can_roll_back: Whether there is a snapshot.
            lost: Whether the weights are worse than they were.
        """
        since = math.inf if self._last is None else step - self._last[0]
        if since < self._cooldown:
            return None
        rungs = list(self._budgets)
        if lost or since < self._memory:  # the lower rung would not do, has just been tried, or was not enough before
            rungs.append(rungs.pop(0))
        for rung in rungs:
            if self._used[rung] < self._budgets[rung] and (rung != "rollback" or can_roll_back):
                self._used[rung] += 1
                self._last = (step, rung)
                return rung
        return "stop" if self._stop else None

    def why_stop(self) -> str:
        """What has been used up, for the message."""
        return ", ".join(f"{rung}: {self._used[rung]} of {self._budgets[rung]}" for rung in self._budgets)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"used": dict(self._used), "last": None if self._last is None else list(self._last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there."""
        self._used |= state["used"]
        self._last = None if state["last"] is None else (int(state["last"][0]), str(state["last"][1]))


def _at_least(of: str, least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"Invalid {name}={value!r} of {of}: a whole number of at least {least} is needed.")
