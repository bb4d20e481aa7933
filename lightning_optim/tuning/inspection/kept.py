"""Everything a look may change, put back as it was."""

from __future__ import annotations

import random
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_LARGE = 10_000
"""Containers above this size are kept as they are, without a look at what is in them."""


@contextmanager
def untouched(model: nn.Module, *others: Any) -> Iterator[None]:
    """Put back the model, with what can be reached from it, further objects, and the random numbers.

    Args:
        model: The model, of which the tensors are copied.
        others: Trainer, loaders and the like; of their tensors only the reference is put back.
    """
    kept = _Kept()
    kept.visit(model, tensors=True)
    for other in others:
        kept.visit(other, tensors=False)
    rng = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        kept.restore()
        torch.set_rng_state(rng[0])
        np.random.set_state(rng[1])
        random.setstate(rng[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


class _Kept:
    def __init__(self) -> None:
        self.seen: dict[int, Any] = {}
        self.dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self.lists: list[tuple[list[Any], list[Any]]] = []
        self.sets: list[tuple[set[Any], set[Any]]] = []
        self.tensors: list[tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, bool]] = []
        self.generators: list[tuple[Any, Any]] = []

    def visit(self, root: Any, tensors: bool) -> None:
        waiting = [root]
        while waiting:
            value = waiting.pop()
            if id(value) in self.seen or isinstance(value, _PLAIN):
                continue
            self.seen[id(value)] = value
            if isinstance(value, Tensor):
                if tensors:
                    self._keep_tensor(value)
            elif isinstance(value, torch.Generator):
                self.generators.append((value.set_state, value.get_state()))
            elif isinstance(value, np.random.RandomState):
                self.generators.append((value.set_state, value.get_state()))
            elif isinstance(value, random.Random):
                self.generators.append((value.setstate, value.getstate()))
            elif isinstance(value, dict):
                self.dicts.append((value, dict(value)))
                waiting += list(value.values()) if len(value) <= _LARGE else []
            elif isinstance(value, list):
                self.lists.append((value, list(value)))
                waiting += value if len(value) <= _LARGE else []
            elif isinstance(value, set):
                self.sets.append((value, set(value)))
            elif isinstance(value, tuple):
                waiting += list(value) if len(value) <= _LARGE else []
            elif isinstance(getattr(value, "__dict__", None), dict):
                waiting.append(vars(value))

    def _keep_tensor(self, tensor: Tensor) -> None:
        grad = tensor.grad if tensor.is_leaf else None
        self.tensors.append(
            (
                tensor,
                tensor.data if tensor.is_leaf else None,
                tensor.detach().clone(),
                grad,
                None if grad is None else grad.clone(),
                tensor.requires_grad,
            )
        )
        if tensor.is_leaf:
            tensor.grad = None

    def restore(self) -> None:
        with torch.no_grad():
            for tensor, data, value, grad, grad_value, requires_grad in self.tensors:
                if data is not None:
                    tensor.data = data
                    tensor.requires_grad_(requires_grad)
                tensor.detach().copy_(value)
                if grad is not None and grad_value is not None:
                    grad.copy_(grad_value)
                if data is not None:
                    tensor.grad = grad
        for each, content in self.dicts:
            if each.keys() != content.keys() or any(each[key] is not content[key] for key in content):
                each.clear()
                each.update(content)
        for items, before in self.lists:
            items[:] = before
        for members, before_ in self.sets:
            members.clear()
            members.update(before_)
        for put, state in self.generators:
            put(state)


_PLAIN = (types.ModuleType, types.FunctionType, str, bytes, int, float, complex, bool, type(None), type, np.ndarray, torch.device, torch.dtype)
