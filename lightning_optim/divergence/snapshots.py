"""Snapshots of the state of a run: captured while it trains, restored in place."""

from __future__ import annotations

import copy
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim.core.sharding import local
from lightning_optim.divergence.memory import check_memory

_SUSPECT_STEPS = 16
"""Number of steps after a skipped one in which no snapshot is confirmed: as many consecutive flags are a new level."""


class Part(Protocol):
    """A part of the state that a snapshot covers."""

    def live(self) -> Any:
        """Return the present state: nested containers with the tensors themselves, not copies."""

    def restore(self, saved: Any) -> None:
        """Restore a state of that form, copying out of it."""


class Tensors:
    """Parameters and buffers of modules; of sharded ones, the local shards.

    Args:
        modules: Called to get the modules.
    """

    def __init__(self, modules: Callable[[], Iterable[nn.Module]]) -> None:
        self._modules = modules

    def live(self) -> list[Tensor]:
        """Return parameters and buffers, each tensor once."""
        found = {id(t): t for m in self._modules() for t in (*m.parameters(), *m.buffers())}
        return [local(tensor.detach()) for tensor in found.values()]

    def restore(self, saved: list[Tensor]) -> None:
        """Copy into the tensors in place, so that other references to them stay valid."""
        for tensor, value in zip(self.live(), saved, strict=True):
            tensor.copy_(value)


class OptimizerState:
    """State and hyperparameters of an optimizer; of sharded state, the local shards.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    def live(self) -> dict[str, Any]:
        """Return the state of each parameter, and each group without its parameters."""
        return {
            "state": [self._state_of(param) for param in self._params()],
            "groups": [_without_params(group) for group in self._optimizer.param_groups],
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Copy in place where there is a tensor of that shape and dtype; remove state that did not exist then."""
        state = self._optimizer.state
        for param, then in zip(self._params(), saved["state"], strict=False):
            if not then:
                state.pop(param, None)
                continue
            now = state[param]
            for key in now.keys() - then.keys():
                del now[key]
            for key, value in then.items():
                now[key] = _put(now.get(key), value)
        for group, then in zip(self._optimizer.param_groups, saved["groups"], strict=False):
            for key, value in then.items():
                group[key] = _put(group.get(key), value)

    def elements_without_state(self) -> int:
        """Return the number of elements of parameters without state; of sharded ones, of the local shards."""
        return sum(local(param.detach()).numel() for param in self._params() if not self._state_of(param))

    def _params(self) -> list[Tensor]:
        return [param for group in self._optimizer.param_groups for param in group["params"]]

    def _state_of(self, param: Tensor) -> dict[str, Any]:
        return dict(self._optimizer.state.get(param) or {})


class StateDict:
    """The state dict of any object.

    Args:
        get: Called to get the state dict.
        load: Called with a state dict to restore.
    """

    def __init__(self, get: Callable[[], Any], load: Callable[[Any], Any]) -> None:
        self._get, self._load = get, load

    def live(self) -> Any:
        """Return the state dict."""
        return self._get()

    def restore(self, saved: Any) -> None:
        """Load a copy, because some objects modify the state dict that they load."""
        self._load(copy.deepcopy(saved))


class Snapshot:
    """A copy of the state of all parts at one moment.

    Capturing it costs one copy of weights and optimizer state (AdamW in float32: 12 bytes for each parameter), at the
    speed of a copy within memory if the training state is in the same memory. From an accelerator to the ``"cpu"`` the
    copy is asynchronous, into pinned memory that is reused for the next one. For ``"disk"`` a thread writes the copy to
    a file, after which its memory is free.

    Args:
        memory: ``"device"``, ``"cpu"`` or ``"disk"``.
        folder: Folder of the file; None for the folder of temporary files.

    Raises:
        ValueError: ``memory`` is none of the three.

    Example:
        >>> weight = nn.Linear(1, 1, bias=False)
        >>> parts = [Tensors(lambda: [weight])]
        >>> snapshot = Snapshot("cpu")
        >>> snapshot.capture(parts, step=0)
        >>> before = weight.weight.item()
        >>> _ = weight.weight.data.zero_()
        >>> snapshot.restore(parts)
        >>> weight.weight.item() == before
        True
    """

    def __init__(self, memory: str = "cpu", folder: str | Path | None = None) -> None:
        check_memory(memory, "Snapshot")
        self._memory = memory
        self._folder = folder
        self._file: Path | None = None
        self._saved: Any = None
        self._writing: threading.Thread | None = None
        self._arrived: torch.cuda.Event | None = None
        self.step = -1
        self.returns = 0

    def capture(self, parts: Iterable[Part], step: int) -> None:
        """Copy the present state of ``parts``, which is the state after ``step``."""
        self._wait()
        self.step, self.returns = step, 0
        self._saved = [_copied(part.live(), old, self._memory) for part, old in _with_old(parts, self._saved)]
        if self._memory != "device" and torch.cuda.is_available():
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()
        if self._memory == "disk":
            self._write()

    def restore(self, parts: Iterable[Part]) -> None:
        """Restore all parts and count the return; the snapshot is unchanged, and can be restored again."""
        self._wait()
        self.returns += 1
        saved = self._saved if self._file is None else torch.load(self._file, weights_only=False)
        for part, then in zip(parts, saved, strict=True):
            part.restore(then)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that its tensors take; 0 on disk."""
        return sum(t.nbytes for t in _tensors(self._saved))

    def close(self) -> None:
        """Free its memory and remove its file."""
        self._wait()
        self._saved = None
        if self._file is not None:
            self._file.unlink(missing_ok=True)
            self._file = None

    def _write(self) -> None:
        if self._file is None:
            handle, name = tempfile.mkstemp(suffix=".snapshot", dir=self._folder)
            os.close(handle)
            self._file = Path(name)
        saved, self._saved, path = self._saved, None, self._file

        def write() -> None:
            if self._arrived is not None:
                self._arrived.synchronize()
            torch.save(saved, path)

        self._writing = threading.Thread(target=write, name="snapshot")
        self._writing.start()

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None


def bytes_needed(parts: Iterable[Part]) -> int:
    """Return the bytes of a snapshot of these parts once every optimizer has its state.

    For a parameter without state, as before the first step, two float32 numbers per element are assumed.
    """
    needed = 0
    for part in parts:
        live = part.live()
        needed += sum(tensor.nbytes for tensor in _tensors(live))
        if isinstance(part, OptimizerState):
            needed += 8 * part.elements_without_state()
    return needed


class SnapshotPair:
    """The last snapshot that is known to be good, and a candidate that is not confirmed yet.

    Args:
        memory: Where they are kept; see `Snapshot`.
        clean: Number of steps without an alarm after which a candidate is good.
        folder: Folder of files; None for the folder of temporary files.
    """

    def __init__(self, memory: str, clean: int, folder: str | Path | None = None) -> None:
        self._clean = clean
        self._good = Snapshot(memory, folder)
        self._candidate = Snapshot(memory, folder)
        self._waits = False
        self._suspect_at = -1

    @property
    def good(self) -> Snapshot | None:
        """The snapshot to return to; None if there is none yet."""
        return self._good if self._good.step >= 0 else None

    def capture_first(self, parts: Iterable[Part], step: int) -> None:
        """Capture the state at the start of a run, which is good without confirmation."""
        self._good.capture(parts, step)

    def capture(self, parts: Iterable[Part], step: int) -> None:
        """Capture a new candidate, unless the last one is still to be confirmed."""
        if not self._waits:
            self._candidate.capture(parts, step)
            self._waits = True

    def confirm(self, step: int) -> None:
        """Note that nothing was wrong up to ``step``; the candidate is good once enough such steps have passed."""
        due = max(self._candidate.step + self._clean, self._suspect_at + min(self._clean, _SUSPECT_STEPS))
        if self._waits and step >= due:
            self._good, self._candidate = self._candidate, self._good
            self._waits = False

    def mark_suspect(self, step: int) -> None:
        """Note that ``step`` was skipped: it may be the first of many, so the candidate is not confirmed at once."""
        self._suspect_at = step

    def discard(self) -> None:
        """Discard the candidate, because there was an alarm before it was confirmed."""
        self._waits = False

    def close(self) -> None:
        """Free memory and remove files."""
        self._good.close()
        self._candidate.close()


def _with_old(parts: Iterable[Part], saved: Any) -> list[tuple[Part, Any]]:
    parts = list(parts)
    return list(zip(parts, saved if saved is not None else [None] * len(parts), strict=False))


def _without_params(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _copied(value: Any, old: Any, memory: str) -> Any:
    """Copy nested containers, into the tensors of an older copy where they fit."""
    if isinstance(value, Tensor):
        value = local(value.detach())
        if not (isinstance(old, Tensor) and old.shape == value.shape and old.dtype == value.dtype):
            away = memory != "device" and value.device.type == "cuda"
            old = torch.empty_like(value, device="cpu", pin_memory=True) if away else torch.empty_like(value)
        return old.copy_(value, non_blocking=True)
    if isinstance(value, dict):
        olds = old if isinstance(old, dict) else {}
        return {key: _copied(item, olds.get(key), memory) for key, item in value.items()}
    if isinstance(value, list | tuple):
        before = old if isinstance(old, list | tuple) and len(old) == len(value) else [None] * len(value)
        return type(value)([_copied(item, was, memory) for item, was in zip(value, before, strict=True)])
    return copy.deepcopy(value)


def _put(now: Any, then: Any) -> Any:
    """Copy ``then``, into the tensor ``now`` if it fits, and return the result."""
    if isinstance(then, Tensor):
        target = local(now) if isinstance(now, Tensor) else None
        if target is not None and target.shape == then.shape and target.dtype == then.dtype:
            target.copy_(then)
            return now
        return then.clone()
    return copy.deepcopy(then)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in _tensors(item)]
