"""State of a clip rule for one optimizer, from step to step and across checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_optim.clipping.base import Clip, ClipRule, Divisor
from lightning_optim.core.stats import GradStats

logger = logging.getLogger(__name__)


class Clipper:
    """The state of a clip rule for one optimizer, kept under the contract described in `ClipRule`.

    Args:
        rule: The rule.
        limit: Factor of the rule's limit, as a function of the number of optimizer steps so far; None for 1.
    """

    def __init__(self, rule: ClipRule, limit: Callable[[int], float] | None = None) -> None:
        self.rule = rule
        self._limit = limit
        self._saved: Mapping[str, Tensor] | None = None
        self._state: dict[str, Tensor] = {}
        self._next: dict[str, Tensor] = {}

    def decide(self, stats: GradStats, steps: int, parameters: int, device: torch.device) -> Clip:
        """Decide how the gradients of this step are clipped; `commit` ends the step.

        Args:
            stats: Statistics of the gradients.
            steps: Optimizer steps taken so far.
            parameters: Number of parameters of the optimizer.
            device: The device of the state.

        Returns:
            The decision, whose tensors are on the device of ``stats``.

        Raises:
            ValueError: The schedule of the limit is not above 0 at this step.
        """
        self._prepare(parameters, device)
        limit = 1.0 if self._limit is None else self._limit(steps)
        if not limit > 0:
            raise ValueError(
                f"The schedule multiplies the limit of {self.rule!r} by {limit} at step {steps}, which would clip all "
                "gradients to 0. It must stay above 0, for instance Cosine(final=0.1)."
            )
        answer = self.rule(stats, self._state, limit)
        clip = Divisor(answer) if isinstance(answer, Tensor) else answer
        if self._state:
            self._next = {"steps": self._state["steps"] + 1, **self.rule.updated(stats, self._state, clip)}
        return clip

    def commit(self, accepted: Tensor) -> None:
        """End the step: adopt the next state, or keep the present one.

        Args:
            accepted: Whether the step happened, bool, shape [], on the device.
        """
        for name, new in self._next.items():
            old = self._state[name]
            self._state[name] = torch.where(accepted, new.to(old.dtype), old)
        self._next = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the name and the state of the rule, as copies of tensors; empty for a rule without state."""
        state = self._state or self._saved or {}
        if not state:
            return {}
        return {"rule": type(self.rule).__name__, "state": {name: t.detach().clone() for name, t in state.items()}}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore the state returned by `state_dict`; that of another kind of rule is ignored, with a warning."""
        self._state, self._next, self._saved = {}, {}, None
        if saved and saved["rule"] == type(self.rule).__name__:
            self._saved = saved["state"]
        elif saved:
            logger.warning(
                "%r starts from new state, because the checkpoint has the state of %s.", self.rule, saved["rule"]
            )

    def _prepare(self, parameters: int, device: torch.device) -> None:
        """Create the state, or extend it for parameters that have joined the optimizer."""
        known = self._state or self._saved
        if self._state and all(len(self._state[name]) == parameters for name in self.rule.per_parameter):
            return
        fresh = self.rule.init_state(parameters)
        if not fresh:
            return
        fresh["steps"] = torch.zeros((), dtype=torch.int64, device="cpu")
        if known is not None:
            if self._fits(known, fresh):
                for name, value in fresh.items():
                    if name in self.rule.per_parameter:
                        value[: len(known[name])] = known[name].to(value.device)
                    else:
                        fresh[name] = known[name]
            else:
                logger.warning(
                    "%r starts from new state, because the state in the checkpoint has another size.", self.rule
                )
        self._saved = None
        self._state = {name: value.to(device) for name, value in fresh.items()}

    def _fits(self, known: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> bool:
        return known.keys() == fresh.keys() and all(
            known[name].shape[1:] == value.shape[1:] and len(known[name]) <= len(value)
            if name in self.rule.per_parameter
            else known[name].shape == value.shape
            for name, value in fresh.items()
        )
