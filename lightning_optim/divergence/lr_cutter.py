"""The learning rate reduced for a while, whoever sets it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.core.uncompiled import uncompiled


class LRCutter:
    """Multiplies an optimizer's learning rates by a factor in each step, and puts them back after it.

    So it goes with every schedule, also with torch's, which compute the next rate from the last. A cut stays for
    ``hold`` steps and returns over as many as ``recover``, by equal factors. Steps that are skipped count.

    Args:
        optimizer: The optimizer.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> cut = LRCutter(optimizer)
        >>> cut.start(0.5, hold=1, recover=0)
        >>> for _ in range(2):
        ...     cut.advance()
        ...     weight.grad = torch.ones(1)
        ...     optimizer.step()
        ...     print(weight.item(), optimizer.param_groups[0]["lr"])
        -0.5 1.0
        -1.5 1.0
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._lasting = 1.0
        self._factor = 1.0
        self._hold = self._recover = 0
        self._age = 0
        self._kept: list[Any] = []
        self._handles = [
            optimizer.register_step_pre_hook(uncompiled(lambda *_: self._cut())),
            optimizer.register_step_post_hook(uncompiled(lambda *_: self._restore())),
        ]

    @property
    def factor(self) -> float:
        """What rates are multiplied by at present."""
        return self._lasting * self._passing()

    def start(self, factor: float, hold: int, recover: int) -> None:
        """Cuts by ``factor``, on top of what is left of the last cut."""
        self._factor = self._passing() * factor
        self._hold, self._recover, self._age = hold, recover, -1  # the coming step is number 0

    def lower(self, factor: float) -> None:
        """Cuts for good."""
        self._lasting *= factor

    def advance(self) -> None:
        """Called before each step."""
        self._age += 1

    def close(self) -> None:
        """Leaves the optimizer as it was."""
        self._restore()
        while self._handles:
            self._handles.pop().remove()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "lasting": self._lasting,
            "factor": self._factor,
            "hold": self._hold,
            "recover": self._recover,
            "age": self._age,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there."""
        self._lasting, self._factor = state["lasting"], state["factor"]
        self._hold, self._recover, self._age = state["hold"], state["recover"], state["age"]

    def _passing(self) -> float:
        over = max(self._age, 0) - self._hold
        if over < 0:
            return self._factor
        if over >= self._recover:
            return 1.0
        return float(self._factor ** (1 - (over + 1) / (self._recover + 1)))

    def _cut(self) -> None:
        self._restore()  # the last update may have been interrupted
        factor = self.factor
        if factor == 1.0:
            return
        groups = self._optimizer.param_groups
        self._kept = [g["lr"].clone() if isinstance(g["lr"], Tensor) else g["lr"] for g in groups]
        for group in groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].mul_(factor)
            else:
                group["lr"] *= factor

    def _restore(self) -> None:
        kept, self._kept = self._kept, []
        for group, rate in zip(self._optimizer.param_groups, kept, strict=False):
            if isinstance(rate, Tensor):
                group["lr"].copy_(rate)
            else:
                group["lr"] = rate
