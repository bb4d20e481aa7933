"""How an optimizer comes to its update: in its own step or in another's, after one evaluation of the closure or more.

Two kinds of optimizers do not simply evaluate their closure and update.

- One that holds another and steps by it: sharpness-aware minimization, Lookahead, schedule-free wrappers. What updates
  the parameters is the step of the optimizer inside, with the gradients that are there by then.
- One that evaluates its closure more than once, or after it has moved the weights. Until its step is over, the weights
  may not be those of the run, so that it must not be left in between.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import LBFGS, Optimizer

_EVALUATES_ONCE = ("torch.optim.", "lightning_optim.")


def updating_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer whose step changes the parameters: the one inside, as deep as it lies, or ``optimizer`` itself.

    It is inside if it is the one attribute that is an optimizer with torch's step hooks and the same parameters.

    Args:
        optimizer: An optimizer with torch's step hooks.

    Example:
        >>> class Wrapper(Optimizer):
        ...     def __init__(self, base):
        ...         super().__init__(base.param_groups, {})
        ...         self.base = base
        >>> import torch
        >>> base = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> updating_optimizer(Wrapper(base)) is base
        True
    """
    # An optimizer holds no parameters twice, so that it cannot hold itself, at any depth, and be found for ever.
    seen = [optimizer]
    while True:
        inside = [value for value in vars(seen[-1]).values() if _has_hooks(value) and _same_params(value, seen[-1])]
        if len(inside) != 1 or any(inside[0] is one for one in seen):
            return seen[-1]
        seen.append(inside[0])


class Evaluations:
    """The evaluations of the closure in one step, and whether the step can still be left as if it had not begun.

    Args:
        optimizer: The optimizer whose ``step`` gets the closure.
        tracks: Whether anyone asks.

    Attributes:
        count: Evaluations in the present step that are over; gradients that lie ready count as one.
    """

    def __init__(self, optimizer: Optimizer, tracks: bool) -> None:
        self._optimizer = optimizer
        known = type(optimizer).step.__module__.startswith(_EVALUATES_ONCE) and not isinstance(optimizer, LBFGS)
        self._tracks = tracks and not known
        self._versions: list[int] | None = None
        self.count = 0

    def begin(self, watch: bool) -> None:
        """Begin a step.

        Args:
            watch: Whether anything can change before the gradients are there, or has to be known afterwards.
        """
        self.count = 0
        self._versions = self._present_versions() if self._tracks and watch else None

    def have_moved(self) -> bool:
        """Whether parameters have been changed since the step began."""
        return self._versions is not None and self._versions != self._present_versions()

    def nothing_has_changed(self) -> bool:
        """Whether the step can be left now: this is the first evaluation, of the weights that it began with."""
        return self.count <= 1 and not self.have_moved()

    def _present_versions(self) -> list[int]:
        return [param._version for group in self._optimizer.param_groups for param in group["params"]]


def _has_hooks(value: Any) -> bool:
    return isinstance(value, Optimizer) and "_optimizer_step_pre_hooks" in vars(value)


def _same_params(one: Optimizer, other: Optimizer) -> bool:
    return _params(one) == _params(other)


def _params(optimizer: Optimizer) -> set[Tensor]:
    return {param for group in optimizer.param_groups for param in group["params"]}
