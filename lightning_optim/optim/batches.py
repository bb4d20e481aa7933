"""Sorts an optimizer's parameters into batches, and keeps the result for as long as it holds.

What can run in one call of a backend depends on dtypes, devices, flags and state, which hardly ever change from one
step to the next; gradients do. To look is several times cheaper than to sort, and a model has up to tens of thousands
of tensors.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_optim.backends import Batch
from lightning_optim.backends.placements import PLAIN, gradient_of
from lightning_optim.backends.shards import local
from lightning_optim.optim import low_precision
from lightning_optim.optim.state import complete_state, tensor_names
from lightning_optim.rules import Rule
from lightning_optim.weight_decay import decay_form


class Ruled(Protocol):
    """What is needed of an optimizer to sort its parameters."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...  # noqa: D102 - torch's own

    @property
    def state(self) -> Any: ...  # noqa: D102

    def rule_of(self, group: dict[str, Any]) -> Rule:
        """How a group's parameters are updated."""

    def label(self, group: dict[str, Any], index: int) -> str:
        """How messages call a parameter."""


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

    def __init__(self, optimizer: Ruled) -> None:
        self.batches: list[Batch] = []
        self.rows: list[list[int]] = []
        sizes: list[int] = []
        numel: list[int] = []
        by_key: dict[Any, int] = {}
        position = -1
        for group in optimizer.param_groups:
            rule = optimizer.rule_of(group)
            first = len(numel)
            for index, param in enumerate(group["params"]):
                position += 1
                grad = gradient_of(param, functools.partial(optimizer.label, group, index))
                if grad is None:
                    continue
                if grad.layout != torch.strided:
                    raise RuntimeError(
                        f"{type(optimizer).__name__}: the gradient of {optimizer.label(group, index)} is sparse "
                        f"({grad.layout}). It needs dense gradients: create the layer with sparse=False, or use "
                        "torch.optim.SparseAdam."
                    )
                state = complete_state(optimizer.state[param], param, group, rule, position)
                number = self._place(by_key, param, grad, state, group, rule)
                self.rows[number].append(len(numel))
                numel.append(param.numel())
            sizes.append(len(numel) - first)
        self.group_sizes = tuple(sizes)
        self.numel = tuple(numel)
        self._same, self._equal, _ = _look(optimizer)
        # What FSDP2 makes of a DTensor's shard between two steps is its own affair.
        self._kept = all(type(whole) in PLAIN for batch in self.batches for whole in batch.wholes)

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
        tensors = {name: local(state[name]) for name in tensor_names(rule, state)}
        dtypes = [tensor.dtype for tensor in tensors.values()]
        tensors |= {name: local(state[name]) for name in low_precision.companions(state)}
        form = decay_form(group)
        kahan = False
        stochastic: tuple[str, ...] = ()
        if low_precision.uses(group) or torch.uint8 in dtypes:
            kahan, stochastic = low_precision.storage(group, param, rule, state)
        key = (type(rule), group["cautious"], form, kahan, stochastic, param.device, param.dtype, grad.dtype, *dtypes)
        if key not in by_key:
            by_key[key] = len(self.batches)
            self.batches.append(Batch(rule, [], [], [], [], [], [], group["cautious"], form, kahan, stochastic))
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

    def refill(self, optimizer: Ruled) -> bool:
        """Take the gradients of another step. False if something else has changed: then sort anew."""
        if not self._kept:
            return False
        same, equal, grads = _look(optimizer)
        if not set(map(type, grads)).issubset(PLAIN):
            return False
        if equal != self._equal or len(same) != len(self._same) or not all(map(operator.is_, same, self._same)):
            return False
        for batch, rows in zip(self.batches, self.rows, strict=True):
            batch.grads.extend(map(grads.__getitem__, rows))
        return True

    def release(self) -> None:
        """Let go of the gradients, whose memory is free once the caller drops them too."""
        for batch in self.batches:
            batch.grads.clear()
            batch.shared.clear()


def _look(optimizer: Ruled) -> tuple[list[object], list[object], list[Tensor]]:
    """What sorting depends on, as objects that must be the same and values that must be equal; and the gradients.

    Without a loop in Python over the tensors: with ten thousand of them that is what a step would mostly do.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    given = list(map(_GRAD, params))
    grads = [grad for grad in given if grad is not None]
    states = optimizer.state.values()
    same = [*params, *states, *itertools.chain.from_iterable(map(dict.values, states))]
    equal = [
        [_kind(group, optimizer.rule_of(group)) for group in optimizer.param_groups],
        [grad is None for grad in given],
        *(list(map(attribute, params)) for attribute in (_DTYPE, _DEVICE)),
        *(list(map(attribute, grads)) for attribute in (_DTYPE, _LAYOUT)),
    ]
    return same, equal, grads


_GRAD, _DTYPE, _DEVICE, _LAYOUT = map(operator.attrgetter, ("grad", "dtype", "device", "layout"))


def _kind(group: Mapping[str, Any], rule: Rule) -> tuple[Any, ...]:
    """What batches depend on of a group. They keep the group itself, whose numbers are therefore always the current."""
    flags = (group[flag] for flag in low_precision.DEFAULTS)
    return (id(group), len(group["params"]), type(rule), group["cautious"], decay_form(group), *flags)
