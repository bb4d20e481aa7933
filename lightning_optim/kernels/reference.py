"""The reference backend in torch operations, one tensor after the other, on any device; the others are tested by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from lightning_optim.core.host import is_set, widest_dtype
from lightning_optim.core.sharding import sum_over_shards
from lightning_optim.core.stats import STEP_SUMS
from lightning_optim.core.transfer import upload
from lightning_optim.kernels import shared_work
from lightning_optim.kernels.base import Backend, Batch
from lightning_optim.kernels.batch_values import (
    grad_of,
    is_usual,
    moment_of,
    needs_no_scaling,
    pieces_of,
    rebound,
    rows_of,
    states_of_tensor_rule,
    whole_numel,
    widened,
)
from lightning_optim.kernels.finish import StepResult, finish
from lightning_optim.kernels.matrix_rule import StepOnCpu
from lightning_optim.kernels.parts import IN_PLACE, parts
from lightning_optim.kernels.pieces import Index, norm, take
from lightning_optim.kernels.rules import TensorRule, UpdateRule
from lightning_optim.kernels.scalars import commit, places_of, scalar_columns


class ReferenceBackend(Backend):
    """Backend that runs every rule, elementwise or tensor rule, in plain torch operations."""

    name = "reference"
    low_precision = True

    def why_not(self, device: torch.device) -> str | None:
        """Return None: this backend runs on every device."""
        return None

    def supports(self, batch: Batch) -> bool:
        """Return True: this backend runs every batch."""
        return True

    def measure(self, grads: Sequence[Tensor]) -> Tensor:
        """Implement `Backend`; returns shape [tensors]."""
        wide = widest_dtype(grads[0].device)
        if grads[0].device.type == "cpu":
            return torch.stack([norm(grad, wide) for grad in grads]).square()
        return torch.stack(torch._foreach_norm(list(grads), 2, dtype=wide)).square()

    def sums(self, batch: Batch, divisor: Tensor | None) -> dict[str, Tensor]:
        """Implement `Backend`."""
        assert isinstance(batch.rule, UpdateRule)
        return _rule_sums(batch, batch.rule, scalar_columns(batch, divisor))

    def begin(
        self, batch: Batch, *, divisor: Tensor | None, skip: Tensor | None, collect: bool
    ) -> Callable[[], Tensor | None]:
        """Implement `Backend`."""
        assert isinstance(batch.rule, TensorRule)
        start = shared_work.begin if shared_work.shares_now(batch) else begin_alone
        return start(batch, batch.rule.update, divisor=divisor, skip=skip, collect=collect)

    def apply(self, batch: Batch, *, divisor: Tensor | None, skip: Tensor | None, collect: bool) -> Tensor | None:
        """Implement `Backend`."""
        rule = batch.rule
        if batch.route is not None:
            return self.begin(batch, divisor=divisor, skip=skip, collect=collect)()
        if isinstance(rule, TensorRule):
            return apply_tensor_rule(batch, rule.update, divisor=divisor, skip=skip, collect=collect)
        if _skipped_on_host(batch, skip):
            return torch.full((len(batch.params), len(STEP_SUMS)), math.nan, device="cpu") if collect else None
        assert isinstance(rule, UpdateRule)
        columns = scalar_columns(batch, divisor)
        if rule.sums and not rule.shared:
            columns |= rule.rescale(columns, _rule_sums(batch, rule, columns), whole_numel(batch))
        scalars = rows_of(columns, batch.dtype)

        def run(rows: list[int], part: Batch, decays: Tensor) -> Tensor | None:
            numbers = [scalars[row] for row in rows]
            return finish(part, _steps(part, rule, numbers), decays, numbers, skip, collect)

        return _in_parts(batch, columns, run, skip, parts(batch))


def apply_tensor_rule(
    batch: Batch,
    update: Callable[..., Any],
    subtract: Callable[[Batch, Iterable[Tensor], Tensor, list[dict[str, Tensor]]], None] | None = None,
    *,
    divides: bool = False,
    in_place: Callable[[Batch, Mapping[str, Tensor], Sequence[int]], StepOnCpu | None] | None = None,
    divisor: Tensor | None,
    skip: Tensor | None,
    collect: bool,
) -> Tensor | None:
    """Run `Backend.apply` for a tensor rule.

    Args:
        batch: The tensors to update.
        update: The rule's `update`, or a replacement of the backend's.
        subtract: Faster function of a backend that subtracts deltas and the decay of form `shrink`, coefficients
            [tensors], from the parameters, and moves their averages by the scalars of each tensor; used in steps that
            need nothing else. None if the backend has none.
        divides: Whether ``update`` multiplies the gradients by the scalar `inverse_divisor`; see
            `TensorRule.divides_on_cpu`.
        in_place: The rule's `MatrixRule.on_cpu`, which is asked first; None to do without.
        divisor: As for `Backend.apply`.
        skip: As for `Backend.apply`.
        collect: As for `Backend.apply`.

    Returns:
        As `Backend.apply`.
    """
    if _skipped_on_host(batch, skip):
        return torch.full((len(batch.params), len(STEP_SUMS)), math.nan, device="cpu") if collect else None
    columns = scalar_columns(batch, divisor)
    as_given = needs_no_scaling(columns) if batch.device.type == "cpu" else [False] * len(batch.params)
    at_once = divides and _are_only_divided(batch, columns)
    one = torch.ones((), dtype=batch.dtype, device=batch.device)
    plain = batch.decay_form == "shrink" and not (batch.cautious or batch.low_precision)

    @cache
    def scalars() -> list[dict[str, Tensor]]:
        return rows_of(columns, batch.dtype)

    def run(rows: list[int], part: Batch, decays: Tensor) -> Tensor | None:
        numbers = [scalars()[row] for row in rows]
        grads = [
            part.grads[i].to(part.dtype) if at_once or as_given[row] else grad_of(part, i, numbers[i])
            for i, row in enumerate(rows)
        ]
        states = [states_of_tensor_rule(part, i) for i in range(len(rows))]
        given = [row | {"inverse_divisor": one} for row in numbers] if divides and not at_once else numbers
        deltas, new_states = update([widened(p) for p in part.params], grads, states, given, part.groups)
        if subtract is None or not plain or collect:
            # Not `zip`, which keeps its last tuple while it makes the next one.
            steps = map(lambda *step: step, grads, deltas, new_states)
            return finish(part, steps, decays, numbers, skip, collect)
        subtract(part, deltas, decays, numbers)
        pairs = [(state[n], new[n]) for state, new in zip(part.states, new_states, strict=True) for n in new]
        if pairs:
            torch._foreach_copy_([old for old, _ in pairs], [new for _, new in pairs])
        return None

    def run_in_place(rows: list[int], part: Batch, decays: Tensor) -> None:
        assert in_place is not None
        step = in_place(part, columns, rows)
        if step is not None:
            step.step()
            return
        for some in parts(part):
            run([rows[i] for i in some], part.take(some), decays[some])

    if in_place is not None and is_usual(batch, columns, collect):
        return _in_parts(batch, columns, run_in_place, skip, parts(batch, IN_PLACE))
    return _in_parts(batch, columns, run, skip, [list(range(len(batch.params)))] if at_once else parts(batch))


def begin_alone(batch: Batch, update: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], Tensor | None]:
    """Return `apply_tensor_rule` with its arguments, in the form of `shared_work.begin`."""
    return partial(apply_tensor_rule, batch, update, *args, **kwargs)


def _are_only_divided(batch: Batch, columns: dict[str, Tensor]) -> bool:
    """Return whether a tensor rule that divides the gradients itself may read them where they are, all in one call."""
    if batch.cautious or batch.decay_form == "rescale" or not batch.plain:
        return False
    dtypes = {batch.params[0].dtype, *(grad.dtype for grad in batch.grads)}
    usual = dtypes == {batch.dtype} and all(map(Tensor.is_contiguous, batch.grads))
    return usual and not any(columns["l2"].tolist())


def _in_parts(
    batch: Batch,
    columns: dict[str, Tensor],
    run: Callable[[list[int], Batch, Tensor], Tensor | None],
    skip: Tensor | None,
    cut: Iterable[list[int]],
) -> Tensor | None:
    """Update the batch part by part, storing each part before the next one begins.

    Args:
        batch: The tensors to update.
        columns: Scalars of all tensors, [tensors] each.
        run: Function that updates a part, given the indices of its tensors, the part, and its rows of `decay`.
        skip: As for `Backend.apply`.
        cut: Indices of the tensors of each part.

    Returns:
        The step sums, [tensors, columns of `STEP_SUMS`]; None if ``run`` returns none.
    """
    order: list[int] = []
    sums: list[Tensor] = []
    for rows in cut:
        whole = len(rows) == len(batch.params)
        decays = columns["decay"] if whole else columns["decay"][upload(rows, batch.device)]
        collected = run(rows, batch.take(rows), decays)
        if collected is not None:
            order += rows
            sums.append(collected)
    commit(batch, columns, skip)
    if len(sums) < 2:
        return sums[0] if sums else None
    in_order = torch.empty(len(order), len(STEP_SUMS), device=batch.device)
    in_order[upload(order, batch.device)] = torch.cat(sums)
    return in_order


def _skipped_on_host(batch: Batch, skip: Tensor | None) -> bool:
    return batch.device.type == "cpu" and is_set(skip)


def _rule_sums(batch: Batch, rule: UpdateRule, columns: dict[str, Tensor]) -> dict[str, Tensor]:
    function = rebound(type(rule).sums_update)
    names = rule.sums_scalars()
    scalars = rows_of(columns, batch.dtype)

    def terms(i: int, index: Index, states: list[Tensor]) -> Tensor:
        state = [widened(take(moment, index)) for moment in states]
        arguments = (scalars[i][name] for name in names)
        values = function(
            widened(take(batch.params[i], index)), grad_of(batch, i, scalars[i], index), *state, *arguments
        )
        return torch.stack([value.sum(dtype=widest_dtype(batch.device)) for value in values])

    rows = []
    for i, param in enumerate(batch.params):
        states = [moment_of(batch, i, n) if n in batch.quantized else batch.states[i][n] for n in rule.state]
        found = [terms(i, index, states) for index in pieces_of(batch, param)]
        rows.append(found[0] if len(found) == 1 else torch.stack(found).sum(0))
    sums = sum_over_shards(torch.stack(rows), batch.full_params)
    return dict(zip(rule.sums, sums.unbind(1), strict=True))


def _steps(batch: Batch, rule: UpdateRule, scalars: list[dict[str, Tensor]]) -> Iterator[StepResult]:
    function, names = rebound(type(rule).update), rule.update_scalars()
    places_of(names, list(scalars[0]))

    def step(i: int) -> StepResult:
        grad = grad_of(batch, i, scalars[i])
        state = [moment_of(batch, i, name) for name in rule.state]
        delta, *new = function(widened(batch.params[i]), grad, *state, *(scalars[i][name] for name in names))
        return grad, delta, dict(zip(rule.state, new, strict=True))

    return map(step, range(len(batch.params)))
