"""The update of a batch whose tensors ranks share: sharded ones, or copies of which each rank processes some."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_optim.core.host import is_set, read
from lightning_optim.core.shards import split_of
from lightning_optim.core.stats import STEP_SUMS
from lightning_optim.core.transfer import upload
from lightning_optim.kernels.base import Batch
from lightning_optim.kernels.batch_values import (
    grad_of,
    is_usual,
    needs_no_scaling,
    rows_of,
    states_of_tensor_rule,
    widened,
)
from lightning_optim.kernels.finish import finish
from lightning_optim.kernels.matrix_rule import MatrixRule, StepOnCpu
from lightning_optim.kernels.owners import buckets_of, owners_of
from lightning_optim.kernels.parts import AT_LEAST, IN_PLACE, keys, largest_part
from lightning_optim.kernels.routes import Copies, Cut, Meshes, Named
from lightning_optim.kernels.rules import TensorRule
from lightning_optim.kernels.scalars import commit, scalar_columns
from lightning_optim.kernels.shared_process import AtOnce, InParts, Process

Subtract = Callable[[Batch, Iterable[Tensor], Tensor, list[Named]], None]
InPlace = Callable[[Batch, Mapping[str, Tensor], Sequence[int]], StepOnCpu | None]


def begin(
    batch: Batch,
    update: Callable[..., Any],
    subtract: Subtract | None = None,
    *,
    divides: bool = False,
    in_place: InPlace | None = None,
    divisor: Tensor | None,
    skip: Tensor | None,
    collect: bool,
) -> Callable[[], Tensor | None]:
    """Start `Backend.apply` for a batch with a `route`: the first bucket is on its way when this returns.

    Args:
        batch: The tensors to update, of a tensor rule.
        update: As for `apply_tensor_rule`.
        subtract: As for `apply_tensor_rule`.
        divides: As for `apply_tensor_rule`.
        in_place: As for `apply_tensor_rule`; used where ranks have copies.
        divisor: As for `Backend.apply`.
        skip: As for `Backend.apply`; equal on all ranks of the route.
        collect: As for `Backend.apply`.

    Returns:
        Function that completes the update and returns what `Backend.apply` does.
    """
    if batch.device.type == "cpu" and is_set(skip):
        nothing = torch.full((len(batch.params), len(STEP_SUMS)), math.nan, device="cpu") if collect else None
        return lambda: nothing
    work = _SharedWork(batch, update, subtract, divides, in_place, divisor, skip, collect)
    work.send()
    return work.complete


def shares_now(batch: Batch) -> bool:
    """Return whether ranks share the update of a batch with a `route` at this step; else each can do all of it."""
    rule = batch.rule
    if not isinstance(batch.route, Copies) or not isinstance(rule, TensorRule):
        return True
    counts = batch.device.type == "cpu" and rule.counts_steps
    return any(
        rule.divides_now(group, read(state["step"]) + 1 if counts else None)
        for group, state in zip(batch.groups, batch.scalar_states, strict=True)
    )


@dataclass(frozen=True)
class _Plan:
    """What depends on shapes only: owners, buckets, and what travels of each tensor."""

    owners: list[int]
    buckets: list[list[int]]
    going: list[dict[str, Cut]]
    coming: list[dict[str, Cut]]
    own_states: list[tuple[str, ...]]
    """Names of the states of each tensor that the rule's middle part owns."""


@dataclass
class _OnTheWay:
    """A bucket that has been sent to the owners."""

    rows: list[int]
    grads: list[Tensor]
    """As the rule sees them where they are needed again; otherwise as they are."""
    new_states: list[Named]
    arrived: Callable[[], list[Named]]
    steps: Steps = field(default_factory=list)
    """If the bucket is updated in place, its steps with the rows of each."""


Steps = list[tuple[list[int], StepOnCpu]]


class _SharedWork:
    """One update of a batch, bucket by bucket, the next one of which is on its way while one is processed."""

    def __init__(
        self,
        batch: Batch,
        update: Callable[..., Any],
        subtract: Subtract | None,
        divides: bool,
        in_place: InPlace | None,
        divisor: Tensor | None,
        skip: Tensor | None,
        collect: bool,
    ) -> None:
        assert isinstance(batch.rule, TensorRule)
        assert batch.route is not None
        self._batch, self._rule, self._route = batch, batch.rule, batch.route
        self._skip, self._collect = skip, collect
        rule = batch.rule
        self._process: Process = InParts(rule) if isinstance(rule, MatrixRule) else AtOnce(rule, update, divides)
        simple = batch.decay_form == "shrink" and not (batch.cautious or batch.low_precision or collect)
        self._subtract = subtract if simple else None
        self._columns = scalar_columns(batch, divisor)
        copies = isinstance(batch.route, Copies)
        self._in_place = in_place if copies and is_usual(batch, self._columns, collect) else None
        on_host = batch.device.type == "cpu"
        self._as_given = needs_no_scaling(self._columns) if on_host else [False] * len(batch.params)
        self._keys = keys(batch, rule)  # They depend on settings, which may change from step to step.
        if "plan" not in batch.kernels:
            # It must be the same on all ranks, and therefore whether or not steps are taken in place.
            batch.kernels["plan"] = self._make_plan(IN_PLACE * AT_LEAST["cpu"] if in_place and copies else 0)
        self._plan: _Plan = batch.kernels["plan"]
        self._waiting = iter(self._plan.buckets)
        self._next: _OnTheWay | None = None

    @cached_property
    def _scalars(self) -> list[Named]:
        return rows_of(self._columns, self._batch.dtype)

    def _make_plan(self, at_least: int) -> _Plan:
        batch, route = self._batch, self._route
        costs = [self._rule.cost(param, group) for param, group in zip(batch.full_params, batch.groups, strict=True)]
        owners = owners_of(costs, route.ranks)
        going, coming, names = [], [], []
        for param, state, group in zip(batch.full_params, batch.full_states, batch.groups, strict=True):
            split = split_of(param)
            dim = None if split is None else split.dim
            like = param if isinstance(route, Meshes) else None
            here = {n: Cut(tuple(param.shape), t, dim, like) for n, t in self._process.sent(batch.dtype).items()}
            back = {}
            for name, (shape, dtype) in self._process.returned(param, group, batch.dtype).items():
                is_cut = dim is not None and shape[dim] == param.shape[dim]
                back[name] = Cut(shape, dtype, dim if is_cut else None, like)
            own = {
                n: _state_cut(t, batch.dtype if n in batch.quantized or t.is_floating_point() else t.dtype, route)
                for n, t in state.items()
                if n not in self._process.local_state
            }
            going.append(here | _marked(own))
            coming.append(back | _marked(own))
            names.append(tuple(own))
        # What travels is what an owner has in memory: of SOAP, for one, its factors as well.
        sizes = [sum(math.prod(cut.shape) for cut in cuts.values()) for cuts in going]
        largest = max(largest_part(batch, list(map(Tensor.numel, batch.full_params))), at_least)
        buckets = buckets_of(owners, costs, sizes, self._keys, largest)
        return _Plan(owners, buckets, going, coming, names)

    def send(self) -> None:
        """Send the next bucket to the owners, if there is one."""
        rows = next(self._waiting, None)
        if rows is None:
            self._next = None
            return
        if steps := self._steps(rows):
            self._next = _OnTheWay(rows, [], [], list, steps)
            return
        batch, plan = self._batch.take(rows), self._plan
        scalars = [self._scalars[row] for row in rows]
        grads: Any = (
            batch.grads[i].to(batch.dtype) if self._as_given[row] else grad_of(batch, i, scalars[i])
            for i, row in enumerate(rows)
        )
        if batch.cautious:
            grads = list(grads)
        states = [states_of_tensor_rule(batch, i) for i in range(len(rows))]
        new_states: list[Named] = []
        owners, cuts = [plan.owners[row] for row in rows], [plan.going[row] for row in rows]

        def sent() -> Iterator[Named]:
            for i, (row, grad) in enumerate(zip(rows, grads, strict=True)):
                state, numbers, group = states[i], scalars[i], batch.groups[i]
                new_states.append(self._process.advance(grad, state, numbers, group))
                if not self._route.needs(owners[i]):
                    yield {}
                    continue
                own = _marked({name: state[name] for name in plan.own_states[row]})
                yield self._process.prepare(widened(batch.params[i]), grad, new_states[i], numbers, group) | own

        arrived = self._route.gather(owners, cuts, sent(), batch.device)
        self._next = _OnTheWay(rows, grads if batch.cautious else batch.grads, new_states, arrived)

    def complete(self) -> Tensor | None:
        """Process all buckets, and return the step sums if they are collected."""
        batch, order, sums = self._batch, [], []
        while (bucket := self._next) is not None:
            wholes = bucket.arrived()
            bucket.arrived = list  # The messages have been read.
            self.send()
            if bucket.steps:
                self._finish_in_place(bucket)
                continue
            collected = self._finish(bucket, wholes)
            if collected is not None:
                order += bucket.rows
                sums.append(collected)
        commit(batch, self._columns, self._skip)
        if not sums:
            return None
        in_order = torch.empty(len(order), len(STEP_SUMS), device=batch.device)
        in_order[upload(order, batch.device)] = torch.cat(sums)
        return in_order

    def _steps(self, rows: list[int]) -> Steps:
        """Return the steps in place by which ``rows`` can be updated; none if they cannot."""
        if self._in_place is None or any(self._plan.coming[row].keys() != {"direction"} for row in rows):
            return []
        found = []
        for members in self._alike(rows):
            step = self._in_place(self._batch.take(members), self._columns, members)
            if step is None or not step.is_shared:
                return []
            found.append((members, step))
        return found

    def _alike(self, rows: Iterable[int]) -> Iterable[list[int]]:
        alike: dict[Any, list[int]] = {}
        for row in rows:
            alike.setdefault(self._keys[row], []).append(row)
        return alike.values()

    def _owned(self, rows: Iterable[int]) -> Iterable[list[int]]:
        return self._alike(row for row in rows if self._route.owns(self._plan.owners[row]))

    def _finish_in_place(self, bucket: _OnTheWay) -> None:
        """As `_finish`; what is sent is the same, so that other ranks need not do the same."""
        found: dict[int, Named] = {}
        assert self._in_place is not None
        for own in self._owned(bucket.rows):
            step = self._in_place(self._batch.take(own), self._columns, own)
            assert step is not None
            found |= {row: {"direction": result} for row, result in zip(own, step.directions(), strict=True)}
        received = self._scatter(bucket.rows, [found.get(row, {}) for row in bucket.rows])
        parts = dict(zip(bucket.rows, received, strict=True))
        for members, step in bucket.steps:
            step.finish([parts[row]["direction"] for row in members])

    def _results(self, rows: list[int], wholes: list[Named]) -> list[Named]:
        """Process what this rank owns of a bucket, and return what is to be sent of each tensor; empties ``wholes``."""
        plan, groups = self._plan, self._batch.groups
        given, results = dict(zip(rows, wholes, strict=True)), dict[int, Named]()
        for members in self._owned(rows):
            sent = [given[row] for row in members]
            states = [{n: given[row].pop(_mark(n)) for n in plan.own_states[row]} for row in members]
            numbers = [self._scalars[row] for row in members]
            found = self._process.whole(sent, states, numbers, [groups[row] for row in members])
            for row, old, (result, new) in zip(members, states, found, strict=True):
                sent_back = {name: result[name] for name in plan.coming[row] if name in result}
                results[row] = sent_back | _marked(old | new)
        wholes.clear()
        return [results.get(row, {}) for row in rows]

    def _scatter(self, rows: list[int], results: list[Named]) -> list[Named]:
        """Send the results of what this rank owns of a bucket, and return this rank's parts of all of them."""
        plan = self._plan
        owners, cuts = [plan.owners[row] for row in rows], [plan.coming[row] for row in rows]
        return self._route.scatter(owners, cuts, results, self._batch.device)()

    def _finish(self, bucket: _OnTheWay, wholes: list[Named]) -> Tensor | None:
        """Process what this rank owns of a bucket, send the results, and store this rank's parts of all results."""
        rows, plan, process = bucket.rows, self._plan, self._process
        batch = self._batch.take(rows)
        parts = self._scatter(rows, self._results(rows, wholes))
        scalars = [self._scalars[row] for row in rows]
        new_states = [
            new | {n: part[_mark(n)] for n in plan.own_states[row]}
            for row, new, part in zip(rows, bucket.new_states, parts, strict=True)
        ]
        amounts = process.after(parts, batch.full_params, scalars, batch.groups)
        shapes = [param.shape for param in batch.params]
        deltas = (amount.reshape(shape) for amount, shape in zip(amounts, shapes, strict=True))
        decays = self._columns["decay"]
        if len(rows) < len(self._batch.params):
            decays = decays[upload(rows, batch.device)]
        if self._subtract is None:
            return finish(
                batch,
                map(lambda *step: step, bucket.grads, deltas, new_states),
                decays,
                scalars,
                self._skip,
                self._collect,
            )
        self._subtract(batch, deltas, decays, scalars)
        pairs = [(old[n], new[n]) for old, new in zip(batch.states, new_states, strict=True) for n in new]
        if pairs:
            torch._foreach_copy_([old for old, _ in pairs], [new for _, new in pairs])
        return None


def _state_cut(state: Tensor, dtype: torch.dtype, route: Any) -> Cut:
    split = split_of(state)
    is_shard = hasattr(state, "placements")
    return Cut(
        tuple(state.shape),
        dtype,
        None if split is None else split.dim,
        state if is_shard and isinstance(route, Meshes) else None,
    )


def _mark(name: str) -> str:
    """Return the name of a state among what travels, which differs from all others."""
    return f"state {name}"


def _marked(named: dict[str, Any]) -> dict[str, Any]:
    return {_mark(name): value for name, value in named.items()}
