"""The end of a step in torch operations: mask, decay, store and sum, piece by piece."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_optim.core.host import widest_dtype
from lightning_optim.core.sharding import sum_over_shards
from lightning_optim.core.stats import STEP_SUMS
from lightning_optim.kernels import averages, step_sums
from lightning_optim.kernels.base import Batch
from lightning_optim.kernels.batch_values import moment_of, pieces_of, rebound, whole_numel, widened
from lightning_optim.kernels.corrections import cut, weights_of
from lightning_optim.kernels.pieces import Index, pieces, take
from lightning_optim.kernels.quantization import quantize
from lightning_optim.kernels.rounding import kahan_pending, kahan_rest, round_stochastically
from lightning_optim.kernels.weight_decay import APPLY_DECAY, DECAY_TERM, INITIAL, decay_factor, norm_factor

StepResult = tuple[Tensor, Tensor, dict[str, Tensor]]
"""Gradient, delta, new state."""


def finish(
    batch: Batch,
    steps: Iterable[StepResult],
    decays: Tensor,
    scalars: list[dict[str, Tensor]],
    skip: Tensor | None,
    collect: bool,
) -> Tensor | None:
    """Mask, decay, store, average and sum, as in (5) to (8) of `Backend`."""
    on_host = batch.device.type == "cpu"
    if batch.cautious:
        steps = _cautious(batch, list(steps))
    if batch.decay_form == "rescale":
        steps = list(steps)
        moved = [_moved_sq(p, delta) for p, (_, delta, _) in zip(batch.params, steps, strict=True)]
        decays = norm_factor(decays, sum_over_shards(torch.stack(moved), batch.full_params), whole_numel(batch))
    decay = decays.to(batch.dtype)
    apply_decay = rebound(APPLY_DECAY[batch.decay_form])
    kept = averages.names_of(batch.averages) if batch.averages else ()
    move_average = rebound(averages.moved) if kept else averages.moved
    decay_term = rebound(DECAY_TERM.get(batch.decay_form, _param))

    def put(old: Tensor, new: Tensor) -> None:
        if new is not old:
            new = new.to(old.dtype)
            old.copy_(new if on_host or skip is None else torch.where(skip != 0, old, new))

    def write_piece(i: int, index: Index, first: int, delta: Tensor, moments: dict[str, Tensor]) -> Tensor | None:
        param, state = take(batch.params[i], index), batch.states[i]
        before = widened(param)
        initial = [widened(take(state[INITIAL], index))] if batch.decay_form == "toward_initial" else []
        terms = (before, take(delta, index), decay[i], *initial)
        after, rest = _stored(batch, i, index, first, before, apply_decay(*terms))
        row = None
        if collect:
            row = _sums(batch, i, index, after, moments, scalars[i], decay_term(*terms))
        if rest is not None:
            put(take(state["kahan_comp"], index), rest)
        put(param, after)
        for name, weight in kept:
            average = take(state[name], index)
            put(average, move_average(average, after.to(batch.dtype), scalars[i][weight]))
        return row

    def write(i: int, step: StepResult) -> Tensor | None:
        _, delta, new_state = step
        param, first, rows = batch.params[i], 0, []
        moments = _moments(batch, i, new_state) if collect else {}
        for index in pieces_of(batch, param):
            rows.append(write_piece(i, index, first, delta, moments))
            first += take(param, index).numel()
        for name, new in _stored_state(batch, i, new_state).items():
            put(batch.states[i][name], new)
        found = [row for row in rows if row is not None]
        return (found[0] if len(found) == 1 else torch.stack(found).sum(0)) if found else None

    # The variables of a loop would keep the temporaries of one tensor alive during the next, so this is a `map`.
    sums = list(map(write, range(len(batch.params)), steps))
    if len(sums) < len(batch.params):
        raise ValueError(
            f"Invalid update from {type(batch.rule).__name__}: it gave {len(sums)} amounts to subtract, but must give "
            f"one for each of {len(batch.params)} tensors."
        )
    if not collect:
        return None
    result = sum_over_shards(torch.stack([row for row in sums if row is not None]), batch.full_params)
    result[:, STEP_SUMS.index("decay_sq")] *= decay_factor(batch.decay_form, decays).square()
    result = result.float()
    return result if on_host or skip is None else result.masked_fill(skip != 0, math.nan)


def _moved_sq(param: Tensor, delta: Tensor) -> Tensor:
    """Return the square sum of a parameter after the update, without decay, shape []."""
    wide = widest_dtype(param.device)
    found = [
        (widened(take(param, index)) - take(delta, index)).square().sum(dtype=wide)
        for index in pieces(param.shape, param.device)
    ]
    return found[0] if len(found) == 1 else torch.stack(found).sum()


def _param(param: Any, delta: Any, decay: Any) -> Any:
    return param


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
    if batch.corrected:
        weights = weights_of(take(batch.params[i], index), take(batch.states[i]["kahan_comp"], index))
        pending = kahan_pending(weights - param, change)
        return cut(param + pending, batch.rounding_keys[i], 2 + len(batch.rule.state), first)
    if batch.kahan:
        pending = kahan_pending(widened(take(batch.states[i]["kahan_comp"], index)), change)
        after = (param + pending).to(dtype)
        return after, kahan_rest(pending, widened(after), param)
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
                codes, scales = quantize(
                    state[name],
                    batch.rule.compressible[name],
                    key,
                    slot,
                    batch.states[i][f"{name}_scale"].shape,
                )
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
        found["first_moment"] = moment_of(batch, i, name) if name in batch.quantized else batch.states[i][name]
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
