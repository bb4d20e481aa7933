"""The state of the guard in a checkpoint, and its way back into the guard of a resumed run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_optim.callbacks._guard.guarded import GuardedOptimizer
from lightning_optim.callbacks._guard.responses import Responses
from lightning_optim.callbacks._hub import Hub
from lightning_optim.core.state_version import VERSION, check_version
from lightning_optim.divergence import DivergenceReport, Ladder


def guard_state(
    guarded: Sequence[GuardedOptimizer],
    ladder: Ladder,
    report: DivergenceReport,
    responses: Responses,
    snapshots: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the state of a guard, in plain numbers and tensors.

    Args:
        guarded: Its parts of each optimizer.
        ladder: The responses that it has used up.
        report: Its report.
        responses: The responses of the fit.
        snapshots: State of its snapshots; None if there are none.
    """
    state: dict[str, Any] = {"version": VERSION, "optimizers": [one.state_dict() for one in guarded]}
    state |= {"ladder": ladder.state_dict(), "report": report.state_dict(), "responses": responses.state_dict()}
    return state if snapshots is None else {**state, "snapshots": snapshots}


def check_guard_state(state: Mapping[str, Any]) -> None:
    """Check that a saved state can be read, and warn of parts that cannot.

    Args:
        state: As `guard_state` returns it; empty if there is none.
    """
    known = ("optimizers", "ladder", "report", "responses", "snapshots")
    check_version(state, "the state of DivergenceGuard", known)


def restore_guard(
    state: Mapping[str, Any],
    hub: Hub,
    guarded: Sequence[GuardedOptimizer],
    ladder: Ladder,
    report: DivergenceReport,
    responses: Responses | None,
) -> None:
    """Restore a state, its snapshots aside.

    Args:
        state: As `guard_state` returns it; empty if there is none. Checkpoints of version 0.1 have less.
        hub: The hub, which has the optimizers' places and names in the checkpoint.
        guarded: The guard's parts of each optimizer.
        ladder: The responses that it has used up.
        report: Its report.
        responses: The responses of the fit; None before it.
    """
    optimizers = state.get("optimizers", [])
    for one, place in zip(guarded, hub.restored_places(), strict=True):
        if place is not None and place < len(optimizers):
            one.restore(optimizers[place], hub.restored_names(place))
    if "report" in state:
        report.load_state_dict(state["report"])
    if "ladder" in state:
        ladder.load_state_dict(state["ladder"])
    if "responses" in state and responses is not None:
        responses.load_state_dict(state["responses"])
