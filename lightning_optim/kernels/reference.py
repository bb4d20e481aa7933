"""The reference backend in torch operations, one tensor after the other, on any device; the others are tested by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_optim.core.host import is_set, widest_dtype
from lightning_optim.core.sharding import sum_over_shards
from lightning_optim.core.stats import STEP_SUMS
from lightning_optim.core.transfer import upload
from lightning_optim.kernels import step_sums
from lightning_optim.kernels.base import Backend, Batch
from lightning_optim.kernels.parts import parts
from lightning_optim.kernels.pieces import Index, norm, pieces, take
from lightning_optim.kernels.quantization import dequantize, quantize
from lightning_optim.kernels.rounding import kahan_pending, kahan_rest, round_stochastically
from lightning_optim.kernels.rules import TensorRule, UpdateRule, rebind
from lightning_optim.kernels.scalars import commit, scalar_columns
from lightning_optim.kernels.weight_decay import APPLY_DECAY, DECAY_TERM, INITIAL, decay_factor, norm_factor

NAMED: dict[str, Callable[..., Any]] = {
    "sqrt": torch.sqrt,
    "absolute": torch.abs,
    "sign": torch.sign,
    "where": torch.where,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
}

StepResult = tuple[Tensor, Tensor, dict[str, Tensor]]  # gradient, delta, new state


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

    def apply(self, batch: Batch, *, divisor: Tensor | None, skip: Tensor | None, collect: bool) -> Tensor | None:
        """Implement `Backend`."""
        rule = batch.rule
        if isinstance(rule, TensorRule):
            return apply_tensor_rule(batch, rule.update, divisor=divisor, skip=skip, collect=collect)
        if _skipped_on_host(batch, skip):
            return torch.full((len(batch.params), len(STEP_SUMS)), math.nan, device="cpu") if collect else None
        assert isinstance(rule, UpdateRule)
        columns = scalar_columns(batch, divisor)
        if rule.sums and not rule.shared:
            columns |= rule.rescale(columns, _rule_sums(batch, rule, columns), whole_numel(batch))
        scalars = _rows(columns, batch.dtype)

        def run(rows: list[int], part: Batch, decays: Tensor) -> Tensor | None:
            numbers = [scalars[row] for row in rows]
            return _finish(part, _steps(part, rule, numbers), decays, numbers, skip, collect)

        return _in_parts(batch, columns, run, skip)


def apply_tensor_rule(
    batch: Batch,
    update: Callable[..., Any],
    subtract: Callable[[Batch, Iterable[Tensor], Tensor], None] | None = None,
    *,
    divides: bool = False,
    divisor: Tensor | None,
    skip: Tensor | None,
    collect: bool,
) -> Tensor | None:
    """Run `Backend.apply` for a tensor rule.

    Args:
        batch: The tensors to update.
        update: The rule's `update`, or a replacement of the backend's.
        subtract: Faster function of a backend that subtracts deltas and the decay of form `shrink`, coefficients
            [tensors], from the parameters; used in steps that need nothing else. None if the backend has none.
        divides: Whether ``update`` multiplies the gradients by the scalar `inverse_divisor`; see
            `TensorRule.divides_on_cpu`.
        divisor: As for `Backend.apply`.
        skip: As for `Backend.apply`.
        collect: As for `Backend.apply`.

    Returns:
        As `Backend.apply`.
    """
    if _skipped_on_host(batch, skip):
        return torch.full((len(batch.params), len(STEP_SUMS)), math.nan, device="cpu") if collect else None
    columns = scalar_columns(batch, divisor)
    scalars = _rows(columns, batch.dtype)
    as_given = _needs_no_scaling(columns) if batch.device.type == "cpu" else [False] * len(batch.params)
    at_once = divides and _are_only_divided(batch, columns)
    one = torch.ones((), dtype=batch.dtype, device=batch.device)
    plain = batch.decay_form == "shrink" and not (batch.cautious or batch.low_precision)

    def run(rows: list[int], part: Batch, decays: Tensor) -> Tensor | None:
        numbers = [scalars[row] for row in rows]
        grads = [
            part.grads[i].to(part.dtype) if at_once or as_given[row] else _grad(part, i, scalars[row])
            for i, row in enumerate(rows)
        ]
        states = [
            {n: _wide(tensor) for n, tensor in state.items() if n not in ("kahan_comp", INITIAL)}
            for state in part.states
        ]
        given = [row | {"inverse_divisor": one} for row in numbers] if divides and not at_once else numbers
        deltas, new_states = update([_wide(p) for p in part.params], grads, states, given, part.groups)
        if subtract is None or not plain or collect:
            # Not `zip`, which keeps its last tuple while it makes the next one.
            steps = map(lambda *step: step, grads, deltas, new_states)
            return _finish(part, steps, decays, numbers, skip, collect)
        subtract(part, deltas, decays)
        pairs = [(state[n], new[n]) for state, new in zip(part.states, new_states, strict=True) for n in new]
        if pairs:
            torch._foreach_copy_([old for old, _ in pairs], [new for _, new in pairs])
        return None

    return _in_parts(batch, columns, run, skip, at_once=at_once)


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
    at_once: bool = False,
) -> Tensor | None:
    """Update the batch part by part, storing each part before the next one begins.

    Args:
        batch: The tensors to update.
        columns: Scalars of all tensors, [tensors] each.
        run: Function that updates a part, given the indices of its tensors, the part, and its rows of `decay`.
        skip: As for `Backend.apply`.
        at_once: Whether all tensors are one part, because ``run`` needs little memory for many.

    Returns:
        The step sums, [tensors, columns of `STEP_SUMS`]; None if ``run`` returns none.
    """
    order: list[int] = []
    sums: list[Tensor] = []
    for rows in [list(range(len(batch.params)))] if at_once else parts(batch):
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


def _finish(
    batch: Batch,
    steps: Iterable[StepResult],
    decays: Tensor,
    scalars: list[dict[str, Tensor]],
    skip: Tensor | None,
    collect: bool,
) -> Tensor | None:
    """Mask, decay, store and sum, as in (5) to (8) of `Backend`."""
    on_host = batch.device.type == "cpu"
    if batch.cautious:
        steps = _cautious(batch, list(steps))
    if batch.decay_form == "rescale":
        steps = list(steps)
        moved = [_moved_sq(p, delta) for p, (_, delta, _) in zip(batch.params, steps, strict=True)]
        decays = norm_factor(decays, sum_over_shards(torch.stack(moved), batch.full_params), whole_numel(batch))
    decay = decays.to(batch.dtype)
    apply_decay = rebound(APPLY_DECAY[batch.decay_form])
    decay_term = rebound(DECAY_TERM.get(batch.decay_form, _param))

    def put(old: Tensor, new: Tensor) -> None:
        if new is not old:
            new = new.to(old.dtype)
            old.copy_(new if on_host or skip is None else torch.where(skip != 0, old, new))

    def write_piece(i: int, index: Index, first: int, delta: Tensor, moments: dict[str, Tensor]) -> Tensor | None:
        param, state = take(batch.params[i], index), batch.states[i]
        before = _wide(param)
        initial = [_wide(take(state[INITIAL], index))] if batch.decay_form == "toward_initial" else []
        terms = (before, take(delta, index), decay[i], *initial)
        after, rest = _stored(batch, i, index, first, before, apply_decay(*terms))
        row = None
        if collect:
            row = _sums(batch, i, index, after, moments, scalars[i], decay_term(*terms))
        if rest is not None:
            put(take(state["kahan_comp"], index), rest)
        put(param, after)
        return row

    def write(i: int, step: StepResult) -> Tensor | None:
        _, delta, new_state = step
        param, first, rows = batch.params[i], 0, []
        moments = _moments(batch, i, new_state) if collect else {}
        for index in _pieces(batch, param):
            rows.append(write_piece(i, index, first, delta, moments))
            first += take(param, index).numel()
        for name, new in _stored_state(batch, i, new_state).items():
            put(batch.states[i][name], new)
        found = [row for row in rows if row is not None]
        return (found[0] if len(found) == 1 else torch.stack(found).sum(0)) if found else None

    # The variables of a loop would keep the temporaries of one tensor alive during the next, so this is a `map`.
    sums = [row for row in map(write, range(len(batch.params)), steps) if row is not None]
    if not collect:
        return None
    result = sum_over_shards(torch.stack(sums), batch.full_params)
    result[:, STEP_SUMS.index("decay_sq")] *= decay_factor(batch.decay_form, decays).square()
    result = result.float()
    return result if on_host or skip is None else result.masked_fill(skip != 0, math.nan)


def _moved_sq(param: Tensor, delta: Tensor) -> Tensor:
    """Return the square sum of a parameter after the update, without decay, shape []."""
    wide = widest_dtype(param.device)
    found = [
        (_wide(take(param, index)) - take(delta, index)).square().sum(dtype=wide)
        for index in pieces(param.shape, param.device)
    ]
    return found[0] if len(found) == 1 else torch.stack(found).sum()


def _param(param: Any, delta: Any, decay: Any) -> Any:
    return param


def _skipped_on_host(batch: Batch, skip: Tensor | None) -> bool:
    return batch.device.type == "cpu" and is_set(skip)


def _needs_no_scaling(columns: dict[str, Tensor]) -> list[bool]:
    """Return for each gradient, on the CPU, whether it is used unscaled, which saves a pass over memory."""
    factors, l2 = columns["inverse_divisor"].tolist(), columns["l2"].tolist()
    return [factor == 1 and weight == 0 for factor, weight in zip(factors, l2, strict=True)]


def _rule_sums(batch: Batch, rule: UpdateRule, columns: dict[str, Tensor]) -> dict[str, Tensor]:
    function = rebound(type(rule).sums_update)
    names = rule.sums_scalars()
    scalars = _rows(columns, batch.dtype)

    def terms(i: int, index: Index, states: list[Tensor]) -> Tensor:
        state = [_wide(take(moment, index)) for moment in states]
        arguments = (scalars[i][name] for name in names)
        values = function(_wide(take(batch.params[i], index)), _grad(batch, i, scalars[i], index), *state, *arguments)
        return torch.stack([value.sum(dtype=widest_dtype(batch.device)) for value in values])

    rows = []
    for i, param in enumerate(batch.params):
        states = [_moment(batch, i, n) if n in batch.quantized else batch.states[i][n] for n in rule.state]
        found = [terms(i, index, states) for index in _pieces(batch, param)]
        rows.append(found[0] if len(found) == 1 else torch.stack(found).sum(0))
    sums = sum_over_shards(torch.stack(rows), batch.full_params)
    return dict(zip(rule.sums, sums.unbind(1), strict=True))


@cache
def rebound(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` rebound to operations on torch tensors."""
    return rebind(function, NAMED)  # type: ignore[no-any-return]


def whole_numel(batch: Batch) -> Tensor:
    """Return the number of elements of each tensor over all its shards, [tensors], float64."""
    return upload([t.numel() for t in batch.full_params], batch.device, widest_dtype(batch.device))


def _pieces(batch: Batch, tensor: Tensor) -> Iterable[Index]:
    """Return the pieces of a tensor of ``batch``; one for tensors that are more than memory, which may not be cut."""
    return pieces(tensor.shape, batch.device) if batch.plain else [()]


def _rows(columns: dict[str, Tensor], dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Return the scalars of each tensor as 0-d tensors of ``dtype``."""
    values = zip(*(column.to(dtype).unbind() for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in values]


def _wide(tensor: Tensor) -> Tensor:
    """Convert to the dtype of the arithmetic; integers (indices, counters of a tensor rule) are not converted."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _moment(batch: Batch, i: int, name: str) -> Tensor:
    """Return a state in the dtype of the arithmetic; 8-bit codes are dequantized."""
    state = batch.states[i]
    if name in batch.quantized:
        return dequantize(state[name], state[f"{name}_scale"], batch.rule.compressible[name])
    return _wide(state[name])


def _grad(batch: Batch, i: int, scalars: dict[str, Tensor], index: Index = ()) -> Tensor:
    """Return a gradient, or a piece of it, as the rule sees it: divided, negated for `maximize`, with the L2 term."""
    scaled, param = (
        take(batch.grads[i], index).to(batch.dtype) * scalars["inverse_divisor"],
        take(batch.params[i], index),
    )
    for part in _pieces(batch, param):
        take(scaled, part).add_(scalars["l2"] * _wide(take(param, part)))
    return scaled


def _steps(batch: Batch, rule: UpdateRule, scalars: list[dict[str, Tensor]]) -> Iterator[StepResult]:
    function, names = rebound(type(rule).update), rule.update_scalars()

    def step(i: int) -> StepResult:
        grad = _grad(batch, i, scalars[i])
        state = [_moment(batch, i, name) for name in rule.state]
        delta, *new = function(_wide(batch.params[i]), grad, *state, *(scalars[i][name] for name in names))
        return grad, delta, dict(zip(rule.state, new, strict=True))

    return map(step, range(len(batch.params)))


def _stored(
    batch: Batch, i: int, index: Index, first: int, param: Tensor, change: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return one piece of the new parameter in its storage dtype, and of its compensation, if it has one.

    Args:
        batch: The batch.
        i: Index of the tensor.
        index: Index of the piece.
        first: Number of elements before the piece.
        param: The piece of the parameter before the step.
        change: Amount to subtract from it.
    """
    dtype = batch.params[i].dtype
    if batch.kahan:
        pending = kahan_pending(_wide(take(batch.states[i]["kahan_comp"], index)), change)
        after = (param + pending).to(dtype)
        return after, kahan_rest(pending, _wide(after), param)
    if "param" in batch.stochastic:
        return round_stochastically(param - change, batch.rounding_keys[i], 0, first), None
    return (param - change).to(dtype), None


def _stored_state(batch: Batch, i: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the new state of one tensor, stochastically rounded where it is stored so."""
    quantized = batch.quantized
    for name in batch.stochastic:
        if name in state:
            key, slot = batch.rounding_keys[i], 2 + batch.rule.state.index(name)
            if name in quantized:
                codes, scales = quantize(state[name], batch.rule.compressible[name], key, slot)
                state = state | {name: codes, f"{name}_scale": scales}
            else:
                state = state | {name: round_stochastically(state[name], key, slot)}
    return state


def _cautious(batch: Batch, steps: list[StepResult]) -> Iterator[StepResult]:
    """Mask the components of updates that point against the gradient (Liang et al., https://arxiv.org/abs/2411.16085).

    The rest is rescaled to keep the mean step length, by a factor of at most 1000, as in the authors' code.

    Yields:
        Gradient, masked update and new state of each tensor, in order.
    """
    masks = [(delta * grad > 0).to(delta.dtype) for grad, delta, _ in steps]
    counts = sum_over_shards(torch.stack([mask.sum() for mask in masks]), batch.full_params)
    numel = whole_numel(batch).to(counts.dtype)
    scale = numel / counts.maximum(numel * 1e-3)
    for i, (grad, delta, state) in enumerate(steps):
        yield grad, delta * masks[i] * scale[i], state


def _moments(batch: Batch, i: int, new_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the moments that the step sums read: the first before the step, the second after it."""
    rule, found = batch.rule, {}
    if rule.first_moment in new_state:
        name = rule.first_moment
        found["first_moment"] = _moment(batch, i, name) if name in batch.quantized else batch.states[i][name]
    if rule.second_moment in new_state:
        found["second_moment"] = new_state[rule.second_moment]
    return found


def _sums(
    batch: Batch,
    i: int,
    index: Index,
    after: Tensor,
    moments: dict[str, Tensor],
    scalars: dict[str, Tensor],
    decay_term: Tensor,
) -> Tensor:
    """Compute one row of step sums over a piece of a tensor.

    Args:
        batch: The batch, before this piece is stored.
        i: Index of the tensor.
        index: Index of the piece.
        after: The piece of the new parameter.
        moments: The result of `_moments`.
        scalars: Scalars of the tensor, shape [] each.
        decay_term: The piece of the decay term.

    Returns:
        Shape [columns], float64 where the device supports it; NaN where a sum is undefined.
    """
    rule, dtype, device = batch.rule, widest_dtype(batch.device), batch.device
    constants = {"zero": 0.0, "one": 1.0, "tiny": step_sums.TINY}
    known = {name: torch.full((), value, dtype=dtype, device=device) for name, value in constants.items()}
    known |= {name: scalars[name] for name in ("eps", "bias_correction2_sqrt")}
    grad = take(batch.grads[i], index).to(batch.dtype) * scalars["inverse_divisor"]
    known |= {"param": take(batch.params[i], index).to(dtype), "after": after.to(dtype), "grad": grad.to(dtype)}
    known["decay_term"] = decay_term.to(dtype)
    known |= {name: take(moment, index).to(dtype) for name, moment in moments.items()}
    row = torch.full((len(STEP_SUMS),), math.nan, dtype=dtype, device=device)
    for name in step_sums.collected(rule):
        names = step_sums.arguments(name)
        if known.keys() >= set(names):
            left, right = rebound(step_sums.FACTORS[name])(*(known[n] for n in names))
            row[STEP_SUMS.index(name)] = (left * right).sum()
    return row
