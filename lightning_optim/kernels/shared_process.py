"""A rule as ranks that share its work run it: what is sent of a tensor, what comes back, and what happens where."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_optim.kernels.matrix_rule import Like, MatrixRule
from lightning_optim.kernels.routes import Named
from lightning_optim.kernels.rules import TensorRule


class Process(Protocol):
    """A rule, cut into what runs on shards and what runs on whole tensors; `MatrixRule` has the contract."""

    local_state: tuple[str, ...]

    def sent(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Return the dtypes of what `prepare` returns by name, given that of the arithmetic."""

    def returned(self, param: Tensor, group: Any, dtype: torch.dtype) -> dict[str, Like]:
        """Return shapes and dtypes of what `whole` passes to `after`, as `MatrixRule.returned`."""

    def advance(self, grad: Tensor, state: Named, scalars: Named, group: Any) -> Named:
        """Return the new values of `local_state`, as `MatrixRule.advance`."""

    def prepare(self, param: Tensor, grad: Tensor, state: Named, scalars: Named, group: Any) -> Named:
        """Return by name what is sent of a tensor, in its shape."""

    def whole(self, sent: Any, states: Any, scalars: Any, groups: Any) -> list[tuple[Named, Named]]:
        """Compute what needs whole tensors from what was sent, as `MatrixRule.whole`."""

    def after(self, results: Any, params: Any, scalars: Any, groups: Any) -> Iterator[Tensor]:
        """Yield the amounts to subtract, as `MatrixRule.after`."""


class InParts:
    """A `MatrixRule`."""

    def __init__(self, rule: MatrixRule) -> None:
        self._rule, self.local_state = rule, rule.local_state
        self.advance, self.returned, self.after = rule.advance, rule.returned, rule.after

    def sent(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Implement `Process`."""
        return {"tensor": self._rule.sent_dtype}

    def prepare(self, param: Tensor, grad: Tensor, state: Named, scalars: Named, group: Any) -> Named:
        """Implement `Process`."""
        return {"tensor": self._rule.prepare(grad, state, scalars, group)}

    def whole(self, sent: Any, states: Any, scalars: Any, groups: Any) -> list[tuple[Named, Named]]:
        """Implement `Process`."""
        return self._rule.whole((one.pop("tensor") for one in sent), states, scalars, groups)


class AtOnce:
    """Any other rule: weights, gradient and all state are sent, and all of the update is done by the owner."""

    local_state: tuple[str, ...] = ()

    def __init__(self, rule: TensorRule, update: Callable[..., Any], divides: bool) -> None:
        self._update, self._divides, self._reads_weights = update, divides, rule.reads_weights

    def sent(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Implement `Process`."""
        return {"grad": dtype} | ({"param": dtype} if self._reads_weights else {})

    def returned(self, param: Tensor, group: Any, dtype: torch.dtype) -> dict[str, Like]:
        """Implement `Process`."""
        return {"delta": (tuple(param.shape), dtype)}

    def advance(self, grad: Tensor, state: Named, scalars: Named, group: Any) -> Named:
        """Implement `Process`."""
        return {}

    def prepare(self, param: Tensor, grad: Tensor, state: Named, scalars: Named, group: Any) -> Named:
        """Implement `Process`."""
        return {"grad": grad} | ({"param": param} if self._reads_weights else {})

    def whole(self, sent: Any, states: Any, scalars: Any, groups: Any) -> list[tuple[Named, Named]]:
        """Implement `Process`."""
        if self._divides:  # The gradients are divided already.
            scalars = [row | {"inverse_divisor": torch.ones_like(row["inverse_divisor"])} for row in scalars]
        grads = [one["grad"] for one in sent]
        params = [one["param"] for one in sent] if self._reads_weights else grads
        deltas, new_states = self._update(params, grads, states, scalars, groups)
        return [({"delta": delta}, new) for delta, new in zip(deltas, new_states, strict=True)]

    def after(self, results: Any, params: Any, scalars: Any, groups: Any) -> Iterator[Tensor]:
        """Implement `Process`."""
        return (result["delta"] for result in results)
