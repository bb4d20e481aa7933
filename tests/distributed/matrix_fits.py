"""Fits on two ranks of optimizers that need whole matrices: in shards and under DDP; see test_matrix_fits.py."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.tensor import DTensor

import lightning_optim as lo
from lightning_optim.divergence import Rollback
from lightning_optim.optim import muon
from tests.distributed.fsdp2_fits import STEPS, Bad, Deciding, RunsBad, Sharded, Shards, sharding, whole_weights
from tests.helpers import SaveAt, StatefulLoader, batches, make_trainer
from tests.optim.matrices_on_ranks import all_pay, counted, precise

NAMES = ("muon", "normuon", "adafactor", "soap")


def fit(name: str, model, extra: tuple = (), ckpt_path: Path | None = None, **strategy) -> dict:
    """Counts after each step and the final weights, whole."""
    deciding = Deciding()
    trainer = make_trainer(
        [
            lo.ConfigureOptimizers(name, lr=0.01, schedule="cosine", warmup=2, param_groups=["no_decay"]),
            lo.GradientClipping(0.5),
            lo.DivergenceGuard(),
            lo.OptimizerMonitor(),
            deciding,
            *extra,
        ],
        max_steps=STEPS,
        **strategy,
    )
    loader = StatefulLoader(STEPS, []) if extra or ckpt_path else batches(STEPS, batch_size=4)
    with precise(torch.float32):
        trainer.fit(model, loader, ckpt_path=ckpt_path)
    return {
        "counts": deciding.counts,
        "weights": [weight.detach() for weight in whole_weights(model)],
        "sharded": any(isinstance(param, DTensor) for param in model.parameters()),
        "divided": getattr(trainer.optimizers[0], "divide_over", "no attribute"),
    }


def fit_back(name: str) -> dict:
    """What the guard did, and what this rank held after each step."""
    rollback = Rollback(every=4, clean=1, lr_factor=1.0)
    guard = lo.DivergenceGuard(lr_cut=None, rollback=rollback, patience=2, cooldown=1)
    shards = Shards()
    trainer = make_trainer(
        [lo.ConfigureOptimizers(name, lr=0.01), guard, shards],
        max_steps=STEPS,
        **sharding(),
    )
    trainer.fit(RunsBad(seed=7), batches(STEPS, batch_size=4))
    return {"did": [(e.step, e.text) for e in guard.report.entries if e.kind == "did"], "after": shards.after}


def fit_sharded(name: str) -> dict:
    return fit(name, Sharded(seed=7), **sharding())


def fit_copies(name: str) -> dict:
    """Under DDP, with what this rank has orthogonalised."""
    with counted(muon, "orthogonalize_stack") as shapes, all_pay():
        strategy = DDPStrategy(process_group_backend="gloo")
        found = fit(name, Bad(seed=7), devices=2, strategy=strategy, use_distributed_sampler=False)
    return found | {"shapes": shapes}


def fit_resumed(name: str, folder: Path, distributed: bool) -> dict:
    path = folder / f"{name}-{distributed}.ckpt"
    whole = fit(name, Sharded(seed=7), (SaveAt(7, path),), **sharding(distributed))
    torch.distributed.barrier()
    return {"whole": whole, "rest": fit(name, Sharded(seed=7), ckpt_path=path, **sharding(distributed))}


def fit_some(folder: Path, names: tuple[str, ...]) -> dict:
    """All of this file for some optimizers, one after another."""
    results = {}
    for name in names:
        results[f"sharded-{name}"] = fit_sharded(name)
        results[f"back-{name}"] = fit_back(name)
        for distributed in (False, True):
            results[f"resumed-{name}-{distributed}"] = fit_resumed(name, folder, distributed)
    return results


def fit_fast(folder: Path) -> dict:
    """What the default run of the tests looks at."""
    return {"sharded-normuon": fit_sharded("normuon"), "resumed-normuon-True": fit_resumed("normuon", folder, True)}
