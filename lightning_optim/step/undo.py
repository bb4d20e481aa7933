"""A copy of what one step of any optimizer may change, and the way back to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_MISSING = object()


class OptimizerSnapshot:
    """Parameters, gradients, state, groups and attributes of an optimizer, and torch's random numbers.

    The way back keeps identities: each tensor, list and dict that was there is the same object again, with the same
    content. Objects of other classes are kept as references.

    Args:
        optimizer: Any optimizer of torch's kind.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([weight], lr=0.5, momentum=0.9)
        >>> weight.grad = torch.ones(2)
        >>> before = OptimizerSnapshot(optimizer)
        >>> optimizer.step()
        >>> before.restore()
        >>> weight.data, optimizer.state
        (tensor([1., 1.]), defaultdict(<class 'dict'>, {}))
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        params = [param for group in optimizer.param_groups for param in group["params"]]
        self._kept = _Kept()
        self._kept.add(vars(optimizer))
        self._grads = [(param, param.grad) for param in params]
        for _, grad in self._grads:
            self._kept.add(grad)
        self._rng = torch.get_rng_state()
        self._cuda_rng = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back."""
        self._kept.restore()
        for param, grad in self._grads:
            param.grad = grad
        torch.set_rng_state(self._rng)
        if self._cuda_rng:
            torch.cuda.set_rng_state_all(self._cuda_rng)
        forget = getattr(self._optimizer, "forget_step", None)
        if callable(forget):  # tables of ours, which may refer to state of the step that is undone
            forget()


class _Kept:
    """Content of tensors and containers, by identity."""

    def __init__(self) -> None:
        self._tensors: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._containers: dict[int, tuple[Any, Any]] = {}

    def add(self, value: Any) -> None:
        if isinstance(value, Tensor):
            if id(value) not in self._tensors:
                self._tensors[id(value)] = (value, value.data, value.detach().clone())
        elif isinstance(value, dict | list) and id(value) not in self._containers:
            self._containers[id(value)] = (value, value.copy())
            for part in (*value.keys(), *value.values()) if isinstance(value, dict) else value:
                self.add(part)
        elif isinstance(value, tuple):
            for part in value:
                self.add(part)

    def restore(self) -> None:
        for container, content in self._containers.values():
            if isinstance(container, list):
                container[:] = content
            else:
                _restore_dict(container, content)
        for tensor, storage, content in self._tensors.values():
            if not content.is_sparse and tensor.data_ptr() != storage.data_ptr():
                tensor.data = storage  # An optimizer has given the parameter another storage.
            tensor.detach().copy_(content)


def _restore_dict(container: dict[Any, Any], content: dict[Any, Any]) -> None:
    if list(container) == list(content) and all(container[key] is value for key, value in content.items()):
        return
    container.clear()
    container.update(content)
