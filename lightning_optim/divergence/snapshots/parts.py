"""Parts of the state that a snapshot covers: each returns its present state, and restores a former one in place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from lightning_optim.core.sharding import local
from lightning_optim.divergence.snapshots.nested import stored_bytes, tensors_in


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


def bytes_needed(parts: Iterable[Part]) -> int:
    """Return the bytes of a snapshot of these parts once every optimizer has its state.

    For a parameter without state, as before the first step, two float32 numbers per element are assumed.
    """
    needed = 0
    for part in parts:
        live = part.live()
        needed += sum(stored_bytes(tensor) for tensor in tensors_in(live))
        if isinstance(part, OptimizerState):
            needed += 8 * part.elements_without_state()
    return needed


def _without_params(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


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


def _put(now: Any, then: Any) -> Any:
    """Copy ``then``, into the tensor ``now`` if it fits, and return the result."""
    if isinstance(then, Tensor):
        target = local(now) if isinstance(now, Tensor) else None
        if target is not None and target.shape == then.shape and target.dtype == then.dtype:
            target.copy_(then)
            return now
        return then.clone()
    return copy.deepcopy(then)
