"""Choice of how ranks share the work of a parameter: an owner of each sharded one, and of each copy where it pays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_optim.core.placements import is_sharded
from lightning_optim.core.shards import split_of
from lightning_optim.kernels.routes import Copies, Meshes, Route, Shards
from lightning_optim.kernels.rules import MatrixRule, Rule, TensorRule

Way = tuple[Any, ...]

WORTH = {"cpu": 20.0, "cuda": 8000.0}
"""Operations per byte of a result from which it is quicker to receive it from another rank than to compute it, by
device type; see docs/benchmarks.md. `whole` of a matrix has about ten times as many as its smaller side is long."""


def way_of(param: Tensor, group: Mapping[str, Any], rule: Rule, divide_over: Any) -> Way | None:
    """Return how ranks share the update of ``param``, as a key; None if each rank updates what it has.

    Args:
        param: The parameter.
        group: Its parameter group.
        rule: The rule that updates it.
        divide_over: `FusedOptimizer.divide_over`.
    """
    if not isinstance(rule, TensorRule) or rule.is_elementwise(param, group):
        return None
    if is_sharded(param):
        split = split_of(param)
        if split is None:
            return "meshes", param.device_mesh  # type: ignore[attr-defined]
        return "shards", split.mesh, split.mesh_dim
    if not divide_over or not isinstance(rule, MatrixRule) or hasattr(param, "device_mesh"):
        return None
    if torch.distributed.get_world_size(divide_over) < 2 or not pays(param, group, rule):
        return None
    return "copies", divide_over


def pays(param: Tensor, group: Mapping[str, Any], rule: MatrixRule) -> bool:
    """Return whether receiving the result for ``param`` takes less time than computing it."""
    worth = WORTH.get(param.device.type)
    return worth is not None and rule.cost(param, group) >= worth * param.numel() * rule.sent_dtype.itemsize


def route_of(way: Way) -> Route:
    """Return the route of a key from `way_of`, which is made of process groups of the present."""
    kind, *arguments = way
    route: Route = {"shards": Shards, "copies": Copies, "meshes": Meshes}[kind](*arguments)
    return route
