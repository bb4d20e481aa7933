"""The weight of a place: which of its inputs it is, and how it is before training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_optim.tuning.inspection import operations
from lightning_optim.tuning.inspection.nodes import Node, Nodes
from lightning_optim.tuning.inspection.operations import argument, fans
from lightning_optim.tuning.inspection.sites import Sums, Weight
from lightning_optim.tuning.inspection.units import repeated_units


def weight_in(
    kind: str, name: str, args: Any, kwargs: Any, inputs: Sequence[Tensor], parents: Sequence[Node]
) -> Tensor | None:
    """Return the weight among the arguments of a function; None where it has none.

    Args:
        kind: Kind of the function.
        name: Its name.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        inputs: The tensors among its arguments.
        parents: Where they come from.
    """
    if kind == "linear" or name in operations.LINEAR:
        tensor = argument(args, kwargs, 1, "weight")
    elif kind == "product" and len(inputs) >= 2:
        index = 2 if name in ("addmm", "baddbmm") else 1
        if index >= len(inputs) or parents[index].root().kind != "parameter":
            return None
        tensor = inputs[index]
    else:
        return None
    return tensor if isinstance(tensor, Tensor) and tensor.is_floating_point() else None


def measured(tensor: Tensor, name: str, args: Any, kwargs: Any, source: str | None, where: str) -> Weight | None:
    """Return what there is to know about a weight; None for a shape whose inputs cannot be counted.

    Args:
        tensor: The weight.
        name: Name of the function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        source: Name of the parameter that it is; None if it is computed.
        where: Name of the module.
    """
    # conv_transpose has output_padding before groups.
    groups = argument(args, kwargs, 7 if name.startswith("conv_t") else 6, "groups", 1)
    groups = groups if isinstance(groups, int) else 1
    found = fans(name, tensor, groups if name != "linear" else 1, argument(args, kwargs, 3, "stride", 1))
    if found is None:
        return None
    rms = Sums()
    rms.add(tensor)
    depthwise = name.startswith("conv") and tensor.shape[1] == 1 and groups > 1
    return Weight(
        source or f"{where}.weight",
        tuple(tensor.shape),
        found,
        rms.rms,
        tensor.requires_grad,
        source is not None,
        0 if depthwise else repeated_units(tensor, found.rows),
        depthwise,
    )


def bias_in(name: str, args: Any, kwargs: Any, nodes: Nodes) -> str | None:
    """Return the name of the trainable bias of a function; None where it has none."""
    bias = argument(args, kwargs, 2, "bias") if name in operations.LINEAR else None
    return nodes.names.get(id(bias)) if isinstance(bias, Tensor) and bias.requires_grad else None
