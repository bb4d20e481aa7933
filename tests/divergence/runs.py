"""A run with a fault in it, in any precision, with accumulation, on one rank or two, and what it leaves to look at."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_optim as lo
from lightning_optim.divergence import Spikes, StepGuard
from tests.helpers import Net, batches, make_trainer, precision

QUICK = Spikes(warmup=16, window=32)
"""The usual rule, ready after fewer steps."""


@dataclass(frozen=True)
class Cell:
    """One way to train."""

    precision: str = "32-true"
    accumulate: int = 1
    ranks: int = 1

    @property
    def scaled(self) -> bool:
        return self.precision == "16-mixed"

    def __str__(self) -> str:
        return f"{self.precision}-acc{self.accumulate}" + (f"-{self.ranks}ranks" if self.ranks > 1 else "")


@dataclass
class Told:
    """A line of the guard's report."""

    step: int
    kind: str
    text: str
    names: list[str]
    batches: list[int]


@dataclass
class Seen:
    """What a run leaves. ``after[k]`` is the state after optimizer step k, ``start`` the one before the first."""

    start: dict[str, Any] = field(default_factory=dict)
    after: list[dict[str, Any]] = field(default_factory=list)
    grads: list[dict[str, Tensor]] = field(default_factory=list)
    baselines: list[list[list[float]]] = field(default_factory=list)  # accepted gradient norms and losses
    told: list[Told] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    skipped: int = 0
    overflows: int = 0
    steps: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)
    beside: list[Seen] = field(default_factory=list)  # other runs that this one is compared with

    def kinds(self) -> list[str]:
        return [told.kind for told in self.told]

    def of(self, kind: str) -> list[Told]:
        return [told for told in self.told if told.kind == kind]

    def did(self) -> list[tuple[int, str]]:
        """When something was done, and its first word: learning (rate), back, training (is stopped)."""
        return [(told.step, told.text.split()[0]) for told in self.of("did")]

    def before(self, step: int) -> dict[str, Any]:
        return self.after[step - 1] if step else self.start


class Fault:
    """A run with something wrong in it. Its docstring says what, and `check` what must come of it."""

    number: int
    steps = 60
    batch_size = 32
    lr = 0.01
    log_every = 1
    accumulations: tuple[int, ...] = (1, 4)
    keep_states = True
    init_scale = 1024.0

    def model(self, cell: Cell) -> L.LightningModule:
        return FaultyNet(self, cell)

    def guard(self) -> lo.DivergenceGuard:
        return lo.DivergenceGuard(QUICK)

    def loader(self, cell: Cell) -> Any:
        """As many samples in a step, whatever the cell."""
        return batches(self.steps * cell.accumulate * cell.ranks, self.batch_size // (cell.accumulate * cell.ranks))

    def callbacks(self, guard: lo.DivergenceGuard) -> list[L.Callback]:
        return [lo.ConfigureOptimizers("adamw", lr=self.lr, schedule="cosine", warmup=3), guard]

    def factor(self, step: int, micro: int, last: bool) -> float:
        """By what the loss of a micro-batch is multiplied, on the last rank or on another."""
        return 1.0

    def run(self, cell: Cell, folder: Path) -> Seen:
        return fit(self, cell, folder)

    def check(self, cell: Cell, seen: Seen) -> None:
        """Raises an AssertionError if the guard has not done what it must."""
        raise NotImplementedError


class FaultyNet(Net):
    """`tests.helpers.Net`, whose loss has the fault."""

    def __init__(self, fault: Fault, cell: Cell) -> None:
        super().__init__(seed=7)
        self.fault, self.cell = fault, cell

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        micro = batch_idx % self.cell.accumulate
        return loss * self.fault.factor(self.trainer.global_step, micro, self.global_rank == self.cell.ranks - 1)


def trainer_of(fault: Fault, cell: Cell, callbacks: list[L.Callback], **options: Any) -> L.Trainer:
    if cell.ranks > 1:
        options |= {"devices": cell.ranks, "strategy": DDPStrategy(process_group_backend="gloo")}
    options |= {"accumulate_grad_batches": cell.accumulate, "log_every_n_steps": fault.log_every}
    return make_trainer(callbacks, **options, **precision(cell.precision, fault.init_scale))


def fit(
    fault: Fault,
    cell: Cell,
    folder: Path,
    resume: Path | None = None,
    save: Path | None = None,
    **options: Any,
) -> Seen:
    """Runs it, from a checkpoint and into one if given; on several ranks, every one calls this."""
    torch.manual_seed(0)
    guard = fault.guard()
    guard._report_dir = str(folder)  # what a fault's own arguments need not repeat
    watcher = _Watcher(fault.keep_states)
    trainer = trainer_of(fault, cell, [*fault.callbacks(guard), watcher], **options)
    model = fault.model(cell)
    trainer.fit(model, fault.loader(cell), ckpt_path=resume)
    if save is not None:
        trainer.save_checkpoint(save)
    seen = watcher.seen
    seen.told = [Told(e.step, e.kind, e.text, list(e.names), list(e.batches)) for e in guard.report.entries]
    seen.skipped, seen.overflows, seen.steps = guard.skipped_steps, guard.overflow_steps, trainer.global_step
    seen.losses = getattr(model, "losses", [])
    seen.weights = {name: p.detach().clone() for name, p in model.state_dict().items()}
    return seen


class _Watcher(L.Callback):
    """Comes last and notes how each optimizer step leaves things."""

    def __init__(self, keep_states: bool) -> None:
        self.seen = Seen()
        self._keep_states = keep_states
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        self.seen.start = self._state(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step == self._step or not self._keep_states:
            return
        self._step = trainer.global_step
        self.seen.after.append(self._state(trainer, pl_module))
        self.seen.grads.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, lo.DivergenceGuard):
                (watch,) = [d for d in callback.hub.pipelines[0].detectors if isinstance(d, StepGuard)]
                self.seen.baselines.append([] if watch.spikes is None else watch.spikes.state_dict()["accepted"])

    def _state(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        if not self._keep_states:
            return {}
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        averages = [c._average_model for c in callbacks if hasattr(c, "_average_model")]
        return copy.deepcopy(
            {
                "parameters": dict(pl_module.state_dict()),
                "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
                "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
                "averages": [dict(average.state_dict()) for average in averages if average is not None],
            }
        )


def tensor_loader(*tensors: Tensor, batch_size: int, shuffle: bool = False) -> DataLoader[Any]:
    data = torch.utils.data.TensorDataset(*tensors)
    return DataLoader(data, batch_size, shuffle=shuffle, generator=torch.Generator().manual_seed(1), drop_last=True)
