"""Trials within fits of two ranks, with DDP and FSDP2; called on each rank by tests/tuning/test_trials_on_ranks.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy

import lightning_optim as lo
from tests.distributed.fsdp2_fits import Sharded, sharding, whole_weights
from tests.helpers import StatefulLoader, make_trainer
from tests.tuning.learner import Learner


def fit(kind: str, test: lo.LRRangeTest | None) -> list[Any]:
    configure = lo.ConfigureOptimizers("adamw", 1e-3, schedule="cosine", warmup=2)
    options: dict[str, Any] = {"devices": 2, "strategy": DDPStrategy(process_group_backend="gloo")}
    trainer = make_trainer(
        [configure, lo.GradientClipping(0.5), lo.DivergenceGuard(), *([] if test is None else [test])],
        max_steps=8,
        max_epochs=-1,
        **(options if kind == "ddp" else sharding()),
    )
    torch.manual_seed(3)
    model: Any = Learner() if kind == "ddp" else Sharded(seed=7)
    trainer.fit(model, None if kind == "ddp" else StatefulLoader(8, []))
    weights = [p.detach().clone() for p in model.parameters()] if kind == "ddp" else whole_weights(model)
    return [*weights, torch.get_rng_state()]


def fit_all(folder: Path) -> dict[str, Any]:
    found = {}
    for kind in ("ddp", "fsdp2"):
        test = lo.LRRangeTest(steps=60, repeats=2, apply=False)
        without, within = fit(kind, None), fit(kind, test)
        assert test.found is not None
        found[kind] = {
            "equal": all(torch.equal(a, b) for a, b in zip(without, within, strict=True)),
            "losses": test.found[0].evidence.losses.tolist(),
            "text": str(test.found),
        }
    return found
