"""Which process works on which trial of a study, and what becomes of a trial whose process has died.

Optuna records heartbeats only within ``study.optimize`` and only in a database, so each trial has an owner and a beat
among its attributes, which every storage keeps.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import Any

OWNER, BEAT, RETRY_OF, LOST, SURPLUS = "owner", "beat", "retry_of", "lost", "surplus"
"""Attributes of a trial."""

MOST_RETRIES = 2
"""How often a trial is begun again whose process has died: what kills each process must not be tried for ever."""


def this_process() -> str:
    """Return what names this process among all machines, also if its id is used again later."""
    return f"{socket.gethostname()}:{os.getpid()}:{_started(os.getpid())}"


def is_dead(owner: str) -> bool:
    """Return whether a process is known to have ended, which is so on this machine only."""
    host, pid, started = owner.rsplit(":", 2)
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return _started(int(pid)) != started


def _started(pid: int) -> str:
    """When a process started, in ticks since the machine did; empty where it cannot be known, or for a zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


class Claims:
    """The trials of this process, and a look at those of others.

    Args:
        study: The study.
        storage: Its storage.
        interval: Seconds between two beats.
        grace: Seconds without a beat after which the process of a trial counts as dead.
    """

    def __init__(self, study: Any, storage: Any, interval: float = 15.0, grace: float = 120.0) -> None:
        self._study, self._storage, self._interval, self._grace = study, storage, interval, grace
        self._owner = this_process()
        self._mine: dict[int, Any] = {}
        self._seen: dict[int, tuple[Any, float]] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="beats of trials", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the beats."""
        self._ended.set()
        self._thread.join()

    def take(self, trial: Any) -> None:
        """Become the owner of a trial."""
        trial.set_user_attr(OWNER, self._owner)
        with self._lock:
            self._mine[trial.number] = trial

    def leave(self, number: int) -> None:
        """Be its owner no longer: it has ended."""
        with self._lock:
            self._mine.pop(number, None)

    def recover(self) -> list[int]:
        """Mark running trials of dead processes as failed, and queue their hyperparameters again.

        Returns:
            The numbers of these trials.
        """
        from optuna.trial import TrialState

        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [t.number for t in running if t.number not in self._mine and self._is_lost(t) and self._requeue(t)]

    def release(self) -> None:
        """Give the trials that still run back to the study, for the next process that works on it."""
        with self._lock:
            mine, self._mine = list(self._mine.values()), {}
        for trial in mine:
            self._requeue(self._study.trials[trial.number], again=True)

    def _requeue(self, trial: Any, again: bool = False) -> bool:
        """Mark a trial as failed and queue it anew; return whether this process was the one to do so.

        Args:
            trial: The trial, which runs.
            again: Whether it counts as if it had not been begun.
        """
        from optuna.exceptions import OptunaError
        from optuna.trial import TrialState

        try:
            # It is marked before it fails, so that no process counts it as done in between.
            self._storage.set_trial_user_attr(trial._trial_id, LOST, True)
            self._storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)
        except (OptunaError, RuntimeError):  # It has ended, or another process was faster.
            return False
        before = trial.user_attrs.get(RETRY_OF, [])
        retries = before if again else [trial.number, *before]
        if len(retries) <= MOST_RETRIES and trial.params:
            self._study.enqueue_trial(trial.params, user_attrs={RETRY_OF: retries})
        return True

    def _is_lost(self, trial: Any) -> bool:
        owner = trial.user_attrs.get(OWNER)
        if owner is not None and is_dead(owner):
            return True
        beat, now = trial.user_attrs.get(BEAT), time.monotonic()
        before = self._seen.get(trial.number)
        if before is None or before[0] != beat:
            self._seen[trial.number] = (beat, now)
            return False
        return now - before[1] > self._grace

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(self._interval):
            count += 1
            with self._lock:
                mine = list(self._mine.values())
            for trial in mine:
                try:
                    trial.set_user_attr(BEAT, count)
                except Exception:  # It has ended meanwhile, or the storage is away for a moment.
                    continue
