"""Incidents of a run: alarms that are close together, with the steps before, during and after them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lightning_optim.divergence.observation import StepObservation

BEFORE, AFTER = 64, 16
"""Number of steps of each optimizer before an incident, and of the loggers' axis after it, that belong to it."""
_APART = 64
"""Number of steps without an alarm that ends an incident."""
_LONGEST = 192
"""Number of steps after which the next alarm starts another incident, so that none grows without limit."""
_HALF = 256
"""Largest number of first, and of last, steps that are kept of one incident: several optimizers make many."""

_LASTING = frozenset({"vanishing", "dead", "stalled", "no_gradient", "lr_too_high", "lr_too_low"})
"""Kinds that describe a state of the run and no event: they start no incident and do not extend one."""


@dataclass(frozen=True)
class SeenStep:
    """One step of one optimizer.

    Args:
        number: Running number over all optimizers.
        at: Position on the loggers' axis.
        optimizer: Index of the optimizer.
        seen: The observation of the step.
    """

    number: int
    at: int
    optimizer: int
    seen: StepObservation

    def as_dict(self) -> dict[str, Any]:
        """Return the step as plain values."""
        return {"at": self.at, "optimizer": self.optimizer, "lr": self.seen.rate, **asdict(self.seen)}


@dataclass
class Incident:
    """Alarms that are close together, the responses to them, and the steps around them.

    Args:
        first_step: Position of the first alarm on the loggers' axis.
        last_step: Position of the last alarm or response.
        kinds: Kinds of the alarms, ``did`` for a response, each once.
        left_out: Number of steps in the middle that are left out.
        picture: Name of its picture in the folder of the report; None if there is none.
        picture_rows: Number of steps in the picture.
    """

    first_step: int
    last_step: int
    kinds: list[str] = field(default_factory=list)
    left_out: int = 0
    picture: str | None = None
    picture_rows: int = 0
    _first: list[SeenStep] = field(default_factory=list)
    _last: deque[SeenStep] = field(default_factory=lambda: deque(maxlen=_HALF))
    _numbers: dict[int, int] = field(default_factory=dict)

    @property
    def has_response(self) -> bool:
        """Whether the guard has responded to it."""
        return "did" in self.kinds

    @property
    def rows(self) -> int:
        """Number of its steps, those that are left out as well."""
        return len(self._first) + len(self._last) + self.left_out

    @property
    def steps(self) -> list[SeenStep]:
        """Its steps, in order."""
        return sorted((*self._first, *self._last), key=lambda row: (row.at, row.number))

    def add(self, row: SeenStep) -> None:
        """Add a step, unless it is there."""
        if row.number <= self._numbers.get(row.optimizer, -1):
            return
        self._numbers[row.optimizer] = row.number
        if len(self._first) < _HALF:
            self._first.append(row)
            return
        self.left_out += len(self._last) == _HALF
        self._last.append(row)

    def title(self) -> str:
        """Return when it was, and the kinds of its alarms."""
        when = f"step {self.first_step}"
        if self.last_step != self.first_step:
            when = f"steps {self.first_step} to {self.last_step}"
        kinds = [kind for kind in self.kinds if kind != "did"]
        return f"{when}: {', '.join(kinds)}" + (", with a response" if self.has_response else "")

    def as_dict(self) -> dict[str, Any]:
        """Return the incident as plain values."""
        return {
            "first_step": self.first_step,
            "last_step": self.last_step,
            "kinds": list(self.kinds),
            "picture": self.picture,
            "steps": [row.as_dict() for row in self.steps],
            "steps_left_out": self.left_out,
        }


class Incidents:
    """The incidents of a run, and its last steps, from which the next one takes the steps before it.

    Args:
        most: Largest number of incidents that are kept, at least 4. The first and the last quarter always are; of those
            between, skipped steps without a response make room first.

    Attributes:
        kept: The incidents, in order.
        left_out: Number of those that are not kept.
    """

    def __init__(self, most: int = 16) -> None:
        self.kept: list[Incident] = []
        self.left_out = 0
        self._most = most
        self._count = 0
        self._recent: dict[int, deque[SeenStep]] = {}

    def see(self, at: int, optimizer: int, seen: StepObservation) -> None:
        """Add a step; the arguments are those of `SeenStep`."""
        self._count += 1
        row = SeenStep(self._count, at, optimizer, seen)
        # One more than the steps before an incident, which is the step of its first alarm.
        self._recent.setdefault(optimizer, deque(maxlen=BEFORE + 1)).append(row)
        if self.kept and at <= self.kept[-1].last_step + AFTER:
            self.kept[-1].add(row)

    def mark(self, at: int, kind: str) -> None:
        """Add an alarm or a response: to the last incident, or to a new one.

        Args:
            at: Position on the loggers' axis; -1 for that of the last step.
            kind: Its kind; ``did`` for a response.
        """
        recent = self._all_recent()
        at = recent[-1].at if at < 0 and recent else at
        last = self.kept[-1] if self.kept else None
        if kind in _LASTING:
            if last is not None and at <= last.last_step + AFTER and kind not in last.kinds:
                last.kinds.append(kind)
            return
        is_near = last is not None and at - last.last_step <= _APART
        if last is None or not is_near or (at - last.first_step > _LONGEST and kind != "did"):
            last = Incident(at, at)
            self.kept.append(last)
            self._make_room()
        last.last_step = max(last.last_step, at)
        if kind not in last.kinds:
            last.kinds.append(kind)
        for row in recent:
            last.add(row)

    def last_steps(self) -> list[SeenStep]:
        """Return the last 64 steps of each optimizer, in order."""
        return self._all_recent(BEFORE)

    def _all_recent(self, most: int = BEFORE + 1) -> list[SeenStep]:
        rows = [row for recent in self._recent.values() for row in list(recent)[-most:]]
        return sorted(rows, key=lambda row: row.number)

    def _make_room(self) -> None:
        if len(self.kept) <= self._most:
            return
        quarter = self._most // 4
        between = range(quarter, len(self.kept) - quarter)
        minor = [place for place in between if not self.kept[place].has_response]
        del self.kept[minor[len(minor) // 2] if minor else len(self.kept) // 2]
        self.left_out += 1

    def state_dict(self) -> dict[str, Any]:
        """Return incidents and last steps, as plain values."""
        return {
            "kept": [_incident_state(incident) for incident in self.kept],
            "left_out": self.left_out,
            "count": self._count,
            "recent": [_row_state(row) for row in self._all_recent()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state returned by `state_dict`; pictures are drawn again."""
        self.kept = [_incident_of(saved) for saved in state["kept"]]
        self.left_out, self._count = state["left_out"], state["count"]
        self._recent = {}
        for row in map(_row_of, state["recent"]):
            self._recent.setdefault(row.optimizer, deque(maxlen=BEFORE + 1)).append(row)


def _row_state(row: SeenStep) -> dict[str, Any]:
    saved: dict[str, Any] = _swapped({"number": row.number, **row.as_dict()}, _no_nan)
    return saved


def _row_of(saved: Mapping[str, Any]) -> SeenStep:
    values = _swapped(saved, lambda value: math.nan if value is None else value)
    known = {one.name for one in fields(StepObservation)}  # Another version may have saved more.
    seen: dict[str, Any] = {key: value for key, value in values.items() if key in known}
    return SeenStep(values["number"], values["at"], values["optimizer"], StepObservation(**seen))


def _swapped(value: Any, swap: Callable[[Any], Any]) -> Any:
    """Return a value with each plain value in it swapped, and lists as tuples."""
    if isinstance(value, Mapping):
        return {key: _swapped(item, swap) for key, item in value.items()}
    return tuple(_swapped(item, swap) for item in value) if isinstance(value, list | tuple) else swap(value)


def _no_nan(value: Any) -> Any:
    """Return None for NaN, which is not equal to itself, so that equal runs would have checkpoints that are not."""
    return None if isinstance(value, float) and value != value else value


def _incident_state(incident: Incident) -> dict[str, Any]:
    rows: Sequence[SeenStep] = (*incident._first, *incident._last)
    return {
        "first_step": incident.first_step,
        "last_step": incident.last_step,
        "kinds": list(incident.kinds),
        "left_out": incident.left_out,
        "rows": [_row_state(row) for row in rows],
    }


def _incident_of(saved: Mapping[str, Any]) -> Incident:
    incident = Incident(saved["first_step"], saved["last_step"], list(saved["kinds"]))
    for row in map(_row_of, saved["rows"]):
        incident.add(row)
    incident.left_out = saved["left_out"]
    return incident
