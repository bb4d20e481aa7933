"""A temporary cut of the learning rate that works with every schedule."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.core.stateful import Stateful
from lightning_optim.core.step_hooks import after_closure, calls_already, closure_of
from lightning_optim.core.uncompiled import uncompiled


class LRCutter(Stateful):
    """Factor on the learning rates of an optimizer, applied before each step and removed after it.

    It therefore works with every schedule, including torch's, which compute the next rate from the last. A cut stays
    for ``hold`` steps, and the rate returns over ``recover`` further steps, by equal factors. Skipped steps count.

    Args:
        optimizer: The optimizer, of any package.

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

    STATE = ("lasting", "factor", "hold", "recover", "age")

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._lasting = 1.0
        self._factor = 1.0
        self._hold = self._recover = 0
        self._age = 0
        self._is_counted = self._is_stepping = False
        self._kept: list[Any] = []
        self._used: tuple[list[Any], float] = [], 1.0
        self._handles = [
            optimizer.register_step_pre_hook(uncompiled(self._before)),
            optimizer.register_step_post_hook(uncompiled(self._after)),
        ]

    @property
    def factor(self) -> float:
        """The present factor on the learning rates."""
        return self._lasting * self._passing()

    def used_lrs(self) -> list[float]:
        """Return the learning rate of each group in the last step; empty before it.

        A rate that is a tensor is read now, and so is that of the coming step if a schedule has changed it since.
        """
        rates, factor = self._used
        return [float(rate) * factor for rate in rates]

    def start(self, factor: float, hold: int, recover: int) -> None:
        """Start a temporary cut, on top of what remains of the last one.

        Args:
            factor: Factor on the learning rates.
            hold: Number of steps at the reduced rate.
            recover: Number of steps over which the rate then returns.
        """
        self._factor = self._passing() * factor
        self._hold, self._recover, self._age = hold, recover, -1  # The coming step has number 0.

    def lower(self, factor: float) -> None:
        """Multiply the learning rates by ``factor`` permanently."""
        self._lasting *= factor

    @property
    def lasting(self) -> float:
        """The permanent part of the factor."""
        return self._lasting

    def undo(self, lasting: float) -> None:
        """End a temporary cut, and set the permanent part of the factor."""
        self._lasting = lasting
        self._factor, self._hold, self._recover = 1.0, 0, 0

    def advance(self) -> None:
        """Count a step that was announced, which a GradScaler may leave out; one that is under way has been counted."""
        if not self._is_stepping:
            self._age += 1
            self._is_counted = True

    def close(self) -> None:
        """Remove the hooks and restore the learning rates."""
        self._restore()
        while self._handles:
            self._handles.pop().remove()

    def _passing(self) -> float:
        over = max(self._age, 0) - self._hold
        if over < 0:
            return self._factor
        if over >= self._recover:
            return 1.0
        return float(self._factor ** (1 - (over + 1) / (self._recover + 1)))

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = closure_of(args, kwargs)
        is_new = closure is not None and not calls_already(
            closure, self._evaluated
        )  # else a `super().step()` within it
        if not self._is_counted and (is_new or not self._is_stepping):
            self._age += 1
        self._is_counted, self._is_stepping = False, True
        self._cut()
        return after_closure(args, kwargs, self._evaluated)

    def _evaluated(self, loss: Any) -> None:
        """Mark the closure of a step that has been counted."""

    def _after(self, *_: Any) -> None:
        self._is_stepping = False
        self._restore()

    def _cut(self) -> None:
        self._restore()  # The last update may have been interrupted.
        groups, factor = self._optimizer.param_groups, self.factor
        self._used = [group["lr"] for group in groups], factor
        if factor == 1.0:
            return
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
