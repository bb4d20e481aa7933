"""Fits on two ranks of a model in shards (FSDP2); called on each rank by test_fsdp2.py."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import lightning_optim as lo
from lightning_optim.diagnostics import Histograms, PerTensor
from lightning_optim.divergence import Rollback
from tests.clip_rules import OF_NET
from tests.helpers import (
    ADAMWS,
    Net,
    SaveAt,
    StatefulLoader,
    batches,
    make_trainer,
)

STEPS = 12
BAD_STEP, BAD_RANK = 5, 1
# Every rule with our optimizer; every way to hand over its operands with a rule of each form.
RUNS = [("ours", rule) for rule in OF_NET]
RUNS += [(kind, rule) for kind in ("torch-fused", "torch") for rule in ("global_norm", "group_norm", "agc", "value")]


class Deciding(L.Callback):
    """Notes the counts after each batch."""

    def __init__(self) -> None:
        self.counts = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        guard = next(c for c in trainer.callbacks if isinstance(c, lo.DivergenceGuard))
        (counts,) = guard.hub.counts()
        self.counts.append([counts.steps, counts.clipped, counts.skipped])


class Bad(Net):
    """Each rank takes its part of every batch; the loss is NaN on one rank at one step."""

    def training_step(self, batch, batch_idx):
        ranks = self.trainer.world_size
        loss = super().training_step([part[self.global_rank :: ranks] for part in batch], batch_idx)
        bad = batch_idx == BAD_STEP and self.global_rank == (BAD_RANK if ranks > 1 else 0)
        return loss * float("nan") if bad else loss


class Sharded(Bad):
    """In shards over the ranks, by its rows."""

    def configure_model(self):
        if isinstance(self.body.weight, DTensor):
            return
        for layer in (self.body, self.norm, self.head):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])


class Factory(Sharded):
    """Without a callback on the Trainer, so that the first step asks for the length of the run."""

    def configure_optimizers(self):
        return lo.OptimizerFactory("adamw", lr=0.01, schedule="cosine", warmup="20%", weight_decay=0.1)(self)


class Frozen(Factory):
    """Whose head stands still at first."""

    optimizer = "adamw"

    def configure_optimizers(self):
        head = lo.ParamGroupRule(name="head", pattern="^head", frozen_until="4 steps")
        return lo.OptimizerFactory(self.optimizer, lr=0.01, schedule="cosine", param_groups=[head])(self)


class ForeignFrozen(Frozen):
    """The same with torch's own optimizer."""

    optimizer = "torch.optim.AdamW"


def fit_bare(kind, extra: tuple = (), ckpt_path: Path | None = None, distributed_checkpoint: bool = False):
    """Final weights of a `Factory`, after one epoch of good batches."""
    trainer = make_trainer(extra, **sharding(distributed_checkpoint))
    model = kind(seed=7)
    trainer.fit(model, StatefulLoader(BAD_STEP, []), ckpt_path=ckpt_path)
    return {"weights": whole_weights(model)}


def fit(kind: str, rule: str, folder: Path, sharded: bool, extra: tuple = (), ckpt_path: Path | None = None):
    """Counts after each step and the final weights, whole."""
    deciding = Deciding()
    trainer = make_trainer(
        [
            lo.ConfigureOptimizers(**ADAMWS[kind], lr=0.01, schedule="cosine", warmup=2),
            lo.GradientClipping(method=OF_NET[rule]()),
            lo.DivergenceGuard(),
            lo.OptimizerMonitor(per_tensor=PerTensor(heat_maps=()), histograms=Histograms(every=5)),
            deciding,
            *extra,
        ],
        max_steps=STEPS,
        logger=L.loggers.TensorBoardLogger(folder, name=f"{kind}-{rule}", version="0"),
        **(sharding() if sharded else {}),
    )
    model = (Sharded if sharded else Bad)(seed=7)
    loader = StatefulLoader(STEPS, []) if extra or ckpt_path else batches(STEPS, batch_size=4)
    trainer.fit(model, loader, ckpt_path=ckpt_path)
    (state,) = trainer.callbacks[0]._kept["lightning_optim"].get("clip", [{}])  # type: ignore[attr-defined]
    return {
        "counts": deciding.counts,
        "weights": whole_weights(model),
        "clip": state,
    }


class RunsBad(Sharded):
    """The loss of one rank is NaN at two steps in a row."""

    def training_step(self, batch, batch_idx):
        bad = self.global_rank == BAD_RANK and batch_idx in (7, 8)
        return super().training_step(batch, batch_idx) * (float("nan") if bad else 1.0)


class Shards(L.Callback):
    """Copies what this rank holds of weights and optimizer state, after each batch."""

    def __init__(self) -> None:
        self.after = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        (optimizer,) = trainer.optimizers
        held = [*pl_module.parameters(), *(t for state in optimizer.state.values() for t in state.values())]
        self.after.append([(t.to_local() if isinstance(t, DTensor) else t).detach().clone() for t in held])


def fit_back(kind: str):
    """What the guard did, and what this rank held after each step."""
    guard, shards = (
        lo.DivergenceGuard(lr_cut=None, rollback=Rollback(every=4, clean=1, lr_factor=1.0), patience=2, cooldown=1),
        Shards(),
    )
    trainer = make_trainer(
        [lo.ConfigureOptimizers(**ADAMWS[kind], lr=0.01), guard, shards], max_steps=STEPS, **sharding()
    )
    trainer.fit(RunsBad(seed=7), batches(STEPS, batch_size=4))
    return {"did": [(e.step, e.text) for e in guard.report.entries if e.kind == "did"], "after": shards.after}


def whole_weights(model: L.LightningModule) -> list[torch.Tensor]:
    return [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]


def sharding(distributed_checkpoint: bool = False) -> dict:
    strategy = ModelParallelStrategy(
        data_parallel_size=2,
        tensor_parallel_size=1,
        save_distributed_checkpoint=distributed_checkpoint,
        process_group_backend="gloo",
    )
    return {"devices": 2, "strategy": strategy, "use_distributed_sampler": False}


def fit_all(folder: Path) -> dict:
    """All of this file, one after another; what this rank has to show."""
    results = {f"{kind}-{rule}": fit(kind, rule, folder, sharded=True) for kind, rule in RUNS}
    for kind in ("ours", "torch"):
        path = folder / f"{kind}.ckpt"
        whole = fit(kind, "adagc", folder / "whole", True, (SaveAt(7, path),))
        torch.distributed.barrier()
        results[f"resumed-{kind}"] = {"whole": whole, "rest": fit(kind, "adagc", folder / "rest", True, ckpt_path=path)}
    for module in (Factory, Frozen):
        for distributed in (False, True):
            path = folder / f"{module.__name__}-{distributed}.ckpt"
            whole = fit_bare(module, (SaveAt(3, path),), distributed_checkpoint=distributed)
            torch.distributed.barrier()
            rest = fit_bare(module, ckpt_path=path, distributed_checkpoint=distributed)
            results[f"resumed-{module.__name__}-{distributed}"] = {"whole": whole, "rest": rest}
    results |= {f"back-{kind}": fit_back(kind) for kind in ADAMWS}
    try:
        fit_bare(ForeignFrozen)
    except ValueError as error:
        results["refused"] = str(error)
    return results
