"""Sorts an optimizer's parameters into batches, and keeps the result for as long as it holds.

What can run in one call of a backend depends on dtypes, devices, flags and state, which hardly ever change from one
step to the next; gradients do. To look is several times cheaper than to sort, and a model has up to tens of thousands
of tensors.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_optim import kernels
from lightning_optim.core.placements import PLAIN, gradient_of
from lightning_optim.core.sharding import local
from lightning_optim.kernels import Backend, Batch
from lightning_optim.kernels.plain import resolved
from lightning_optim.kernels.rules import Rule
from lightning_optim.kernels.weight_decay import decay_form, decay_forms
from lightning_optim.optim import admission, low_precision
from lightning_optim.optim.admission import GRADIENT, Owned, Ruled, Subject
from lightning_optim.optim.occupied import Occupied
from lightning_optim.optim.state import complete_state, tensor_names
from lightning_optim.optim.tensor_form import Form

_AS_IT_IS = nullcontext()
_NBYTES = torch.UntypedStorage.nbytes


class Batches:
    """The parameters that have a gradient, by what can run in one call.

    Args:
        optimizer: Whose parameters; state that they lack yet is made.

    Attributes:
        batches: What backends run. Their gradients are there from `refill`, or the construction, until `release`.
        backends: For each batch, what runs it: what the optimizer's `backend` asks for, if that can.
        rows: For each batch, the place of each of its tensors among all parameters with a gradient.
        group_sizes: How many parameters of each group have a gradient.
        numel: Number of elements of each of them, whole tensors where sharded.
    """

    def __init__(self, optimizer: Ruled) -> None:
        self.batches: list[Batch] = []
        self.rows: list[list[int]] = []
        self._written: list[Owned] = []
        self._read: list[Owned] = []
        self._fulls: list[Tensor] = []
        self._with_grad: list[tuple[Tensor, Callable[[], str]]] = []
        sizes: list[int] = []
        numel: list[int] = []
        by_key: dict[Any, int] = {}
        position = -1
        rules = list(map(optimizer.rule_of, optimizer.param_groups))
        for group, rule in zip(optimizer.param_groups, rules, strict=True):
            first = len(numel)
            for index, param in enumerate(group["params"]):
                position += 1
                label = functools.partial(optimizer.label, group, index)
                if gradient_of(param, label) is None:
                    continue
                self._with_grad.append((param, label))
                subject = Subject(optimizer, group, index)
                state = optimizer.state[param]
                admission.check_state(subject, local(param), rule, {n: local(v) for n, v in state.items()})
                with _AS_IT_IS if type(local(param)) in PLAIN else admission.by_name(optimizer, [param]):
                    complete_state(state, param, group, rule, position)
                number = self._place(by_key, subject, param, state, rule)
                self.rows[number].append(len(numel))
                numel.append(param.numel())
            sizes.append(len(numel) - first)
        admission.check_apart(self._written, self._read)
        self.backends = [_backend_for(batch, optimizer.backend) for batch in self.batches]
        self.group_sizes = tuple(sizes)
        self.numel = tuple(numel)
        self._remember(optimizer, rules)

    def _place(self, by_key: dict[Any, int], subject: Subject, param: Tensor, state: dict[str, Any], rule: Rule) -> int:
        """Enter one parameter; returns the number of its batch."""
        group = subject.group
        own = {name: state[name] for name in tensor_names(rule, state)}
        fulls = own | {name: state[name] for name in low_precision.companions(state)}
        arrays = {name: local(full) for name, full in fulls.items()}
        scalar_names = ("step", *rule.scalar_state) if rule.counts_steps else tuple(rule.scalar_state)
        scalars = {name: state[name] for name in scalar_names}
        form = decay_form(group)
        kahan = False
        stochastic: tuple[str, ...] = ()
        if low_precision.uses(group) or any(tensor.dtype == torch.uint8 for tensor in own.values()):
            kahan, stochastic = low_precision.storage(group, param, rule, state)
        keys = {"rounding_key": state["rounding_key"]} if stochastic else {}
        grad = admission.grad_of(subject, param)
        plain = self._admit(subject, {"": param, **fulls, **scalars, **keys}, grad)
        admission.check_counts(subject, scalars)
        dtypes = [(name, tensor.dtype) for name, tensor in arrays.items()]
        key = (
            *(type(rule), group["cautious"], form, kahan, stochastic),
            *(plain, param.device, param.dtype, grad.dtype, *dtypes),
        )
        if key not in by_key:
            by_key[key] = len(self.batches)
            self.batches.append(Batch(rule, [], [], [], [], [], [], group["cautious"], form, kahan, stochastic, plain))
            self.rows.append([])
        batch = self.batches[by_key[key]]
        batch.params.append(local(param))
        batch.grads.append(grad)
        batch.states.append(arrays)
        batch.scalar_states.append(scalars)
        batch.groups.append(group)
        batch.full_params.append(param)
        batch.rounding_keys.extend(keys.values())
        return by_key[key]

    def _admit(self, subject: Subject, fulls: dict[str, Tensor], grad: Tensor) -> bool:
        """Whether kernels may run on one parameter's tensors; of DTensors, on this rank's shards."""
        written = {role: local(full) for role, full in fulls.items()}
        plain = admission.check_memory(subject, {**written, GRADIENT: grad})
        if plain:
            self._written += [(tensor, subject, role) for role, tensor in written.items()]
            self._read.append((grad, subject, GRADIENT))
            self._fulls += fulls.values()
        return plain

    def _remember(self, optimizer: Ruled, rules: Sequence[Rule]) -> None:
        """Note everything that was asked above, to see at the next step whether it still holds."""
        self._same, self._equal, fulls = _look(optimizer, rules)
        grads = list(map(local, fulls))
        self._sharded = not {*map(type, self._fulls), *map(type, fulls)}.issubset(PLAIN)
        kinds = {type(tensor) for tensor, _, _ in (*self._written, *self._read)}
        dtensors = all(type(full) in PLAIN or hasattr(full, "to_local") for full in (*self._fulls, *fulls))
        self._kept = dtensors and kinds.issubset(PLAIN) and all(batch.plain for batch in self.batches)
        if self._kept:
            self._held = [tensor for tensor, _, _ in self._written]
            self._addresses = list(map(Tensor.data_ptr, self._held))
            # To keep a storage makes asking cheap. Not those of parameters, which are moved (`Module.to`): their old
            # memory would stay.
            self._params = [i for i, (_, _, role) in enumerate(self._written) if not role]
            self._param_bytes = _storage_bytes([self._held[i] for i in self._params])
            self._state_storages = [tensor.untyped_storage() for tensor, _, role in self._written if role]
            self._state_bytes = list(map(_NBYTES, self._state_storages))
            self._form = Form(self._held)
            self._grad_form = Form(grads)
            self._grad_bytes = _storage_bytes(grads)
            self._lazy = [i for i, grad in enumerate(grads) if grad.is_neg() or grad._is_zerotensor()]
            self._occupied = Occupied(self._held, grads)
        self._written, self._read = [], []

    def refill(self, optimizer: Ruled, rules: Sequence[Rule]) -> bool:
        """Take the gradients of another step. False if something else has changed: then sort anew."""
        if not self._kept:
            return False
        same, equal, grads = _look(optimizer, rules)
        if equal != self._equal or len(same) != len(self._same) or not all(map(operator.is_, same, self._same)):
            return False
        held = self._held
        if self._sharded:  # a DTensor may have been given another shard (FSDP2 does so), and its gradient is one, too
            held = list(map(local, self._fulls))
            grads = [local(grad) for param, label in self._with_grad if (grad := gradient_of(param, label)) is not None]
        if not set(map(type, grads)).issubset(PLAIN):
            return False
        # An object may have been given other memory (`weight.data = ...`, `set_`, `resize_`; new memory is asked for
        # before the old is let go, so it has another address), or another form (`t_`, and `resize_` to less).
        # Gradients are new at nearly each step.
        if list(map(Tensor.data_ptr, held)) != self._addresses or not self._form.fits(held):
            return False
        # A storage that is emptied and filled again may be where it was, and smaller.
        if _storage_bytes([held[i] for i in self._params]) != self._param_bytes:
            return False
        if list(map(_NBYTES, self._state_storages)) != self._state_bytes:
            return False
        if not self._grad_form.fits(grads) or _storage_bytes(grads) != self._grad_bytes:
            return False
        for i in self._lazy:
            grads[i] = resolved(grads[i])
        if self._occupied.reached_by(grads):  # which sorting refuses
            return False
        for batch, rows in zip(self.batches, self.rows, strict=True):
            batch.grads.extend(map(grads.__getitem__, rows))
        return True

    def release(self) -> None:
        """Let go of the gradients, whose memory is free once the caller drops them too."""
        for batch in self.batches:
            batch.grads.clear()
            batch.shared.clear()


def _look(optimizer: Ruled, rules: Sequence[Rule]) -> tuple[list[object], list[object], list[Tensor]]:
    """What sorting depends on, as objects that must be the same and values that must be equal; and the gradients.

    Without a loop in Python over the tensors: with ten thousand of them that is what a step would mostly do.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    given = list(map(_GRAD, params))
    states = optimizer.state.values()
    same = [*params, *states, *itertools.chain.from_iterable(map(dict.values, states))]
    equal: list[object] = [
        optimizer.backend,
        list(map(_kind, optimizer.param_groups, rules)),
        decay_forms(optimizer.param_groups),
        [grad is None for grad in given],
    ]
    return same, equal, [grad for grad in given if grad is not None]


def _storage_bytes(tensors: Sequence[Tensor]) -> list[int]:
    """How much memory the storage of each has."""
    return list(map(_NBYTES, map(Tensor.untyped_storage, tensors)))


def _backend_for(batch: Batch, name: str) -> Backend:
    """What runs ``batch``: the backend called ``name``, if that can, else the one that runs everything."""
    backend = kernels.choose(name, batch.device)
    able = batch.plain and backend.supports(batch)
    if not able or (batch.low_precision and not backend.low_precision):
        return kernels.get_backend("reference")
    return backend


_GRAD = operator.attrgetter("grad")


def _kind(group: Mapping[str, Any], rule: Rule) -> tuple[Any, ...]:
    """What batches depend on of a group. They keep the group itself, whose numbers are therefore always the current."""
    flags = (group[flag] for flag in low_precision.FLAGS)
    return (id(group), len(group["params"]), type(rule), group["cautious"], *flags)
