"""Parts of the state that a snapshot covers: each returns its present state, and restores a former one in place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
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

    def portable(self, saved: Any) -> Any:
        """Return a saved state under names and numbers that another process has, too, sharing its tensors."""

    def identity(self) -> dict[str, Any]:
        """Return what it is a state of, in plain values: one of another identity must not be restored."""


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

    def portable(self, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the saved tensors by the present names of the parameters."""
        present = {self._first_name_of(param, name): name for name, param in self._parameters()}
        return {present.get(name, name): value for name, value in saved.items()}

    def identity(self) -> dict[str, Any]:
        """Return the name and shape of each parameter; buffers may come and go."""
        return {"parameters": sorted([name, list(local(param.detach()).shape)] for name, param in self._parameters())}

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all parameters with their present names."""
        for prefix, module in self._prefixed():
            for name, param in module.named_parameters():
                yield prefix + name, param

    def _prefixed(self) -> list[tuple[str, nn.Module]]:
        return [(f"{index}:" if index else "", module) for index, module in enumerate(self._modules())]

    def _named(self) -> dict[str, Tensor]:
        parameters: dict[str, Tensor] = {}
        buffers: dict[str, Tensor] = {}
        for name, param in self._parameters():
            parameters.setdefault(self._first_name_of(param, name), param)
        for prefix, module in self._prefixed():
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
        names: Called to get the names of parameters; those that have none are known by their place.
    """

    def __init__(self, optimizer: Optimizer, names: Callable[[], Mapping[Tensor, str]] = dict) -> None:
        self._optimizer, self._names = optimizer, names
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

    def portable(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """Return the saved state by the present places of the parameters."""
        numbers = [self._number_of(param) for param in self._params()]
        state = {place: saved["state"][number] for place, number in enumerate(numbers) if number in saved["state"]}
        return {"state": state, "groups": saved["groups"]}

    def identity(self) -> dict[str, Any]:
        """Return the class, the parameters of each group in order, and the settings that no schedule moves."""
        names, groups = self._names(), self._optimizer.param_groups
        return {
            "class": type(self._optimizer).__name__,
            "parameters": [[names.get(param) for param in group["params"]] for group in groups],
            "settings": [self._settings_of(group) for group in groups],
        }

    def _settings_of(self, group: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Return the numbers in a group that its optimizer was made with, or that a scheduler multiplies."""
        found = {}
        for key in sorted(self._optimizer.defaults.keys() & group.keys()):
            value = group.get(f"initial_{key}", group[key])
            numbers = [_number(item) for item in (value if isinstance(value, list | tuple) else [value])]
            if None not in numbers:
                found[key] = numbers
        return found

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
        fixed: Keys whose values do not change during a run; those of another run have others.
    """

    def __init__(
        self,
        get: Callable[[], Any],
        load: Callable[[Any], Any],
        name: str = "a state dict",
        fixed: Sequence[str] = (),
    ) -> None:
        self._get, self._load, self._name, self._fixed = get, load, name, fixed

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

    def portable(self, saved: Any) -> Any:
        """Return the saved state dict as it is."""
        return saved

    def identity(self) -> dict[str, Any]:
        """Return the name, and the values that do not change during a run."""
        state = self._get() if self._fixed else {}
        return {"name": self._name, **{key: state[key] for key in self._fixed if key in state}}


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


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


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
