"""Two snapshots: the last good one, and a candidate that is not confirmed yet."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_optim.divergence.snapshots.parts import Part
from lightning_optim.divergence.snapshots.snapshot import Snapshot

_SUSPECT_STEPS = 16
"""Number of steps after a skipped one in which no snapshot is confirmed: as many consecutive flags are a new level."""


class SnapshotPair:
    """The last snapshot that is known to be good, and a candidate that is not confirmed yet.

    Args:
        memory: Where they are kept; see `Snapshot`.
        clean: Number of steps without an alarm after which a candidate is good.
        folder: Folder of files; None for the folder of temporary files.
        agree: Called with whether a snapshot is whole on this rank, to get whether it is on all of them.
        on_loss: Called with the error, if a snapshot was lost on this rank.
    """

    def __init__(
        self,
        memory: str,
        clean: int,
        folder: str | Path | None = None,
        agree: Callable[[bool], bool] = bool,
        on_loss: Callable[[Exception], object] = lambda error: None,
    ) -> None:
        self._clean = clean
        self._agree, self._on_loss = agree, on_loss
        self._good = Snapshot(memory, folder)
        self._candidate = Snapshot(memory, folder)
        self._waits = False
        self._suspect_at = -1

    @property
    def good(self) -> Snapshot | None:
        """The snapshot to return to; None if there is none yet."""
        return self._good if self._good.step >= 0 and self._is_whole(self._good) else None

    def capture_first(self, parts: Iterable[Part], step: int) -> None:
        """Capture the state at the start of a run, which is good without confirmation."""
        self._good.capture(parts, step)

    def check(self) -> None:
        """Report the good snapshot if it has been lost, before it is needed."""
        if self._good.error is not None:
            self._on_loss(self._good.error)

    def capture(self, parts: Iterable[Part], step: int) -> None:
        """Capture a new candidate, unless the last one is still to be confirmed."""
        if not self._waits:
            self._candidate.capture(parts, step)
            self._waits = True

    def confirm(self, step: int) -> None:
        """Note that nothing was wrong up to ``step``; the candidate is good once enough such steps have passed.

        One that was lost is discarded, and the good one before it stays.
        """
        due = max(self._candidate.step + self._clean, self._suspect_at + min(self._clean, _SUSPECT_STEPS))
        if self._waits and step >= due:
            self._waits = False
            if self._is_whole(self._candidate):
                self._good, self._candidate = self._candidate, self._good

    def mark_suspect(self, step: int) -> None:
        """Note that ``step`` was skipped: it may be the first of many, so the candidate is not confirmed at once."""
        self._suspect_at = step

    def discard(self) -> None:
        """Discard the candidate, because there was an alarm before it was confirmed."""
        self._waits = False

    def restore(self, parts: Iterable[Part]) -> list[str] | None:
        """Restore the good snapshot, and discard the candidate.

        Returns:
            Names of what has changed its form since the snapshot, and is left as it is; None if there is no snapshot
            that can be read on all ranks, and nothing has been changed.
        """
        good = self.good
        if good is None:
            return None
        self.discard()
        saved = None
        with contextlib.suppress(OSError):  # The snapshot keeps the error.
            saved = good.read()
        return good.put_back(saved, parts) if self._is_whole(good) else None

    @property
    def size(self) -> int:
        """Bytes of what `state_dict` returns."""
        return sum(snapshot.size for snapshot in self._kept().values())

    def state_dict(self, parts: Sequence[Part]) -> dict[str, Any]:
        """Return both for a checkpoint, as `Snapshot.state_dict` does; not a candidate that has been discarded.

        Raises:
            OSError: One of them was lost, or its file cannot be read.
        """
        snapshots = {name: snapshot.state_dict(parts) for name, snapshot in self._kept().items()}
        return {**snapshots, "suspect_at": self._suspect_at}

    def load_state_dict(self, state: Mapping[str, Any], parts: Sequence[Part]) -> None:
        """Restore the state returned by `state_dict`, of parts of the same identity."""
        self._suspect_at, self._waits = state["suspect_at"], "candidate" in state
        for name, snapshot in (("good", self._good), ("candidate", self._candidate)):
            if name in state:
                snapshot.load_state_dict(state[name], parts)

    def _kept(self) -> dict[str, Snapshot]:
        good = {"good": self._good} if self._good.step >= 0 else {}
        return {**good, "candidate": self._candidate} if self._waits else good

    def close(self) -> None:
        """Free memory and remove files."""
        self._good.close()
        self._candidate.close()

    def _is_whole(self, snapshot: Snapshot) -> bool:
        """Return whether a snapshot is whole on all ranks, which all have to ask."""
        error = snapshot.error
        if error is not None:
            self._on_loss(error)
        return self._agree(error is None)
