"""Fused kernels of torch take no sparse gradients, and whether there are any is known when the first ones are there."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_optim.core.operands_flag import drop_operands
from lightning_optim.core.step_hooks import after_closure, closure_of, is_trial_step

_TAKE_SPARSE = (torch.optim.SGD, torch.optim.Adagrad)
"""Those of torch's optimizers with a fused form that take sparse gradients in another form."""


def gives_sparse_gradients(model: nn.Module) -> bool:
    """Whether a layer was made with ``sparse=True``."""
    layers = (module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag))
    return any(layer.sparse and layer.weight.requires_grad for layer in layers)


class UnfuseIfSparse:
    """Has an optimizer that was made fused use its ordinary form, if its first gradients are sparse.

    ``torch.nn.functional.embedding(..., sparse=True)`` gives them, too, and no module tells of it.

    Args:
        optimizer: The optimizer, before its first step.

    Example:
        >>> table = nn.Parameter(torch.ones(2, 2))
        >>> optimizer = torch.optim.SGD([table], lr=1.0, fused=True)
        >>> _ = UnfuseIfSparse(optimizer)
        >>> nn.functional.embedding(torch.tensor([1]), table, sparse=True).sum().backward()
        >>> optimizer.step()
        >>> table.tolist()
        [[1.0, 1.0], [0.0, 0.0]]
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._is_known = not isinstance(optimizer, _TAKE_SPARSE) or not optimizer.defaults.get("fused")
        if not self._is_known:
            optimizer.register_step_pre_hook(self._before)

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._is_known or is_trial_step(optimizer, closure_of(args, kwargs)):
            return None
        self._optimizer = optimizer
        return after_closure(args, kwargs, self._look)

    def _look(self, loss: Any) -> None:
        if self._is_known:
            return
        optimizer = self._optimizer
        del self._optimizer
        self._is_known = True
        grads = [param.grad for group in optimizer.param_groups for param in group["params"]]
        if not any(grad is not None and grad.layout != torch.strided for grad in grads):
            return
        if hasattr(optimizer, "grad_scale"):
            label = type(optimizer).__name__
            raise ValueError(
                f"{label} has been made fused, and its gradients are sparse, which no fused kernel takes; under a "
                f"GradScaler it is too late to change that. Give {label} the argument fused=False."
            )
        for group in optimizer.param_groups:
            group["fused"] = None
        drop_operands(optimizer)
