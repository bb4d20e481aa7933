"""8-bit state of DTensors: codes with the placements of the parameter, and scales that are sharded like its rows.

Blocks do not cross rows (`quantization.scale_shape`), so a rank has the scales of its own rows, and another number of
ranks can load them. This takes rows: a vector, or a matrix of very short rows, keeps 32-bit state on ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_optim.core.placements import distributed, is_split
from lightning_optim.core.sharding import local
from lightning_optim.kernels.quantization import BLOCK, blocks, dequantize, filled, row_size, scale_shape


def has_rows(shape: torch.Size) -> bool:
    """Return whether a tensor of ``shape`` has rows to which blocks are confined."""
    return len(scale_shape(shape)) > 1


def why_not(param: Tensor) -> str | None:
    """Return the reason why blocks of a DTensor would be cut by its sharding, as a clause; None if they are not.

    Dimensions before a row may be sharded in any way. The last one may be if it is a row, and each rank has whole
    blocks of it.

    Args:
        param: A parameter.
    """
    rows = len(scale_shape(param.shape)) - 1
    if not rows:
        return None
    mesh: Any = getattr(param, "device_mesh", None)
    cut = [(dim, p.dim) for dim, p in enumerate(getattr(param, "placements", ())) if is_split(p) and p.dim >= rows]
    if not cut:
        return None
    ((mesh_dim, dim), *others) = cut
    parts = mesh.size(mesh_dim)
    if not others and dim == rows == param.dim() - 1 and param.shape[dim] % (parts * BLOCK) == 0:
        return None
    return (
        f"its shape {tuple(param.shape)} is sharded along dimension {dim} over {parts} ranks, which would cut blocks "
        f"of {BLOCK} values"
    )


def new_codes(param: Tensor, value: float, signed: bool) -> tuple[Tensor, Tensor]:
    """Return codes and scales of a state of one value; DTensors if ``param`` is one.

    Args:
        param: The parameter.
        value: The value of all elements, at least 0.
        signed: Whether the codes are signed.
    """
    codes, scales = filled(local(param), value, signed)
    if not hasattr(param, "device_mesh"):
        return codes, scales
    return _as_shard_of(param, codes, param.shape), _as_shard_of(param, scales, scale_shape(param.shape))


def values_of(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """Return the float32 values of codes and scales; a DTensor if these are DTensors."""
    values = dequantize(local(codes), local(scales), signed)
    return _as_shard_of(codes, values, codes.shape) if hasattr(codes, "device_mesh") else values


def fitted(state: Mapping[str, Any], param: Tensor, signs: Mapping[str, bool]) -> dict[str, Any]:
    """Return loaded state with scales that are distributed like ``param``.

    Args:
        state: State of the parameter, from a run on any number of ranks or on none; its tensors are not changed.
        param: The parameter.
        signs: The states that may have codes, and whether each is signed.

    Returns:
        The state. Codes in blocks that ``param`` cannot have, as those of a whole vector on several ranks, are replaced
        by their float32 values.
    """
    result = dict(state)
    mesh, placements = getattr(param, "device_mesh", None), getattr(param, "placements", ())
    for name, signed in signs.items():
        codes, scales = state.get(name), state.get(f"{name}_scale")
        if not (isinstance(codes, Tensor) and isinstance(scales, Tensor)) or codes.shape != param.shape:
            continue
        if mesh is None and not hasattr(scales, "device_mesh"):
            continue
        shape, flat = scale_shape(codes.shape), torch.Size((blocks(codes.numel()),))
        if scales.shape != shape and scales.shape == flat and row_size(codes.numel(), shape) % BLOCK == 0:
            scales = scales.view(shape)  # It has the same blocks, in one row.
        if scales.shape == shape and (mesh is None or (has_rows(codes.shape) and why_not(param) is None)):
            result[f"{name}_scale"] = distributed(scales, mesh, placements)
        elif scales.shape in (shape, flat):
            del result[f"{name}_scale"]
            result[name] = dequantize(distributed(codes, None, ()), distributed(scales, None, ()), signed)
    return result


def _as_shard_of(like: Tensor, shard: Tensor, shape: torch.Size) -> Tensor:
    """Return the DTensor of ``shape`` with the placements of ``like`` whose local tensor is ``shard``."""
    from torch.distributed.tensor import DTensor

    given: Any = like
    stride = torch.empty(shape, device="meta").stride()
    whole: Tensor = DTensor.from_local(
        shard, given.device_mesh, given.placements, run_check=False, shape=shape, stride=stride
    )
    return whole
