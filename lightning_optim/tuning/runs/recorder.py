"""Callbacks of a job: what it writes down, where it ends, and a factor on its learning rates."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.callbacks import DivergenceGuard
from lightning_optim.core.wrappers import unwrap_optimizer
from lightning_optim.schedules.scheduler import Scheduler
from lightning_optim.tuning.runs.digests import digest_of_batch, digest_of_module
from lightning_optim.tuning.runs.job import write_json
from lightning_optim.tuning.runs.records import CURVE_FILE, FACTS_FILE, VALIDATION_FILE

_BATCHES = 3
"""Number of batches at the start that are compared between runs."""
_PENDING = 64
_SECONDS = 1.0
_PEAKS = ("initial_lr", "peak_lr")
_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "peak_lr")


class Recorder(L.Callback):
    """Write the training loss of each step, the metrics of each validation, and facts, into the folder of a job.

    Losses stay on the device until some tens of them are written together.

    Args:
        folder: The folder.
        seed: Seed that random numbers get again when training starts, so that the order of the data does not depend on
            how many of them the model has drawn; None to leave them as they are.
        probe: Number of steps after which to end without a validation; None for the whole run.
    """

    def __init__(self, folder: str | Path, seed: int | None = None, probe: int | None = None) -> None:
        self.folder, self.seed, self.probe = Path(folder), seed, probe
        self.facts: dict[str, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the initial weights, and start the clock."""
        self.facts |= {
            "weights": digest_of_module(pl_module),
            "parameters": sum(p.numel() for p in pl_module.parameters() if p.requires_grad),
            "batches": [],
            "lr": learning_rates(trainer.optimizers),
            "max_steps": trainer.max_steps,
        }
        if self.probe is not None:
            total = float(trainer.estimated_stepping_batches)
            self.facts["total_steps"] = int(total) if 0 < total < math.inf else None
            trainer.limit_val_batches = 0
        if self.seed is not None:
            L.seed_everything(self.seed, workers=True, verbose=False)
        self._write_facts()
        self._pending: list[tuple[int, float, Tensor]] = []
        self._parts: list[Tensor] = []
        self._step = trainer.global_step
        with (self.folder / CURVE_FILE).open("w", encoding="utf-8") as file:
            file.write("step,seconds,train_loss\n")
        (self.folder / VALIDATION_FILE).write_text("", encoding="utf-8")
        self._start = self._flushed = time.perf_counter()
        self._paused = 0.0
        self._has_stepped = False
        self._pause: float | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the first batches."""
        if len(self.facts["batches"]) < _BATCHES:
            self.facts["batches"].append(digest_of_batch(batch))
            self._write_facts()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss of a step; after the last step, ask for a validation."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if not isinstance(loss, Tensor):
            loss = next((v for k, v in trainer.callback_metrics.items() if "loss" in k and "val" not in k), None)
        if loss is not None and loss.numel() == 1:
            self._parts.append(loss.detach().reshape(()).clone())
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if not self._has_stepped:  # Kernels are compiled and workers started in the first step.
            self._has_stepped, self._paused = True, time.perf_counter() - self._start
        if self._parts:
            # Lightning returns the loss of a micro-batch divided by their number.
            total = self._parts[0] if len(self._parts) == 1 else torch.stack(self._parts).sum()
            self._pending.append((self._step, self.seconds(), total))
            self._parts = []
        now = time.perf_counter()
        if len(self._pending) >= _PENDING or now - self._flushed > _SECONDS:
            self._flush()
        if self.probe is not None and self._step >= self.probe:
            trainer.should_stop = True
        elif 0 < trainer.max_steps <= self._step:
            # Otherwise Lightning ends without a validation of the final weights.
            if trainer.check_val_every_n_epoch is not None:
                trainer.check_val_every_n_epoch = 1
            trainer.should_stop = True

    def seconds(self) -> float:
        """Return the seconds of training so far, without the first step and without validation."""
        return time.perf_counter() - self._start - self._paused

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        if not trainer.sanity_checking and hasattr(self, "_start"):
            self._flush()
            self._pause = time.perf_counter()
            if "validated" not in self.facts:
                self._before = set(trainer.callback_metrics)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the metrics, and let the clock go on."""
        if trainer.sanity_checking or not hasattr(self, "_start"):
            return
        if self._pause is not None:
            self._paused += time.perf_counter() - self._pause
            self._pause = None
        if "validated" not in self.facts:  # Names need not tell: those that validation has brought.
            self.facts["validated"] = sorted(set(trainer.callback_metrics) - self._before)
            self._write_facts()
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if v.numel() == 1}
        line = {"step": trainer.global_step, "seconds": self.seconds(), "epoch": trainer.current_epoch}
        with (self.folder / VALIDATION_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "metrics": metrics}) + "\n")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write what is left, and what is known at the end only."""
        self._note(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write what is left."""
        if hasattr(self, "_start"):
            self._note(trainer)

    def _note(self, trainer: L.Trainer) -> None:
        self._flush()
        guards = [callback for callback in trainer.callbacks if isinstance(callback, DivergenceGuard)]  # type: ignore[attr-defined]
        early = any(isinstance(c, EarlyStopping) and c.stopped_epoch > 0 for c in trainer.callbacks)  # type: ignore[attr-defined]
        ended = trainer.should_stop and not early and self.probe is None and 0 < self._step < trainer.max_steps
        self.facts |= {
            "steps": trainer.global_step,
            "state_bytes": state_bytes(trainer.optimizers),
            "skipped": sum(guard.skipped_steps for guard in guards),
            "stopped_by_guard": bool(ended and any(guard.stops for guard in guards)),
        }
        self._write_facts()

    def _flush(self) -> None:
        self._flushed = time.perf_counter()
        if not self._pending:
            return
        losses = torch.stack([loss.float() for *_, loss in self._pending]).tolist()
        lines = [f"{step},{at:.6f},{loss!r}\n" for (step, at, _), loss in zip(self._pending, losses, strict=True)]
        self._pending = []
        with (self.folder / CURVE_FILE).open("a", encoding="utf-8") as file:
            file.writelines(lines)

    def _write_facts(self) -> None:
        write_json(self.folder / FACTS_FILE, self.facts)


class RateFactor(L.Callback):
    """Multiply the learning rates of all groups, and the peaks of their schedules, when a fit starts.

    The groups keep their ratios. It works with any optimizer and with schedulers that start from the group's rate.

    Args:
        factor: The factor, above 0.

    Raises:
        ValueError: The factor is not above 0.
    """

    def __init__(self, factor: float) -> None:
        if not 0 < factor < math.inf:
            raise ValueError(f"Invalid factor={factor!r}: must be above 0.")
        self.factor = factor

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Scale what the optimizers and schedulers have been made with."""
        if self.factor == 1:
            return
        # Our scheduler computes the rates from the peaks, and would take a written rate for a new peak as well.
        ours = [c.scheduler.optimizer for c in trainer.lr_scheduler_configs if isinstance(c.scheduler, Scheduler)]
        for optimizer in trainer.optimizers:
            driven = any(unwrap_optimizer(optimizer) is each for each in ours)
            for group in optimizer.param_groups:
                for key in _PEAKS if driven else _RATES:
                    if isinstance(group.get(key), float | int):
                        group[key] = group[key] * self.factor
                    elif isinstance(group.get(key), Tensor):
                        group[key] = group[key].detach().clone().mul_(self.factor)
        for config in trainer.lr_scheduler_configs:
            base = getattr(config.scheduler, "base_lrs", None)
            if base is not None:
                config.scheduler.base_lrs = [lr * self.factor for lr in base]


def learning_rates(optimizers: Iterable[Optimizer]) -> dict[str, float]:
    """Return the peak rate of each group of optimizers, by its name, or its number without one."""
    found: dict[str, float] = {}
    several = len(all_of := list(optimizers)) > 1
    for number, optimizer in enumerate(all_of):
        for index, group in enumerate(optimizer.param_groups):
            name = f"{number}." * several + str(group.get("name", index))
            found[name] = float(group.get("max_lr", group.get("initial_lr", group["lr"])))
    return found


def state_bytes(optimizers: Iterable[Optimizer]) -> int:
    """Return the size of all tensors in the states of optimizers, in bytes, those that share memory once."""
    sizes: dict[int, int] = {}

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            sizes[storage.data_ptr() or id(value)] = storage.nbytes()
        elif isinstance(value, dict):
            for each in value.values():
                add(each)
        elif isinstance(value, list | tuple):
            for each in value:
                add(each)

    for optimizer in optimizers:
        for state in optimizer.state.values():
            add(state)
    return sum(sizes.values())
