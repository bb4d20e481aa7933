"""One parameter of an optimizer, updated by itself with the optimizer's own settings and state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_optim.core.stats import StepStats
from lightning_optim.kernels import averages
from lightning_optim.kernels.rules import Rule
from lightning_optim.optim import update_pass
from lightning_optim.optim.batches import Batches

if TYPE_CHECKING:
    from lightning_optim.optim.base import FusedOptimizer


class OneParam:
    """A view of an optimizer that has one parameter, which `update` updates as a step of the optimizer would.

    Settings are those of the parameter's group at the time of the update, and state is that of the optimizer, so that
    nothing is kept twice. It has the attributes by which the operands of a step reach an optimizer.

    Args:
        optimizer: The optimizer.
        param: Its parameter.

    Attributes:
        divisor: Divisor of the gradient, shape [] or [1]; None for none.
        found_inf: If it is there and not zero, shape [], the update changes nothing.
        collect_step_stats: Whether to fill ``step_stats`` in the same pass.
        step_stats: Statistics of the last update; None if they were not collected.
    """

    grad_scale: Tensor  # They come and go, as those of an optimizer.
    found_inf: Tensor
    divisor: Tensor | None = None
    collect_step_stats: bool = False
    divide_over: Any = None  # A parameter by itself is divided over no ranks.
    step_stats: StepStats | None = None

    def __init__(self, optimizer: FusedOptimizer, param: Tensor) -> None:
        self._optimizer = optimizer
        self.param = param
        self._group: dict[str, Any] = {
            "params": [param]
        }  # one object for all updates, by which batches are known again
        self.param_groups = [self._group]
        self.state: dict[Tensor, dict[str, Any]] = {}
        self._batches: Batches | None = None

    @property
    def backend(self) -> str:
        """Name of the backend that the optimizer asks for."""
        name: str = self._optimizer.backend
        return name

    def rule_of(self, group: Mapping[str, Any]) -> Rule:
        """Return the rule that updates ``group``."""
        return self._optimizer.rule_of(group)

    def label(self, group: Mapping[str, Any], index: int) -> str:
        """Return the text that identifies the parameter in messages."""
        return self._optimizer.label(group, index)

    def follow(self, group: Mapping[str, Any], index: int) -> None:
        """Take over the present settings and state.

        Args:
            group: The parameter's group of the optimizer.
            index: Index of the parameter in the group.
        """
        self._group.clear()
        self._group.update(group)
        self._group["params"] = [self.param]
        if group.get("ema") is not None:  # As batches have it, which are sorted anew where it differs.
            self._group["ema"] = averages.parse(group["ema"])
        if names := group.get("param_names"):
            self._group["param_names"] = [names[index]]
        state = self._optimizer.state.get(self.param)
        self.state = {self.param: state} if state else {}

    @torch.no_grad()
    def update(self) -> None:
        """Update the parameter with its gradient, creating state that does not exist yet; `follow` comes first.

        Raises:
            RefusedError: The gradient or the state cannot be used for an update.
        """
        if not self.state:
            self._optimizer.make_state([self.param])  # by the optimizer, as its place there is a part of some state
            self.state = {self.param: self._optimizer.state[self.param]}
        rules = [self.rule_of(self._group)]
        if self._batches is None or not self._batches.refill(self, rules):
            self._batches = Batches(self)
        try:
            self.step_stats = update_pass.update(self, self._batches)
        finally:
            self._batches.release()

    def forget(self) -> None:
        """Let go of what is kept from the last update, and of the state."""
        self._batches, self.state, self.step_stats = None, {}, None
