"""Snapshots of a Lightning run: what they cover, when they are captured, and the way back."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_optim.callbacks._guard.guarded import GuardedOptimizer
from lightning_optim.callbacks._guard.saved_snapshots import LEFT_OUT, MISFIT, restore_snapshots, save_snapshots
from lightning_optim.callbacks._hub import Hub
from lightning_optim.callbacks._lightning import averaged_models, logging_step, plain_name
from lightning_optim.core.sizes import format_bytes
from lightning_optim.divergence import Alarm, Rollback
from lightning_optim.divergence.memory import SHARE, fits_in_memory, free_disk, free_memory
from lightning_optim.divergence.snapshots import OptimizerState, Part, SnapshotPair, StateDict, Tensors, bytes_needed

_NAMED = 8
"""Largest number of names in a warning."""


class RunSnapshots:
    """The snapshots of one fit. The first is the state that training starts from.

    Args:
        config: When they are captured, and what is saved of them.
        memory: Where they are kept, as `memory_for` finds it.
        trainer: The Trainer, at the start of training.
        pl_module: Its module.
        hub: The hub, which has the pipelines.
        guarded: The guard's parts of each optimizer.
        first_is_good: Whether the present state is worth a return to it.
        saved: The snapshots of the run that this one resumes, as `state_dict` returns them; None if there are none.
    """

    def __init__(
        self,
        config: Rollback,
        memory: str,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        hub: Hub,
        guarded: Sequence[GuardedOptimizer],
        first_is_good: bool = True,
        saved: Mapping[str, Any] | None = None,
    ) -> None:
        self._hub, self._guarded, self._config = hub, guarded, config
        self._parts = parts_of(trainer, pl_module, hub, guarded)
        agree = trainer.strategy.reduce_boolean_decision
        self._pair = SnapshotPair(memory, config.clean, agree=agree, on_loss=self._warn_of_loss)
        self._place = f"{tempfile.gettempdir()} (TMPDIR)" if memory == "disk" else f"memory ({memory!r})"
        self._warned_of_loss = self._warned_of_saving = False
        self._left: set[str] = set()
        if self._resume(saved, logging_step(trainer)):
            return
        if first_is_good:
            self._pair.capture_first(self._parts, logging_step(trainer))
            if memory != "disk":  # Where it is not known yet; see `capture_if_due`.
                self._pair.check()

    @property
    def back_to(self) -> int | None:
        """The step whose state a rollback would restore; None if there is no good snapshot."""
        good = self._pair.good
        return None if good is None else good.step

    def observe(self, step: int, alarms: Sequence[Alarm]) -> None:
        """Confirm, suspect or discard the candidate, by the alarms up to ``step``."""
        if any(not alarm.skip_suffices for alarm in alarms):
            self._pair.discard()
        elif alarms:
            self._pair.mark_suspect(step)
        else:
            self._pair.confirm(step)

    def capture_if_due(self, step: int) -> None:
        """Capture a candidate if one is due; call it after a step at which nothing was wrong."""
        if (step + 1) % self._config.every == 0:
            self._pair.check()
            self._pair.capture(self._parts, step)

    def restore(self) -> int | None:
        """Restore the last good snapshot, and notify schedules and judges.

        Returns:
            How many times this snapshot has been restored, this time included; None if it could not be read, and
            nothing has been changed.
        """
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # Skips that have not arrived yet belong to the time before.
        good = self._pair.good
        left = self._pair.restore(self._parts)
        if good is None or left is None:
            return None
        self._warn_of_left(left)
        self._hub.hold_schedules()
        for guarded in self._guarded:
            guarded.rolled_back()
        return good.returns

    def state_dict(self) -> dict[str, Any]:
        """Return them for a checkpoint, if they are small enough; else the reason why they are left out.

        A checkpoint is saved without them if they cannot be read, with one warning.
        """
        try:
            return save_snapshots(self._pair, self._parts, self._config.checkpoint_mb, self._hub.trainer)
        except Exception as error:  # Of the disk, of the device, or of a state dict of the user's.
            if not self._warned_of_saving:
                self._warned_of_saving = True
                warnings.warn(
                    f"The snapshots are left out of checkpoints: {type(error).__name__}: {error}", stacklevel=2
                )
            return {LEFT_OUT: "they could not be read"}

    def _resume(self, saved: Mapping[str, Any] | None, step: int) -> bool:
        """Restore the snapshots of a checkpoint; return whether there are any, and they fit on all ranks."""
        if not saved:
            return False
        reason = restore_snapshots(saved, self._pair, self._parts, self._hub.trainer)
        if self._hub.trainer.strategy.reduce_boolean_decision(reason is None):
            return True
        self._pair.discard()
        tell = rank_zero_info if reason is not None and reason.startswith(MISFIT) else rank_zero_warn
        tell(
            f"The snapshots of the run before {reason or 'cannot be restored on another rank'}: a divergence now "
            f"returns to step {step}, where the run was resumed."
        )
        return False

    def _warn_of_left(self, names: Sequence[str]) -> None:
        """Name what is left as it is, each once."""
        new = [name for name in names if name not in self._left]
        self._left.update(new)
        if new:
            more = f" and {len(new) - _NAMED} more" if len(new) > _NAMED else ""
            rank_zero_warn(
                f"The rollback leaves as it is what is new, gone or of another shape since the snapshot: "
                f"{', '.join(new[:_NAMED])}{more}. All other weights and states are restored."
            )

    def _warn_of_loss(self, error: Exception) -> None:
        if not self._warned_of_loss:
            self._warned_of_loss = True
            warnings.warn(
                f"A snapshot could not be kept in {self._place}: {type(error).__name__}: {error}. Training continues "
                "with the snapshot before it, if there is one, and the next one is tried as usual.",
                stacklevel=2,
            )

    def close(self) -> None:
        """Free memory and remove files."""
        self._pair.close()


def memory_for(wanted: str, parts: Sequence[Part], trainer: L.Trainer) -> str | None:
    """Return where two snapshots are kept, which all ranks decide alike; None if there is no room for a default.

    In the memory of the host they may take half of what is free, shared among the ranks of the machine.

    Args:
        wanted: ``"device"``, ``"cpu"``, ``"disk"`` or ``"auto"``; see `Rollback`.
        parts: What a snapshot covers.
        trainer: The Trainer, at the start of training.

    Raises:
        MisconfigurationException: Snapshots on disk are wanted, or the memory has no room, and neither has the disk.
    """
    if wanted == "device":
        return wanted
    need, ranks = 2 * bytes_needed(parts), max(getattr(trainer.strategy, "num_processes", 1), 1)
    agree = trainer.strategy.reduce_boolean_decision
    taken = f"Two snapshots take {format_bytes(need)}" + (f" on each of {ranks} ranks" if ranks > 1 else "")
    memory, disk = free_memory(), free_disk()
    if wanted != "disk":
        if agree(fits_in_memory(need, memory, ranks)):
            return "cpu"
        too_much = f"{taken}, which is more than {SHARE:.0%} of the {format_bytes(memory)} of memory that are free"
        if wanted == "auto":
            rank_zero_warn(
                f"{too_much}. So there are none, and a divergence leads to the other responses of the guard only. "
                "`DivergenceGuard: {rollback: {memory: disk}}` keeps them on disk, `rollback: {memory: device}` on the "
                "accelerator, and `rollback: null` does without them and without this message."
            )
            return None
        rank_zero_warn(
            f"{too_much}. They go to disk, {tempfile.gettempdir()} (TMPDIR). "
            "`DivergenceGuard: {rollback: {memory: disk}}` says so from the start, `rollback: null` does without them."
        )
    if not agree(need * ranks <= disk):
        raise MisconfigurationException(
            f"{taken}, and {tempfile.gettempdir()} has {format_bytes(disk)} free. Set TMPDIR to a disk that has room, "
            "take `DivergenceGuard: {rollback: {memory: device}}` if the accelerator has, or `rollback: null`."
        )
    return "disk"


def parts_of(
    trainer: L.Trainer, pl_module: L.LightningModule, hub: Hub, guarded: Sequence[GuardedOptimizer]
) -> list[Part]:
    """Return all that a rollback restores; neither the position in the data nor the count of steps."""

    def names() -> dict[Tensor, str]:
        return {param: plain_name(name) for name, param in pl_module.named_parameters()}

    precision = trainer.precision_plugin
    baselines: list[Any] = []
    for g in guarded:
        own = g.watch.spikes, g.judge.trend, g.watch.early, g.watch.moments, *g.watch.detectors
        baselines += [baseline for baseline in own if baseline is not None]
    return [
        Tensors(lambda: [pl_module, *averaged_models(trainer), *(a for m in hub.members for a in m.averages())]),
        *(OptimizerState(pipeline.optimizer, names) for pipeline in hub.pipelines),
        *(_part_of(c.scheduler, c.scheduler.load_state_dict, "schedules") for c in trainer.lr_scheduler_configs),
        _part_of(precision, precision.load_state_dict),
        *(StateDict(p.clip_state, p.load_clip_state, "the state of clipping", ("rule",)) for p in hub.pipelines),
        *(_part_of(baseline, baseline.load_state_dict) for baseline in baselines),
    ]


def _part_of(stateful: Any, load: Callable[[Any], Any], *fixed: str) -> StateDict:
    return StateDict(stateful.state_dict, load, f"the state of {type(stateful).__name__}", fixed)
