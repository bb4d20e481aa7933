"""Sorting of an optimizer's parameters into batches, which are reused while they are valid.

Which tensors a backend can update in one call depends on dtypes, devices, flags and state, which rarely change between
steps; only gradients do. Checking that batches are still valid is several times cheaper than sorting, and a model may
have tens of thousands of tensors.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_optim import kernels
from lightning_optim.core.placements import PLAIN, gradient_of
from lightning_optim.core.sharding import local
from lightning_optim.kernels import Backend, Batch, averages
from lightning_optim.kernels.base import MANY, Watch
from lightning_optim.kernels.plain import resolved
from lightning_optim.kernels.routes import Route
from lightning_optim.kernels.rules import Rule, UpdateRule
from lightning_optim.kernels.weight_decay import decay_form, decay_forms
from lightning_optim.optim import admission, low_precision
from lightning_optim.optim.admission import GRADIENT, Owned, Ruled, Subject
from lightning_optim.optim.division import Way, divided_params, route_of, way_of
from lightning_optim.optim.occupied import Occupied
from lightning_optim.optim.state import complete_state, tensor_names
from lightning_optim.optim.tensor_form import Form

_AS_IT_IS = nullcontext()
_WATCHED_AFTER = 8
"""Number of steps without a change after which it is worth describing all tensors to a compiled loop."""
_MOST_WATCHES = 4
"""Number of times that this is done: what changes again and again is looked at in Python."""
_NBYTES = torch.UntypedStorage.nbytes


class Batches:
    """Parameters that have a gradient, sorted into batches that a backend updates in one call each.

    Args:
        optimizer: The optimizer; missing state of its parameters is created.

    Attributes:
        batches: The batches. They hold gradients from construction or `refill` until `release`.
        backends: For each batch, the backend that runs it: the one that `backend` of the optimizer asks for, if able.
        routes: The ways in which ranks share the work of some batches.
        order: Indices of the batches in the order of their update: shared ones first, whose tensors then travel while
            this rank updates the rest.
        rows: For each batch, the index of each of its tensors among all parameters with a gradient.
        group_sizes: Number of parameters with a gradient in each group.
        numel: Number of elements of each parameter with a gradient, over all shards.

    Raises:
        RefusedError: A gradient or a state cannot be used for an update.
    """

    def __init__(self, optimizer: Ruled) -> None:
        self.batches: list[Batch] = []
        self.rows: list[list[int]] = []
        self._written: list[Owned] = []
        self._read: list[Owned] = []
        self._fulls: list[Tensor] = []
        self._routes: dict[Way, Route] = {}
        self._divided = divided_params(optimizer)
        self._with_grad: list[tuple[Tensor, Callable[[], str]]] = []
        sizes: list[int] = []
        numel: list[int] = []
        by_key: dict[Any, int] = {}
        position = -1
        rules = list(map(optimizer.rule_of, optimizer.param_groups))
        for group, rule in zip(optimizer.param_groups, rules, strict=True):
            first = len(numel)
            if group.get("ema") is not None:
                group["ema"] = averages.parse(group["ema"])
            for index, param in enumerate(group["params"]):
                position += 1
                label = functools.partial(optimizer.label, group, index)
                if gradient_of(param, label) is None:
                    continue
                self._with_grad.append((param, label))
                subject = Subject(optimizer, group, index)
                state = optimizer.state[param]
                admission.check_present_state(subject, param, rule, state)
                with _AS_IT_IS if type(local(param)) in PLAIN else admission.by_name(optimizer, [param]):
                    complete_state(state, param, group, rule, position)
                number = self._place(by_key, subject, param, state, rule)
                self.rows[number].append(len(numel))
                numel.append(param.numel())
            sizes.append(len(numel) - first)
        admission.check_apart(self._written, self._read)
        self.backends = [_backend_for(batch, optimizer.backend) for batch in self.batches]
        if optimizer.backend != "reference":
            for batch, backend in zip(self.batches, self.backends, strict=True):
                low_precision = batch.low_precision or bool(batch.quantized)
                kernels.warn_if_slow(backend, batch.device, sum(batch.numel), low_precision)
        self.routes = list(self._routes.values())
        self.order = sorted(range(len(self.batches)), key=lambda number: self.batches[number].route is None)
        self.group_sizes = tuple(sizes)
        self.numel = tuple(numel)
        self._remember(optimizer, rules)

    def _place(self, by_key: dict[Any, int], subject: Subject, param: Tensor, state: dict[str, Any], rule: Rule) -> int:
        """Add one parameter to its batch, and return the index of the batch."""
        group = subject.group
        own = {name: state[name] for name in tensor_names(rule, state)}
        count = len(group["ema"]) if group.get("ema") else 0
        fulls = own | {name: state[name] for name in (*low_precision.companions(state), *averages.state_names(count))}
        arrays = {name: local(full) for name, full in fulls.items()}
        scalar_names = ("step", *rule.scalar_state) if rule.counts_steps else tuple(rule.scalar_state)
        scalar_names += (averages.STEP,) if count else ()
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
        over = subject.optimizer.divide_over if id(param) in self._divided else None
        way = way_of(param, group, rule, over)
        key = (
            *(type(rule), group["cautious"], form, kahan, stochastic, way, count),
            *(plain, param.device, param.dtype, grad.dtype, *dtypes),
        )
        if key not in by_key:
            by_key[key] = len(self.batches)
            flags = (group["cautious"], form, kahan, stochastic, plain)
            self.batches.append(Batch(rule, [], [], [], [], [], [], *flags, route=self._route(way), averages=count))
            self.rows.append([])
        batch = self.batches[by_key[key]]
        batch.params.append(local(param))
        batch.grads.append(grad)
        batch.states.append(arrays)
        if way is not None:
            batch.full_states.append(own)
        batch.scalar_states.append(scalars)
        batch.groups.append(group)
        batch.full_params.append(param)
        batch.rounding_keys.extend(keys.values())
        return by_key[key]

    def _route(self, way: Way | None) -> Route | None:
        """Return the route of ``way``, one for all batches that have it."""
        if way is not None and way not in self._routes:
            self._routes[way] = route_of(way)
        return None if way is None else self._routes[way]

    def _admit(self, subject: Subject, fulls: dict[str, Tensor], grad: Tensor) -> bool:
        """Validate the local tensors of one parameter, and return whether kernels may run on them."""
        written = {role: local(full) for role, full in fulls.items()}
        plain = admission.check_memory(subject, {**written, GRADIENT: grad})
        if plain:
            self._written += [(tensor, subject, role) for role, tensor in written.items()]
            self._read.append((grad, subject, GRADIENT))
            self._fulls += fulls.values()
        return plain

    def _remember(self, optimizer: Ruled, rules: Sequence[Rule]) -> None:
        """Record everything on which the batches depend, to check at the next step whether they are still valid."""
        self._same, self._equal, fulls = _look(optimizer, rules)
        grads = list(map(local, fulls))
        self._sharded = not {*map(type, self._fulls), *map(type, fulls)}.issubset(PLAIN)
        kinds = {type(tensor) for tensor, _, _ in (*self._written, *self._read)}
        dtensors = all(type(full) in PLAIN or hasattr(full, "to_local") for full in (*self._fulls, *fulls))
        self._kept = dtensors and kinds.issubset(PLAIN) and all(batch.plain for batch in self.batches)
        if self._kept:
            self._held = [tensor for tensor, _, _ in self._written]
            self._addresses = list(map(Tensor.data_ptr, self._held))
            # References to storages make the check cheap. Those of parameters are not kept, because `Module.to`
            # replaces them, and a reference would keep the old memory alive.
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
        self._watch: Watch | None = None
        self._steps_to_watch = _WATCHED_AFTER
        self._watches = 0

    def refill(self, optimizer: Ruled, rules: Sequence[Rule]) -> bool:
        """Fill the batches with new gradients; return False if anything else has changed, so that they are invalid."""
        if not self._kept:
            return False
        if self._watch is not None and self._is_unchanged(optimizer, rules):
            return True
        same, equal, grads = _look(optimizer, rules)
        if equal != self._equal or len(same) != len(self._same) or not all(map(operator.is_, same, self._same)):
            return False
        held = self._held
        if self._sharded:  # FSDP2 may have replaced the local shards of parameters and gradients.
            held = list(map(local, self._fulls))
            grads = [local(grad) for param, label in self._with_grad if (grad := gradient_of(param, label)) is not None]
        if not set(map(type, grads)).issubset(PLAIN):
            return False
        # A tensor may have new memory (`weight.data = ...`, `set_`, `resize_`; it has another address, because it is
        # allocated before the old memory is freed), or other metadata (`t_`, and `resize_` to fewer elements).
        # Gradients are new at nearly every step.
        if list(map(Tensor.data_ptr, held)) != self._addresses or not self._form.fits(held):
            return False
        # A storage that was freed and allocated again may have the same address but a smaller size.
        if _storage_bytes([held[i] for i in self._params]) != self._param_bytes:
            return False
        if list(map(_NBYTES, self._state_storages)) != self._state_bytes:
            return False
        if not self._grad_form.fits(grads) or _storage_bytes(grads) != self._grad_bytes:
            return False
        for i in self._lazy:
            grads[i] = resolved(grads[i])
        if self._occupied.reached_by(grads):  # Sorting again raises the error.
            return False
        for batch, rows in zip(self.batches, self.rows, strict=True):
            batch.grads.extend(map(grads.__getitem__, rows))
        self._steps_to_watch -= 1
        if self._steps_to_watch <= 0 and self._watches < _MOST_WATCHES and not self._sharded and not self._lazy:
            self._begin_watch(optimizer, rules)
        return True

    def _begin_watch(self, optimizer: Ruled, rules: Sequence[Rule]) -> None:
        """Let a compiled loop look for changes from now on, if there are many tensors and the backend has one."""
        self._watch, self._watches, self._steps_to_watch = None, self._watches + 1, _WATCHED_AFTER
        if len(self._held) < MANY or all(backend.watch is None for backend in self.backends):
            self._watches = _MOST_WATCHES
            return
        for batch, backend in zip(self.batches, self.backends, strict=True):
            if backend.numbers is not None:
                batch.count_by(backend.numbers)
        watch = next(backend.watch for backend in self.backends if backend.watch is not None)
        self._lists = [group["params"] for group in optimizer.param_groups]
        self._state = optimizer.state
        params = [param for params in self._lists for param in params]
        self._settings = _settings(optimizer, rules)
        self._by_address = [
            backend.takes_addresses
            and isinstance(batch.rule, UpdateRule)
            and batch.addresses is not None
            and all(map(Tensor.is_contiguous, batch.grads))
            for batch, backend in zip(self.batches, self.backends, strict=True)
        ]
        whole = len(self.batches) == 1
        self._indices = [slice(None) if whole else np.array(rows, dtype=np.int64) for rows in self.rows]
        try:
            self._watch = watch(
                self._lists, [self._state, *self._state.values()], self._held, params, list(map(_GRAD, params))
            )
        except ValueError:  # Something among these cannot be watched.
            self._watches = _MOST_WATCHES

    def _is_unchanged(self, optimizer: Ruled, rules: Sequence[Rule]) -> bool:
        """Return whether certainly nothing but the gradients has changed, and fill the batches with these if so."""
        assert self._watch is not None
        groups = optimizer.param_groups
        if optimizer.state is not self._state or len(groups) != len(self._lists):
            return False
        if not all(group["params"] is params for group, params in zip(groups, self._lists, strict=True)):
            return False
        if _settings(optimizer, rules) != self._settings:
            return False
        addresses = self._watch.gradients()
        if addresses is None:  # Perhaps something has changed.
            self._watch = None
            return False
        if self._occupied.reached_at(addresses):
            return False
        for batch, indices, by_address in zip(self.batches, self._indices, self._by_address, strict=True):
            if by_address:
                batch.give(addresses[indices])
            else:
                batch.grads.extend(map(_GRAD, batch.full_params))
        return True

    def release(self) -> None:
        """Drop the references to the gradients, so that the caller can free their memory."""
        for batch in self.batches:
            batch.grads.clear()
            if batch.grad_addresses is not None:
                batch.give(None)
            batch.shared.clear()


def _look(optimizer: Ruled, rules: Sequence[Rule]) -> tuple[list[object], list[object], list[Tensor]]:
    """Return the objects that must be identical and the values that must be equal for batches to be valid.

    There is no Python loop over the tensors, which would dominate the time of a step with ten thousand of them.

    Returns:
        Objects to compare by identity, values to compare by equality, and the gradients.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    given = list(map(_GRAD, params))
    states = optimizer.state.values()
    same = [*params, *states, *itertools.chain.from_iterable(map(dict.values, states))]
    equal: list[object] = [*_settings(optimizer, rules), [grad is None for grad in given]]
    return same, equal, [grad for grad in given if grad is not None]


def _settings(optimizer: Ruled, rules: Sequence[Rule]) -> list[object]:
    """Return all settings on which batches depend."""
    return [
        optimizer.backend,
        optimizer.divide_over,
        list(map(_kind, optimizer.param_groups, rules)),
        decay_forms(optimizer.param_groups),
    ]


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
_FLAGS = operator.itemgetter(*low_precision.FLAGS)


def _kind(group: Mapping[str, Any], rule: Rule) -> tuple[Any, ...]:
    """Return the settings of a group on which batches depend; numbers are read from the group at each step."""
    return (id(group), len(group["params"]), type(rule), group["cautious"], group.get("ema"), *_FLAGS(group))
