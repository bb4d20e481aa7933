"""Sums over parameters that FSDP1 has flattened and sharded. Private parts of FSDP1 are used in this module only.

A rank holds some elements of some parameters, as plain tensors, and no gradient of the other parameters. (FSDP2,
`fully_shard`, uses DTensors; see `sharding`.) ``tests/distributed/test_fsdp1.py`` states what is relied on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.core.transfer import upload


class FlatShards:
    """The sharded parameters of FSDP1 with their process groups and unsharded sizes.

    Args:
        units: For each sharding unit of FSDP, its process group and the unsharded number of elements of its parameters.
    """

    def __init__(self, units: Sequence[tuple[Any, dict[Tensor, int]]]) -> None:
        self._sizes = {param: size for _, sizes in units for param, size in sizes.items()}
        self._groups: dict[Any, set[Tensor]] = {}
        for group, sizes in units:
            self._groups.setdefault(group, set()).update(sizes)

    @classmethod
    def of(cls, module: nn.Module) -> FlatShards | None:
        """Return the sharded parameters of ``module``; None if there are none."""
        units = list(_units(module))
        return cls(units) if units else None

    def __contains__(self, param: Tensor) -> bool:
        return param in self._sizes

    def numel(self, param: Tensor) -> int:
        """Return the number of elements of a parameter over all its shards."""
        return self._sizes.get(param, param.numel())

    def sum(self, values: Tensor, params: Sequence[Tensor]) -> Tensor:
        """Add per-tensor values of local shards over the ranks among which each tensor is sharded.

        Args:
            values: Values of this rank's shards, [tensors] or [tensors, columns].
            params: The parameters.

        Returns:
            A new tensor of the same shape.
        """
        return self._reduce(values, params, "SUM")

    def max(self, values: Tensor, params: Sequence[Tensor]) -> Tensor:
        """Compute the maximum of per-tensor values, else as `sum`; infinite if any rank has a NaN."""
        # Some communication libraries drop a NaN in MAX, but none drops an infinity.
        return self._reduce(values.nan_to_num(nan=torch.inf, posinf=torch.inf), params, "MAX")

    def _reduce(self, values: Tensor, params: Sequence[Tensor], operation: str) -> Tensor:
        values = values.clone()
        for group, cut in self._groups.items():
            indices = [i for i, param in enumerate(params) if param in cut]
            if indices:
                rows = upload(indices, values.device)
                part = values[rows]
                torch.distributed.all_reduce(part, getattr(torch.distributed.ReduceOp, operation), group)
                values[rows] = part
        return values


def _units(module: nn.Module) -> Iterator[tuple[Any, dict[Tensor, int]]]:
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    for unit in FullyShardedDataParallel.fsdp_modules(module):
        handle = unit._handle
        if handle is None or not handle.uses_sharded_strategy:
            continue
        flat: Any = handle.flat_param
        if handle._use_orig_params:
            sizes = {p: math.prod(shape) for p, shape in zip(flat._params, flat._shapes, strict=True)}
        else:
            sizes = {flat: math.prod(flat._unpadded_unsharded_size)}
        yield handle.process_group, sizes


def free_gathered_flat(model: nn.Module) -> None:
    """Free the whole weights of FSDP1's modules in ``model``, which a pass without gradients leaves in memory."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp._runtime_utils import _reshard

    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel) and module._handle is not None:
            _reshard(module, module._handle, True)
