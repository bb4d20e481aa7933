"""State of a clip rule for one optimizer, from step to step and across checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optim.clipping.base import Clip, ClipRule, Divisor
from lightning_optim.core.state_version import VERSION, check_version
from lightning_optim.core.stats import GradStats

logger = logging.getLogger(__name__)


class Clipper:
    """The state of a clip rule for one optimizer, kept under the contract described in `ClipRule`.

    Args:
        rule: The rule.
        limit: Factor of the rule's limit, as a function of the number of optimizer steps so far; None for 1.
        names: Returns the name of each parameter of the optimizer, in order, by which state of single parameters is
            matched when it is restored; None where one has no name. Without all names it is matched by position.
    """

    def __init__(
        self,
        rule: ClipRule,
        limit: Callable[[int], float] | None = None,
        names: Callable[[], Sequence[str | None]] = tuple,
    ) -> None:
        self.rule = rule
        self._limit = limit
        self._names_now = names
        self._names: Sequence[str] | None = None
        self._saved: Mapping[str, Tensor] | None = None
        self._prepared_for: int | None = None  # the number of parameters that the state was made for
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
        limit = self.begin(steps, parameters, device)
        answer = self.rule(stats, self._state, limit)
        clip = Divisor(answer) if isinstance(answer, Tensor) else answer
        if self._state:
            self._next = {"steps": self._state["steps"] + 1, **self.rule.updated(stats, self._state, clip)}
        return clip

    def begin(self, steps: int, parameters: int, device: torch.device) -> float:
        """Begin a step, whose decision is then made from `values`; arguments as for `decide`.

        Returns:
            The factor of the schedule on the rule's limit.

        Raises:
            ValueError: The schedule of the limit is not above 0 at this step.
        """
        if parameters != self._prepared_for:
            self._prepare(parameters, device)
            self._prepared_for = parameters
        limit = 1.0 if self._limit is None else self._limit(steps)
        if not limit > 0:
            raise ValueError(
                f"The schedule multiplies the limit of {self.rule!r} by {limit} at step {steps}, which would clip all "
                "gradients to 0. It must stay above 0, for instance Cosine(final=0.1)."
            )
        return limit

    @property
    def values(self) -> Mapping[str, Tensor]:
        """The present state of the rule, by name."""
        return self._state

    def adopt(self, state: Mapping[str, Tensor]) -> None:
        """End the step with a state that already is the one after it, whether the step was accepted or not."""
        self._state, self._next = dict(state), {}

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
        """Return the name and the state of the rule, as copies of tensors, with the names of parameters it is of.

        Empty for a rule without state.
        """
        state = self._state or self._saved or {}
        if not state:
            return {}
        names = {"names": list(self._names)} if self._names is not None and self.rule.per_parameter else {}
        values = {name: tensor.detach().clone() for name, tensor in state.items()}
        return {"version": VERSION, "rule": type(self.rule).__name__, "state": values, **names}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore the state returned by `state_dict`; that of another kind of rule is ignored, with a warning.

        Args:
            saved: The state; without ``names``, as version 1 has it, it is matched by position.

        Raises:
            ValueError: It is of a later version.
        """
        check_version(saved, "the state of a clip rule", ("rule", "state", "names", "released"))
        self._state, self._next, self._saved, self._prepared_for, self._names = {}, {}, None, None, None
        if saved and saved["rule"] == type(self.rule).__name__:
            self._saved, self._names = saved["state"], saved.get("names")
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
        names = _unique(self._names_now(), parameters)
        if known is not None:
            places = _places(names, self._names) if names is not None and self._names is not None else None
            if self._fits(known, fresh, places):
                for name, value in fresh.items():
                    if name not in self.rule.per_parameter:
                        fresh[name] = known[name]
                    elif places is None:
                        value[: len(known[name])] = known[name].to(value.device)
                    else:
                        here, there = places
                        value[here] = known[name].to(value.device)[there]
            else:
                logger.warning(
                    "%r starts from new state, because the state in the checkpoint has another size.", self.rule
                )
        self._saved, self._names = None, names
        self._state = {name: value.to(device) for name, value in fresh.items()}

    def _fits(self, known: Mapping[str, Tensor], fresh: Mapping[str, Tensor], places: _Places | None) -> bool:
        named = 0 if self._names is None else len(self._names)
        return known.keys() == fresh.keys() and all(
            known[name].shape[1:] == value.shape[1:]
            and (len(known[name]) <= len(value) if places is None else len(known[name]) == named)
            if name in self.rule.per_parameter
            else known[name].shape == value.shape
            for name, value in fresh.items()
        )


_Places = tuple[list[int], list[int]]
"""Where parameters are now, and where each of them was."""


def _places(names: Sequence[str], before: Sequence[str]) -> _Places:
    were = {name: place for place, name in enumerate(before)}
    here = [place for place, name in enumerate(names) if name in were]
    return here, [were[names[place]] for place in here]


def _unique(names: Sequence[str | None], count: int) -> list[str] | None:
    """The names, if there is one for each parameter and no two are the same."""
    known = [name for name in names if name is not None]
    return known if len(known) == len(set(known)) == count else None
