"""State of a clip rule that is kept for each parameter by itself, as one entry of a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optim.clipping import ClipRule
from lightning_optim.core.state_version import VERSION, check_version
from lightning_optim.step.last_norm import LastNorm
from lightning_optim.step.released_param import ReleasedParam

logger = logging.getLogger(__name__)


class Saved:
    """A state from a checkpoint: of single parameters, or of a rule for all of them (`clipping.Clipper`).

    Args:
        state: The state; empty for none.
        rule: Name of the present rule's class; state of another kind of rule is ignored, with a warning.

    Attributes:
        last_norm_sq: Square of the last step's norm, shape []; None if it is not known.

    Raises:
        ValueError: It is of a later version.
    """

    def __init__(self, state: Mapping[str, Any], rule: str = "") -> None:
        check_version(state, "the state of a clip rule", ("rule", "state", "names", "released"))
        if state and state["rule"] != rule:
            logger.warning("%s starts from new state, because the checkpoint has the state of %s.", rule, state["rule"])
            state = {}
        self._rule = rule
        self._values: Mapping[str, Tensor] = state.get("state", {})
        self._single: dict[str, Tensor] = dict(state.get("released", {}))
        self.last_norm_sq = self._single.pop("last_norm_sq", None)
        names = state.get("names")
        self._places = None if names is None else {name: place for place, name in enumerate(names)}

    def of(self, name: str | None, position: int) -> dict[str, Any]:
        """Return the state of one parameter, for `Clipper.load_state_dict`; empty if there is none.

        Args:
            name: Its name, by which it is found if all have names; None if it is not known.
            position: Its index among the parameters of the optimizer.
        """
        place = position if self._places is None or name is None else self._places.get(name, -1)
        per_parameter = [value for value in self._values.values() if value.dim()]
        if not self._values or place < 0 or any(place >= len(value) for value in per_parameter):
            return {}
        own = {
            key: self._single[key][place] if key in self._single else value[place : place + 1] if value.dim() else value
            for key, value in self._values.items()
        }
        return {"version": VERSION, "rule": self._rule, "state": own}


def joined(
    rule: ClipRule,
    names: Sequence[str | None],
    params: Sequence[ReleasedParam | None],
    saved: Saved,
    norm: LastNorm | None,
) -> dict[str, Any]:
    """Return the states of all parameters as one entry, which a `Clipper` for all of them reads, too.

    A step may be accepted for one tensor and not for another. So what a rule keeps once for all parameters, the number
    of accepted steps for one, is there for each (under ``released``), and its maximum where a `Clipper` looks.

    Args:
        rule: The rule.
        names: Name of each parameter; None where it is not known.
        params: What keeps the state of each parameter; None for one that has had no gradient.
        saved: The state that the run began with.
        norm: Estimate of the global norm; None for none.
    """
    entry: dict[str, Any] = {"version": VERSION, "rule": type(rule).__name__, "state": {}}
    fresh = rule.init_state(1)
    if not fresh and norm is None:
        return {}
    if fresh:
        fresh["steps"] = torch.zeros((), dtype=torch.int64, device="cpu")
        states = []
        for position, (name, one) in enumerate(zip(names, params, strict=True)):
            here = {} if one is None or one.clipper is None else one.clipper.state_dict()
            states.append((here or saved.of(name, position) or {"state": fresh})["state"])
        each = {key: torch.stack([state[key].cpu() for state in states]) for key in fresh}
        single = {key: value for key, value in each.items() if key not in rule.per_parameter}
        entry["state"] = {
            key: single[key].amax(0) if key in single else value.flatten(0, 1) for key, value in each.items()
        }
        entry["released"] = single
        if None not in names and len(set(names)) == len(names):
            entry["names"] = list(names)
    if norm is not None:
        entry.setdefault("released", {})["last_norm_sq"] = norm.last_sq.detach().cpu().clone()
    return entry
