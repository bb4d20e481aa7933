"""A snapshot of the state of a run: captured while it trains, restored in place."""

from __future__ import annotations

import contextlib
import errno
import tempfile
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from lightning_optim.core.sizes import format_bytes
from lightning_optim.divergence.memory import check_memory, free_disk
from lightning_optim.divergence.snapshots.nested import copied, on_host, placed, stored_bytes, tensors_in
from lightning_optim.divergence.snapshots.parts import Part


class Snapshot:
    """A copy of the state of all parts at one moment.

    Capturing it costs one copy of weights and optimizer state (AdamW in float32: 12 bytes for each parameter), at the
    speed of a copy within memory if the training state is in the same memory. From an accelerator to the ``"cpu"`` the
    copy is asynchronous, into pinned memory that is reused for the next one. For ``"disk"`` a thread writes the copy to
    a file, after which its memory is free. The file has no name where the system allows that (POSIX), so a killed
    process leaves none. An error, such as that of a full disk or of memory that has run out, is kept in `error`.

    Args:
        memory: ``"device"``, ``"cpu"`` or ``"disk"``.
        folder: Folder of the file; None for the folder of temporary files.

    Raises:
        ValueError: ``memory`` is none of the three.

    Example:
        >>> from torch import nn
        >>> from lightning_optim.divergence.snapshots import Tensors
        >>> weight = nn.Linear(1, 1, bias=False)
        >>> parts = [Tensors(lambda: [weight])]
        >>> snapshot = Snapshot("cpu")
        >>> snapshot.capture(parts, step=0)
        >>> before = weight.weight.item()
        >>> _ = weight.weight.data.zero_()
        >>> snapshot.restore(parts)  # what could not be restored
        []
        >>> weight.weight.item() == before
        True
    """

    def __init__(self, memory: str = "cpu", folder: str | Path | None = None) -> None:
        check_memory(memory, "Snapshot")
        self._memory = memory
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._saved: Any = None
        self._error: Exception | None = None
        self._writing: threading.Thread | None = None
        self._arrived: torch.cuda.Event | None = None
        self.step = -1
        self.returns = 0
        self.size = 0
        """Bytes of its tensors, wherever they are."""

    def capture(self, parts: Iterable[Part], step: int) -> None:
        """Copy the present state of ``parts``, which is the state after ``step``."""
        self._wait()
        self.step, self.returns, self._error = step, 0, None
        try:
            self._saved = [copied(part.live(), old, self._memory) for part, old in _with_old(parts, self._saved)]
        except Exception as error:  # Memory that has run out has an error type on each device, and states are anyone's.
            self._saved = None
            self._fail(error)
            return
        self._keep()

    def _keep(self) -> None:
        """Note the size of what has been captured, and write it, if it goes to disk."""
        self.size = sum(stored_bytes(t) for t in tensors_in(self._saved))
        if self._memory != "device" and torch.cuda.is_available():
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()
        if self._memory == "disk":
            self._write()

    def restore(self, parts: Iterable[Part]) -> list[str]:
        """Restore all parts and count the return; the snapshot is unchanged, and can be restored again.

        Returns:
            Names of what has changed its form since the snapshot, and is left as it is.

        Raises:
            OSError: The snapshot was lost, or its file cannot be read; nothing has been changed.
        """
        return self.put_back(self.read(), parts)

    def put_back(self, saved: Any, parts: Iterable[Part]) -> list[str]:
        """Restore all parts from what `read` returned, as `restore` does."""
        self.returns += 1
        left: list[str] = []
        for part, then in zip(parts, saved, strict=True):
            left += part.restore(then)
        return left

    def read(self) -> Any:
        """Return the saved states of all parts; from disk, a new copy of them.

        Raises:
            OSError: The snapshot was lost, or its file cannot be read.
        """
        if self.error is None and self._file is not None:
            try:
                self._file.seek(0)
                return torch.load(self._file, weights_only=False)
            except Exception as error:  # A damaged file causes errors of many types.
                self._fail(error)
        if self._error is not None:
            raise OSError(f"The snapshot of step {self.step} is lost: {self._error}") from self._error
        return self._saved

    def state_dict(self, parts: Iterable[Part]) -> dict[str, Any]:
        """Return it for a checkpoint: plain values and tensors in the memory of the host, which it may share.

        Args:
            parts: Those that it was captured of.

        Raises:
            OSError: The snapshot was lost, or its file cannot be read.
        """
        states = [part.portable(then) for part, then in zip(parts, self.read(), strict=True)]
        return {"step": self.step, "returns": self.returns, "states": on_host(states)}

    def load_state_dict(self, state: Mapping[str, Any], parts: Iterable[Part]) -> None:
        """Become a copy of the snapshot that `state_dict` returned, of parts of the same identity."""
        self._wait()
        self.step, self.returns, self._error = state["step"], state["returns"], None
        states = zip(parts, state["states"], strict=True)
        self._saved = [placed(then, part.live(), self._memory) for part, then in states]
        self._keep()

    @property
    def error(self) -> Exception | None:
        """The error by which the last capture was lost; None if it is whole. Waits until it is written."""
        self._wait()
        return self._error

    @property
    def nbytes(self) -> int:
        """Bytes of memory that its tensors take; 0 on disk."""
        return sum(stored_bytes(t) for t in tensors_in(self._saved))

    def close(self) -> None:
        """Free its memory and remove its file."""
        self._wait()
        self._saved = None
        self._close_file()

    def _write(self) -> None:
        saved, self._saved = self._saved, None

        def write() -> None:
            try:
                if self._arrived is not None:
                    self._arrived.synchronize()
                self._save(saved)
            except Exception as error:  # It would end the thread unseen.
                self._fail(error)

        self._writing = threading.Thread(target=write, name="snapshot")
        self._writing.start()

    def _save(self, saved: Any) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(suffix=".snapshot", dir=self._folder)  # noqa: SIM115 - kept open
        self._file.seek(0)
        self._file.truncate()
        free = free_disk(self._folder)
        if self.size > free:  # Checkpoints may go to the same disk, which must not be filled up.
            raise OSError(errno.ENOSPC, f"it needs {format_bytes(self.size)}, and {format_bytes(free)} are free")
        torch.save(saved, self._file)
        self._file.flush()

    def _fail(self, error: Exception) -> None:
        """Keep the error, and give back the space of a file that is not whole."""
        self._error = error
        self._close_file()

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # Closing writes what is still buffered.
                file.close()

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None


def _with_old(parts: Iterable[Part], saved: Any) -> list[tuple[Part, Any]]:
    parts = list(parts)
    return list(zip(parts, saved if saved is not None else [None] * len(parts), strict=False))
