"""A clip rule at work on one optimizer: what it remembers, from step to step and over a resume."""

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
    """Asks a rule at each step, and keeps its state under the contract that `ClipRule` tells.

    Args:
        rule: The rule.
        limit: By what the rule's limit is multiplied, as a function of the optimizer steps taken so far.
    """

    def __init__(self, rule: ClipRule, limit: Callable[[int], float] | None = None) -> None:
        self.rule = rule
        self._limit = limit
        self._saved: Mapping[str, Tensor] | None = None
        self._state: dict[str, Tensor] = {}
        self._next: dict[str, Tensor] = {}

    def decide(self, stats: GradStats, steps: int, parameters: int, device: torch.device) -> Clip:
        """What to do at this step.

        Args:
            stats: The gradients.
            steps: Optimizer steps taken so far.
            parameters: How many parameters the optimizer has.
            device: Where the state is kept.
        """
        self._prepare(parameters, device)
        limit = 1.0 if self._limit is None else self._limit(steps)
        if not limit > 0:
            raise ValueError(
                f"The schedule multiplies the limit of {self.rule!r} by {limit} at step {steps}: nothing would pass. "
                "It has to stay above 0, for instance Cosine(final=0.1)."
            )
        answer = self.rule(stats, self._state, limit)
        clip = Divisor(answer) if isinstance(answer, Tensor) else answer
        if self._state:
            self._next = {"steps": self._state["steps"] + 1, **self.rule.updated(stats, self._state, clip)}
        return clip

    def commit(self, accepted: Tensor) -> None:
        """Ends the step: the state moves on, or stays if the step is not ``accepted`` (bool, shape [])."""
        for name, new in self._next.items():
            old = self._state[name]
            self._state[name] = torch.where(accepted, new.to(old.dtype), old)
        self._next = {}

    def state_dict(self) -> dict[str, Any]:
        """Rule and state, as plain tensors; empty for a rule that remembers nothing."""
        state = self._state or self._saved or {}
        if not state:
            return {}
        return {"rule": type(self.rule).__name__, "state": {name: t.detach().clone() for name, t in state.items()}}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Takes up what another run has saved; what another kind of rule has saved is left."""
        self._state, self._next, self._saved = {}, {}, None
        if saved and saved["rule"] == type(self.rule).__name__:
            self._saved = saved["state"]
        elif saved:
            logger.warning("%r starts afresh: the checkpoint has the state of %s.", self.rule, saved["rule"])

    def _prepare(self, parameters: int, device: torch.device) -> None:
        """Makes the state, or makes room for parameters that have joined the optimizer."""
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
                logger.warning("%r starts afresh: the state in the checkpoint is of another size.", self.rule)
        self._saved = None
        self._state = {name: value.to(device) for name, value in fresh.items()}

    def _fits(self, known: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> bool:
        return known.keys() == fresh.keys() and all(
            known[name].shape[1:] == value.shape[1:] and len(known[name]) <= len(value)
            if name in self.rule.per_parameter
            else known[name].shape == value.shape
            for name, value in fresh.items()
        )
