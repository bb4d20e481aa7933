"""The snapshots of a run in its checkpoints: which of them are saved, and which a resumed run can return to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as L

from lightning_optim.callbacks._packages import is_lightning
from lightning_optim.core.sizes import format_bytes
from lightning_optim.divergence.snapshots import Part, SnapshotPair

LEFT_OUT = "left_out"
"""Key of the reason why a checkpoint has no snapshots."""

MISFIT = "do not fit this run"
"""Beginning of the reason why snapshots of another configuration are not restored."""

_WHOLE = ("SingleDeviceStrategy", "DDPStrategy")
"""Strategies with which each rank has the whole state, so that the checkpoint of the first one is that of all."""


def save_snapshots(pair: SnapshotPair, parts: Sequence[Part], limit_mb: float, trainer: L.Trainer) -> dict[str, Any]:
    """Return the snapshots for a checkpoint, in plain values and tensors; else the reason why they are left out.

    Args:
        pair: The snapshots.
        parts: The parts that they were captured of.
        limit_mb: Largest size in MB, of both together.
        trainer: The Trainer.

    Raises:
        Exception: They were lost, or cannot be read.
    """
    if not _has_whole_state(trainer):
        return {LEFT_OUT: "each rank has those of its own shards only"}
    if pair.size > limit_mb * 1e6 or limit_mb == 0:
        return {LEFT_OUT: f"they take {format_bytes(pair.size)}; `rollback: {{checkpoint_mb: .inf}}` saves them"}
    return {**pair.state_dict(parts), "identity": [part.identity() for part in parts]}


def restore_snapshots(
    state: Mapping[str, Any], pair: SnapshotPair, parts: Sequence[Part], trainer: L.Trainer
) -> str | None:
    """Restore the snapshots of a checkpoint.

    Args:
        state: As `save_snapshots` returns it.
        pair: Where they are restored.
        parts: The parts of this run.
        trainer: The Trainer.

    Returns:
        Why they are left out, as a predicate; None if they have been restored.
    """
    if (reason := state.get(LEFT_OUT)) is not None:
        return f"are not in the checkpoint ({reason})"
    if not _has_whole_state(trainer):
        return f"{MISFIT} (they are whole, and each rank of this run has a shard)"
    try:
        if (reason := _difference(state, parts)) is not None:
            return f"{MISFIT} ({reason})"
        pair.load_state_dict(state, parts)
    except Exception as error:  # A checkpoint that someone has edited, or no memory for them.
        return f"cannot be restored ({type(error).__name__}: {error})"
    return None


def _difference(state: Mapping[str, Any], parts: Sequence[Part]) -> str | None:
    saved, present = state["identity"], [part.identity() for part in parts]
    if len(saved) != len(present):
        return "other optimizers, schedulers or detectors"
    for then, now in zip(saved, present, strict=True):
        for key in [*then, *(now.keys() - then.keys())]:
            if then.get(key) != now.get(key):
                short = all(isinstance(each.get(key), str) for each in (then, now))
                return f"{then[key]} then, {now[key]} now" if short else f"other {key} {_owner(now)}"
    return None


def _owner(identity: Mapping[str, Any]) -> str:
    of = identity.get("class") or identity.get("name")
    return f"of {of}" if of else "of the module"


def _has_whole_state(trainer: L.Trainer) -> bool:
    """Return whether each rank has all weights and all optimizer state, not a shard of them."""
    sharded = any(hasattr(optimizer, "consolidate_state_dict") for optimizer in trainer.optimizers)  # torch's ZeRO
    return not sharded and any(is_lightning(trainer.strategy, name) for name in _WHOLE)
