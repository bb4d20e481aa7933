"""Sorts an optimizer's parameters into batches, and keeps the result for as long as it holds.

What can run in one call of a backend depends on dtypes, devices, flags and state, which hardly ever change from one
step to the next; gradients do. To look is several times cheaper than to sort, and a model has up to tens of thousands
of tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_optim.backends import Batch
from lightning_optim.backends.shards import local
from lightning_optim.optim import low_precision
from lightning_optim.optim.state import complete_state
from lightning_optim.rules import Rule, UpdateRule

if TYPE_CHECKING:
    from lightning_optim.optim.base import FusedOptimizer


class Batches:
    """The parameters that have a gradient, by what can run in one call.

    Args:
        optimizer: Whose parameters; state that they lack yet is made.

    Attributes:
        batches: What backends run. Their gradients are there from `refill`, or the construction, until `release`.
        rows: For each batch, the place of each of its tensors among all parameters with a gradient.
        group_sizes: How many parameters of each group have a gradient.
        numel: Number of elements of each of them, whole tensors where sharded.
    """

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self.batches: list[Batch] = []
        self.rows: list[list[int]] = []
        sizes: list[int] = []
        numel: list[int] = []
        self._kinds: list[tuple[Any, ...]] = []
        self._members: list[list[_Member]] = []
        by_key: dict[Any, int] = {}
        position = -1
        for group in optimizer.param_groups:
            rule = optimizer.rule_of(group)
            self._kinds.append(_kind(group, rule))
            members: list[_Member] = []
            first = len(numel)
            for index, param in enumerate(group["params"]):
                position += 1
                grad = param.grad
                if grad is None:
                    members.append(_Member(param))
                    continue
                if grad.layout != torch.strided:
                    raise RuntimeError(
                        f"{type(optimizer).__name__}: the gradient of {optimizer.label(group, index)} is sparse "
                        f"({grad.layout}). It needs dense gradients: create the layer with sparse=False, or use "
                        "torch.optim.SparseAdam."
                    )
                state = complete_state(optimizer.state[param], param, group, rule, position)
                number = self._place(by_key, param, grad, state, group, rule)
                batch = self.batches[number]
                self.rows[number].append(len(numel))
                numel.append(param.numel())
                members.append(
                    _Member(
                        param, batch.grads, param.dtype, param.device, grad.dtype, state, len(state), [*state.values()]
                    )
                )
            self._members.append(members)
            sizes.append(len(numel) - first)
        self.group_sizes = tuple(sizes)
        self.numel = tuple(numel)

    def _place(
        self,
        by_key: dict[Any, int],
        param: Tensor,
        grad: Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        rule: Rule,
    ) -> int:
        """Enter one parameter; returns the number of its batch."""
        names = rule.state if isinstance(rule, UpdateRule) else _tensor_names(rule, state)
        tensors = {name: local(state[name]) for name in names}
        dtypes = [tensor.dtype for tensor in tensors.values()]
        kahan = False
        stochastic: tuple[str, ...] = ()
        if low_precision.uses(group) or torch.uint8 in dtypes:
            kahan, stochastic = low_precision.storage(group, param, rule, state)
            tensors |= {name: local(state[name]) for name in low_precision.companions(state)}
        key = (type(rule), group["cautious"], kahan, stochastic, param.device, param.dtype, grad.dtype, *dtypes)
        if key not in by_key:
            by_key[key] = len(self.batches)
            self.batches.append(Batch(rule, [], [], [], [], [], [], group["cautious"], kahan, stochastic))
            self.rows.append([])
        batch = self.batches[by_key[key]]
        batch.params.append(local(param))
        batch.grads.append(local(grad))
        batch.states.append(tensors)
        scalar_names = ("step", *rule.scalar_state) if rule.counts_steps else tuple(rule.scalar_state)
        batch.scalar_states.append({name: state[name] for name in scalar_names})
        batch.groups.append(group)
        batch.wholes.append(param)
        if stochastic:
            batch.rounding_keys.append(state["rounding_key"])
        return by_key[key]

    def refill(self, optimizer: FusedOptimizer) -> bool:
        """Take the gradients of another step. False if something else has changed: then sort anew."""
        if len(optimizer.param_groups) != len(self._members):
            return False
        for group, kind, members in zip(optimizer.param_groups, self._kinds, self._members, strict=True):
            params = group["params"]
            if len(params) != len(members) or _kind(group, optimizer.rule_of(group)) != kind:
                return False
            for param, member in zip(params, members, strict=True):
                grad = param.grad
                if grad is None:
                    if member.grads is not None or param is not member.param:
                        return False
                    continue
                state = optimizer.state[param]
                if (
                    member.grads is None
                    or param is not member.param
                    or param.dtype is not member.dtype
                    or param.device != member.device
                    or grad.dtype is not member.grad_dtype
                    or grad.layout is not torch.strided
                    or state is not member.state
                    or len(state) != member.entries
                    or not all(map(operator.is_, state.values(), member.values))
                ):
                    return False
                member.grads.append(local(grad))
        return True

    def release(self) -> None:
        """Let go of the gradients, whose memory is free once the caller drops them too."""
        for batch in self.batches:
            batch.grads.clear()
            batch.shared.clear()


class _Member(NamedTuple):
    """A parameter, and what has to be as it was; only the parameter if it has no gradient."""

    param: Tensor
    grads: list[Tensor] | None = None
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    grad_dtype: torch.dtype | None = None
    state: Mapping[str, Any] = {}
    entries: int = 0
    values: Sequence[Any] = ()


def _kind(group: Mapping[str, Any], rule: Rule) -> tuple[Any, ...]:
    """What a group's batches depend on. Tensors keep their group itself, so its numbers are always the current ones."""
    return (id(group), type(rule), group["cautious"], *(group[flag] for flag in low_precision.DEFAULTS))


def _tensor_names(rule: Rule, state: Mapping[str, Any]) -> tuple[str, ...]:
    others = {"step", "rounding_key", *low_precision.companions(state), *rule.scalar_state}
    return tuple(name for name, value in state.items() if isinstance(value, Tensor) and name not in others)
