"""Snapshots of a Lightning run: what they cover, when they are captured, and the way back."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import lightning.pytorch as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn

from lightning_optim.callbacks._guard.guarded import GuardedOptimizer
from lightning_optim.callbacks._hub import Hub
from lightning_optim.callbacks._lightning import averaged_models, logging_step
from lightning_optim.core.sizes import format_bytes
from lightning_optim.divergence import Alarm, Rollback
from lightning_optim.divergence.memory import SHARE, fits_in_memory, free_disk, free_memory
from lightning_optim.divergence.snapshots import OptimizerState, Part, SnapshotPair, StateDict, Tensors, bytes_needed


class RunSnapshots:
    """The snapshots of one fit. The first is the state that training starts from.

    Two of them must fit into half of the memory that is free when training starts, shared among the ranks of the
    machine; otherwise they go to disk, with a warning.

    Args:
        config: When they are captured, and where they are kept.
        trainer: The Trainer, at the start of training.
        pl_module: Its module.
        hub: The hub, which has the pipelines.
        guarded: The guard's parts of each optimizer.

    Raises:
        MisconfigurationException: Neither memory nor disk has room for them.
    """

    def __init__(
        self,
        config: Rollback,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        hub: Hub,
        guarded: Sequence[GuardedOptimizer],
    ) -> None:
        self._hub, self._guarded, self._every = hub, guarded, config.every
        self._parts = _parts(trainer, pl_module, hub, guarded)
        self._pair = SnapshotPair(_memory_for(config.memory, self._parts, trainer), config.clean)
        self._pair.capture_first(self._parts, logging_step(trainer))

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
        if (step + 1) % self._every == 0:
            self._pair.capture(self._parts, step)

    def restore(self) -> int:
        """Restore the last good snapshot, and notify schedules and judges.

        Returns:
            How many times this snapshot has been restored, this time included.
        """
        good = self._pair.good
        assert good is not None
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # Skips that have not arrived yet belong to the time before.
        good.restore(self._parts)
        self._pair.discard()
        self._hub.hold_schedules()
        for guarded in self._guarded:
            guarded.rolled_back()
        return good.returns

    def close(self) -> None:
        """Free memory and remove files."""
        self._pair.close()


def _memory_for(wanted: str, parts: Sequence[Part], trainer: L.Trainer) -> str:
    """Return where two snapshots fit: where they are wanted, or on disk. All ranks decide alike."""
    if wanted == "device":
        return wanted
    need, ranks = 2 * bytes_needed(parts), max(getattr(trainer.strategy, "num_processes", 1), 1)
    agree = trainer.strategy.reduce_boolean_decision
    taken = f"Two snapshots take {format_bytes(need)}" + (f" on each of {ranks} ranks" if ranks > 1 else "")
    memory, disk = free_memory(), free_disk()
    if wanted == "cpu":
        if agree(fits_in_memory(need, memory, ranks)):
            return wanted
        rank_zero_warn(
            f"{taken}, which is more than {SHARE:.0%} of the {format_bytes(memory)} of memory that are free. They go "
            f"to disk, {tempfile.gettempdir()} (TMPDIR). `DivergenceGuard: {{rollback: {{memory: disk}}}}` says so "
            "from the start, `rollback: null` does without them."
        )
    if not agree(need * ranks <= disk):
        raise MisconfigurationException(
            f"{taken}, and {tempfile.gettempdir()} has {format_bytes(disk)} free. Set TMPDIR to a disk that has room, "
            "take `DivergenceGuard: {rollback: {memory: device}}` if the accelerator has, or `rollback: null`."
        )
    return "disk"


def _parts(
    trainer: L.Trainer, pl_module: L.LightningModule, hub: Hub, guarded: Sequence[GuardedOptimizer]
) -> list[Part]:
    """Return all that a rollback restores; neither the position in the data nor the count of steps."""
    precision = trainer.precision_plugin
    baselines = [own for g in guarded for own in (g.watch.spikes, g.judge.trend, *g.watch.detectors) if own is not None]
    return [
        Tensors(lambda: [pl_module, *averaged_models(trainer)]),
        *(OptimizerState(pipeline.optimizer) for pipeline in hub.pipelines),
        *(StateDict(c.scheduler.state_dict, c.scheduler.load_state_dict) for c in trainer.lr_scheduler_configs),
        StateDict(precision.state_dict, precision.load_state_dict),
        *(StateDict(pipeline.clip_state, pipeline.load_clip_state) for pipeline in hub.pipelines),
        *(StateDict(baseline.state_dict, baseline.load_state_dict) for baseline in baselines),
    ]
