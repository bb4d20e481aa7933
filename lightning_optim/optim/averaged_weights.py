"""Use of the averages of weights that `ema` keeps: exchanged with the parameters in place, or as a state dict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim.core.sharding import local
from lightning_optim.core.wrappers import unwrap_optimizer
from lightning_optim.kernels.averages import kept_by
from lightning_optim.optim.base import FusedOptimizer
from lightning_optim.optim.exchange import exchange, is_exact, undo

KEY = "averaged"
"""Key of a group: the number of the average that the parameters are at, and their dtypes (`0 bfloat16`); empty while
they are trained. It is one text, because distributed checkpoints cannot load a list where there was none."""


def has_averages(optimizer: Optimizer) -> bool:
    """Return whether an optimizer keeps averages of the weights."""
    optimizer = unwrap_optimizer(optimizer)  # Those of other packages may mean something else by the key.
    return isinstance(optimizer, FusedOptimizer) and any(group.get("ema") for group in optimizer.param_groups)


def average_of(optimizer: Optimizer) -> int | None:
    """Return the number of the average that the parameters of an optimizer are at; None while they are trained."""
    return next((at for group in unwrap_optimizer(optimizer).param_groups if (at := _at(group)) is not None), None)


@torch.no_grad()
def swap_in_average(optimizer: Optimizer, which: int = 0) -> None:
    """Exchange the parameters of an optimizer with an average of them, in place and without further memory.

    Until `swap_out_average`, which restores both bit for bit, the weights of training are in the state of the
    optimizer, so that a checkpoint in between is complete. Parameters that have not been updated yet are their own
    average.

    Args:
        optimizer: An optimizer of this package with averages; see `ema` of `SharedOptions`.
        which: Number of the average, in the order of the option.

    Raises:
        ValueError: There is no such average, or parameters are float16, which cannot be exchanged bit for bit.

    Example:
        >>> from lightning_optim.optim import SGD
        >>> weight = nn.Parameter(torch.zeros(1))
        >>> optimizer = SGD([weight], lr=1.0, ema=0.9)
        >>> for _ in range(2):
        ...     weight.grad = torch.ones(1)
        ...     optimizer.step()
        >>> swap_in_average(optimizer)
        >>> weight.data
        tensor([-1.7045])
        >>> swap_out_average(optimizer)
        >>> weight.data
        tensor([-2.])
    """
    optimizer = unwrap_optimizer(optimizer)
    _check(optimizer, which)
    if average_of(optimizer) == which:
        return
    swap_out_average(optimizer)
    for group in optimizer.param_groups:
        if not group.get("ema"):
            continue
        pairs = list(_pairs(optimizer, group, which))
        for param, average in pairs:
            if not is_exact(param.dtype, average.dtype):
                raise ValueError(
                    f"A parameter of {str(param.dtype).removeprefix('torch.')} cannot be exchanged with its average in "
                    "place and back bit for bit. Needed are float32, bfloat16 or float64 parameters; the average as "
                    "weights for use is lightning_optim.optim.ema_state_dict(model, optimizer)."
                )
    for group in optimizer.param_groups:
        if group.get("ema"):
            pairs = list(_pairs(optimizer, group, which))
            for param, average in pairs:
                exchange(local(param), local(average))
            _note_change(pairs)
            dtypes = sorted({str(param.dtype).removeprefix("torch.") for param, _ in pairs})
            group[KEY] = " ".join([str(which), *dtypes])


@torch.no_grad()
def swap_out_average(optimizer: Optimizer) -> None:
    """Restore the weights of training after `swap_in_average`, bit for bit; nothing happens where they are in place.

    Args:
        optimizer: The optimizer.

    Raises:
        ValueError: The parameters have another dtype than when the average was swapped in.
    """
    optimizer = unwrap_optimizer(optimizer)
    swapped = [(group, at) for group in optimizer.param_groups if (at := _at(group)) is not None]
    for group, which in swapped:
        dtypes = group[KEY].split()[1:]
        for param, _ in _pairs(optimizer, group, which):
            if (dtype := str(param.dtype).removeprefix("torch.")) not in dtypes:
                raise ValueError(
                    f"The weights of training were set aside from {' and '.join(dtypes)} parameters, and cannot be "
                    f"restored to a {dtype} parameter. Load the checkpoint into a model of that dtype."
                )
    for group, which in swapped:
        pairs = list(_pairs(optimizer, group, which))
        for param, average in pairs:
            undo(local(param), local(average))
        _note_change(pairs)
        group[KEY] = ""


@contextmanager
def averaged_weights(optimizer: Optimizer | Iterable[Optimizer], which: int = 0) -> Iterator[None]:
    """Have the parameters at an average of the weights within a block, for validation or saving in a plain loop.

    Args:
        optimizer: The optimizer, or several.
        which: As for `swap_in_average`.

    Raises:
        ValueError: As for `swap_in_average`.
    """
    several = list(_several(optimizer))
    before = [average_of(one) for one in several]
    try:
        for one in several:
            swap_in_average(one, which)
        yield
    finally:
        for one, at in zip(several, before, strict=True):
            swap_out_average(one) if at is None else swap_in_average(one, at)


def ema_state_dict(model: nn.Module, optimizer: Optimizer | Iterable[Optimizer], which: int = 0) -> dict[str, Any]:
    """Return a copy of a model's state dict with an average in place of each parameter, in the parameter's dtype.

    Parameters that no optimizer updates, and buffers, are as they are in the model. Running statistics of batch norm
    belong to the weights of training: `torch.optim.swa_utils.update_bn` computes those of the average.

    Args:
        model: The model.
        optimizer: Its optimizer, or several, of this package with averages.
        which: Number of the average, in the order of the option `ema`.

    Returns:
        The state dict; tensors are DTensors where the parameters are.

    Raises:
        ValueError: There is no such average, or none of a parameter of the model.

    Example:
        >>> from lightning_optim.optim import AdamW
        >>> model = nn.Linear(2, 1)
        >>> optimizer = AdamW(model.parameters(), ema=[0.999, "power 0.05"])
        >>> model(torch.ones(2)).backward()
        >>> optimizer.step()
        >>> sorted(ema_state_dict(model, optimizer, which=1))
        ['bias', 'weight']
    """
    averages: dict[int, Tensor] = {}
    for one in map(unwrap_optimizer, _several(optimizer)):
        _check(one, which)
        for group in one.param_groups:
            in_place = _at(group) == which
            pairs = _pairs(one, group, which)
            averages |= {id(param): param if in_place else average for param, average in pairs}
    found: dict[str, Any] = dict(model.state_dict(keep_vars=True))
    if averages and not averages.keys() & set(map(id, found.values())):
        raise ValueError("The optimizer has averages of other parameters than those of this model.")
    for name, value in found.items():
        if isinstance(value, Tensor):
            average = averages.get(id(value), value)
            found[name] = average.detach().to(value.dtype, copy=True)
    return found


def _at(group: Mapping[str, Any]) -> int | None:
    """Return the number of the average that the parameters of a group are at; None while they are trained."""
    at = group.get(KEY)
    return int(at.split()[0]) if at else None


def _several(optimizer: Optimizer | Iterable[Optimizer]) -> Iterable[Optimizer]:
    return [optimizer] if hasattr(optimizer, "param_groups") else optimizer  # type: ignore[list-item]


def _check(optimizer: Optimizer, which: int) -> None:
    owner, kept = type(optimizer).__name__, 0
    if has_averages(optimizer):
        kept = max(len(kept_by(group)) for group in optimizer.param_groups)
    if not kept:
        raise ValueError(
            f"{owner} keeps no averages of the weights. Give an optimizer of lightning_optim.optim the option ema, "
            "such as ema=0.999."
        )
    if not (isinstance(which, int) and 0 <= which < kept):
        raise ValueError(f"Invalid which={which!r}: must be a whole number from 0 to {kept - 1}; {owner} keeps {kept}.")


def _pairs(optimizer: Optimizer, group: Mapping[str, Any], which: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each parameter of a group with its average."""
    for param in group["params"]:
        average = optimizer.state.get(param, {}).get(f"ema_{which}")
        if average is not None:
            yield param, average


def _note_change(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Tell autograd that the tensors have changed; local shards have counters of their own."""
    torch.autograd.graph.increment_version([tensor for pair in pairs for tensor in pair])
