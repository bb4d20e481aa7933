"""What is known of an optimizer's gradients from earlier steps, as long as only their values change.

Which parameters have a gradient, of which sizes and dtypes, is the same at nearly every step. A compiled loop tells
whether it is (`kernels.base.Watch`), so that a step does nothing for each of perhaps thousands of parameters in Python.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterator, Sequence
from typing import Protocol, overload

from torch import Tensor
from torch.optim import Optimizer

from lightning_optim import kernels
from lightning_optim.kernels import plain
from lightning_optim.kernels.sizes import Sizes

_AFTER = 8
"""Number of steps after which it is worth describing the gradients to a compiled loop, once and after a change."""
_MOST = 4
"""Number of times that this is done: what changes again and again is looked at in Python."""
_GRAD = operator.attrgetter("grad")


class Found(Protocol):
    """What `Gradients` has found of one step, as far as it is used here."""

    optimizer: Optimizer
    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    group_sizes: tuple[int, ...]
    parameters: int

    def numel(self) -> tuple[int, ...]:
        """See `Gradients`."""

    def places(self) -> Tensor | None:
        """See `Gradients`."""


class PresentGrads(Sequence[Tensor]):
    """The gradients of parameters that all have one, taken from the parameters when they are asked for.

    Args:
        params: The parameters.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = params
        self._all: list[Tensor] | None = None

    def __len__(self) -> int:
        return len(self._params)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, int) and self._all is None:
            return _GRAD(self._params[index])  # type: ignore[no-any-return]
        return self._list()[index]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._list())

    def _list(self) -> list[Tensor]:
        if self._all is None:
            self._all = list(map(_GRAD, self._params))
        return self._all


class KnownGradients:
    """The gradients of one optimizer, on one device, which only change their values and their addresses.

    Args:
        gradients: The gradients of a step.

    Attributes:
        params: The parameters that have a gradient.
        group_sizes: Number of them in each group.
        parameters: Number of all parameters.
        numel: Number of elements of each gradient.
        places: As `Gradients.places`, or None if all parameters have a gradient.

    Raises:
        ValueError: Some of them cannot be watched.
    """

    def __init__(self, gradients: Found) -> None:
        grads = list(gradients.grads)
        kinds = {(grad.dtype, grad.device) for grad in grads}
        dtype, self._device = grads[0].dtype, grads[0].device
        backend = kernels.choose("auto", grads[0].device)
        if backend.watch is None or len(kinds) > 1 or dtype not in plain.FLOATS or not plain.all_usual(grads):
            raise ValueError("These gradients cannot be watched.")
        groups = gradients.optimizer.param_groups
        self._lists = [group["params"] for group in groups]
        everything = [param for params in self._lists for param in params]
        self._watch = backend.watch(self._lists, [], [], everything, list(map(_GRAD, everything)))
        self._backend, self._dtype = backend, dtype
        self._sizes = Sizes(tuple(grad.numel() for grad in grads))
        self.params, self.group_sizes = gradients.params, gradients.group_sizes
        self.parameters, self.numel = gradients.parameters, gradients.numel()
        self.places = None if len(self.params) == self.parameters else gradients.places()

    def still_there(self, optimizer: Optimizer) -> bool:
        """Return whether certainly the same parameters have a gradient of the same kind."""
        groups = optimizer.param_groups
        if len(groups) != len(self._lists):
            return False
        same = all(group["params"] is params for group, params in zip(groups, self._lists, strict=True))
        return same and self._watch.gradients() is not None

    def norm_sq(self) -> Tensor | None:
        """Read the gradients, and return their square sums, shape [tensors]; None if they are others by now."""
        addresses = self._watch.gradients()
        if addresses is None:
            return None
        return self._backend.measure_at(addresses, self._sizes, self._dtype, self._device)


class Memory:
    """What is remembered of one optimizer."""

    def __init__(self) -> None:
        self.known: KnownGradients | None = None
        self.steps, self.times = 0, 0

    def present(self, optimizer: Optimizer) -> KnownGradients | None:
        """Return what is known of the optimizer's gradients, if it holds for the present ones."""
        if self.known is not None and not self.known.still_there(optimizer):
            self.known = None
        return self.known


MEMORIES: weakref.WeakKeyDictionary[Optimizer, Memory] = weakref.WeakKeyDictionary()
"""What is remembered of each optimizer."""


def remember(gradients: Found) -> None:
    """Note a step with gradients that were not known, and get to know them after a few."""
    memory = MEMORIES.get(gradients.optimizer)
    if memory is None:
        memory = MEMORIES[gradients.optimizer] = Memory()
    memory.steps += 1
    if memory.steps < _AFTER or memory.times >= _MOST:
        return
    memory.steps, memory.times = 0, memory.times + 1
    try:
        memory.known = KnownGradients(gradients)
    except ValueError:
        memory.times = _MOST


def forget(optimizer: Optimizer) -> None:
    """Let go of what is kept of an optimizer's gradients, and with it of the parameters."""
    MEMORIES.pop(optimizer, None)
