"""The norm of the gradient that one rank computes, before gradients are averaged over ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_optim.core.host import widest_dtype


class LocalGradient:
    """Square sums of the gradients of one backward pass as this rank computes them.

    A hook on a parameter runs before the gradient is accumulated and before DistributedDataParallel reduces it, so it
    receives the gradient of this pass alone. Nothing of DistributedDataParallel is replaced and no gradient is kept;
    the cost is one small kernel for each parameter. Sharded parameters, whose gradients have other hooks, are not
    supported.

    Args:
        params: The parameters whose gradients are measured.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> local = LocalGradient([weight])
        >>> weight.square().sum().mul(0.5).backward()
        >>> {tuple(p.shape): norm_sq.item() for p, norm_sq in local.take().items()}
        {(2,): 25.0}
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._found: dict[Tensor, Tensor] = {}
        self._twice = False
        self._handles = [p.register_hook(self._hook(p)) for p in params if p.requires_grad]  # type: ignore[no-untyped-call]

    def take(self) -> dict[Tensor, Tensor]:
        """Remove the hooks after the pass, and return the square sum of each gradient, shape [], by parameter.

        The result is empty if a parameter had several gradients (reentrant checkpointing), because their square sums do
        not add up to that of the sum.
        """
        while self._handles:
            self._handles.pop().remove()
        found, self._found = self._found, {}
        return {} if self._twice else found

    def _hook(self, param: Tensor):  # type: ignore[no-untyped-def]
        def hook(grad: Tensor) -> None:
            self._twice |= param in self._found
            if grad.layout == torch.strided:
                wide = widest_dtype(grad.device)
                self._found[param] = torch.linalg.vector_norm(grad.detach(), dtype=wide).square()

        return hook
