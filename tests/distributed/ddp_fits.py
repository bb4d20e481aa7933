"""Fits on two ranks with DDP, one of which meets a NaN; called on each rank by test_ddp.py."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import DDPStrategy

import lightning_optim as lo
from lightning_optim.divergence import Rollback
from tests.clip_rules import OF_NET
from tests.distributed.fsdp2_fits import Deciding as Counts
from tests.helpers import ADAMWS, Net, SaveAt, Snapshots, StatefulLoader, batches, make_trainer

BAD_STEP, BAD_RANK = 2, 1
KINDS = ("ours", "torch")
STEPS = 50


class OneBadRank(Net):
    """Its loss is NaN on one rank at one step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if (batch_idx, self.global_rank) == (BAD_STEP, BAD_RANK) else loss


class Deciding(L.Callback):
    """Notes how often this rank has skipped after each batch."""

    def __init__(self, guard: lo.DivergenceGuard) -> None:
        self.guard, self.skipped = guard, []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.skipped.append(self.guard.skipped_steps)
        self.averages = self.guard._guarded[0].watch.moments.state_dict()["averages"]


def fit(folder: Path, kind: str) -> None:
    guard, snapshots = lo.DivergenceGuard(), Snapshots()
    deciding = Deciding(guard)
    configure = lo.ConfigureOptimizers(**ADAMWS[kind], lr=0.01, schedule="cosine", warmup=2)
    trainer = make_trainer(
        [configure, lo.GradientClipping(0.5), guard, lo.OptimizerMonitor(), deciding, snapshots],
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        logger=L.loggers.TensorBoardLogger(folder, name="run", version="0"),
    )
    model = OneBadRank(seed=7)
    trainer.fit(model, batches(12))  # six for each rank
    torch.save(
        {
            "skipped": deciding.skipped,
            "averages": deciding.averages,
            "before": snapshots.before[BAD_STEP],
            "after": snapshots.after[BAD_STEP],
            "final": snapshots.after[-1],
            "start": snapshots.before[0],
        },
        folder / f"rank{trainer.global_rank}.pt",
    )


def fit_with(rule: str, folder: Path) -> None:
    """Fifty steps with a clip rule, NaN on one rank in one of them."""
    deciding = Counts()
    trainer = make_trainer(
        [
            lo.ConfigureOptimizers("adamw", lr=0.01),
            lo.GradientClipping(method=OF_NET[rule]()),
            lo.DivergenceGuard(),
            deciding,
        ],
        max_steps=STEPS,
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
    )
    model = OneBadRank(seed=7)
    trainer.fit(model, batches(20))  # ten for each rank
    torch.save(
        {"counts": deciding.counts, "weights": [p.detach() for p in model.parameters()]},
        folder / f"{rule}-{trainer.global_rank}.pt",
    )


class BadTwice(Net):
    """Its loss is NaN on one rank at some steps, and its data differ from rank to rank."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx) * (1 + self.global_rank)
        bad = self.global_step in (*range(14, 19), *range(26, 31)) and self.global_rank == BAD_RANK
        return loss * float("nan") if bad else loss


def fit_back(folder: Path, name: str, *others: L.Callback, ckpt_path: Path | None = None) -> None:
    """Forty steps with two returns to a snapshot."""
    guard = lo.DivergenceGuard(lr_cut=None, rollback=Rollback(every=8, clean=3), cooldown=1, report_dir=str(folder))
    parts = [lo.ConfigureOptimizers("adamw", lr=0.01, schedule="cosine"), guard, *others]
    strategy = DDPStrategy(process_group_backend="gloo")
    trainer = make_trainer(parts, max_epochs=2, devices=2, strategy=strategy)
    model = BadTwice(seed=7)
    trainer.fit(model, StatefulLoader(20, []), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    found = {
        "weights": [p.detach() for p in model.parameters()],
        "state": trainer.optimizers[0].state_dict(),
        "did": [(entry.step, entry.text) for entry in guard.report.entries if entry.kind == "did"],
    }
    torch.save(found, folder / f"{name}-{trainer.global_rank}.pt")


def fit_all(folder: Path) -> None:
    """Every kind of optimizer, every way to clip, and a resume before a rollback; the results are in ``folder``."""
    fit_back(folder, "whole", SaveAt(22, folder / "saved"))
    fit_back(folder, "resumed", ckpt_path=folder / "saved")
    for kind in KINDS:
        fit(kind=kind, folder=folder / kind)
    for rule in OF_NET:
        fit_with(rule, folder)
