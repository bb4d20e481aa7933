"""Products of matrices that are known to be symmetric, of which computing half of the tiles is enough."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_optim import kernels

HALVED_FROM = 4096
"""Number of rows from which half of the tiles take less time than all of them. Of a kernel of this kind in Triton,
torch's developers report for an H100 and bfloat16 0.7x to 0.8x of cuBLAS's speed for 128 to 2048 rows, 1.2x to 1.3x for
4096, and 1.5x for 8192 (https://github.com/pytorch/pytorch/pull/184886). Ours has not been timed on a GPU."""


class Products(NamedTuple):
    """Ways to compute symmetric products.

    Args:
        product: Returns x @ y.
        add_product: Returns beta * add + alpha * (x @ y), where ``add`` is symmetric, called as `torch.addmm`.
    """

    product: Callable[[Tensor, Tensor], Tensor]
    add_product: Callable[..., Tensor]


@cache
def symmetric_products(device: torch.device, dtype: torch.dtype, rows: int, batched: bool) -> Products:
    """Return the fastest way to compute symmetric products.

    The choice depends on the arguments only, so that ranks with equal tensors make the same.

    Args:
        device: Device of the matrices.
        dtype: Their dtype.
        rows: Number of rows of the result.
        batched: Whether they are [matrices, rows, columns] rather than [rows, columns].
    """
    if device.type == "cuda" and rows >= HALVED_FROM and dtype.itemsize == 2 and _compiles(device):
        from lightning_optim.kernels.triton import symmetric

        return Products(symmetric.product, symmetric.add_product)
    return Products(torch.matmul, torch.baddbmm if batched else torch.addmm)


def _compiles(device: torch.device) -> bool:
    # What pays on AMD's GPUs has not been reported.
    return torch.version.hip is None and kernels.why_not("triton", device) is None
