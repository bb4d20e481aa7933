"""Steps of a plain torch module: forward, loss, backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_optim.tuning.inspection.loaders import first_batches


class PlainSteps:
    """Forward and backward of a module in a plain torch program.

    Args:
        model: The module.
        data: Batches: a list, a DataLoader, or anything that can be iterated more than once.
        loss: Function of outputs and targets for batches of ``(inputs, targets)``; None for a model whose output has a
            ``loss``.
        step: Function of model and batch that returns the loss, in place of ``loss``.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        loss: Callable[[Any, Any], Tensor] | None,
        step: Callable[[Any, Any], Tensor] | None,
    ) -> None:
        self.model, self.data, self.loss, self.own_step = model, data, loss, step
        self.scale = 1.0

    def roots(self) -> list[Any]:
        """What a step may change, in addition to the model."""
        return [self.data, self.loss, self.own_step]

    def left(self) -> list[Any]:
        """What is not to be followed from there."""
        return []

    def start(self) -> None:
        """Nothing is to be prepared."""

    def batches(self, count: int) -> Iterator[Any]:
        """Yield the first batches, on the device of the model."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        for batch in first_batches(self.data, count):
            yield tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)

    def run(self, batch: Any, index: int) -> Tensor | None:
        """Compute the loss and its gradients."""
        if self.own_step is not None:
            loss = self.own_step(self.model, batch)
        elif isinstance(batch, dict):
            outputs = self.model(**batch)
            loss = outputs["loss"] if isinstance(outputs, dict) else getattr(outputs, "loss", outputs)
        else:
            if self.loss is None or not isinstance(batch, list | tuple) or len(batch) != 2:
                raise ValueError(
                    "Invalid loss=None: must be a function of outputs and targets, with batches of (inputs, targets); "
                    "for other batches give step=, a function of model and batch that returns the loss."
                )
            loss = self.loss(self.model(batch[0]), batch[1])
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"Invalid {'step' if self.own_step else 'loss'}: must return one number, got {got}.")
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()
