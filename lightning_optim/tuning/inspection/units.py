"""Tensors of a batch, and what a function does with the units of a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_optim.tuning.inspection.operations import argument

MOST_ROWS = 4096
"""Units of a weight, at most, that are compared with each other."""


def tensors_in(batch: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a batch with their places: ``"[0]"``, ``"image"``.

    Args:
        batch: Tensors in any nesting of lists, tuples, mappings and objects with attributes.
        path: The place of ``batch``.
        depth: How deep it lies.
    """
    if isinstance(batch, Tensor):
        yield path, batch
    elif depth < 6 and isinstance(batch, dict):
        for key, value in batch.items():
            yield from tensors_in(value, f"{path}.{key}" if path else str(key), depth + 1)
    elif depth < 6 and isinstance(batch, list | tuple):
        for index, value in enumerate(batch):
            yield from tensors_in(value, f"{path}[{index}]", depth + 1)
    elif depth < 6 and hasattr(batch, "__dict__") and not isinstance(batch, type):
        yield from tensors_in({k: v for k, v in vars(batch).items() if not k.startswith("__")}, path, depth + 1)
    elif depth < 6 and hasattr(batch, "data") and isinstance(batch.data, dict):
        yield from tensors_in(batch.data, path, depth + 1)


def cancels_mean(name: str, args: Any, kwargs: Any) -> bool:
    """Return whether a normalisation subtracts the mean of each channel, and so whatever bias came before it.

    Layer norm subtracts the mean over channels, which leaves what a bias adds to one more than to another; a group of
    several channels does the same.

    Args:
        name: Name of the function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """
    if name == "batch_norm":
        return bool(argument(args, kwargs, 5, "training", False))
    if name == "instance_norm":
        return bool(argument(args, kwargs, 5, "use_input_stats", True))
    if name == "group_norm":
        channels = args[0].shape[1] if args else kwargs["input"].shape[1]
        return bool(argument(args, kwargs, 1, "num_groups", 0) == channels)
    return False


def unit_axis(kind: str, name: str, output: Tensor, parent: int, inputs: list[Tensor]) -> int:
    """Return the dimension of the units of an output, given that of the first input, -1 if it is unknown."""
    if name.startswith("conv") or name in ("batch_norm", "instance_norm", "group_norm"):
        return 1 if output.ndim > 1 else 0
    if kind in ("linear", "product", "embedding", "recurrent", "attention") or name in ("layer_norm", "rms_norm"):
        return output.ndim - 1
    if inputs and inputs[0].shape == output.shape and 0 <= parent < output.ndim:
        return parent
    return 1 if output.ndim >= 4 else max(output.ndim - 1, 0)


def repeated_units(weight: Tensor, rows: int) -> int:
    """Number of units that are equal to an earlier one, other than zero; few inputs say nothing."""
    units = weight.detach().movedim(rows, 0).flatten(1)
    if not 2 <= len(units) <= MOST_ROWS or units.shape[1] < 2:
        return 0
    units = units[(units != 0).any(1)]
    repeated = len(units) - len(torch.unique(units, dim=0)) if len(units) else 0
    return repeated if units.shape[1] >= 4 or repeated >= len(units) / 2 else 0


def flat_tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of an argument, of lists and tuples in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from flat_tensors(each)
