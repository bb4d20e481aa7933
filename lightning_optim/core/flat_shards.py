"""Sums over whole parameters that torch's first FSDP has flattened and split. Its private parts are used only here.

A rank holds some elements of some parameters, as plain tensors, and no gradient at all of the others. (The second one,
`fully_shard`, has DTensors; see `sharding`.) ``tests/distributed/test_fsdp1.py`` says what is relied on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.core.transfer import upload


class FlatShards:
    """Which parameters are cut, over which ranks, and how large they are as a whole.

    Args:
        units: For each unit of FSDP that cuts, its process group, and the whole size of its parameters.
    """

    def __init__(self, units: Sequence[tuple[Any, dict[Tensor, int]]]) -> None:
        self._sizes = {param: size for _, sizes in units for param, size in sizes.items()}
        self._groups: dict[Any, set[Tensor]] = {}
        for group, sizes in units:
            self._groups.setdefault(group, set()).update(sizes)

    @classmethod
    def of(cls, module: nn.Module) -> FlatShards | None:
        """The shards of ``module``; None if there are none."""
        units = list(_units(module))
        return cls(units) if units else None

    def __contains__(self, param: Tensor) -> bool:
        return param in self._sizes

    def numel(self, param: Tensor) -> int:
        """Number of elements of a parameter as a whole."""
        return self._sizes.get(param, param.numel())

    def sum(self, values: Tensor, params: Sequence[Tensor]) -> Tensor:
        """``values`` ([tensors] or [tensors, columns]) of this rank's parts, added over the ranks that share each."""
        return self._reduce(values, params, "SUM")

    def max(self, values: Tensor, params: Sequence[Tensor]) -> Tensor:
        """The largest of ``values``; infinite if any rank has a NaN."""
        # MAX may drop a NaN, depending on the library that communicates, but none drops an infinity.
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
