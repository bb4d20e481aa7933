"""Alarms of a run: those of the parameters that it starts with, and those of the steps that arrive at the host."""

from __future__ import annotations

import math
from collections.abc import Sequence

import lightning.pytorch as L
import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_optim.callbacks._guard.guarded import GuardedOptimizer
from lightning_optim.callbacks._guard.reporter import GuardReporter
from lightning_optim.callbacks._guard.step_batches import StepLocation
from lightning_optim.callbacks._lightning import logging_step, plain_name
from lightning_optim.core.sharding import local
from lightning_optim.divergence import Alarm, DivergenceReport
from lightning_optim.factory.about import about
from lightning_optim.step.measure import measure_largest

_READABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)
_NAMED = 8
"""Largest number of names in a warning."""


def new_alarms(
    guarded: Sequence[GuardedOptimizer],
    report: DivergenceReport,
    reporter: GuardReporter,
    skipped: int,
    everything: bool = False,
) -> list[tuple[Alarm, StepLocation]]:
    """Judge the steps that have arrived, report what is wrong with them, and return what may need a response.

    Args:
        guarded: The guard's parts of each optimizer.
        report: The report, which keeps the steps.
        reporter: Where alarms are reported.
        skipped: Number of skipped steps so far.
        everything: Whether to wait for the steps that have not arrived.
    """
    found = []
    for index, one in enumerate(guarded):
        name = about(one.optimizer).name if len(guarded) > 1 else None
        for seen in one.watch.read(everything):
            location = one.batches.of(seen.step)
            report.see(location.step, index, seen)
            for alarm in one.judge.update(seen, one.names):
                found.append((alarm, location))
                if not alarm.is_repeated:
                    reporter.notify(alarm, location, index, skipped if seen.skipped else None, name)
        for alarm in one.health_alarms(everything):
            location = one.batches.of(alarm.step)
            reporter.notify(alarm, location, index, None, name)
            if alarm.escalates:  # Other alarms about individual parameters need no response.
                found.append((alarm, location))
    return found


def check_parameters(trainer: L.Trainer, pl_module: L.LightningModule, reporter: GuardReporter) -> bool:
    """Report parameters that are not finite before training has done anything.

    Args:
        trainer: The Trainer, at the start of training.
        pl_module: The module.
        reporter: Where they are reported.

    Returns:
        Whether there are none, on any rank.
    """
    bad = _not_finite(pl_module)
    if bad:
        some = ", ".join(bad[:_NAMED]) + (f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else "")
        text = (
            f"training starts with parameters that are not finite: {some}. Neither skipped steps nor a rollback "
            "help against that; look at their initialization, or at the checkpoint that they come from"
        )
        step = logging_step(trainer)
        location = StepLocation(step, trainer.current_epoch)
        reporter.notify(Alarm("nonfinite", step, text, tuple(bad[:_NAMED])), location, 0, None)
    return bool(trainer.strategy.reduce_boolean_decision(not bad))


def _not_finite(module: nn.Module) -> list[str]:
    """Return the names of the parameters that contain a NaN or an infinity, after one read of all of them.

    Of sharded parameters the local shards are read. Buffers are left out: an attention mask of -inf is healthy.
    """
    names, largest = [], []
    for name, param in module.named_parameters():
        if not isinstance(param, UninitializedParameter) and param.dtype in _READABLE and not param.is_meta:
            names.append(plain_name(name))
            largest.append(measure_largest([local(param.detach())]).reshape(()))
    if not names:
        return []
    found = torch.stack([value.to(largest[0], non_blocking=True) for value in largest])
    return [name for name, value in zip(names, found.tolist(), strict=True) if not math.isfinite(value)]
