"""A run that saves a checkpoint after every step, goes on from the last one, and may be killed at any moment."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_optim as lo
from lightning_optim.divergence import Rollback, Spikes
from tests.helpers import Net, StatefulLoader, make_trainer

STEPS, ACCUMULATE = 40, 2
BAD_STEPS = (8, 20, 21, 33)
"""Single skips, and two in a row: the rate is cut. No rollback is needed."""


class Says(L.Callback):
    """Tells whoever may kill it what it is about to do."""

    def __init__(self, listener: Connection | None) -> None:
        self._listener = listener

    def _say(self, what: str) -> None:
        if self._listener is not None:
            self._listener.send(what)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int):
        self._say("accumulation" if batch_idx % ACCUMULATE else "step")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]):
        self._say("save")


class WholeSteps(ModelCheckpoint):
    """Saves between steps only.

    After a resume Lightning's own saves again at the first micro-batch, because it does not remember that it has saved
    this step; and no checkpoint has gradients that are being accumulated.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % ACCUMULATE == 0:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def survive(folder: Path, rollback: bool, listener: Connection | None = None) -> None:
    """Trains to the end and writes down what came out."""
    guard = lo.DivergenceGuard(
        Spikes(warmup=8, window=16),
        rollback=Rollback(every=6, clean=3) if rollback else None,
        patience=2,
        cooldown=0,
        report_dir=str(folder),
    )
    parts = [
        lo.ConfigureOptimizers("adamw", lr=0.01, schedule="cosine", warmup=5),
        lo.GradientClipping(method="zclip"),
        guard,
        Says(listener),
        WholeSteps(folder, save_last=True, every_n_train_steps=1),
    ]
    trainer = make_trainer(parts, enable_checkpointing=True, accumulate_grad_batches=ACCUMULATE)
    model, last = Net(nan_batches=[ACCUMULATE * step for step in BAD_STEPS]), folder / "last.ckpt"
    loader = StatefulLoader(STEPS * ACCUMULATE, [], batch_size=8)
    trainer.fit(model, loader, ckpt_path=last if last.exists() else None)
    did = [entry.text for entry in guard.report.entries if entry.kind == "did"]
    assert not any(text.startswith("back") for text in did), did
    torch.save({"weights": dict(model.state_dict()), "skipped": guard.skipped_steps}, folder / "final.pt")
