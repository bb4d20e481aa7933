"""What one step did to each tensor of an optimizer: the rows of `debug_step`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_optim.core.sharding import local


@dataclass(frozen=True)
class TensorStep:
    """What one step did to one parameter.

    Args:
        name: Name of the parameter, or its place in the groups.
        shape: Its shape.
        dtype: Its dtype.
        group: Name of its group, or the group's index.
        lr: Learning rate of the group; NaN if it has none.
        grad: `none`, `zero`, `not finite`, `sparse` or `fine`.
        grad_norm: Norm of the gradient that the update used; NaN without one.
        grad_dtype: Its dtype; None without one.
        weight_norm: Norm of the weights before the step.
        update_norm: Norm of the change of the weights, decay included.
        against_grad: Cosine between the change and minus the gradient: above 0 the step goes down, below 0 up. NaN
            where one of them is 0.
        decay_share: Norm of the part of the change that weight decay makes, as a share of the change; None if it has
            not been measured.
        state_before: Names of its state before the step.
        state_after: Names of its state after the step.
        step_before: The count `step` in its state before the step; None without one.
        step_after: The same after the step.
        state_changed: Whether any of the state changed.
        skipped: Reason why the weights did not change, in words; None if they did.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    group: str
    lr: float
    grad: str
    grad_norm: float
    grad_dtype: torch.dtype | None
    weight_norm: float
    update_norm: float
    against_grad: float
    decay_share: float | None
    state_before: tuple[str, ...]
    state_after: tuple[str, ...]
    step_before: float | None
    step_after: float | None
    state_changed: bool
    skipped: str | None

    @property
    def ratio(self) -> float:
        """Norm of the change, as a share of the norm of the weights; NaN for weights of 0."""
        return self.update_norm / self.weight_norm if self.weight_norm else math.nan


class Before:
    """One parameter before the step, and the gradient that the step used.

    Args:
        name: Its name.
        param: The parameter.
        group: Its group.
        index: Index of the group.
        state: Its state.
    """

    def __init__(self, name: str, param: Tensor, group: Mapping[str, Any], index: int, state: Mapping[str, Any]):
        self.name, self.param, self.group = name, param, group
        self.label = str(group.get("name", index))
        self.lr, self.weight = _number(group.get("lr")), _copy(param)
        self.address = local(param).data_ptr()
        self.state = {key: _copy(value) for key, value in state.items()}
        self.original: Tensor | None = None
        self.grad: Tensor | None = None

    def take_gradient(self) -> None:
        """Copy the gradient as it is now."""
        self.original = self.param.grad
        self.grad = None if self.original is None else _copy(self.original)

    @property
    def grad_kind(self) -> str:
        """What the gradient is, in a word."""
        if self.grad is None:
            return "none"
        values = _values(self.grad)
        if not bool(torch.isfinite(values).all()):
            return "not finite"
        if not bool(values.any()):
            return "zero"
        return "sparse" if self.grad.is_sparse else "fine"

    @property
    def grad_changed(self) -> bool:
        """Whether the step has written into the gradient."""
        if self.grad is None or self.original is None or self.original is not self.param.grad:
            return False
        return not _same(self.grad, _copy(self.original))

    @property
    def moved_storage(self) -> bool:
        """Whether the weights are in another storage than before the step."""
        return local(self.param).data_ptr() != self.address

    def change(self) -> Tensor:
        """Return the change of the weights since, in float64 or complex128."""
        return _wide(_copy(self.param)) - _wide(self.weight)

    def row(self, change: Tensor, state: Mapping[str, Any], decay: Tensor | None, skipped: str | None) -> TensorStep:
        """Return what the step did.

        Args:
            change: Change of the weights.
            state: The state after the step.
            decay: The part of the change that weight decay makes; None if it is not known.
            skipped: Why the weights did not change; None if they did.
        """
        norm = float(torch.linalg.vector_norm(change))
        grad_norm = against = math.nan
        if self.grad is not None:
            grad = _wide(self.grad.to_dense() if self.grad.is_sparse else self.grad)
            grad_norm = float(torch.linalg.vector_norm(grad))
            if grad_norm and norm and grad.shape == change.shape:
                against = -float(torch.real((change.conj() * grad).sum())) / (grad_norm * norm)
        share = None
        if decay is not None:
            share = float(torch.linalg.vector_norm(decay)) / norm if norm else 0.0
        return TensorStep(
            name=self.name,
            shape=tuple(self.param.shape),
            dtype=self.param.dtype,
            group=self.label,
            lr=self.lr,
            grad=self.grad_kind,
            grad_norm=grad_norm,
            grad_dtype=None if self.grad is None else self.grad.dtype,
            weight_norm=float(torch.linalg.vector_norm(_wide(self.weight))),
            update_norm=norm,
            against_grad=against,
            decay_share=share,
            state_before=tuple(self.state),
            state_after=tuple(state),
            step_before=_count(self.state),
            step_after=_count(state),
            state_changed=self.state_changed(state),
            skipped=skipped,
        )

    def state_changed(self, state: Mapping[str, Any]) -> bool:
        """Return whether the state differs from that before the step."""
        return self.state.keys() != state.keys() or any(
            not _same(old, _copy(state[key])) for key, old in self.state.items() if isinstance(old, Tensor)
        )


def _copy(value: Any) -> Any:
    return local(value.detach()).clone() if isinstance(value, Tensor) else value


def _values(tensor: Tensor) -> Tensor:
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _same(a: Any, b: Any) -> bool:
    a, b = (_values(t) if isinstance(t, Tensor) else t for t in (a, b))
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return bool(a is b or a == b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return math.nan


def _count(state: Mapping[str, Any]) -> float | None:
    value = state.get("step")
    return None if value is None else _number(value)
