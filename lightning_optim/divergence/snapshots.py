"""Snapshots of the state of a run: captured while it trains, restored in place."""

from __future__ import annotations

import contextlib
import copy
import errno
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from lightning_optim.core.sharding import local
from lightning_optim.core.sizes import format_bytes
from lightning_optim.divergence.memory import check_memory, free_disk

_SUSPECT_STEPS = 16
"""Number of steps after a skipped one in which no snapshot is confirmed: as many consecutive flags are a new level."""


class Part(Protocol):
    """A part of the state that a snapshot covers."""

    def live(self) -> Any:
        """Return the present state: nested containers with the tensors themselves, not copies."""

    def restore(self, saved: Any) -> Sequence[str]:
        """Restore a state of that form, copying out of it.

        Returns:
            Names of what has changed its form since, and is left as it is.
        """


class Tensors:
    """Parameters and buffers of modules by name; of sharded ones, the local shards.

    A parameter keeps the name that it had first, because pruning and parametrizations rename parameters that the
    optimizer goes on with. A buffer has its present name, because modules assign new tensors to their buffers.

    Args:
        modules: Called to get the modules.
    """

    def __init__(self, modules: Callable[[], Iterable[nn.Module]]) -> None:
        self._modules = modules
        self._first_names: MutableMapping[Tensor, str] = WeakIdKeyDictionary()
        self._taken: set[str] = set()

    def live(self) -> dict[str, Tensor]:
        """Return parameters and buffers, each tensor once."""
        return {name: local(tensor.detach()) for name, tensor in self._named().items()}

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Tensor]) -> list[str]:
        """Copy into the tensors in place, so that other references to them stay valid.

        Returns:
            Names of the tensors that are gone, that are new, or that have another shape or dtype.
        """
        # A detached sparse tensor does not write through to the one that it comes from.
        now = {n: t if t.layout != torch.strided else local(t.detach()) for n, t in self._named().items()}
        left = [name for name in now if name not in saved]
        for name, value in saved.items():
            if name in now and _fits(now[name], value):
                now[name].copy_(value)
            elif name not in now or not _equal(now[name], value):
                left.append(name)
        return left

    def _named(self) -> dict[str, Tensor]:
        parameters: dict[str, Tensor] = {}
        buffers: dict[str, Tensor] = {}
        for index, module in enumerate(self._modules()):
            prefix = f"{index}:" if index else ""
            for name, param in module.named_parameters():
                parameters.setdefault(self._first_name_of(param, prefix + name), param)
            for name, buffer in module.named_buffers():
                buffers.setdefault(prefix + name, buffer)
        found: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in (buffers | parameters).items():
            found.setdefault(id(tensor), (name, tensor))
        return dict(found.values())

    def _first_name_of(self, param: Tensor, name: str) -> str:
        if param not in self._first_names:
            if name in self._taken and name in set(self._first_names.values()):
                name += " (new)"  # The parameter that had this name is still there, under another one.
            self._first_names[param] = name
            self._taken.add(name)
        return self._first_names[param]


class OptimizerState:
    """State and hyperparameters of an optimizer; of sharded state, the local shards.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._numbers: MutableMapping[Tensor, int] = WeakIdKeyDictionary()
        self._next = 0

    def live(self) -> dict[str, Any]:
        """Return the state of each parameter by a number that it keeps, and each group without its parameters."""
        return {
            "state": {self._number_of(param): self._state_of(param) for param in self._params()},
            "groups": [_without_params(group) for group in self._optimizer.param_groups],
        }

    def restore(self, saved: Mapping[str, Any]) -> list[str]:
        """Copy in place where there is a tensor of that shape and dtype; remove state that did not exist then.

        Parameters and groups that the optimizer did not have then are left as they are.

        Returns:
            An empty list: what is left belongs to parameters, which `Tensors` names.
        """
        state = self._optimizer.state
        for param in self._params():
            then = saved["state"].get(self._number_of(param))
            if then is None:
                continue
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
        return []

    def elements_without_state(self) -> int:
        """Return the number of elements of parameters without state; of sharded ones, of the local shards."""
        return sum(local(param.detach()).numel() for param in self._params() if not self._state_of(param))

    def _number_of(self, param: Tensor) -> int:
        if param not in self._numbers:
            self._numbers[param] = self._next
            self._next += 1
        return self._numbers[param]

    def _params(self) -> list[Tensor]:
        return [param for group in self._optimizer.param_groups for param in group["params"]]

    def _state_of(self, param: Tensor) -> dict[str, Any]:
        return dict(self._optimizer.state.get(param) or {})


class StateDict:
    """The state dict of any object.

    Args:
        get: Called to get the state dict.
        load: Called with a state dict to restore.
        name: Name in reports, if it cannot be restored.
    """

    def __init__(self, get: Callable[[], Any], load: Callable[[Any], Any], name: str = "a state dict") -> None:
        self._get, self._load, self._name = get, load, name

    def live(self) -> Any:
        """Return the state dict."""
        return self._get()

    def restore(self, saved: Any) -> list[str]:
        """Load a copy, because some objects modify the state dict that they load.

        Returns:
            The name and the error, if the object does not accept its former state any more; otherwise an empty list.
        """
        try:
            self._load(copy.deepcopy(saved))
        except Exception as error:  # Any object of the user's, which may raise any error.
            return [f"{self._name} ({type(error).__name__}: {error})"]
        return []


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

    def capture(self, parts: Iterable[Part], step: int) -> None:
        """Copy the present state of ``parts``, which is the state after ``step``."""
        self._wait()
        self.step, self.returns, self._error = step, 0, None
        try:
            self._saved = [_copied(part.live(), old, self._memory) for part, old in _with_old(parts, self._saved)]
        except Exception as error:  # Memory that has run out has an error type on each device, and states are anyone's.
            self._saved = None
            self._fail(error)
            return
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

    @property
    def error(self) -> Exception | None:
        """The error by which the last capture was lost; None if it is whole. Waits until it is written."""
        self._wait()
        return self._error

    @property
    def nbytes(self) -> int:
        """Bytes of memory that its tensors take; 0 on disk."""
        return sum(_nbytes(t) for t in _tensors(self._saved))

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
        need, free = sum(_nbytes(t) for t in _tensors(saved)), free_disk(self._folder)
        if need > free:  # Checkpoints may go to the same disk, which must not be filled up.
            raise OSError(errno.ENOSPC, f"it needs {format_bytes(need)}, and {format_bytes(free)} are free")
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


def bytes_needed(parts: Iterable[Part]) -> int:
    """Return the bytes of a snapshot of these parts once every optimizer has its state.

    For a parameter without state, as before the first step, two float32 numbers per element are assumed.
    """
    needed = 0
    for part in parts:
        live = part.live()
        needed += sum(_nbytes(tensor) for tensor in _tensors(live))
        if isinstance(part, OptimizerState):
            needed += 8 * part.elements_without_state()
    return needed


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


def _fits(now: Tensor, then: Tensor) -> bool:
    """Return whether ``then`` can be copied into ``now`` element by element."""
    if now.layout != then.layout or now.shape != then.shape or not torch.can_cast(then.dtype, now.dtype):
        return False
    # Elements of an expanded tensor share their memory, so torch refuses to write them.
    return now.layout != torch.strided or all(now.stride(d) or n <= 1 for d, n in enumerate(now.shape))


def _equal(now: Tensor, then: Tensor) -> bool:
    """Return whether a tensor that cannot be written has not changed."""
    same = now.layout == then.layout == torch.strided and now.shape == then.shape
    return same and torch.equal(now, then.to(now))


def _nbytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor; those of the elements that it stores, if it is sparse."""
    if tensor.layout == torch.strided:
        return tensor.nbytes
    return int(tensor._nnz()) * (tensor.element_size() + 8 * tensor.dim())


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
