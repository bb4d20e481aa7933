"""Runs with faults for test_guard_processes.py: ``python guard_script.py ranks|survivor FOLDER``."""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

import lightning_optim as lo
from lightning_optim.divergence import Rollback, Spikes
from tests import ranks
from tests.helpers import Net, StatefulLoader, batches, make_trainer, precision

CASES = [("32-true", 1), ("32-true", 4), ("bf16-mixed", 1), ("16-mixed", 1)]
SPIKE, BAD, STEPS = 30, range(40, 45), 56


class OneBadRank(Net):
    """On rank 1 alone, a spike at one step and NaN at five in a row."""

    accumulate = 1

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        step = batch_idx // self.accumulate
        if self.global_rank == 1 and step == SPIKE:
            return loss * 100
        return loss * float("nan") if self.global_rank == 1 and step in BAD else loss


def fit_ranks(folder: Path) -> None:
    for name, accumulate in CASES:
        guard = lo.DivergenceGuard(
            Spikes(warmup=16, window=32), lr_cut=None, rollback=Rollback(every=10, clean=5), report_dir=str(folder)
        )
        trainer = make_trainer(
            [lo.ConfigureOptimizers("adamw", lr=0.01), guard],
            devices=2,
            strategy=DDPStrategy(process_group_backend="gloo"),
            accumulate_grad_batches=accumulate,
            **precision(name),
        )
        model = OneBadRank(seed=7)
        model.accumulate = accumulate
        trainer.fit(model, batches(2 * STEPS * accumulate, batch_size=32))
        torch.save(
            {
                "told": [[entry.step, entry.kind, entry.text] for entry in guard.report.entries],
                "skipped": guard.skipped_steps,
                "weights": dict(model.state_dict()),
            },
            folder / f"{name}-{accumulate}-rank{trainer.global_rank}.pt",
        )


class Slow(L.Callback):
    """Says where it is, and leaves time to be killed."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        print(batch_idx, flush=True)
        time.sleep(0.02)


def fit_survivor(folder: Path) -> None:
    checkpoints = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1)
    guard = lo.DivergenceGuard(Spikes(warmup=8, window=16), rollback=None, patience=2, cooldown=0)
    configure = lo.ConfigureOptimizers("adamw", lr=0.01, schedule="cosine", warmup=5)
    parts = [configure, lo.GradientClipping(method="zclip"), guard, checkpoints, Slow()]
    trainer = make_trainer(parts, enable_checkpointing=True)
    model, last = Net(nan_batches=[12, 13, 30, 41, 42]), folder / "last.ckpt"
    trainer.fit(model, StatefulLoader(60, []), ckpt_path=last if last.exists() else None)
    torch.save({"weights": dict(model.state_dict()), "skipped": guard.skipped_steps}, folder / "final.pt")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if sys.argv[1] == "ranks":
        fit_ranks(Path(sys.argv[2]))
        ranks.leave()
    fit_survivor(Path(sys.argv[2]))
