"""Choice of how ranks share the work of a parameter: an owner of each sharded one, and of each copy where it pays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_optim.core.placements import PLAIN, is_sharded
from lightning_optim.core.shards import split_of
from lightning_optim.kernels.routes import Copies, Meshes, Route, Shards
from lightning_optim.kernels.rules import Rule, TensorRule
from lightning_optim.optim.admission import Ruled

Way = tuple[Any, ...]

WORTH = {"cpu": 2000.0, "cuda": 8000.0}
"""Operations for each byte of a result from which it takes less time to receive it than to compute it, by device type.

It is the quotient of the speeds of products and of a network. That of the CPU is measured (docs/benchmarks.md); that of
GPUs is 400 Tflop/s over 50 GB/s, which no measurement on several GPUs confirms yet. A square matrix of n columns has
15·n for five iterations in bfloat16, one four times as long 11·n.
"""

AT_LEAST = {"cpu": 3e8, "cuda": 1e11}
"""Operations of all matrices together from which the time of a message does not matter, by device type."""


def divided_params(optimizer: Ruled) -> frozenset[int]:
    """Return the ids of the parameters that ranks with copies of the model divide, see `FusedOptimizer.divide_over`.

    The result depends on shapes and settings only, so all ranks find the same.
    """
    group = optimizer.divide_over
    if not group or torch.distributed.get_world_size(group) < 2:
        return frozenset()
    found: dict[str, dict[int, float]] = {}
    for settings in optimizer.param_groups:
        rule = optimizer.rule_of(settings)
        if not isinstance(rule, TensorRule):
            continue
        for param in settings["params"]:
            if type(param) in PLAIN and (operations := pays(param, settings, rule)):
                found.setdefault(param.device.type, {})[id(param)] = operations
    return frozenset(key for device, costs in found.items() if sum(costs.values()) >= AT_LEAST[device] for key in costs)


def pays(param: Tensor, group: Mapping[str, Any], rule: TensorRule) -> float | None:
    """Return the operations that are spared if receiving the result takes less time than computing it, else None."""
    worth, divisible = WORTH.get(param.device.type), rule.divisible(param, group)
    if worth is None or divisible is None:
        return None
    operations, received = divisible
    return operations if operations >= worth * received else None


def way_of(param: Tensor, group: Mapping[str, Any], rule: Rule, divide_over: Any) -> Way | None:
    """Return how ranks share the update of ``param``, as a key; None if each rank updates what it has.

    Args:
        param: The parameter.
        group: Its parameter group.
        rule: The rule that updates it.
        divide_over: The process group that divides it if it is not sharded; None for no division.
    """
    if not isinstance(rule, TensorRule):
        return None
    if is_sharded(param):
        split = split_of(param)
        if rule.is_elementwise(param, group):
            return None
        if split is None:
            return "meshes", param.device_mesh  # type: ignore[attr-defined]
        return "shards", split.mesh, split.mesh_dim
    return None if divide_over is None else ("copies", divide_over)


def route_of(way: Way) -> Route:
    """Return the route of a key from `way_of`, which is made of process groups of the present."""
    kind, *arguments = way
    route: Route = {"shards": Shards, "copies": Copies, "meshes": Meshes}[kind](*arguments)
    return route
